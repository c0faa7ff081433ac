#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| mruntime_tests::fuzz::prepacked(data));
