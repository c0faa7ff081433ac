//! Compares the prepacked tokenizer with the `tokenizers` library on all files below some paths, and their speeds:
//! `identity TOKENIZER.json PATH...`. Files that are not UTF-8 are read as the standard library's lossy text of them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use mruntime_text::{SpecialTokens, StreamDecoder, Tokenizer, prepack_tokenizer};

/// Bytes of a text that is encoded at a time: the library takes longer for longer ones.
const PIECE: usize = 1 << 18;

#[derive(Default)]
struct Totals {
    bytes: usize,
    tokens: usize,
    ours: Duration,
    library: Duration,
}

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let Some(json) = args.next() else {
        eprintln!("usage: identity TOKENIZER.json PATH...");
        return ExitCode::from(2);
    };
    let json = std::fs::read(&json).expect("TOKENIZER.json can be read");
    let start = Instant::now();
    let section = match prepack_tokenizer(&json) {
        Ok(section) => section,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    println!("prepacked in {:.2} s: {} bytes", start.elapsed().as_secs_f64(), section.len());
    let prepacked = Tokenizer::from_section(section).expect("a valid section");
    let library = Tokenizer::from_json(&json).expect("a tokenizer.json");

    let mut totals = Totals::default();
    let mut paths: Vec<PathBuf> = args.map(PathBuf::from).collect();
    while let Some(path) = paths.pop() {
        if path.is_dir() && !path.is_symlink() {
            paths.extend(path.read_dir().expect("a directory").map(|entry| entry.expect("an entry").path()));
        } else if path.is_file()
            && let Ok(bytes) = std::fs::read(&path)
            && !compare(&prepacked, &library, &String::from_utf8_lossy(&bytes), &path, &mut totals)
        {
            return ExitCode::FAILURE;
        }
    }
    let Totals { bytes, tokens, ours, library } = totals;
    let rate = |time: Duration| bytes as f64 / 1e6 / time.as_secs_f64();
    println!("{bytes} bytes, {tokens} tokens: the same");
    println!("encoded at {:.1} MB/s, by the library at {:.1} MB/s", rate(ours), rate(library));
    ExitCode::SUCCESS
}

/// Whether both give the same tokens for all of a text, and the same text for the tokens.
fn compare(prepacked: &Tokenizer, library: &Tokenizer, text: &str, path: &Path, totals: &mut Totals) -> bool {
    let mut rest = text;
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at(rest.ceil_char_boundary(PIECE.min(rest.len())));
        rest = behind;
        for special in [SpecialTokens::Parse, SpecialTokens::AsText] {
            let start = Instant::now();
            let ids = prepacked.encode(piece, special);
            let middle = Instant::now();
            // The library refuses texts that its regex engine cannot split.
            let Ok(expected) = library.encode(piece, special) else { continue };
            totals.library += middle.elapsed();
            totals.ours += middle - start;
            totals.bytes += piece.len();
            totals.tokens += expected.len();
            let mut stream = StreamDecoder::new(prepacked, true);
            let mut text: String = expected.iter().map(|&id| stream.push(id).to_owned()).collect();
            text.push_str(stream.finish());
            if !matches!(&ids, Ok(ids) if *ids == expected) || text != library.decode(&expected, true) {
                println!("{}: {special:?} differs in {piece:?}", path.display());
                return false;
            }
        }
    }
    true
}
