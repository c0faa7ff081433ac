//! `mr-bench roofline`: what this machine can do at best, measured here and now: how fast it reads memory, its f32 FMA peak, and
//! the peak of the fast lane's unit.
//!
//! Decoding reads every weight once a token, so the read bandwidth bounds it; prefill multiplies, so the peak does.

use std::hint::black_box;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use clap::Args;
use mr_cli::Result;
use mrt_kernels::{FastLane, Isa, Numerics, fast_peak, fma_peak, read_peak, read_peak_in_turn};
use mruntime::{Arena, Pool, aligned_bytes};
use serde::Serialize;
use serde_json::json;

use crate::machine::Origin;

/// What is read in one pass, 1 GB: far more than any cache holds, as a model is. No power of two, whose parts would fall into
/// the same sets of the caches.
const READ_LEN: usize = 250_000_000;

/// Rounds of multiply-adds in one pass: some milliseconds, so that forking and joining do not count.
const FMA_ROUNDS: u64 = 1 << 22;

/// Passes of each kind in a sample.
const PASSES: usize = 3;

/// How long [`run`] takes samples for each number of threads.
const TIME: Duration = Duration::from_secs(3);

/// Measure this machine's read bandwidth, f32 FMA peak and the fast lane's peak, the limits of decoding and prefill
#[derive(Args)]
pub struct RooflineArgs {
    /// Numbers of threads [default: 1 and all fast physical cores]
    #[arg(short, long, value_name = "N,...", value_delimiter = ',', value_parser = mr_cli::parse_threads)]
    threads: Vec<usize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: RooflineArgs) -> Result<()> {
    let mut threads = args.threads;
    if threads.is_empty() {
        threads = vec![1, mruntime::performance_cores()];
        threads.dedup();
    }
    let (origin, mut memory) = (Origin::now(), memory()?);
    let measure = |&threads| -> Result<Roofline> {
        let (mut meter, mut pool) = (Meter::new(&mut memory)?, Pool::new(threads)?);
        let start = Instant::now();
        while start.elapsed() < TIME {
            meter.sample(&mut pool);
        }
        Ok(meter.roofline(threads))
    };
    let rooflines: Vec<_> = threads.iter().map(measure).collect::<Result<_>>()?;
    let mut out = io::stdout().lock();
    if args.json {
        writeln!(out, "{}", origin.with(json!({ "roofline": rooflines }))?)?;
    } else {
        origin.write(&mut out)?;
        writeln!(out)?;
        write_table(&rooflines, &mut out)?;
    }
    Ok(())
}

/// The limits at one number of threads.
#[derive(Serialize)]
pub struct Roofline {
    /// Threads at work.
    pub threads: usize,
    /// Reading of anonymous memory (huge pages where the system gives them), GB/s: each thread from one place or from four
    /// in turn, whichever is faster.
    pub read_gb_s: Rate,
    /// f32 multiply-adds in registers, GFLOP/s, for each instruction set.
    pub fma_gflop_s: Vec<FmaPeak>,
    /// Products of 16-bit numbers and their sums in registers, GFLOP/s; none without a fast lane.
    pub fast_gflop_s: Option<FastPeak>,
}

/// The peak of the fast lane's unit.
#[derive(Serialize)]
pub struct FastPeak {
    /// The lane's name, as results are labelled.
    pub numerics: &'static str,
    /// GFLOP/s, two operations for each product.
    #[serde(flatten)]
    pub rate: Rate,
}

/// The peak of one instruction set.
#[derive(Serialize)]
pub struct FmaPeak {
    /// The instruction set's name.
    pub isa: &'static str,
    /// GFLOP/s, two operations per multiply-add.
    #[serde(flatten)]
    pub rate: Rate,
}

/// Several passes in short.
#[derive(Serialize)]
pub struct Rate {
    /// The fastest pass.
    pub best: f64,
    /// The median pass.
    pub median: f64,
}

/// What bounds an operation, per second.
pub struct Limit {
    pub bytes_s: f64,
    /// Products with weights.
    pub flop_s: f64,
    /// Attention, which is exact on some fast lanes.
    pub attention_flop_s: f64,
}

impl Roofline {
    /// What bounds products; none where the peak is not measured.
    pub fn limit(&self, isa: Isa, numerics: Numerics) -> Option<Limit> {
        let exact = &self.fma_gflop_s.iter().find(|peak| peak.isa == isa.name())?.rate;
        let (products, attention) = match numerics {
            Numerics::Exact => (exact, exact),
            Numerics::Fast(lane) => {
                let fast = &self.fast_gflop_s.as_ref()?.rate;
                (fast, if lane.attends() { fast } else { exact })
            }
        };
        Some(Limit {
            bytes_s: 1e9 * self.read_gb_s.median,
            flop_s: 1e9 * products.median,
            attention_flop_s: 1e9 * attention.median,
        })
    }
}

/// The memory that a [`Meter`] reads. Who measures other things too keeps it until all is done: a virtual machine may give
/// freed memory back to its host, which occupies a core for some seconds.
///
/// # Errors
/// When it cannot be had.
pub fn memory() -> Result<Arena> {
    let mut arena = Arena::new(aligned_bytes::<f32>(READ_LEN))?;
    // Pages come into being when they are first written.
    arena.bump().alloc::<f32>(READ_LEN)?.fill(1.0);
    Ok(arena)
}

