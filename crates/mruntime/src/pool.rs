//! A fork-join pool with persistent workers: `run` splits a job into parts, the caller is worker 0.
//!
//! A forward pass forks and joins some hundred times a token, so a fork has to cost next to nothing: the workers
//! spin for a moment after each job before they sleep, a job is published with one atomic store, and nothing is
//! allocated. A join never waits for a worker that has not begun: what a sleeping or descheduled worker leaves
//! undone is stolen by the others, part by part, so a core that another program slows down costs one part at most.
//!
//! `run` takes `&mut self`: one job at a time, and a job cannot start another one on the same pool.

use crate::error::Error;
use mrt_kernels::Window;
use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// The most threads a pool can have; a job keeps their number in 12 bits.
pub const MAX_THREADS: usize = 1024;

/// How long a thread spins before it sleeps. Waking a sleeper costs a system call and 5 to 50 microseconds of the
/// scheduler's time; the serial pieces between two jobs of a forward pass are shorter than this.
const SPIN: Duration = Duration::from_micros(50);

/// Spins between two looks at the clock, which costs as much as some of them.
const SPINS_PER_CLOCK: u32 = 32;

/// A fork-join pool; see the [module documentation](self). It belongs to its process: a child made by `fork` has none of
/// its threads, and makes a pool of its own.
pub struct Pool {
    shared: Arc<Shared>,
    /// Worker `w` is `handles[w - 1]`; worker 0 is whoever calls.
    handles: Vec<JoinHandle<()>>,
    threads: usize,
    epoch: u32,
}

