//! Tiny random models against transformers, which computed in float32 with the same FP16 weights
//! (`scripts/make_tiny_goldens.py`).

#![forbid(unsafe_code)]

use mrt_format::{Qwen2Config, qwen2_weights_layout};
use mruntime::{Backing, Model, OpenOptions, Pool, Verify};
use mruntime_tests::{Run, TinyModel, compare_greedy, logits, max_abs_difference, read_f32, with_model};

/// The largest difference of a logit from transformers with an FP16 KV cache.
///
/// Sums in another order differ by 1e-5 or so in logits of up to 20. A key or value that lies near the middle of two FP16
/// numbers can so be rounded to the other one, by 2^-11 of its size, which moves logits by 1e-3. Mistakes move them
/// further: RoPE or head grouping by 3 to 21, missing biases by 6 to 18.
const TOLERANCE: f32 = 2e-3;

/// The stored rows of each prompt, `[positions][vocab]`.
fn golden(model: &TinyModel, file: &str) -> Vec<Vec<f32>> {
    let mut rest = read_f32(&model.dir.join(file));
    let mut rows = |n: usize| rest.drain(..n * model.vocab).collect();
    let rows = model.prompts.iter().map(|prompt| rows(prompt.positions().len())).collect();
    assert!(rest.is_empty(), "{} {file}", model.name());
    rows
}

/// Our logits at the stored positions of each prompt, `[positions][vocab]`.
fn ours(model: &TinyModel, cfg: &Qwen2Config, weights: &[u8]) -> Vec<Vec<f32>> {
    let of_prompt = |ids: &[u32], positions: Vec<usize>| {
        let all = logits(cfg, weights, ids, Run::usual());
        positions.iter().flat_map(|p| &all[p * model.vocab..][..model.vocab]).copied().collect()
    };
    model.prompts.iter().map(|prompt| of_prompt(&prompt.ids, prompt.positions())).collect()
}

/// The largest difference from transformers with an FP16 KV cache over all prompts.
fn difference(model: &TinyModel, cfg: &Qwen2Config, weights: &[u8]) -> f32 {
    let pairs = ours(model, cfg, weights).into_iter().zip(golden(model, "golden_logits_kv16.bin"));
    pairs.map(|(ours, golden)| max_abs_difference(&ours, &golden)).fold(0.0, f32::max)
}

#[test]
fn a_converted_file_holds_what_loading_packs() {
    let dir = tempfile::tempdir().unwrap();
    for tiny in TinyModel::all() {
        let (cfg, weights) = tiny.load();
        let path = dir.path().join("model.mrt");
        tiny.convert(&path, 2);
        for backing in [Backing::Map, Backing::Read] {
            let options = OpenOptions { backing, verify: Verify::Full, ..OpenOptions::default() };
            let model = Model::open(&path, &options, &mut Pool::new(2).unwrap()).unwrap();
            assert_eq!(model.config(), &cfg, "{}", tiny.name());
            assert!(model.arena() == weights.bytes(), "{}", tiny.name());
        }
    }
}

#[test]
fn logits_equal_those_of_transformers() {
    for model in TinyModel::all() {
        let (cfg, weights) = model.load();
        let ours = ours(&model, &cfg, weights.bytes());
        let (kv16, kv32) = (golden(&model, "golden_logits_kv16.bin"), golden(&model, "golden_logits.bin"));
        for (i, prompt) in model.prompts.iter().enumerate() {
            let difference = max_abs_difference(&ours[i], &kv16[i]);
            assert!(difference <= TOLERANCE, "{} prompt {i}: {difference}", model.name());
            // With a float32 cache: not further than rounding the cache takes transformers itself.
            let difference = max_abs_difference(&ours[i], &kv32[i]);
            let tolerance = prompt.fp16_kv_max_dlogit + TOLERANCE;
            assert!(difference <= tolerance, "{} prompt {i}, float32 cache: {difference}", model.name());
        }
    }
}

#[test]
fn greedy_tokens_equal_those_of_transformers() {
    let (mut equal, mut steps) = (0, 0);
    for model in TinyModel::all() {
        let (cfg, weights) = model.load();
        for (i, prompt) in model.prompts.iter().enumerate() {
            let (theirs, context) = (&prompt.greedy_kv16, prompt.ids.len() + prompt.greedy_kv16.len());
            let ours = with_model(&cfg, weights.bytes(), context, Run::usual(), |mut model| {
                model.generate(&prompt.ids, theirs.len())
            });
            let name = format!("{} prompt {i}", model.name());
            // Two logits may each be off by the tolerance.
            equal += compare_greedy(&name, &ours, theirs, &prompt.greedy_kv16_margin, 2.0 * TOLERANCE);
            steps += theirs.len();
        }
    }
    // Few continuations may be cut short by a tie, or nothing much has been compared.
    assert!(equal * 10 > steps * 9, "{equal} of {steps} steps compared");
}

#[test]
fn mistakes_are_larger_than_the_tolerance() {
    let wrong = |name: &str, change: fn(&mut Qwen2Config, &mut [u8])| {
        let model = TinyModel::named(name);
        let (mut cfg, mut weights) = model.load();
        change(&mut cfg, weights.bytes_mut());
        let difference = difference(&model, &cfg, weights.bytes());
        assert!(difference > 10.0 * TOLERANCE, "{name}: {difference}");
    };
    for name in ["tied", "untied", "gqa7_hd64"] {
        wrong(name, |cfg, _| cfg.rope_theta *= 10.0);
    }
    wrong("vocab_odd", |cfg, _| cfg.rms_norm_eps *= 10.0);
    // Without the biases: the first row of each panel of Q, K and V.
    wrong("big_bias", |cfg, weights| {
        let qkv = qwen2_weights_layout(cfg).layer(1).qkv;
        for panel in weights[qkv.offset as usize..][..qkv.bytes as usize]
            .chunks_exact_mut(mrt_format::panel_bytes(cfg.hidden_size as usize) as usize)
        {
            panel[..mrt_format::ROW_BYTES].fill(0);
        }
    });
    // Gate and up exchanged.
    wrong("inter_odd", |cfg, weights| {
        let gate_up = qwen2_weights_layout(cfg).layer(0).gate_up;
        let panel = mrt_format::panel_bytes(cfg.hidden_size as usize) as usize;
        for pair in weights[gate_up.offset as usize..][..gate_up.bytes as usize].chunks_exact_mut(2 * panel) {
            pair.rotate_left(panel);
        }
    });
}
