#![no_main]

// The tokenizers library's own panics are caught and become errors; libFuzzer's hook would end the process before.
// A panic that reaches libFuzzer ends it all the same.
libfuzzer_sys::fuzz_target!(
    init: std::panic::set_hook(Box::new(|_| {})),
    |data: &[u8]| mruntime_tests::fuzz::tokenizer(data)
);