impl Pool {
    /// Starts `threads - 1` workers; the thread that calls [`run`](Self::run) is the remaining one.
    ///
    /// # Errors
    /// When `threads` is 0 or above [`MAX_THREADS`], or when the system refuses a thread.
    pub fn new(threads: usize) -> Result<Self, Error> {
        if threads == 0 || threads > MAX_THREADS {
            let reason = format!("it must be 1 to {MAX_THREADS}");
            return Err(Error::Threads { threads, reason });
        }
        let shared = Arc::new(Shared {
            state: Padded(AtomicU64::new(0)),
            job: UnsafeCell::new(&|_: usize, _: usize| ()),
            workers: (0..threads).map(|_| Padded(Worker::default())).collect(),
            caller: Mutex::new(None),
            panic: Mutex::new(None),
        });
        // From here on an early return drops the pool, which stops the workers that have started.
        let mut pool = Self { shared, handles: Vec::with_capacity(threads - 1), threads, epoch: 0 };
        for w in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let worker = thread::Builder::new().name(format!("mruntime-{w}"));
            let handle = worker
                .spawn(move || shared.work(w))
                .map_err(|error| Error::Threads { threads, reason: error.to_string() })?;
            pool.handles.push(handle);
        }
        Ok(pool)
    }

    /// The number of threads that jobs use, the caller included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// The number of threads that the pool owns, the caller included.
    pub fn max_threads(&self) -> usize {
        self.handles.len() + 1
    }

    /// Lets the following jobs use the first `threads` threads only, at least one and at most all
    /// (decoding is bound by memory and is often fastest on fewer threads than prefill).
    pub fn set_threads(&mut self, threads: usize) {
        self.threads = threads.clamp(1, self.max_threads());
    }

    /// Calls `f(worker, part)` exactly once for each part in `0..parts` and returns when all are done.
    ///
    /// Worker `w` of `T` takes the parts from `w * parts / T` upwards, so that each thread streams through memory
    /// in order; when it is done, it takes over the last parts of the others. At no time do two calls with the
    /// same `worker` run. A panic in `f` is resumed here after all threads have left the job; other parts may
    /// then not have run, and the pool stays usable.
    ///
    /// # Panics
    /// When `f` does, and when `parts` exceeds `u32::MAX`.
    pub fn run(&mut self, parts: usize, f: impl Fn(usize, usize) + Sync) {
        // One copy of `f`'s code, for one thread and many, and for the caller and the workers.
        let f: &(dyn Fn(usize, usize) + Sync) = &f;
        match self.threads.min(parts) {
            0 | 1 => (0..parts).for_each(|part| f(0, part)),
            threads => self.fork_join(parts, threads, f),
        }
    }

    /// [`run`](Self::run) over the parts of a split: calls `f(worker, i, part)` for each.
    ///
    /// # Panics
    /// When `f` does, when the split has no count or pieces for fewer workers than [`threads`](Self::threads).
    pub fn run_split<S: Split>(&mut self, split: S, f: impl for<'p> Fn(usize, usize, S::Part<'p>) + Sync) {
        let parts = split.parts().expect("a split of per-worker data alone has no number of parts");
        let (threads, workers) = (self.threads, split.workers());
        assert!(threads <= workers, "per-worker data for {workers} workers, but {threads} threads run");
        // SAFETY: `run` passes each `i < parts` once, and a worker index below `threads` that is in one call at a
        // time; `f` cannot keep a part beyond its call, because it accepts one of any lifetime.
        self.run(parts, |worker, i| f(worker, i, unsafe { split.part(worker, i) }));
    }

    fn fork_join(&mut self, parts: usize, threads: usize, f: &(dyn Fn(usize, usize) + Sync)) {
        assert!(u32::try_from(parts).is_ok(), "a job of {parts} parts; at most {} are possible", u32::MAX);
        let shared = &*self.shared;
        let start = |w: usize| (w as u64 * parts as u64 / threads as u64) as u32;
        for (w, worker) in shared.workers[..threads].iter().enumerate() {
            worker.0.range.store(pack(start(w), start(w + 1)), Ordering::Relaxed);
        }
        // SAFETY: the types differ in the lifetime of what is pointed at only. See `Shared::job` for why nobody
        // uses the pointer after that.
        let job: Job = unsafe { std::mem::transmute(std::ptr::from_ref(f)) };
        // SAFETY: no job is open, and none can be opened meanwhile because we have `&mut self`; so no worker is
        // active (the previous `fork_join` waited for that), and only active workers read the job.
        unsafe { *shared.job.get() = job };
        self.epoch = self.epoch.wrapping_add(1);
        // Release: who enters the job sees it and the ranges. SeqCst: see `Shared::enter`.
        let state = OPEN | (threads as u64) << THREADS_SHIFT | u64::from(self.epoch) << EPOCH_SHIFT;
        shared.state.0.store(state, Ordering::SeqCst);
        for (worker, handle) in shared.workers[1..threads].iter().zip(&self.handles) {
            if worker.0.asleep.load(Ordering::SeqCst) {
                handle.thread().unpark();
            }
        }

        // The workers use `f`, so we must not unwind before they have all left.
        let own = catch_unwind(AssertUnwindSafe(|| shared.drain(0, threads, f)));
        let state = shared.close();
        let theirs = if state & PANICKED == 0 { None } else { lock(&shared.panic).take() };
        if let Some(payload) = own.err().or(theirs) {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.0.store(STOP, Ordering::SeqCst);
        for handle in self.handles.drain(..) {
            handle.thread().unpark();
            // A worker catches the panics of jobs and has none of its own.
            let _ = handle.join();
        }
    }
}

// The fields of `Shared::state`. A worker counts as active from entering a job until leaving it.
const ACTIVE: u64 = (1 << 16) - 1;
/// Workers may enter the job.
const OPEN: u64 = 1 << 16;
/// The caller sleeps until no worker is active.
const WAITING: u64 = 1 << 17;
/// A worker has put the payload of a panic into `Shared::panic`.
const PANICKED: u64 = 1 << 18;
/// The pool is being dropped.
const STOP: u64 = 1 << 19;
/// Workers below this number may enter, 12 bits.
const THREADS_SHIFT: u32 = 20;
/// The job's number, 32 bits, by which a worker knows that it has not had this job yet.
const EPOCH_SHIFT: u32 = 32;

/// One to a pair of cache lines: adjacent lines are prefetched together on x86-64, Apple's lines have 128 bytes.
#[repr(align(128))]
struct Padded<T>(T);

#[derive(Default)]
struct Worker {
    /// The parts that nobody has taken yet: start in the low half, end in the high half.
    range: AtomicU64,
    /// Set before the worker looks at the state for the last time and sleeps.
    asleep: AtomicBool,
}

