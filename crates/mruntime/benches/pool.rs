//! What a fork and a join cost, beside rayon's ways of doing the same: medians over many calls.
//!
//! `empty`: every thread has one part that does nothing (a thread may take another's part).
//! `meet`: the parts wait for one another, so that every thread is known to have taken part.
//! `woken`: as `meet`, but the threads have slept before.

use mruntime::Pool;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const CALLS: usize = 20_000;
const WOKEN_CALLS: usize = 500;

/// Median time of a call in microseconds.
fn median(calls: usize, pause: Duration, mut call: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..calls)
        .map(|_| {
            if !pause.is_zero() {
                std::thread::sleep(pause);
            }
            let start = Instant::now();
            call();
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[calls / 2]
}

/// Waits until `threads` threads have come.
struct Meeting {
    came: AtomicUsize,
    threads: usize,
}

impl Meeting {
    fn new(threads: usize) -> Self {
        Self { came: AtomicUsize::new(0), threads }
    }

    /// The `n`-th call of a thread waits for the `n`-th calls of all others.
    fn wait(&self) {
        let round = self.came.fetch_add(1, Ordering::AcqRel) / self.threads;
        while self.came.load(Ordering::Acquire) < (round + 1) * self.threads {
            std::hint::spin_loop();
        }
    }
}

/// Prints a row: the medians of `fork_join`, which gets the work of a part.
fn row(name: &str, threads: usize, mut fork_join: impl FnMut(&(dyn Fn() + Sync))) {
    let meeting = Meeting::new(threads);
    let empty = median(CALLS, Duration::ZERO, || fork_join(&|| ()));
    let meet = median(CALLS, Duration::ZERO, || fork_join(&|| meeting.wait()));
    let woken = median(WOKEN_CALLS, Duration::from_millis(2), || fork_join(&|| meeting.wait()));
    println!("{name:<16} {threads:>7} {empty:>9.2} {meet:>9.2} {woken:>9.2}");
}

fn main() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("microseconds     threads     empty      meet     woken");
    for threads in [2, 4, 8].into_iter().filter(|&threads| threads <= cores) {
        let mut pool = Pool::new(threads).expect("threads");
        row("mruntime run", threads, |part| pool.run(threads, |_, _| part()));

        // Inside `install` the caller is one of rayon's workers, as ours is.
        let rayon = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        rayon.install(|| {
            row("rayon broadcast", threads, |part| {
                rayon.broadcast(|_| part());
            });
            row("rayon scope", threads, |part| {
                rayon::scope(|scope| {
                    for _ in 1..threads {
                        scope.spawn(|_| part());
                    }
                    part();
                });
            });
            if threads == 2 {
                row("rayon join", threads, |part| {
                    rayon::join(part, part);
                });
            }
        });
    }
}
