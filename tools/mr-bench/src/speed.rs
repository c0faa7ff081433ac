//! `mr-bench speed`: tokens a second, beside what this machine's memory and multipliers allow.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use clap::Args;
use mr_cli::{ModelSource, NewFile, Pages, Result};
use mruntime::{Backing, Limits, OpenOptions, Pool, create_qwen2_arenas};
use serde::Serialize;
use serde_json::json;

use crate::inference::{Inference, IsaArg};
use crate::machine::Origin;
use crate::profile::{self, Operation, Recorder};
use crate::roofline::{self, Meter, Roofline};
use crate::work::{decode_bytes, prefill_flops};

/// Measure prefill and decoding speed, and their share of this machine's limits
///
/// ppN is the prefill of N tokens, tgN the decoding of N tokens one by one, @dD after D other tokens. Tokens are random;
/// nothing is sampled. Each test runs once to warm up, then as often as -r says. The limits, multiply-adds for
/// prefill and memory bandwidth for decoding, are measured in turn with it and with as many threads: medians beside medians.
#[derive(Args)]
pub struct SpeedArgs {
    #[command(flatten)]
    model: ModelSource,
    /// Tokens to prefill; 0 for no such test
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', default_value = "512")]
    prompt: Vec<usize>,
    /// Tokens to decode; 0 for no such test
    #[arg(short = 'n', long, value_name = "N,...", value_delimiter = ',', default_value = "64")]
    generate: Vec<usize>,
    /// Tokens that are in the context before
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Numbers of threads of decoding, and of prefill if nothing else is said [default: all fast physical cores]
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', value_parser = mr_cli::parse_threads)]
    threads: Vec<usize>,
    /// Numbers of threads of prefill
    #[arg(long, value_name = "N,...", value_delimiter = ',', value_parser = mr_cli::parse_threads)]
    threads_batch: Vec<usize>,
    /// Measured runs of each test
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = mr_cli::parse_count)]
    repetitions: usize,
    /// Tokens of a prefill step
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = mr_cli::parse_count)]
    batch: usize,
    #[command(flatten)]
    isa: IsaArg,
    /// Where the weights of FILE.mrt are [default: map]
    #[arg(long, value_name = "map|read", conflicts_with = "model_dir", value_parser = parse_backing)]
    backing: Option<Backing>,
    /// Repeat each test with a look at each operation: calls, time, bytes, FLOPs, share of its limit (above 100 % if the
    /// machine was slower while that was measured)
    #[arg(long)]
    profile: bool,
    /// Repeat each test once and write when which operation ran, in Chrome's trace format (for ui.perfetto.dev)
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// Print comma-separated values, one line a test
    #[arg(long, conflicts_with = "profile")]
    csv: bool,
}

/// What there is to be measured at one depth.
#[derive(Clone, Copy)]
enum Kind {
    Prefill(usize),
    Decode(usize),
}

/// The result of one test.
#[derive(Serialize)]
struct Measurement {
    test: String,
    threads: usize,
    prompt_tokens: usize,
    generated_tokens: usize,
    depth: usize,
    /// Seconds of each repetition, in order.
    seconds: Vec<f64>,
    tokens_per_second: Spread,
    /// Work a second at the median: GFLOP/s for prefill, GB/s for decoding.
    rate: f64,
    unit: &'static str,
    /// What the machine can do, in the same unit; none where the peak is not measured.
    limit: Option<f64>,
    /// `rate / limit`
    share: Option<f64>,
    /// What the machine can do, measured between the repetitions.
    roofline: Roofline,
    /// Of as many repetitions more; empty unless asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profile: Vec<Operation>,
}

/// Of several repetitions.
#[derive(Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    origin: Origin,
    model: String,
    weight_bytes: u64,
    backing: &'static str,
    /// After the tests.
    pages: Option<Pages>,
    isa: &'static str,
    numerics: &'static str,
    batch: usize,
    tests: Vec<Measurement>,
}