fn pack(start: u32, end: u32) -> u64 {
    u64::from(start) | u64::from(end) << 32
}

impl Worker {
    /// Takes one part off the range, whose new limits `next` tells with the part.
    fn take(&self, next: impl Fn(u32, u32) -> (u32, u32, u32)) -> Option<usize> {
        // Relaxed: a part is taken once because a range is one atomic that only shrinks; what the parts read and
        // write is ordered by `Shared::state`.
        let mut range = self.range.load(Ordering::Relaxed);
        loop {
            let (start, end) = (range as u32, (range >> 32) as u32);
            if start >= end {
                return None;
            }
            let (part, start, end) = next(start, end);
            match self.range.compare_exchange_weak(
                range,
                pack(start, end),
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(part as usize),
                Err(now) => range = now,
            }
        }
    }

    fn take_first(&self) -> Option<usize> {
        self.take(|start, end| (start, start + 1, end))
    }

    fn take_last(&self) -> Option<usize> {
        self.take(|start, end| (end - 1, start, end - 1))
    }
}

/// What `run` was given: `f(worker, part)`.
type Job = *const (dyn Fn(usize, usize) + Sync);

struct Shared {
    state: Padded<AtomicU64>,
    /// Points at the closure of the last job, which is alive as long as a worker is active.
    job: UnsafeCell<Job>,
    workers: Box<[Padded<Worker>]>,
    /// Whom the last active worker wakes, when `WAITING` is set.
    caller: Mutex<Option<Thread>>,
    /// The payload of the first panic among the workers.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: all fields but `job` are Send and Sync. `job` is written by the caller when no worker is active, and read by
// active workers: entering and leaving are acquire and release operations on `state`, so the accesses do not race.
// Its closure is Sync, so any thread may call it, and outlives the job, because `fork_join` returns or unwinds
// only when the job is closed and no worker is active.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// The life of worker `w`.
    fn work(&self, w: usize) {
        let mut epoch = 0;
        while let Some(threads) = self.enter(w, &mut epoch) {
            // SAFETY: we are active, so the caller does not write the job.
            let job = unsafe { *self.job.get() };
            // SAFETY: the closure is alive as long as we are active, and we do not use it after leaving.
            let f = unsafe { &*job };
            let result = catch_unwind(AssertUnwindSafe(|| self.drain(w, threads, f)));
            self.leave(result);
        }
    }

    /// Waits for a job that worker `w` has not had yet and enters it. Returns the number of threads that share the
    /// job, or `None` when the pool is dropped.
    fn enter(&self, w: usize, epoch: &mut u32) -> Option<usize> {
        let mut spin = Spin::default();
        loop {
            let state = self.state.0.load(Ordering::Acquire);
            let threads = (state >> THREADS_SHIFT & 0xfff) as usize;
            let job_epoch = (state >> EPOCH_SHIFT) as u32;
            if state & STOP != 0 {
                return None;
            }
            if state & OPEN != 0 && job_epoch != *epoch && w < threads {
                // This fails when the caller closes the job or another worker enters or leaves.
                let active = state + 1;
                if self.state.0.compare_exchange(state, active, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    *epoch = job_epoch;
                    return Some(threads);
                }
            } else if !spin.turn() {
                // Either we see the caller's store to `state`, or the caller, which stores to `state` first and
                // then looks at `asleep`, sees that it has to wake us: all four accesses are SeqCst.
                let asleep = &self.workers[w].0.asleep;
                asleep.store(true, Ordering::SeqCst);
                if self.state.0.load(Ordering::SeqCst) == state {
                    thread::park();
                }
                asleep.store(false, Ordering::SeqCst);
            }
        }
    }

    /// Runs the worker's own parts, then those that the others have not come to.
    fn drain(&self, w: usize, threads: usize, f: &(dyn Fn(usize, usize) + Sync)) {
        while let Some(part) = self.workers[w].0.take_first() {
            f(w, part);
        }
        // Ranges only shrink, so one look at each is enough.
        for other in (w + 1..threads).chain(0..w) {
            while let Some(part) = self.workers[other].0.take_last() {
                f(w, part);
            }
        }
    }

