//! What is the same bit for bit, on whole models: converted files, and the logits of every instruction set, number of
//! threads and division of the text into calls and batches. That machines agree with each other, the stored results prove.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use mruntime::Isa;
use mruntime_tests::{Run, TinyModel, bits, goldens, logits, read_f32, smollm2_weights, with_model};

/// The logits after each prompt, f32 little-endian `[prompts][vocab]`.
fn stored(model: &TinyModel) -> PathBuf {
    goldens().join("bits").join(format!("{}.bin", model.name()))
}

/// The logits after each prompt of the model, computed in that way.
fn last_logits(model: &TinyModel, run: Run) -> Vec<f32> {
    let (cfg, weights) = model.load();
    let last = |ids: &[u32]| logits(&cfg, weights.bytes(), ids, run).split_off((ids.len() - 1) * model.vocab);
    model.prompts.iter().flat_map(|prompt| last(&prompt.ids)).collect()
}

/// The SHA-256 of every model's `.mrt` file.
fn stored_files() -> PathBuf {
    goldens().join("bits/converted.sha256")
}

/// "The capital of France is Paris.", for SmolLM2.
const REAL_PROMPT: [u32; 7] = [504, 3575, 282, 4649, 314, 7042, 30];

/// The logits of SmolLM2 after [`REAL_PROMPT`], f32 little-endian.
fn stored_real() -> PathBuf {
    goldens().join("bits/smollm2.bin")
}

/// Those logits: all tokens but the last are prefilled, the last is decoded.
fn real_logits(isa: Isa) -> Vec<f32> {
    let (cfg, weights) = smollm2_weights();
    let mut logits = vec![0.0; cfg.vocab_size as usize];
    let run = Run { isa, ..Run::usual() };
    with_model(cfg, weights.bytes(), REAL_PROMPT.len(), run, |mut ready| {
        let (last, first) = REAL_PROMPT.split_last().unwrap();
        ready.forward(first, &mut []);
        ready.forward(&[*last], &mut logits);
    });
    logits
}

/// In the manner of `sha256sum`.
fn converted_files(threads: usize) -> String {
    let dir = tempfile::tempdir().unwrap();
    let line = |model: TinyModel| {
        let name = format!("{}.mrt", model.name());
        format!("{}  {name}\n", model.convert(&dir.path().join(&name), threads).sha256)
    };
    TinyModel::all().into_iter().map(line).collect()
}

#[test]
fn every_instruction_set_gives_the_stored_bits() {
    for model in TinyModel::all() {
        let want = bits(&read_f32(&stored(&model)));
        for isa in Isa::supported() {
            let run = Run { isa, ..Run::usual() };
            assert!(bits(&last_logits(&model, run)) == want, "{} {run:?}", model.name());
        }
    }
}

#[test]
fn every_instruction_set_gives_the_stored_bits_of_a_real_model() {
    let want = bits(&read_f32(&stored_real()));
    for isa in Isa::supported() {
        assert!(bits(&real_logits(isa)) == want, "{}", isa.name());
    }
}

#[test]
fn threads_and_batches_change_no_bit() {
    // Between them: GQA 7:1 and 2:1, tied and untied, an odd vocabulary.
    for name in ["gqa7_hd32", "tied", "vocab_odd"] {
        let model = TinyModel::named(name);
        let (cfg, weights) = model.load();
        let tokens = &model.prompts.iter().max_by_key(|prompt| prompt.ids.len()).unwrap().ids;
        let want = bits(&logits(&cfg, weights.bytes(), tokens, Run::REFERENCE));
        for isa in Isa::supported() {
            for threads in [1, 2, 3, 8] {
                for (split, batch) in [(1, 1), (2, 2), (7, 7), (32, 32), (64, 64), (64, 7), (7, 2)] {
                    let run = Run { isa, threads, split, batch };
                    assert!(bits(&logits(&cfg, weights.bytes(), tokens, run)) == want, "{name} {run:?}");
                }
            }
        }
    }
}

#[test]
fn conversion_gives_the_stored_bytes() {
    let want = std::fs::read_to_string(stored_files()).unwrap();
    for threads in [1, 2, 5] {
        assert_eq!(converted_files(threads), want, "{threads} threads");
    }
}

/// For a change that moves bits on purpose: `cargo test -p mruntime-tests --test bits -- --ignored`
#[test]
#[ignore = "writes the files that the other tests compare with"]
fn write_the_stored_results() {
    std::fs::write(stored_files(), converted_files(1)).unwrap();
    for model in TinyModel::all() {
        let numbers = last_logits(&model, Run::REFERENCE);
        write_f32(&stored(&model), &numbers);
    }
    write_f32(&stored_real(), &real_logits(Isa::PORTABLE));
}

fn write_f32(path: &Path, numbers: &[f32]) {
    let bytes: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
    std::fs::write(path, bytes).unwrap();
}
