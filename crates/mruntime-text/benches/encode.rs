//! Opening, encoding and decoding, prepacked and by the `tokenizers` library, on one thread.

use std::path::Path;
use std::sync::LazyLock;

use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use mruntime_text::{SpecialTokens, StreamDecoder, Tokenizer, prepack_tokenizer};

fn main() {
    divan::main();
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

static JSON: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let path = root().join("models/Qwen2.5-tokenizer/tokenizer.json");
    std::fs::read(path).expect("run models/get_qwen2_5_tokenizer.py first")
});
static SECTION: LazyLock<Vec<u8>> = LazyLock::new(|| prepack_tokenizer(&JSON).unwrap());
static PREPACKED: LazyLock<Tokenizer<'static>> =
    LazyLock::new(|| Tokenizer::from_section(&SECTION[..]).unwrap());
static LIBRARY: LazyLock<Tokenizer<'static>> = LazyLock::new(|| Tokenizer::from_json(&JSON).unwrap());

/// English, code, and the many scripts of the texts of the tests.
const TEXTS: [&str; 3] =
    ["format-spec.md", "crates/mruntime-text/src/template.rs", "tests/goldens/text/qwen25_tokens.json"];

fn text(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

#[divan::bench(args = TEXTS)]
fn encode_prepacked(bencher: Bencher, path: &str) {
    encode(bencher, &PREPACKED, path);
}

#[divan::bench(args = TEXTS)]
fn encode_library(bencher: Bencher, path: &str) {
    encode(bencher, &LIBRARY, path);
}

fn encode(bencher: Bencher, tokenizer: &Tokenizer, path: &str) {
    let text = text(path);
    let encode = || tokenizer.encode(black_box(&text), SpecialTokens::Parse).unwrap();
    bencher.counter(BytesCount::of_str(&*text)).bench_local(encode);
}

#[divan::bench(args = ["prepacked", "library"])]
fn decode(bencher: Bencher, which: &str) {
    let tokenizer = if which == "prepacked" { &*PREPACKED } else { &*LIBRARY };
    let ids = PREPACKED.encode(&text(TEXTS[0]), SpecialTokens::Parse).unwrap();
    bencher.counter(ItemsCount::new(ids.len())).bench_local(|| {
        let mut stream = StreamDecoder::new(tokenizer, true);
        ids.iter().map(|&id| stream.push(id).len()).sum::<usize>()
    });
}

/// A megabyte of what makes long words.
#[divan::bench(args = ["a", " ", "\n", "ab", "é", "<", "語"])]
fn encode_run(bencher: Bencher, piece: &str) {
    let text = piece.repeat((1 << 20) / piece.len());
    let encode = || PREPACKED.encode(black_box(&text), SpecialTokens::Parse).unwrap();
    bencher.counter(BytesCount::of_str(&*text)).bench_local(encode);
}

#[divan::bench]
fn open_prepacked() -> bool {
    Tokenizer::from_section(black_box(&SECTION[..])).unwrap().is_prepacked()
}

#[divan::bench]
fn digest(bencher: Bencher) {
    bencher
        .counter(BytesCount::of_slice(&SECTION[..]))
        .bench_local(|| mrt_format::sha256(black_box(&SECTION)));
}

#[divan::bench(sample_count = 3)]
fn open_library() -> bool {
    Tokenizer::from_json(black_box(&JSON)).unwrap().is_prepacked()
}