    /// A worker's end of a job.
    fn leave(&self, result: thread::Result<()>) {
        if let Err(payload) = result {
            let mut first = lock(&self.panic);
            match *first {
                None => *first = Some(payload),
                // Dropping a payload runs foreign code that may panic again.
                Some(_) => std::mem::forget(payload),
            }
            drop(first);
            self.state.0.fetch_or(PANICKED, Ordering::Relaxed);
        }
        // Release: the caller, which acquires, sees what we did.
        let before = self.state.0.fetch_sub(1, Ordering::Release);
        if before & WAITING != 0
            && before & ACTIVE == 1
            && let Some(caller) = &*lock(&self.caller)
        {
            caller.unpark();
        }
    }

    /// The caller's end of a job: nobody enters any more, and those who have entered leave. Returns the state.
    fn close(&self) -> u64 {
        let mut state = self.state.0.fetch_and(!OPEN, Ordering::Acquire);
        let mut spin = Spin::default();
        while state & ACTIVE != 0 {
            if spin.turn() {
                state = self.state.0.load(Ordering::Acquire);
            } else if state & WAITING == 0 {
                *lock(&self.caller) = Some(thread::current());
                // Either a worker leaves after this and sees that it has to wake us, or we see that it has left.
                state = self.state.0.fetch_or(WAITING, Ordering::Acquire) | WAITING;
            } else {
                thread::park();
                state = self.state.0.load(Ordering::Acquire);
            }
        }
        state
    }
}

/// No holder of these locks panics, so a poisoned one is as good as any.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells when to stop spinning.
#[derive(Default)]
struct Spin {
    turns: u32,
    start: Option<Instant>,
}

impl Spin {
    /// Spins once; false when [`SPIN`] is over.
    fn turn(&mut self) -> bool {
        std::hint::spin_loop();
        self.turns += 1;
        if self.turns.is_multiple_of(SPINS_PER_CLOCK) {
            return self.start.get_or_insert_with(Instant::now).elapsed() < SPIN;
        }
        true
    }
}

/// Mutable data that falls into parts which threads may use at the same time; see [`Pool::run_split`].
///
/// # Safety
/// Parts that are alive at the same time must not overlap, and must be fit for use by any thread, provided that the
/// caller keeps to the contract of [`part`](Self::part).
pub unsafe trait Split: Sync {
    /// One part, for the time of one call.
    type Part<'p>;

    /// The number of parts; `None` when the data goes with any number.
    fn parts(&self) -> Option<usize>;

    /// The number of workers that the data serves.
    fn workers(&self) -> usize {
        usize::MAX
    }

    /// The part `i` of `parts()` for the worker `worker` of `workers()`.
    ///
    /// # Safety
    /// `i` must be below [`parts`](Self::parts) and be asked for once at most; `worker` must be below
    /// [`workers`](Self::workers) and have no other part alive; the lifetime `'p` must end before the split does.
    unsafe fn part<'p>(&self, worker: usize, i: usize) -> Self::Part<'p>;
}

/// A slice in consecutive pieces of one length; the last may be shorter. Part `i` is the `i`-th piece.
pub struct Chunks<'a, T> {
    data: NonNull<T>,
    len: usize,
    piece: usize,
    borrow: PhantomData<&'a mut [T]>,
}

impl<'a, T: Send + 'static> Chunks<'a, T> {
    /// Cuts `data` into pieces of `piece` elements.
    ///
    /// # Panics
    /// When `piece` is 0.
    pub fn new(data: &'a mut [T], piece: usize) -> Self {
        assert!(piece > 0, "pieces of no elements");
        Self { len: data.len(), data: NonNull::from(data).cast(), piece, borrow: PhantomData }
    }
}

// SAFETY: through a shared `Chunks` threads get at disjoint `&mut [T]` only, which is Send when T is.
unsafe impl<T: Send> Sync for Chunks<'_, T> {}

// SAFETY: pieces with different `i` do not overlap: piece `i` lies within [i * piece, (i + 1) * piece).
unsafe impl<T: Send + 'static> Split for Chunks<'_, T> {
    type Part<'p> = &'p mut [T];

    fn parts(&self) -> Option<usize> {
        Some(self.len.div_ceil(self.piece))
    }