/// Runs the subcommand.
pub fn run(args: SpeedArgs) -> Result<()> {
    let decode_threads =
        if args.threads.is_empty() { vec![mruntime::performance_cores()] } else { args.threads };
    let prefill_threads =
        if args.threads_batch.is_empty() { decode_threads.clone() } else { args.threads_batch };
    let mut all_threads = decode_threads.clone();
    all_threads.extend(prefill_threads.iter().filter(|threads| !decode_threads.contains(threads)));
    let most_threads = all_threads.iter().copied().max().unwrap_or(1);
    let mut pool = Pool::new(most_threads)?;
    let backing = args.backing.unwrap_or_default();
    let model = args.model.open(&OpenOptions { backing, ..OpenOptions::default() }, &mut pool)?;
    // Whether it can be written is noticed now; held all the time, the file would be left over by Ctrl-C.
    let new_trace = || args.trace.as_ref().map(|path| NewFile::create(path, model.paths())).transpose();
    new_trace()?;
    let cfg = model.config();
    let (isa, numerics) = (args.isa.get(), args.isa.numerics()?);

    let prefills = args.prompt.iter().map(|&n| Kind::Prefill(n));
    let mut kinds: Vec<_> = prefills.chain(args.generate.iter().map(|&n| Kind::Decode(n))).collect();
    kinds.retain(|kind| kind.tokens() > 0);
    let most_tokens = kinds.iter().map(|kind| kind.tokens()).max();
    let (Some(most_tokens), Some(deepest)) = (most_tokens, args.depth.iter().max()) else {
        return Err("nothing to measure: both -p and -n are 0".into());
    };
    let context = most_tokens.saturating_add(*deepest);
    let limits = Limits { context, batch: args.batch.min(context), threads: most_threads };
    let mut arenas = create_qwen2_arenas(cfg, &limits)?;
    let mut inference = Inference::new(cfg, model.weights(), &mut arenas, &limits, &args.isa)?;
    let tokens: Vec<u32> = (0..context as u32).map(|i| random_token(i, cfg.vocab_size)).collect();
    let mut logits = vec![0.0; cfg.vocab_size as usize];

    let (origin, mut memory) = (Origin::now(), roofline::memory()?);
    let (mut tests, mut events) = (Vec::new(), Vec::new());
    for &threads in &all_threads {
        pool.set_threads(threads);
        for &depth in &args.depth {
            inference.kv.truncate(0);
            if depth > 0 {
                inference.forward(&tokens[..depth], &mut [], &mut pool)?;
            }
            let measured_with = |kind: &Kind| match kind {
                Kind::Prefill(_) => prefill_threads.contains(&threads),
                Kind::Decode(_) => decode_threads.contains(&threads),
            };
            for kind in kinds.iter().copied().filter(measured_with) {
                let mut seconds = Vec::new();
                let mut meter = Meter::new(&mut memory)?;
                for repetition in 0..=args.repetitions {
                    inference.kv.truncate(depth);
                    let tokens = &tokens[depth..depth + kind.tokens()];
                    let start = Instant::now();
                    for step in kind.steps(tokens) {
                        inference.forward(step, &mut logits, &mut pool)?;
                    }
                    // The first one warms up.
                    if repetition > 0 {
                        seconds.push(start.elapsed().as_secs_f64());
                    }
                    meter.sample(&mut pool);
                }
                let roofline = meter.roofline(threads);
                let bounds = roofline.limit(isa, numerics);
                let (work, unit, limit) = match kind {
                    Kind::Prefill(n) => {
                        let peak = bounds.as_ref().map(|limit| limit.flop_s / 1e9);
                        (prefill_flops(cfg, depth, n), "GFLOP/s", peak)
                    }
                    Kind::Decode(n) => (decode_bytes(cfg, depth, n), "GB/s", Some(roofline.read_gb_s.median)),
                };
                let mut test = Measurement::new(kind, depth, seconds, work / 1e9, unit, limit, roofline);
                let mut record = |repetitions| -> Result<Recorder> {
                    let mut recorder = Recorder::new();
                    for _ in 0..repetitions {
                        inference.kv.truncate(depth);
                        for step in kind.steps(&tokens[depth..depth + kind.tokens()]) {
                            recorder.begin();
                            inference
                                .forward_observed(step, &mut logits, &mut pool, |o| recorder.observe(o))?;
                        }
                    }
                    Ok(recorder)
                };
                if args.profile {
                    let spans = record(args.repetitions)?.spans;
                    test.profile = profile::operations(&spans, cfg, bounds.as_ref());
                }
                if args.trace.is_some() {
                    let name = format!("{}, {threads} threads", test.test);
                    events.extend(profile::trace_events(&name, tests.len(), &record(1)?.spans));
                }
                tests.push(test);
            }
        }
    }

    let report = Report {
        origin,
        model: model.name(),
        weight_bytes: model.arena().len() as u64,
        backing: model.backing(),
        pages: Pages::of(model.arena()),
        isa: isa.name(),
        numerics: numerics.name(),
        batch: limits.batch,
        tests,
    };
    let mut out = std::io::stdout().lock();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&report)?)?;
    } else if args.csv {
        write_csv(&report, &mut out)?;
    } else {
        write_table(&report, &mut out)?;
    }
    if let Some(trace) = new_trace()? {
        // Chrome's trace format: an object with the events.
        let events = json!({ "traceEvents": events, "displayTimeUnit": "ms" });
        trace.write(|out| Ok(write!(out, "{events}")?))?;
        trace.commit()?;
    }
    Ok(())
}

