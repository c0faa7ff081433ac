//! `mr-bench cold`: what a fresh process pays until it is ready, and until its first token, stage by stage.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use clap::{Args, ValueEnum};
use mr_cli::{FileError, NumericsArg, Result};
use mruntime::{Isa, Model, Numerics, OpenOptions, Pool, Qwen2Config};
use rustix::fs::{Advice, fadvise};
use serde::Serialize;

use crate::cold_child::{self, Run, Task, parse_prefault};
use crate::machine::Origin;
use crate::sparse::{parse_shape, write_sparse};

/// Measure a cold start: a fresh process to its first token, stage by stage
///
/// Each repetition starts this program again as a process that does what an app does: open the model, make its tokenizer
/// usable, make a session, prefill a prompt of so many tokens, choose the first token. Times count from just before the
/// process is started. "prefill" is the time of the same forward pass later in that process, when all is warm, and
/// "page faults" is what the first one took more. The repetition shown is the one with the median total, so its stages
/// add up; --json has them all.
#[derive(Args)]
pub struct ColdArgs {
    /// Model file
    #[arg(short, long, value_name = "FILE.mrt")]
    model: PathBuf,
    /// Tokens of the prompt
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', default_value = "16,512", value_parser = mr_cli::parse_count)]
    prompt: Vec<usize>,
    /// Threads [default: all fast physical cores]
    #[arg(short, long, value_name = "N", value_parser = mr_cli::parse_threads)]
    threads: Option<usize>,
    /// Processes for each measurement
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = mr_cli::parse_count)]
    repetitions: usize,
    /// When the weights come into memory: on-use, background or at-open
    #[arg(long, value_name = "WHEN", default_value = "background", value_parser = |name: &str| parse_prefault(name).map(|_| name.to_owned()))]
    prefault: String,
    #[command(flatten)]
    numerics: NumericsArg,
    /// Measure again with FILE and, where this user may do that, everything else dropped from the page cache
    #[arg(long, value_name = "WHAT", num_args = 0..=1, require_equals = true, default_missing_value = "all")]
    drop_caches: Option<DropCaches>,
    /// Also measure how soon models of these shapes are ready: 0.1b, 0.5b, 7b; sparse files with FILE's tokenizer
    #[arg(long, value_name = "SHAPE,...", value_delimiter = ',', value_parser = parse_shape)]
    shapes: Vec<(String, Qwen2Config)>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is dropped from the page cache.
#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum DropCaches {
    /// Everything, the program included, where this user may do so; else the model's file
    All,
    /// The model's file
    File,
}

/// One column of the table.
#[derive(Serialize)]
struct Measurement {
    model: String,
    /// Tokens of the prompt; 0 for none, to be ready only.
    prompt: usize,
    /// `warm` or what was dropped.
    cache: &'static str,
    /// Milliseconds to read the bytes that are needed, nothing of them in the page cache, 4 MiB at a time as `dd` does;
    /// one for each repetition.
    read: Vec<f64>,
    /// One for each repetition.
    runs: Vec<Run>,
    /// The repetition with the median time.
    median: usize,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    origin: Origin,
    threads: usize,
    prefault: String,
    numerics: &'static str,
    measurements: Vec<Measurement>,
}