    unsafe fn part<'p>(&self, _worker: usize, i: usize) -> &'p mut [T] {
        let start = i * self.piece;
        let len = self.piece.min(self.len - start);
        // SAFETY: i < ceil(len / piece), so start < len: the piece lies within the slice that `new` borrowed for
        // longer than 'p, and nobody else has it, because `i` comes once only.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr().add(start), len) }
    }
}

/// Scratch memory for each worker: every part that worker `w` runs gets the `w`-th piece, as the part before left it.
/// Goes with any number of parts; combine it with another split in a tuple.
pub struct PerWorker<'a, T> {
    data: NonNull<T>,
    workers: usize,
    piece: usize,
    borrow: PhantomData<&'a mut [T]>,
}

impl<'a, T: Send + 'static> PerWorker<'a, T> {
    /// Cuts `data` into pieces of `piece` elements, one to a worker; a remainder is not used.
    ///
    /// # Panics
    /// When `piece` is 0.
    pub fn new(data: &'a mut [T], piece: usize) -> Self {
        assert!(piece > 0, "pieces of no elements");
        Self { workers: data.len() / piece, data: NonNull::from(data).cast(), piece, borrow: PhantomData }
    }
}

// SAFETY: as for `Chunks`.
unsafe impl<T: Send> Sync for PerWorker<'_, T> {}

// SAFETY: pieces of different workers do not overlap, and a worker has one part alive at a time.
unsafe impl<T: Send + 'static> Split for PerWorker<'_, T> {
    type Part<'p> = &'p mut [T];

    fn parts(&self) -> Option<usize> {
        None
    }

    fn workers(&self) -> usize {
        self.workers
    }

    unsafe fn part<'p>(&self, worker: usize, _i: usize) -> &'p mut [T] {
        // SAFETY: worker < len / piece, so the piece lies within the slice that `new` borrowed for longer than 'p, and
        // nobody else has it, because the worker has no other part alive.
        unsafe { std::slice::from_raw_parts_mut(self.data.as_ptr().add(worker * self.piece), self.piece) }
    }
}

/// A matrix in blocks of rows and columns; those at the right and lower edges may be smaller. Part `i` is block
/// `i % across` of the `i / across`-th row of blocks, where `across` blocks lie side by side.
pub struct Blocks<'a> {
    matrix: Window<'a>,
    rows: usize,
    columns: usize,
}

impl<'a> Blocks<'a> {
    /// Cuts `matrix` into blocks of `rows` × `columns` elements.
    ///
    /// # Panics
    /// When `rows` or `columns` is 0.
    pub fn new(matrix: Window<'a>, rows: usize, columns: usize) -> Self {
        assert!(rows > 0 && columns > 0, "blocks of no elements");
        Self { matrix, rows, columns }
    }

    /// How many blocks lie side by side.
    pub fn across(&self) -> usize {
        self.matrix.columns().div_ceil(self.columns)
    }
}

// SAFETY: blocks with different `i` share no element, and a `Window` may go to any thread.
unsafe impl Split for Blocks<'_> {
    type Part<'p> = Window<'p>;

    fn parts(&self) -> Option<usize> {
        Some(self.matrix.rows().div_ceil(self.rows) * self.across())
    }

    unsafe fn part<'p>(&self, _worker: usize, i: usize) -> Window<'p> {
        let range = |i: usize, piece: usize, end: usize| i * piece..((i + 1) * piece).min(end);
        let rows = range(i / self.across(), self.rows, self.matrix.rows());
        let columns = range(i % self.across(), self.columns, self.matrix.columns());
        // SAFETY: each `i` comes once, so no other block shares an element, and the matrix is written through its
        // blocks only. The borrow behind the window outlives 'p, as the caller promises.
        unsafe { std::mem::transmute::<Window<'_>, Window<'p>>(self.matrix.part(rows, columns)) }
    }
}

// SAFETY: the two splits borrow different data, and each gets the calls that its contract allows.
unsafe impl<A: Split, B: Split> Split for (A, B) {
    type Part<'p> = (A::Part<'p>, B::Part<'p>);

    /// # Panics
    /// When the two have different counts.
    fn parts(&self) -> Option<usize> {
        let (a, b) = (self.0.parts(), self.1.parts());
        assert!(a.is_none() || b.is_none() || a == b, "a split of {a:?} parts beside one of {b:?}");
        a.or(b)
    }

