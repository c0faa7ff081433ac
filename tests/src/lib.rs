//! What the tests that cross crates share: the tiny models with their expected results, and a way to run a model.

#![forbid(unsafe_code)]

pub mod fuzz;
pub mod smollm2_golden;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

use mr_convert::{Converted, NewFile, sources};
use mruntime::hf::{Qwen2Dir, qwen2_load_weights};
use mruntime::{
    Arena, GenerateOptions, Isa, KvCache, Limits, Model, OpenOptions, Pool, Qwen2Config, Qwen2Weights,
    Sampler, SamplingOptions, Scratch, create_qwen2_arenas, qwen2_forward, qwen2_generate,
    qwen2_init_kv_cache, qwen2_init_scratch,
};
use serde::Deserialize;

/// The folder `tests/goldens`.
pub fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens")
}

/// A tiny random Qwen2 model, in the folder of its name, and what transformers makes of it.
#[derive(Deserialize)]
pub struct TinyModel {
    /// Its folder in `tests/goldens/tiny`.
    #[serde(skip)]
    pub dir: PathBuf,
    /// Token ids are below this.
    pub vocab: usize,
    /// What it was asked.
    pub prompts: Vec<TinyPrompt>,
}

/// A prompt and transformers' results for it.
#[derive(Deserialize)]
pub struct TinyPrompt {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Positions whose logits are stored, if not all are.
    positions: Option<Vec<usize>>,
    /// Greedy continuation with a KV cache rounded to FP16.
    pub greedy_kv16: Vec<u32>,
    /// By how much the best logit leads, at each step.
    pub greedy_kv16_margin: Vec<f32>,
    /// How far rounding the KV cache to FP16 moves a logit of transformers.
    pub fp16_kv_max_dlogit: f32,
}

impl TinyPrompt {
    /// Positions whose logits are stored.
    pub fn positions(&self) -> Vec<usize> {
        self.positions.clone().unwrap_or_else(|| (0..self.ids.len()).collect())
    }
}

impl TinyModel {
    /// All tiny models, in the order of their names.
    pub fn all() -> Vec<TinyModel> {
        let entries = std::fs::read_dir(goldens().join("tiny")).unwrap();
        let mut dirs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
        dirs.sort();
        dirs.into_iter().map(TinyModel::read).collect()
    }

    /// The tiny model of that name.
    pub fn named(name: &str) -> TinyModel {
        TinyModel::read(goldens().join("tiny").join(name))
    }

    fn read(dir: PathBuf) -> TinyModel {
        let json = std::fs::read(dir.join("golden.json")).unwrap();
        TinyModel { dir, ..serde_json::from_slice(&json).unwrap() }
    }

    /// The name of its folder.
    pub fn name(&self) -> &str {
        self.dir.file_name().unwrap().to_str().unwrap()
    }

    /// Its config and its weights, packed straight from safetensors.
    pub fn load(&self) -> (Qwen2Config, Arena) {
        let model = Qwen2Dir::open(&self.dir).unwrap();
        let weights = qwen2_load_weights(&model, &mut Pool::new(2).unwrap()).unwrap();
        (model.config, weights)
    }

    /// Converts it to `path` with that many threads.
    pub fn convert(&self, path: &Path, threads: usize) -> Converted {
        convert(&Qwen2Dir::open(&self.dir).unwrap(), path, threads)
    }
}

/// Anonymous memory of a process beside its arenas, as `MemorySizes` states it.
pub const PROCESS_BYTES: u64 = 1_000_000;

/// SmolLM2-135M-Instruct, converted once in this process and mapped.
///
/// # Panics
/// If nobody has fetched it.
pub fn smollm2() -> &'static Model {
    static MODEL: OnceLock<Model> = OnceLock::new();
    MODEL.get_or_init(|| {
        // The mapping outlives the name.
        let (_folder, path) = smollm2_file();
        Model::open(&path, &OpenOptions::default(), &mut Pool::new(1).unwrap()).unwrap()
    })
}

/// SmolLM2-135M-Instruct's config and its weights, packed straight from safetensors once in this process: under emulation a
/// conversion, which hashes all bytes twice, takes a minute.
///
/// # Panics
/// If nobody has fetched it.
pub fn smollm2_weights() -> &'static (Qwen2Config, Arena) {
    static MODEL: OnceLock<(Qwen2Config, Arena)> = OnceLock::new();
    MODEL.get_or_init(|| {
        let dir = smollm2_dir();
        (dir.config, qwen2_load_weights(&dir, &mut Pool::new(2).unwrap()).unwrap())
    })
}

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
}

fn smollm2_dir() -> Qwen2Dir {
    Qwen2Dir::open(&models().join("SmolLM2-135M-Instruct")).unwrap_or_else(|e| {
        panic!("{e}\nrun tests/run.sh, or models/get_smollm2.py, which fetches the model")
    })
}

/// SmolLM2-135M-Instruct as a file, which is removed with the folder.
///
/// # Panics
/// If nobody has fetched it.
pub fn smollm2_file() -> (tempfile::TempDir, PathBuf) {
    // Not in the system's folder for temporary files, which may be in memory.
    let folder = tempfile::tempdir_in(models()).unwrap();
    let path = folder.path().join("smollm2.mrt");
    convert(&smollm2_dir(), &path, 2);
    (folder, path)
}

/// `mr-convert`, with that many threads.
fn convert(model: &Qwen2Dir, path: &Path, threads: usize) -> Converted {
    let (target, mut pool) = (NewFile::create(path, sources(model)).unwrap(), Pool::new(threads).unwrap());
    let converted = mr_convert::convert(model, &target, None, &mut pool, &AtomicBool::new(false)).unwrap();
    target.commit().unwrap();
    converted
}

