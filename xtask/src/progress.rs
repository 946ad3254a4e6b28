//! Shows what is going on: a spinner or a bar on a terminal, plain lines in a log.

use std::cell::RefCell;
use std::io::IsTerminal;
use std::time::Duration;

use cuda_builder::setup::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// Progress on standard error; the line disappears when dropped.
pub struct Shown {
    bar: ProgressBar,
    on_terminal: bool,
    /// The step that is named in the log, so that it is named once.
    step: RefCell<String>,
}

impl Shown {
    /// An empty line, shown from the first step on.
    pub fn new() -> Shown {
        let on_terminal = std::io::stderr().is_terminal();
        let bar = if on_terminal {
            ProgressBar::new_spinner()
        } else {
            ProgressBar::hidden()
        };
        Shown {
            bar,
            on_terminal,
            step: RefCell::default(),
        }
    }

    fn style(template: &str) -> ProgressStyle {
        let style = ProgressStyle::with_template(template).expect("the templates are constants");
        style.progress_chars("━╸─")
    }
}

impl Progress for Shown {
    fn step(&self, what: &str) {
        if self.step.replace(what.to_owned()) == what {
            return;
        }
        if self.on_terminal {
            self.bar.unset_length();
            self.bar.set_style(Shown::style("{spinner} {msg}"));
            self.bar.set_message(what.to_owned());
            self.bar.enable_steady_tick(Duration::from_millis(100));
        } else {
            eprintln!("{what}");
        }
    }

    fn bytes(&self, done: u64, total: Option<u64>) {
        match total {
            Some(total) => {
                self.bar.set_style(Shown::style(
                    "{spinner} {msg} {bar:30} {decimal_bytes}/{decimal_total_bytes} {decimal_bytes_per_sec} {eta}",
                ));
                self.bar.set_length(total);
                // Temporary files may exceed what was announced.
                self.bar.set_position(done.min(total));
            }
            None => {
                self.bar
                    .set_style(Shown::style("{spinner} {msg} {decimal_bytes}"));
                self.bar.set_position(done);
            }
        }
    }

    fn note(&self, line: &str) {
        self.bar.suspend(|| eprintln!("{line}"));
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_template_is_valid() {
        let shown = Shown::new();
        shown.step("fetching");
        shown.bytes(10, None);
        shown.bytes(200, Some(100));
        shown.note("a line");
        assert_eq!(*shown.step.borrow(), "fetching");
    }
}
