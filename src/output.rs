//! What the user sees: text or one JSON document on standard output; progress and notes on standard
//! error.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::Duration;

use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use tidemark_exporter::RunEvent;

/// How a command speaks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
    quiet: bool,
}

impl Output {
    /// From the global options.
    pub(crate) fn new(json: bool, quiet: bool) -> Self {
        Self { json, quiet }
    }

    /// Whether standard output carries JSON.
    pub(crate) fn json(&self) -> bool {
        self.json
    }

    /// The result: as JSON, or as text made only when it is wanted.
    pub(crate) fn result<T: Serialize>(&self, value: &T, text: impl FnOnce() -> String) {
        if self.json {
            match serde_json::to_string_pretty(value) {
                Ok(document) => println!("{document}"),
                Err(e) => eprintln!("tidemark: cannot print the result as JSON: {e}"),
            }
        } else {
            let text = text();
            if !text.is_empty() {
                println!("{}", text.trim_end());
            }
        }
    }

    /// A remark for people.
    pub(crate) fn note(&self, text: &str) {
        if !self.quiet {
            eprintln!("{text}");
        }
    }

    /// A progress display; silent with `--quiet`, plain lines without a terminal.
    pub(crate) fn progress(&self) -> ProgressView {
        ProgressView::new(self.quiet)
    }
}

/// Shows a long operation: bar, rate, time left; changed, new and stored bytes.
pub(crate) struct ProgressView {
    bar: ProgressBar,
    plain: bool,
    step: Mutex<String>,
}

impl ProgressView {
    fn new(quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let bar = ProgressBar::with_draw_target(
            None,
            if quiet || !terminal {
                ProgressDrawTarget::hidden()
            } else {
                ProgressDrawTarget::stderr()
            },
        );
        bar.set_style(spinner());
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, plain: !terminal && !quiet, step: Mutex::new(String::new()) }
    }

    /// Takes an event of a run.
    pub(crate) fn event(&self, event: &RunEvent) {
        match event {
            RunEvent::Step { step } => self.step(step),
            RunEvent::Progress { done, total, new_bytes, stored_bytes } => {
                self.update(*done, *total);
                self.bar.set_message(format!(
                    "new {} stored {}",
                    HumanBytes(*new_bytes),
                    HumanBytes(*stored_bytes)
                ));
            }
            RunEvent::Note { text } => self.note(text),
        }
    }

    /// Takes progress of an engine operation.
    pub(crate) fn engine(&self, what: &str, done: u64, total: u64) {
        if self.step.lock().is_ok_and(|s| *s != what) {
            self.step(what);
        }
        self.update(done, total);
    }

    fn step(&self, step: &str) {
        if let Ok(mut current) = self.step.lock() {
            step.clone_into(&mut current);
        }
        self.bar.set_style(spinner());
        self.bar.set_length(0);
        self.bar.set_position(0);
        self.bar.reset_eta();
        self.bar.set_message("");
        self.bar.set_prefix(step.to_owned());
        if self.plain {
            eprintln!("{step}");
        }
    }

    fn update(&self, done: u64, total: u64) {
        if total > 0 && self.bar.length() != Some(total) {
            self.bar.set_style(bytes());
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
    }

    /// A remark above the bar.
    pub(crate) fn note(&self, text: &str) {
        if self.plain {
            eprintln!("note: {text}");
        } else {
            self.bar.println(format!("note: {text}"));
        }
    }

    /// Takes the display away.
    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

fn spinner() -> ProgressStyle {
    ProgressStyle::with_template("{spinner} {prefix} {elapsed}")
        .unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn bytes() -> ProgressStyle {
    ProgressStyle::with_template(
        "{spinner} {prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta} left  {msg}",
    )
    .map_or_else(|_| ProgressStyle::default_bar(), |s| s.progress_chars("=> "))
}

/// A plain table, columns aligned, no frame.
pub(crate) fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header);
    for row in rows {
        table.add_row(row);
    }
    table.to_string().lines().map(str::trim_end).collect::<Vec<_>>().join("\n")
}

/// Bytes for people.
pub(crate) fn human(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}

/// Milliseconds as seconds for people.
pub(crate) fn seconds(millis: u64) -> String {
    format!("{}.{:01}", millis / 1000, millis % 1000 / 100)
}

/// Microseconds as milliseconds for people.
pub(crate) fn millis(micros: u64) -> String {
    format!("{}.{:01}", micros / 1000, micros % 1000 / 100)
}
