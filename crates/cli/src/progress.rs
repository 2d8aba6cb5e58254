//! Progress bars: on standard error, and only where that is a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

const TICK: Duration = Duration::from_millis(120);

/// One bar, removed when it is dropped.
#[derive(Debug)]
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar over `length` bytes.
    #[must_use]
    pub fn bytes(doing: &str, length: u64) -> Self {
        Self::styled(
            doing,
            ProgressBar::new(length),
            "{msg} {wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  {eta}",
        )
    }

    /// A bar whose length is not known yet.
    #[must_use]
    pub fn spinner(doing: &str) -> Self {
        Self::styled(doing, ProgressBar::new_spinner(), "{spinner} {msg}")
    }

    fn styled(doing: &str, bar: ProgressBar, template: &str) -> Self {
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(doing.to_owned());
        bar.enable_steady_tick(TICK);
        Self(bar)
    }

    /// So many bytes are behind.
    pub fn at(&self, position: u64) {
        self.0.set_position(position);
    }

    /// What is being done now.
    pub fn say(&self, doing: String) {
        self.0.set_message(doing);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
