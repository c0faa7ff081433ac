//! The process that `mr-bench cold` measures: it does what an app does from its start to its first token, and says when
//! it did what.

use std::ffi::OsStr;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use mr_cli::{ModelSource, Pages, Result};
use mruntime::{
    GenerateOptions, Isa, Limits, Numerics, OpenOptions, Pool, Prefault, Qwen2Config, Sampler,
    SamplingOptions, Session, create_qwen2_arenas, qwen2_init_kv_cache, qwen2_init_scratch, session_generate,
};
use mruntime_text::SpecialTokens;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::machine::Memory;
use crate::speed::random_token;

/// The argument that makes a process this one. It is looked for before the command line is parsed, which no app has to do.
pub const ARGUMENT: &str = "cold-child";

/// Positions of the context, and tokens of a prefill step: those of `mruntime_chat`.
const CONTEXT: usize = 4096;
const BATCH: usize = 512;

/// What the process is to do: its second argument, in JSON.
#[derive(Clone, Serialize, Deserialize)]
pub struct Task {
    /// When it was started, by [`now`].
    pub start: Duration,
    pub model: PathBuf,
    pub threads: usize,
    pub prefault: String,
    /// Whether to take the fast lane.
    pub fast: bool,
    /// Tokens of the prompt; 0 to be ready and end.
    pub prompt: usize,
    /// How often the forward pass is repeated when all is warm.
    pub repetitions: usize,
}

/// What it did, in milliseconds; the stages follow one another without a gap.
#[derive(Clone, Default, Serialize, Deserialize)]
pub struct Stages {
    pub exec_and_link: f64,
    pub thread_pool: f64,
    pub open_and_validate: f64,
    pub tokenizer: f64,
    pub arenas: f64,
    /// The same forward pass in the same process, later: what it costs when all is warm.
    pub prefill: f64,
    /// What the first forward pass took more than that.
    pub page_faults: f64,
    pub sampling: f64,
}

impl Stages {
    /// Until the model is open, the tokenizer usable and a session made.
    pub fn ready(&self) -> f64 {
        self.exec_and_link + self.thread_pool + self.open_and_validate + self.tokenizer + self.arenas
    }

    /// Until the first token.
    pub fn first_token(&self) -> f64 {
        self.ready() + self.prefill + self.page_faults + self.sampling
    }
}

/// What it measured.
#[derive(Clone, Serialize, Deserialize)]
pub struct Run {
    pub stages: Stages,
    /// Milliseconds since the start.
    pub ready: f64,
    pub first_token: f64,
    /// At the end: of the first token, or of being ready.
    pub memory: Memory,
    /// The weights' pages.
    pub pages: Option<Pages>,
}

/// The time on the clock that all processes share.
pub fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

/// The names of [`Prefault`] on the command line.
pub fn parse_prefault(name: &str) -> std::result::Result<Prefault, String> {
    match name {
        "on-use" => Ok(Prefault::OnUse),
        "background" => Ok(Prefault::Background),
        "at-open" => Ok(Prefault::AtOpen),
        _ => Err("on-use, background or at-open".into()),
    }
}

/// The longest prompt, in tokens.
pub fn context(cfg: &Qwen2Config) -> usize {
    CONTEXT.min(cfg.max_position_embeddings as usize)
}

/// Does the task and writes a [`Run`] to standard output.
pub fn run(task: &OsStr) -> Result<()> {
    let mut last = now();
    let task: Task = serde_json::from_slice(task.as_encoded_bytes())?;
    let mut stages = Stages { exec_and_link: millis(last - task.start), ..Stages::default() };
    // Milliseconds since the last call.
    let mut lap = || {
        let now = now();
        millis(now - std::mem::replace(&mut last, now))
    };

    let mut pool = Pool::new(task.threads)?;
    stages.thread_pool = lap();

    let options = OpenOptions { prefault: parse_prefault(&task.prefault)?, ..OpenOptions::default() };
    let model = ModelSource::file(task.model).open(&options, &mut pool)?;
    stages.open_and_validate = lap();

    if model.has_tokenizer() {
        model.tokenizer()?.encode("The capital of France is", SpecialTokens::AsText)?;
    }
    stages.tokenizer = lap();

    let (cfg, isa) = (*model.config(), Isa::detect());
    let limits = Limits { context: context(&cfg), batch: BATCH, threads: pool.threads() };
    let mut arenas = create_qwen2_arenas(&cfg, &limits)?;
    let kv = qwen2_init_kv_cache(&cfg, limits.context, &mut arenas.kv_cache.bump())?;
    let mut scratch = qwen2_init_scratch(&cfg, &limits, isa, &mut arenas.scratch.bump())?;
    if let Some(numerics) = Numerics::fast(isa).filter(|_| task.fast) {
        scratch.set_numerics(numerics);
    }
    let mut session = Session::new(cfg, model.weights(), kv, scratch);
    let mut sampler = Sampler::new(SamplingOptions::GREEDY, cfg.vocab_size as usize, isa)?;
    stages.arenas = lap();
    let tokens: Vec<u32> = (0..task.prompt as u32).map(|i| random_token(i, cfg.vocab_size)).collect();
    let mut generate = || -> Result<f64> {
        session.reset();
        let options = GenerateOptions { max_new_tokens: 1, stop_tokens: &[] };
        let stop = |_| ControlFlow::Break(());
        let generated = session_generate(&mut session, &tokens, &mut sampler, &options, &mut pool, stop)?;
        Ok(millis(generated.prefill))
    };
    let memory = if task.prompt == 0 {
        Memory::now()
    } else {
        let first_pass = generate()?;
        stages.sampling = lap() - first_pass;
        let memory = Memory::now();
        let mut passes = (0..task.repetitions).map(|_| generate()).collect::<Result<Vec<_>>>()?;
        passes.sort_by(f64::total_cmp);
        stages.prefill = passes[passes.len() / 2];
        stages.page_faults = first_pass - stages.prefill;
        memory
    };
    let (ready, first_token) = (stages.ready(), stages.first_token());
    let run = Run { stages, ready, first_token, memory, pages: Pages::of(model.arena()) };
    Ok(writeln!(std::io::stdout(), "{}", serde_json::to_string(&run)?)?)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