/// Measures the limits sample by sample, so that something else can be measured between: what a machine can do changes
/// from second to second when others use it too.
pub struct Meter<'a> {
    memory: &'a [f32],
    /// From one place, and from four in turn.
    read: [Vec<f64>; 2],
    fma: Vec<(Isa, Vec<f64>)>,
    fast: Option<(FastLane, Vec<f64>)>,
}

impl<'a> Meter<'a> {
    /// Reads what [`memory`] has made.
    ///
    /// # Errors
    /// When `memory` is something else.
    pub fn new(memory: &'a mut Arena) -> Result<Self> {
        let lane = FastLane::detect(Isa::detect()).filter(|&lane| fast_peak(lane, 1).is_some());
        Ok(Meter {
            memory: memory.bump().alloc(READ_LEN)?,
            read: Default::default(),
            fma: instruction_sets().map(|isa| (isa, Vec::new())).collect(),
            fast: lane.map(|lane| (lane, Vec::new())),
        })
    }

    /// Takes a sample: [`PASSES`] passes of each kind.
    pub fn sample(&mut self, pool: &mut Pool) {
        for _ in 0..PASSES {
            for (peak, rates) in [read_peak, read_peak_in_turn].into_iter().zip(&mut self.read) {
                rates.push(rate(size_of_val(self.memory) as f64, || read(pool, self.memory, peak)));
            }
            for (isa, rates) in &mut self.fma {
                rates.push(multiply(pool, |rounds| fma_peak(*isa, rounds)));
            }
            if let Some((lane, rates)) = &mut self.fast {
                rates.push(multiply(pool, |rounds| fast_peak(*lane, rounds).unwrap_or(0)));
            }
        }
    }

    /// The limits with so many threads, from the samples taken with them. There is at least one.
    pub fn roofline(&self, threads: usize) -> Roofline {
        let [one, four] = self.read.each_ref().map(|rates| Rate::of(rates));
        let fma = |(isa, rates): &(Isa, Vec<f64>)| FmaPeak { isa: isa.name(), rate: Rate::of(rates) };
        let fast =
            |(lane, rates): &(FastLane, Vec<f64>)| FastPeak { numerics: lane.name(), rate: Rate::of(rates) };
        Roofline {
            threads,
            read_gb_s: if one.median > four.median { one } else { four },
            fma_gflop_s: self.fma.iter().map(fma).collect(),
            fast_gflop_s: self.fast.as_ref().map(fast),
        }
    }
}

impl Rate {
    /// Of at least one pass.
    fn of(passes: &[f64]) -> Rate {
        let mut passes = passes.to_vec();
        passes.sort_by(f64::total_cmp);
        Rate { best: passes[passes.len() - 1], median: passes[passes.len() / 2] }
    }
}

/// Writes the limits as a table.
fn write_table(rooflines: &[Roofline], out: &mut impl Write) -> io::Result<()> {
    writeln!(out, "threads  limit                 unit       best    median")?;
    let mut row = |threads, limit: &str, unit, rate: &Rate| {
        writeln!(out, "{threads:>7}  {limit:<20}  {unit:<7}  {:>6.1}    {:>6.1}", rate.best, rate.median)
    };
    for roofline in rooflines {
        row(roofline.threads, "memory read", "GB/s", &roofline.read_gb_s)?;
        for peak in &roofline.fma_gflop_s {
            row(roofline.threads, &format!("f32 FMA, {}", peak.isa), "GFLOP/s", &peak.rate)?;
        }
        if let Some(peak) = &roofline.fast_gflop_s {
            row(roofline.threads, &format!("products, {}", peak.numerics), "GFLOP/s", &peak.rate)?;
        }
    }
    Ok(())
}

/// The vector instruction sets; the portable path, which may have to compute an FMA in software, where there is none.
fn instruction_sets() -> impl Iterator<Item = Isa> {
    let only_portable = Isa::supported().count() == 1;
    Isa::supported().filter(move |&isa| isa != Isa::PORTABLE || only_portable)
}

/// Reads all of `x`, each thread its part of it by `peak`.
fn read(pool: &mut Pool, x: &[f32], peak: fn(Isa, &[f32]) -> f32) {
    let threads = pool.threads();
    let isa = Isa::detect();
    pool.run(threads, |_, i| {
        black_box(peak(isa, &x[i * x.len() / threads..(i + 1) * x.len() / threads]));
    });
}

/// Multiplies on all threads; `peak` does so many rounds and says how many operations those were. In 10^9 a second.
fn multiply(pool: &mut Pool, peak: impl Fn(u64) -> u64 + Sync) -> f64 {
    let threads = pool.threads();
    let operations = peak(1) as f64 * FMA_ROUNDS as f64 * threads as f64;
    rate(operations, || pool.run(threads, |_, _| _ = peak(FMA_ROUNDS)))
}

/// Of one pass over `amount` of work; in 10^9 a second.
fn rate(amount: f64, pass: impl FnOnce()) -> f64 {
    let start = Instant::now();
    pass();
    amount / start.elapsed().as_secs_f64() / 1e9
}
