//! A thread pool that sessions take in turn.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use mruntime::Pool;

/// A pool for whoever has waited longest. A mutex alone is not fair: a session that generates would take it again and again
/// before a thread that waits for it is awake.
pub(crate) struct SharedPool {
    /// Never waited for: only the thread whose turn it is locks it.
    pool: Mutex<Pool>,
    turns: Mutex<Turns>,
    next: Condvar,
}

/// Numbers are drawn in the order in which threads ask for the pool.
#[derive(Default)]
struct Turns {
    /// How many have been drawn.
    drawn: u64,
    /// The one whose turn it is; `drawn` if nobody has the pool.
    current: u64,
}

impl SharedPool {
    pub(crate) fn new(pool: Pool) -> SharedPool {
        SharedPool { pool: Mutex::new(pool), turns: Mutex::default(), next: Condvar::new() }
    }

    /// Runs `f` with the pool, after all who have asked before.
    pub(crate) fn with<T>(&self, f: impl FnOnce(&mut Pool) -> T) -> T {
        let mut turns = lock(&self.turns);
        let mine = turns.drawn;
        turns.drawn += 1;
        drop(self.next.wait_while(turns, |turns| turns.current != mine));
        let _turn = Turn(self);
        f(&mut lock(&self.pool))
    }

    /// Threads that have the pool or wait for it.
    #[cfg(test)]
    pub(crate) fn users(&self) -> u64 {
        let turns = lock(&self.turns);
        turns.drawn - turns.current
    }
}

/// Ends when it is dropped, also by a panic.
struct Turn<'a>(&'a SharedPool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        lock(&self.0.turns).current += 1;
        self.0.next.notify_all();
    }
}

/// A pool stays usable after a panic in a job, and numbers are never half changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::thread;

    #[test]
    fn who_waits_is_next_although_others_ask_again_at_once() {
        let shared = SharedPool::new(Pool::new(1).unwrap());
        let order = Mutex::new(Vec::new());
        let take = |name| shared.with(|_| lock(&order).push(name));
        for _ in 0..20 {
            thread::scope(|scope| {
                shared.with(|_| {
                    scope.spawn(|| take("who waits"));
                    while shared.users() < 2 {
                        thread::yield_now();
                    }
                });
                (0..10).for_each(|_| take("others"));
            });
            let before = lock(&order).drain(..).take_while(|&name| name == "others").count();
            assert_eq!(before, 0, "turns of others while one has waited");
        }
    }

    #[test]
    fn a_panic_ends_a_turn_and_leaves_the_pool_usable() {
        let shared = SharedPool::new(Pool::new(2).unwrap());
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            shared.with(|pool| pool.run(2, |_, part| assert_ne!(part, 1, "a mistake in a job")));
        }));
        assert!(panicked.is_err());
        assert_eq!(shared.users(), 0);
        assert_eq!(shared.with(|pool| pool.threads()), 2);
    }
}