/// Runs the subcommand.
pub fn run(args: ColdArgs) -> Result<()> {
    let threads = args.threads.unwrap_or_else(mruntime::performance_cores);
    let model = Model::open(&args.model, &OpenOptions::default(), &mut Pool::new(1)?)?;
    let numerics = args.numerics.get(Isa::detect())?;
    let bench = Bench { threads, prefault: args.prefault, numerics, repetitions: args.repetitions };
    let name = args.model.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let context = cold_child::context(model.config());
    if let Some(tokens) = args.prompt.iter().find(|&&tokens| tokens > context) {
        return Err(format!("-p {tokens}: the context that is measured with has {context} tokens").into());
    }
    let needed = model.prologue().layout().layer0.attn_norm.offset + model.prologue().arena_offset();

    let mut measurements = Vec::new();
    // Being ready first: what it takes must not depend on weights that are in memory.
    let prompts: Vec<_> = [0].iter().chain(&args.prompt).copied().collect();
    bench.child(&args.model, args.prompt.iter().copied().max().unwrap_or(0))?;
    for &prompt in &prompts {
        measurements.push(bench.measure(&name, &args.model, prompt, None)?);
    }
    if let Some(what) = args.drop_caches {
        let cache = Cache {
            file: File::open(&args.model).map_err(|e| FileError::new(&args.model, e))?,
            what: what.allowed(),
            needed,
        };
        for &prompt in &prompts {
            measurements.push(bench.measure(&name, &args.model, prompt, Some(&cache))?);
        }
    }
    for (name, cfg) in &args.shapes {
        let file = tempfile::Builder::new().prefix("shape-").suffix(".mrt").tempfile();
        let file = file.map_err(|e| format!("a model without weights: {e}"))?;
        write_sparse(file.as_file(), cfg, &tokenizer_sections(&model)?)?;
        bench.child(file.path(), 0)?;
        measurements.push(bench.measure(name, file.path(), 0, None)?);
    }

    let (origin, numerics) = (Origin::now(), numerics.name());
    let report = Report { origin, threads, prefault: bench.prefault, numerics, measurements };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
        return Ok(());
    }
    write_table(&report, &mut out)
}

/// What a tokenizer is made from: all sections whose names say so.
fn tokenizer_sections(model: &Model) -> Result<Vec<(String, Vec<u8>)>> {
    let names = model.prologue().sections().iter().map(|section| &section.name);
    let names = names.filter(|name| name.contains("token"));
    names.map(|name| Ok((name.clone(), model.section(name)?.unwrap_or_default().into_owned()))).collect()
}

struct Bench {
    threads: usize,
    prefault: String,
    numerics: Numerics,
    repetitions: usize,
}

