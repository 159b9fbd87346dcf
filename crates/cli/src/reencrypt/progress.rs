//! How far it is, for people and for programs.

use crate::report::{self, Failure, printable};
use crate::size::Size;
use serde::Serialize;
use std::io::{self, IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Show {
    /// A bar, on standard error, if that is a terminal.
    Bar,
    /// A line of JSON now and then, on standard output.
    Json,
}

/// How often, as cryptsetup does.
pub(crate) const EVERY: Duration = Duration::from_millis(500);

/// Shows the progress of one volume.
#[derive(Debug)]
pub(crate) struct Progress {
    show: Show,
    device: String,
    began: Instant,
    /// How far it was when we came.
    first_bytes: Option<u64>,
    is_open: bool,
}

/// A line as cryptsetup's `--progress-json` prints it. Numbers are strings there, since JSON's are not made for 64 bits.
#[derive(Debug, Serialize)]
struct Line<'a> {
    device: &'a str,
    device_bytes: String,
    device_size: String,
    speed: String,
    eta_ms: String,
    time_ms: String,
}

impl Progress {
    pub(crate) fn new(show: Show, device: String) -> Self {
        Self { show, device, began: Instant::now(), first_bytes: None, is_open: false }
    }

    /// Shows how far it is.
    pub(crate) fn tell(&mut self, done: u64, size: u64, note: &str) -> Result<(), Failure> {
        let first = *self.first_bytes.get_or_insert(done);
        let elapsed = self.began.elapsed();
        let speed = speed(done - first.min(done), elapsed);
        let eta = eta(size - done.min(size), speed);
        match self.show {
            Show::Json => {
                let line = Line {
                    device: &self.device,
                    device_bytes: done.to_string(),
                    device_size: size.to_string(),
                    speed: speed.to_string(),
                    eta_ms: eta.unwrap_or(Duration::ZERO).as_millis().to_string(),
                    time_ms: elapsed.as_millis().to_string(),
                };
                let line = serde_json::to_string(&line).expect("strings");
                report::print(&format!("{line}\n"))
            }
            Show::Bar => {
                let mut error = io::stderr().lock();
                if error.is_terminal() {
                    let _ = write!(error, "\r\x1b[K{}", bar(done, size, speed, eta, note));
                    let _ = error.flush();
                    self.is_open = true;
                }
                Ok(())
            }
        }
    }

    /// Ends the bar's line.
    pub(crate) fn end(&mut self) {
        if std::mem::take(&mut self.is_open) {
            let _ = writeln!(io::stderr().lock());
        }
    }
}

fn speed(bytes: u64, elapsed: Duration) -> u64 {
    let ns = elapsed.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / ns).unwrap_or(u64::MAX)
}

/// `None` while nothing is known.
fn eta(left: u64, speed: u64) -> Option<Duration> {
    match (left, speed) {
        (0, _) => Some(Duration::ZERO),
        (_, 0) => None,
        _ => Some(Duration::from_millis(
            u64::try_from(u128::from(left) * 1000 / u128::from(speed)).unwrap_or(u64::MAX),
        )),
    }
}

fn bar(done: u64, size: u64, speed: u64, eta: Option<Duration>, note: &str) -> String {
    const CELLS: u64 = 30;
    let share =
        |of: u64| u64::try_from(u128::from(done) * u128::from(of) / u128::from(size.max(1))).unwrap_or(of);
    let filled = usize::try_from(share(CELLS)).unwrap_or(0);
    let left = match eta {
        None => "--:--".to_owned(),
        Some(eta) => {
            let seconds = eta.as_secs();
            match seconds / 3600 {
                0 => format!("{:02}:{:02}", seconds / 60, seconds % 60),
                hours => format!("{hours}h{:02}m", seconds / 60 % 60),
            }
        }
    };
    let tenths = share(1000);
    let note = if note.is_empty() { String::new() } else { format!(", {}", printable(note)) };
    let whole = |bytes: u64| Size(bytes >> 20 << 20);
    format!(
        "[{}{}] {:>3}.{}%  {} of {}, {} MiB/s, {left} left{note}",
        "#".repeat(filled),
        "-".repeat(30 - filled.min(30)),
        tenths / 10,
        tenths % 10,
        whole(done),
        Size(size),
        speed >> 20,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_says_share_rate_and_time_left() {
        let text = bar(256 << 20, 1 << 30, 64 << 20, eta(768 << 20, 64 << 20), "");
        assert_eq!(text, "[#######-----------------------]  25.0%  256 MiB of 1 GiB, 64 MiB/s, 00:12 left");
        assert!(bar(0, 1 << 30, 0, eta(1 << 30, 0), "paused").ends_with("--:-- left, paused"));
        assert!(bar(1 << 30, 1 << 30, 0, eta(0, 0), "").contains("100.0%"));
    }

    /// The keys and the strings of cryptsetup's own.
    #[test]
    fn json_lines_are_those_of_cryptsetup() {
        let line = Line {
            device: "/dev/sda",
            device_bytes: "8192".into(),
            device_size: "44040192".into(),
            speed: "126877696".into(),
            eta_ms: "2520012".into(),
            time_ms: "5561235".into(),
        };
        assert_eq!(
            serde_json::to_string(&line).unwrap(),
            "{\"device\":\"/dev/sda\",\"device_bytes\":\"8192\",\"device_size\":\"44040192\",\
             \"speed\":\"126877696\",\"eta_ms\":\"2520012\",\"time_ms\":\"5561235\"}"
        );
    }
}
