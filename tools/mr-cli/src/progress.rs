//! What shows on a terminal how far long work is. It stands on standard error, nowhere if that is no terminal, and goes when it
//! is dropped.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};

/// A bar for work on so many bytes; `what` is the work.
pub fn progress_bar(what: &'static str, bytes: u64) -> ProgressBar {
    let style = "{msg} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(style).expect("the template is valid");
    ProgressBar::new(bytes).with_style(style).with_message(what).with_finish(ProgressFinish::AndClear)
}

/// Something that moves, where nothing counts the work.
pub(crate) fn spinner(message: String) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(message).with_finish(ProgressFinish::AndClear);
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}