fn parse_backing(name: &str) -> std::result::Result<Backing, &'static str> {
    match name {
        "map" => Ok(Backing::Map),
        "read" => Ok(Backing::Read),
        _ => Err("map the file or read it into memory"),
    }
}

impl Kind {
    /// The forward passes: one for all tokens, or one for each.
    fn steps(self, tokens: &[u32]) -> std::slice::Chunks<'_, u32> {
        match self {
            Kind::Prefill(n) => tokens.chunks(n),
            Kind::Decode(_) => tokens.chunks(1),
        }
    }

    fn tokens(self) -> usize {
        match self {
            Kind::Prefill(n) | Kind::Decode(n) => n,
        }
    }
}

impl Measurement {
    /// From the seconds of each repetition, and the work of one in units of `unit` seconds.
    fn new(
        kind: Kind,
        depth: usize,
        seconds: Vec<f64>,
        work: f64,
        unit: &'static str,
        limit: Option<f64>,
        roofline: Roofline,
    ) -> Measurement {
        let (name, prompt_tokens, generated_tokens) = match kind {
            Kind::Prefill(n) => (format!("pp{n}"), n, 0),
            Kind::Decode(n) => (format!("tg{n}"), 0, n),
        };
        let mut sorted = seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
        let tokens = kind.tokens() as f64;
        let rate = work / median;
        Measurement {
            test: if depth > 0 { format!("{name}@d{depth}") } else { name },
            threads: roofline.threads,
            prompt_tokens,
            generated_tokens,
            depth,
            tokens_per_second: Spread {
                median: tokens / median,
                min: tokens / sorted[sorted.len() - 1],
                max: tokens / sorted[0],
            },
            seconds,
            rate,
            unit,
            limit,
            share: limit.map(|limit| rate / limit),
            roofline,
            profile: Vec::new(),
        }
    }
}

/// A token for position `i`: the same ones in every run.
pub fn random_token(i: u32, vocab: u32) -> u32 {
    (i.wrapping_mul(0x9e37_79b9) >> 8) % vocab
}