    fn workers(&self) -> usize {
        self.0.workers().min(self.1.workers())
    }

    unsafe fn part<'p>(&self, worker: usize, i: usize) -> Self::Part<'p> {
        // SAFETY: the caller's promise for the pair holds for both.
        unsafe { (self.0.part(worker, i), self.1.part(worker, i)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    fn pool(threads: usize) -> Pool {
        Pool::new(threads).unwrap()
    }

    #[test]
    fn every_part_runs_once() {
        // Also more threads than cores and fewer parts than threads.
        for threads in [1, 2, 3, 8] {
            let mut pool = pool(threads);
            for parts in [0, 1, 2, 3, 7, 8, 9, 100, 1000] {
                let counts: Vec<_> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
                pool.run(parts, |worker, part| {
                    assert!(worker < threads);
                    counts[part].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.into_iter().all(|count| count.into_inner() == 1), "{threads} {parts}");
            }
        }
    }

    #[test]
    fn many_small_jobs_on_more_threads_than_cores() {
        let mut pool = pool(8);
        let mut sums = [0u64; 13];
        for round in 0..20_000 {
            pool.run_split(Chunks::new(&mut sums, 1), |_, i, sum| sum[0] += i as u64 + round);
        }
        let rounds: u64 = (0..20_000).sum();
        for (i, sum) in sums.iter().enumerate() {
            assert_eq!(*sum, rounds + 20_000 * i as u64);
        }
    }

    #[test]
    fn jobs_after_sleep() {
        let mut pool = pool(3);
        for _ in 0..20 {
            // Both sides of the time at which the workers fall asleep.
            for pause in [SPIN / 2, SPIN, SPIN * 2] {
                thread::sleep(pause);
                let count = AtomicUsize::new(0);
                pool.run(5, |_, _| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(count.into_inner(), 5);
            }
        }
    }

    #[test]
    fn one_worker_does_what_a_blocked_one_leaves() {
        let mut pool = pool(2);
        let done = AtomicUsize::new(0);
        // Part 0 is the caller's first; it ends only when all others, the caller's own too, have been run.
        pool.run(100, |_, part| {
            if part == 0 {
                while done.load(Ordering::Relaxed) < 99 {
                    thread::yield_now();
                }
            } else {
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
        assert_eq!(done.into_inner(), 99);
    }

    #[test]
    fn a_worker_runs_one_part_at_a_time() {
        let mut pool = pool(4);
        let busy: [AtomicBool; 4] = Default::default();
        for _ in 0..500 {
            pool.run(16, |worker, _| {
                assert!(!busy[worker].swap(true, Ordering::Acquire));
                std::hint::spin_loop();
                assert!(busy[worker].swap(false, Ordering::Release));
            });
        }
    }

    #[test]
    fn a_limit_keeps_the_other_workers_out() {
        let mut pool = pool(4);
        pool.set_threads(2);
        assert_eq!((pool.threads(), pool.max_threads()), (2, 4));
        for _ in 0..1000 {
            pool.run(8, |worker, _| assert!(worker < 2));
        }
        pool.set_threads(0);
        assert_eq!(pool.threads(), 1);
        pool.set_threads(99);
        assert_eq!(pool.threads(), 4);
    }

    #[test]
    fn a_panic_arrives_at_the_caller_and_the_pool_stays_usable() {
        let mut pool = pool(4);
        for bad in [0, 5, 15] {
            for _ in 0..50 {
                let result = catch_unwind(AssertUnwindSafe(|| {
                    pool.run(16, |_, part| {
                        if part == bad {
                            // Without the message that `panic!` prints.
                            resume_unwind(Box::new(part));
                        }
                    });
                }));
                assert_eq!(result.unwrap_err().downcast_ref::<usize>(), Some(&bad));
                let count = AtomicUsize::new(0);
                pool.run(16, |_, _| {
                    count.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(count.into_inner(), 16);
            }
        }
    }

    #[test]
    fn of_two_panics_none_is_left_for_the_next_job() {
        let mut pool = pool(2);
        for both in [true, false] {
            let worker_ran = AtomicBool::new(false);
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(2, |_, part| {
                    if part == 1 {
                        worker_ran.store(true, Ordering::Relaxed);
                        resume_unwind(Box::new(if both { "old" } else { "new" }));
                    }
                    // The caller cannot take part 1 while it is here.
                    while !worker_ran.load(Ordering::Relaxed) {
                        thread::yield_now();
                    }
                    if both {
                        resume_unwind(Box::new("caller"));
                    }
                });
            }));
            let expected = if both { "caller" } else { "new" };
            assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&expected));
        }
    }

    #[test]
    fn splits_hand_out_every_element_once() {
        for threads in [1, 2, 5] {
            let mut pool = pool(threads);
            for (len, piece) in [(0, 4), (1, 4), (4, 4), (1003, 10), (1000, 1)] {
                let mut data = vec![0u32; len];
                pool.run_split(Chunks::new(&mut data, piece), |_, i, part| {
                    for (j, value) in part.iter_mut().enumerate() {
                        *value += (i * piece + j) as u32;
                    }
                });
                assert!(data.iter().enumerate().all(|(i, &value)| value == i as u32));
            }
        }
    }

    #[test]
    fn blocks_cover_a_window_and_nothing_else() {
        let (stride, rows, columns) = (12, 5, 10);
        for threads in [1, 3] {
            for (block_rows, block_columns) in [(1, 1), (2, 4), (5, 10), (9, 99), (3, 10)] {
                let mut matrix = vec![0.0; rows * stride];
                let window = Window::new(&mut matrix, rows, columns, stride);
                let blocks = Blocks::new(window, block_rows, block_columns);
                let across = blocks.across();
                pool(threads).run_split(blocks, |_, i, mut block| {
                    for row in 0..block.rows() {
                        for (column, x) in block.row(row).iter_mut().enumerate() {
                            let (row, column) =
                                (i / across * block_rows + row, i % across * block_columns + column);
                            *x += (row * stride + column + 1) as f32;
                        }
                    }
                });
                for (i, &x) in matrix.iter().enumerate() {
                    assert_eq!(x, if i % stride < columns { i as f32 + 1.0 } else { 0.0 });
                }
            }
        }
    }

    #[test]
    fn a_tuple_splits_both_and_per_worker_data_persists() {
        let mut pool = pool(3);
        let (mut a, mut b, mut counts) = (vec![0u8; 50], vec![0u16; 100], vec![0usize; 3 * 16 + 1]);
        let split = ((Chunks::new(&mut a, 1), Chunks::new(&mut b, 2)), PerWorker::new(&mut counts, 16));
        pool.run_split(split, |worker, i, ((a, b), count)| {
            assert_eq!(count.len(), 16);
            (a[0], b[1]) = (i as u8, i as u16 + 1);
            count[0] += 1;
            count[15] = worker;
        });
        assert!((0..50).all(|i| a[i] == i as u8 && b[2 * i] == 0 && b[2 * i + 1] == i as u16 + 1));
        assert_eq!(counts[0] + counts[16] + counts[32], 50);
        assert_eq!(counts[48], 0);
    }

    #[test]
    #[should_panic(expected = "per-worker data for 2 workers, but 3 threads run")]
    fn per_worker_data_for_too_few_workers() {
        let (mut a, mut scratch) = ([0u8; 9], [0u8; 2]);
        let split = (Chunks::new(&mut a, 1), PerWorker::new(&mut scratch, 1));
        pool(3).run_split(split, |_, _, _| ());
    }

    #[test]
    #[should_panic(expected = "a split of Some(9) parts beside one of Some(3)")]
    fn a_tuple_of_different_counts() {
        let (mut a, mut b) = ([0u8; 9], [0u8; 9]);
        pool(2).run_split((Chunks::new(&mut a, 1), Chunks::new(&mut b, 3)), |_, _, _| ());
    }

    #[test]
    fn impossible_numbers_of_threads() {
        for threads in [0, MAX_THREADS + 1] {
            let error = Pool::new(threads).err().unwrap().to_string();
            assert_eq!(error, format!("cannot run on {threads} threads: it must be 1 to 1024"));
        }
    }
}