/// How a text is run through a model. None of it may change a bit of the logits.
#[derive(Clone, Copy, Debug)]
pub struct Run {
    /// Instruction set.
    pub isa: Isa,
    /// Threads.
    pub threads: usize,
    /// Tokens of a call of `qwen2_forward`.
    pub split: usize,
    /// Tokens of a prefill step within a call.
    pub batch: usize,
}

impl Run {
    /// The reference: portable, one thread, token by token.
    pub const REFERENCE: Run = Run { isa: Isa::PORTABLE, threads: 1, split: 1, batch: 1 };

    /// The usual way: the best instruction set, two threads, all tokens at once.
    pub fn usual() -> Run {
        Run { isa: Isa::detect(), threads: 2, split: usize::MAX, batch: 64 }
    }
}

/// A model with an empty KV cache, ready to run.
pub struct Ready<'a> {
    /// Its config.
    pub cfg: Qwen2Config,
    /// Its weights.
    pub weights: Qwen2Weights<'a>,
    /// An empty cache.
    pub kv: KvCache<'a>,
    /// Working memory.
    pub scratch: Scratch<'a>,
    /// Threads.
    pub pool: Pool,
}

impl Ready<'_> {
    /// Runs `tokens` at the next positions. The length of `logits` says which are wanted.
    pub fn forward(&mut self, tokens: &[u32], logits: &mut [f32]) {
        let Ready { cfg, weights, kv, scratch, pool } = self;
        qwen2_forward(cfg, weights, kv, scratch, tokens, logits, pool).unwrap();
    }

    /// Prefills `prompt` and generates `count` tokens greedily; none of them stops it.
    pub fn generate(&mut self, prompt: &[u32], count: usize) -> Vec<u32> {
        let Ready { cfg, weights, kv, scratch, pool } = self;
        let mut sampler =
            Sampler::new(SamplingOptions::GREEDY, cfg.vocab_size as usize, scratch.isa()).unwrap();
        let options = GenerateOptions { max_new_tokens: count, stop_tokens: &[] };
        let mut tokens = Vec::with_capacity(count);
        let push = |token| {
            tokens.push(token);
            ControlFlow::Continue(())
        };
        qwen2_generate(cfg, weights, kv, scratch, prompt, &mut sampler, &options, pool, push).unwrap();
        tokens
    }
}

/// Calls `f` with a model of shape `cfg` whose weight arena is `weights`, with room for `context` positions.
pub fn with_model<T>(
    cfg: &Qwen2Config,
    weights: &[u8],
    context: usize,
    run: Run,
    f: impl FnOnce(Ready<'_>) -> T,
) -> T {
    let limits = Limits { context, batch: run.batch, threads: run.threads };
    let mut arenas = create_qwen2_arenas(cfg, &limits).unwrap();
    f(Ready {
        cfg: *cfg,
        weights: Qwen2Weights::from_arena(cfg, weights).unwrap(),
        kv: qwen2_init_kv_cache(cfg, context, &mut arenas.kv_cache.bump()).unwrap(),
        scratch: qwen2_init_scratch(cfg, &limits, run.isa, &mut arenas.scratch.bump()).unwrap(),
        pool: Pool::new(run.threads).unwrap(),
    })
}

/// The logits of every token, `[tokens][vocab]`.
pub fn logits(cfg: &Qwen2Config, weights: &[u8], tokens: &[u32], run: Run) -> Vec<f32> {
    let vocab = cfg.vocab_size as usize;
    let split = run.split.min(tokens.len());
    let mut logits = vec![0.0; tokens.len() * vocab];
    with_model(cfg, weights, tokens.len(), run, |mut model| {
        for (tokens, logits) in tokens.chunks(split).zip(logits.chunks_mut(split * vocab)) {
            model.forward(tokens, logits);
        }
    });
    logits
}

/// Compares a greedy continuation with that of other software, step by step. Where they first differ, the other's best
/// logit must lead the second by less than `tie`, which is what rounding may decide; from there on they are
/// continuations of different texts. Returns the number of equal steps.
///
/// # Panics
/// If they differ where the lead is larger.
pub fn compare_greedy(name: &str, ours: &[u32], theirs: &[u32], margins: &[f32], tie: f32) -> usize {
    assert_eq!(ours.len(), theirs.len(), "{name}");
    let equal = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
    if equal < theirs.len() {
        let (ours, theirs, margin) = (ours[equal], theirs[equal], margins[equal]);
        assert!(margin < tie, "{name}: step {equal} is {ours}, should be {theirs}, which leads by {margin}");
    }
    equal
}

/// The f32 numbers of a little-endian file.
pub fn read_f32(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let (numbers, rest) = bytes.as_chunks::<4>();
    assert!(rest.is_empty(), "{}: {} bytes", path.display(), bytes.len());
    numbers.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// The bits of each number: what is compared where the contract is bit for bit.
pub fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

/// The largest difference of two numbers at the same place.
pub fn max_abs_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // Unlike `f32::max`, this lets a NaN through.
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, |max, d| if d <= max { max } else { d })
}

/// Natural logarithms of the softmax of `logits`.
pub fn log_probabilities(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let log_sum = logits.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln() + max;
    logits.iter().map(|&x| f64::from(x) - log_sum).collect()
}

/// Kullback-Leibler divergence of the distributions of two sets of logits, in nats.
pub fn kl_divergence(p: &[f32], q: &[f32]) -> f64 {
    let (p, q) = (log_probabilities(p), log_probabilities(q));
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum()
}

/// The example of README.md, compiled as a doc test.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