fn write_table(report: &Report, out: &mut impl Write) -> Result<()> {
    let Report { pages, .. } = report;
    report.origin.write(out)?;
    let mut backing = report.backing.to_owned();
    if let Some(pages) = pages {
        backing +=
            &format!(", {} MiB resident, {} MiB in huge pages", pages.resident >> 10, pages.huge() >> 10);
    }
    writeln!(
        out,
        "model     {}, {} MB of weights, {backing}",
        report.model,
        report.weight_bytes / 1_000_000
    )?;
    let Report { isa, numerics, batch, .. } = report;
    writeln!(out, "run with  {isa}, {numerics} numerics, batch {batch}\n")?;
    writeln!(
        out,
        "| threads | test           |    tok/s |  slowest |  fastest |   rate | limit           | share |"
    )?;
    writeln!(
        out,
        "|--------:|:---------------|---------:|---------:|---------:|-------:|:----------------|------:|"
    )?;
    for test in &report.tests {
        let Spread { median, min, max } = test.tokens_per_second;
        let limit = test.limit.map_or("not measured".into(), |limit| format!("{limit:.1} {}", test.unit));
        let share = test.share.map_or("".into(), |share| format!("{:.1}%", 100.0 * share));
        writeln!(
            out,
            "| {:>7} | {:<14} | {median:>8.2} | {min:>8.2} | {max:>8.2} | {:>6.1} | {limit:<15} | {share:>5} |",
            test.threads, test.test, test.rate
        )?;
    }
    for test in report.tests.iter().filter(|test| !test.profile.is_empty()) {
        profile::write_table(&format!("{}, {} threads", test.test, test.threads), &test.profile, out)?;
    }
    Ok(())
}

fn write_csv(report: &Report, out: &mut impl Write) -> Result<()> {
    let number = |x: Option<f64>| x.map_or(String::new(), |x| x.to_string());
    let Report { origin: Origin { machine, version, commit, date }, pages, .. } = report;
    for (i, test) in report.tests.iter().enumerate() {
        let columns = [
            ("cpu", machine.cpu.clone()),
            ("cores", machine.cores.to_string()),
            ("os", machine.os.to_owned()),
            ("arch", machine.arch.to_owned()),
            ("kernel", machine.kernel.clone()),
            ("huge_pages", machine.huge_pages.clone()),
            ("version", (*version).to_owned()),
            ("commit", commit.unwrap_or_default().to_owned()),
            ("date", date.clone()),
            ("model", report.model.clone()),
            ("weight_bytes", report.weight_bytes.to_string()),
            ("backing", report.backing.to_owned()),
            ("resident_kib", pages.as_ref().map_or(String::new(), |p| p.resident.to_string())),
            ("huge_kib", pages.as_ref().map_or(String::new(), |p| p.huge().to_string())),
            ("isa", report.isa.to_owned()),
            ("numerics", report.numerics.to_owned()),
            ("batch", report.batch.to_string()),
            ("threads", test.threads.to_string()),
            ("test", test.test.clone()),
            ("prompt_tokens", test.prompt_tokens.to_string()),
            ("generated_tokens", test.generated_tokens.to_string()),
            ("depth", test.depth.to_string()),
            ("repetitions", test.seconds.len().to_string()),
            ("tok_s_median", test.tokens_per_second.median.to_string()),
            ("tok_s_min", test.tokens_per_second.min.to_string()),
            ("tok_s_max", test.tokens_per_second.max.to_string()),
            ("rate", test.rate.to_string()),
            ("unit", test.unit.to_owned()),
            ("limit", number(test.limit)),
            ("share", number(test.share)),
        ];
        if i == 0 {
            writeln!(out, "{}", columns.each_ref().map(|(name, _)| *name).join(","))?;
        }
        writeln!(out, "{}", columns.map(|(_, value)| csv_field(&value)).join(","))?;
    }
    Ok(())
}

/// Quoted if it must be (RFC 4180).
fn csv_field(text: &str) -> String {
    if text.contains([',', '"', '\n', '\r']) {
        format!("\"{}\"", text.replace('"', "\"\""))
    } else {
        text.to_owned()
    }
}
