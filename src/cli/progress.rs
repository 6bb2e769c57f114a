//! Progress on a terminal; nothing at all in a pipe.

use crate::pipeline::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// One bar per stage, with the time left.
pub struct Bars {
    bar: ProgressBar,
}

impl Bars {
    pub fn new() -> Self {
        Self { bar: ProgressBar::hidden() }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Progress for Bars {
    fn stage(&mut self, name: &'static str, steps: usize) {
        self.finish();
        // Standard error; hidden by indicatif itself where that is no terminal.
        self.bar = ProgressBar::new(steps as u64);
        if let Ok(style) = ProgressStyle::with_template("{prefix:>18} {wide_bar} {pos}/{len} {msg:>10} {elapsed} (left {eta})") {
            self.bar.set_style(style);
        }
        self.bar.set_prefix(name);
    }

    fn step(&mut self, done: usize, doing: &str) {
        self.bar.set_message(doing.to_owned());
        self.bar.set_position(done as u64);
    }
}
