//! Progress: a bar on a terminal, now and then a line elsewhere.

use std::io::IsTerminal as _;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::say;

/// How many steps are done, and a message beside it.
///
/// On a terminal it is one line that is drawn anew. Elsewhere (a log, a pipe) messages are whole lines.
#[derive(Debug)]
pub(crate) struct Bar {
    bar: Option<ProgressBar>,
}

impl Bar {
    /// A bar of `total` steps of `name`.
    pub(crate) fn new(name: &'static str, total: usize) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr_with_hz(10));
            let style = ProgressStyle::with_template("{prefix:<10} {wide_bar:.cyan/blue} {pos}/{len} {msg}");
            // The template is constant; a mistake in it would show the default style.
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─"));
            bar.set_prefix(name);
            bar
        });
        Self { bar }
    }

    /// Whether it is drawn; else [`Bar::line`] is all there is to see.
    pub(crate) fn is_drawn(&self) -> bool {
        self.bar.is_some()
    }

    /// Goes to a step.
    pub(crate) fn set(&self, done: usize, message: impl Into<String>) {
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
            let message: String = message.into();
            bar.set_message(message);
        }
    }

    /// A whole line, above the bar.
    pub(crate) fn line(&self, line: impl std::fmt::Display) {
        match &self.bar {
            Some(bar) => bar.suspend(|| say(line)),
            None => say(line),
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The progress of downloads, a file at a time.
#[derive(Debug, Default)]
pub(crate) struct Download {
    file: String,
    bar: Option<ProgressBar>,
}

impl Download {
    /// Nothing is shown yet.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// `bytes` of `total` of `file` are there.
    pub(crate) fn update(&mut self, file: &str, bytes: u64, total: Option<u64>) {
        if self.file != file {
            self.begin(file, total);
        }
        if let Some(bar) = &self.bar {
            bar.set_position(bytes);
        }
    }

    fn begin(&mut self, file: &str, total: Option<u64>) {
        self.finish();
        file.clone_into(&mut self.file);
        if !std::io::stderr().is_terminal() {
            let size = total.map_or_else(String::new, |total| format!(", {}", super::bytes(total as usize)));
            say(format_args!("download   {file}{size}"));
            return;
        }
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(10));
        let style = ProgressStyle::with_template("download   {msg} {wide_bar:.cyan/blue} {bytes}/{total_bytes} {bytes_per_sec}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━╸─"));
        bar.set_message(file.to_owned());
        self.bar = Some(bar);
    }

    /// Takes the bar away.
    pub(crate) fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
