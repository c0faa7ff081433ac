//! The error of a job in parts, the same one whichever thread met its error first.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Keeps the error of the lowest failing part; parts above it are skipped, parts below it still run, so that the
/// outcome does not depend on the number of threads.
#[derive(Debug)]
pub struct FirstError<E> {
    part: AtomicUsize,
    error: Mutex<Option<(usize, E)>>,
}

impl<E> FirstError<E> {
    /// No error so far.
    pub fn new() -> Self {
        FirstError { part: AtomicUsize::new(usize::MAX), error: Mutex::new(None) }
    }

    /// Runs `work` for part `part` unless a lower part has failed.
    pub fn attempt(&self, part: usize, work: impl FnOnce() -> Result<(), E>) {
        if part > self.part.load(Ordering::Relaxed) {
            return;
        }
        let Err(error) = work() else { return };
        self.part.fetch_min(part, Ordering::Relaxed);
        let mut kept = self.error.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if kept.as_ref().is_none_or(|(lowest, _)| part < *lowest) {
            *kept = Some((part, error));
        }
    }

    /// The error of the lowest part that failed.
    pub fn into_result(self) -> Result<(), E> {
        let kept = self.error.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        kept.map_or(Ok(()), |(_, error)| Err(error))
    }
}

impl<E> Default for FirstError<E> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_error_of_the_lowest_part_in_any_order() {
        for order in [[1, 2, 3], [3, 2, 1], [2, 3, 1]] {
            let first = FirstError::new();
            let mut ran = Vec::new();
            for part in order {
                first.attempt(part, || {
                    ran.push(part);
                    if part == 3 { Ok(()) } else { Err(part) }
                });
            }
            assert_eq!(first.into_result(), Err(1));
            assert!(ran.contains(&1) && (order[0] != 1 || ran == [1]), "{ran:?}");
        }
        assert_eq!(FirstError::<()>::new().into_result(), Ok(()));
    }
}
