//! What transformers makes of SmolLM2-135M-Instruct (`scripts/make_smollm2_goldens.py`).

use std::path::PathBuf;

use serde::Deserialize;

use crate::{goldens, read_f32};

/// The contents of `tests/goldens/smollm2`.
#[derive(Deserialize)]
pub struct Golden {
    /// What it was asked.
    pub prompts: Vec<Prompt>,
    /// A long text.
    pub text: Text,
}

/// A prompt and transformers' results for it.
#[derive(Deserialize)]
pub struct Prompt {
    /// What the prompt is about.
    pub name: String,
    /// Token ids.
    pub ids: Vec<u32>,
    /// Greedy continuation.
    pub greedy: Vec<u32>,
    /// By how much the best logit leads, at each step.
    pub greedy_margin: Vec<f32>,
    /// How far rounding the KV cache to FP16 moves a logit of transformers after the prompt.
    pub fp16_kv_max_dlogit: f32,
    /// The logits after the prompt.
    #[serde(skip)]
    pub logits: Vec<f32>,
}

/// A long text.
#[derive(Deserialize)]
pub struct Text {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Negative log-likelihood of each token but the first, in nats.
    #[serde(skip)]
    pub nll: Vec<f32>,
}

impl Golden {
    /// Reads the files.
    pub fn read() -> Golden {
        let path = |name: &str| -> PathBuf { goldens().join("smollm2").join(name) };
        let mut golden: Golden =
            serde_json::from_slice(&std::fs::read(path("golden.json")).unwrap()).unwrap();
        golden.text.nll = read_f32(&path("golden_nll.bin"));
        let logits = read_f32(&path("golden_logits.bin"));
        let vocab = logits.len() / golden.prompts.len();
        for (prompt, logits) in golden.prompts.iter_mut().zip(logits.chunks_exact(vocab)) {
            prompt.logits = logits.to_vec();
        }
        golden
    }
}