impl Bench {
    /// Starts one process and waits for what it measured.
    fn child(&self, model: &Path, prompt: usize) -> Result<Run> {
        let program = std::env::current_exe().map_err(|e| format!("this program cannot find itself: {e}"))?;
        let mut task = Task {
            start: Default::default(),
            model: model.to_owned(),
            threads: self.threads,
            prefault: self.prefault.clone(),
            fast: self.numerics != Numerics::Exact,
            prompt,
            repetitions: 3,
        };
        let mut command = Command::new(program);
        command.arg(cold_child::ARGUMENT).stdin(Stdio::null());
        task.start = cold_child::now();
        let task = serde_json::to_string(&task).map_err(|e| FileError::new(model, e))?;
        let output = command.arg(task).output().map_err(|e| format!("the measured process: {e}"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let said = said.trim().trim_start_matches("error: ");
            return Err(format!("the measured process ended with {}: {said}", output.status).into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// Measures the repetitions; `cache` is dropped before each.
    fn measure(&self, name: &str, model: &Path, prompt: usize, cache: Option<&Cache>) -> Result<Measurement> {
        let (mut read, mut runs) = (Vec::new(), Vec::new());
        for _ in 0..self.repetitions {
            if let Some(cache) = cache {
                cache.drop()?;
                read.push(cache.read_needed()?);
                cache.drop()?;
            }
            runs.push(self.child(model, prompt)?);
        }
        let mut order: Vec<_> = (0..runs.len()).collect();
        order.sort_by(|&a, &b| runs[a].first_token.total_cmp(&runs[b].first_token));
        let median = order[(order.len() - 1) / 2];
        let cache = cache.map_or("warm", Cache::name);
        Ok(Measurement { model: name.into(), prompt, cache, read, runs, median })
    }
}

/// The page cache of a model's file.
struct Cache {
    file: File,
    what: DropCaches,
    /// Where the bytes begin that are read in order and whole: behind an embedding table of its own.
    needed: u64,
}

const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

impl DropCaches {
    fn allowed(self) -> DropCaches {
        let all = self == DropCaches::All && File::options().write(true).open(DROP_CACHES).is_ok();
        if all { DropCaches::All } else { DropCaches::File }
    }
}

impl Cache {
    fn name(&self) -> &'static str {
        match self.what {
            DropCaches::All => "all dropped",
            DropCaches::File => "file dropped",
        }
    }

    fn drop(&self) -> Result<()> {
        // Pages that are not written yet cannot be dropped.
        self.file.sync_all().map_err(|e| format!("the model cannot be written to the disk: {e}"))?;
        match self.what {
            DropCaches::All => std::fs::write(DROP_CACHES, "1").map_err(|e| format!("{DROP_CACHES}: {e}"))?,
            DropCaches::File => fadvise(&self.file, 0, None, Advice::DontNeed)?,
        }
        Ok(())
    }

    /// Milliseconds to read what is needed.
    fn read_needed(&self) -> Result<f64> {
        let mut piece = vec![0; 4 << 20];
        let start = Instant::now();
        let mut offset = self.needed;
        loop {
            let read = self.file.read_at(&mut piece, offset);
            match read.map_err(|e| format!("reading the model: {e}"))? {
                0 => return Ok(start.elapsed().as_secs_f64() * 1e3),
                n => offset += n as u64,
            }
        }
    }
}

fn write_table(report: &Report, out: &mut impl Write) -> Result<()> {
    report.origin.write(out)?;
    let Report { threads, prefault, numerics, .. } = report;
    writeln!(out, "process   {threads} threads, prefault {prefault}, {numerics} numerics\n")?;
    let columns = &report.measurements;
    let mut row = |name: &str, cell: &dyn Fn(&Measurement) -> String| -> Result<()> {
        write!(out, "| {name:<26} |")?;
        for column in columns {
            write!(out, " {:>13} |", cell(column))?;
        }
        Ok(writeln!(out)?)
    };
    let ms = |x: f64| format!("{x:.2}");
    let median = |column: &Measurement| column.runs[column.median].clone();
    let if_prompt = |column: &Measurement, cell: String| if column.prompt > 0 { cell } else { String::new() };

    row("model", &|c| c.model.chars().take(13).collect())?;
    row("prompt, tokens", &|c| if_prompt(c, c.prompt.to_string()))?;
    row("page cache", &|c| c.cache.into())?;
    row(&"-".repeat(26), &|_| "-".repeat(12) + ":")?;
    row("exec and link, ms", &|c| ms(median(c).stages.exec_and_link))?;
    row("thread pool, ms", &|c| ms(median(c).stages.thread_pool))?;
    row("open and validate, ms", &|c| ms(median(c).stages.open_and_validate))?;
    row("tokenizer, ms", &|c| ms(median(c).stages.tokenizer))?;
    row("arenas, ms", &|c| ms(median(c).stages.arenas))?;
    row("ready, ms", &|c| ms(median(c).ready))?;
    row("prefill, ms", &|c| if_prompt(c, ms(median(c).stages.prefill)))?;
    row("page faults, ms", &|c| if_prompt(c, ms(median(c).stages.page_faults)))?;
    row("sampling, ms", &|c| if_prompt(c, ms(median(c).stages.sampling)))?;
    row("first token, ms", &|c| if_prompt(c, ms(median(c).first_token)))?;
    row("first token / prefill", &|c| {
        if_prompt(c, format!("{:.3}", median(c).first_token / median(c).stages.prefill))
    })?;
    row("reading the weights, ms", &|c| c.median_read().map_or(String::new(), ms))?;
    row("first token / reading", &|c| {
        let ratio = c.median_read().map(|read| format!("{:.3}", median(c).first_token / read));
        if_prompt(c, ratio.unwrap_or_default())
    })?;
    row("page faults, minor", &|c| median(c).memory.minor_faults.to_string())?;
    row("page faults, major", &|c| median(c).memory.major_faults.to_string())?;
    row("read from storage, MiB", &|c| {
        median(c).memory.storage_read.map_or(String::new(), |bytes| (bytes >> 20).to_string())
    })?;
    row("RSS anonymous, MiB", &|c| format!("{:.1}", median(c).memory.anonymous as f64 / 1024.0))?;
    row("RSS file, MiB", &|c| format!("{:.1}", median(c).memory.file as f64 / 1024.0))?;
    row("weights in huge pages, MiB", &|c| {
        median(c).pages.map_or(String::new(), |pages| (pages.huge() >> 10).to_string())
    })
}

impl Measurement {
    fn median_read(&self) -> Option<f64> {
        let mut read = self.read.clone();
        read.sort_by(f64::total_cmp);
        read.get(read.len().checked_sub(1)? / 2).copied()
    }
}
