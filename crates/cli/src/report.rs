//! What people read when something fails, and what scripts see: two lines and an exit code.
//!
//! The first line says what failed and why, with the values and the rule; the second what to do. The codes have
//! cryptsetup's meanings.

use inlinecrypt_core::error::{Error, ErrorKind};
use std::fmt::{Display, Write as _};
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;

/// The exit codes other than 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Code {
    /// Wrong parameters, a config that cannot be, and whatever has no code of its own.
    Wrong = 1,
    /// No permission, or a wrong key.
    Refused = 2,
    /// Out of memory.
    Memory = 3,
    /// A wrong or missing device or file, or one that fails.
    File = 4,
    /// It exists already, or is in use.
    Busy = 5,
    /// Interrupted by SIGINT, as a shell says it: what was begun rests, and can go on.
    Interrupted = 130,
    /// The same by SIGTERM.
    Terminated = 143,
}

impl Code {
    /// The one total map from kinds of error. What cryptsetup calls a device is a volume, file or engine here.
    pub(crate) fn of(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Permission | ErrorKind::KeyRejected | ErrorKind::ReadOnly => Self::Refused,
            ErrorKind::OutOfMemory => Self::Memory,
            ErrorKind::NotFound
            | ErrorKind::NoKey
            | ErrorKind::EngineFailed
            | ErrorKind::EngineGone
            | ErrorKind::Interrupted
            | ErrorKind::Backing
            | ErrorKind::NoSpace
            | ErrorKind::FlushLost => Self::File,
            ErrorKind::KeyInUse | ErrorKind::Busy | ErrorKind::Stopping => Self::Busy,
            // `ErrorKind` may grow; what is new has no code of its own until it is given one here.
            _ => Self::Wrong,
        }
    }
}

impl From<Code> for ExitCode {
    fn from(code: Code) -> Self {
        Self::from(code as u8)
    }
}

/// The table of exit codes, for help texts and manual pages.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  wrong parameters
  2  no permission, or a wrong key
  3  out of memory
  4  wrong or missing device or file
  5  exists already, or in use
  130, 143  interrupted by SIGINT or SIGTERM: a re-encryption rests, and can go on";

/// Something that failed, as people are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) code: Code,
    /// What failed and why.
    pub(crate) what: String,
    /// What to do.
    pub(crate) advice: String,
}

impl Failure {
    pub(crate) fn new(code: Code, what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { code, what: what.into(), advice: advice.into() }
    }

    /// An error of the crates below, met while doing `what`. Their messages carry advice behind a semicolon.
    pub(crate) fn of(what: impl Display, error: &Error) -> Self {
        let (why, advice) = explain(error);
        let advice = advice.unwrap_or_else(|| default_advice(error.kind()).to_owned());
        Self::new(Code::of(error.kind()), format!("{what}: {why}"), advice)
    }

    /// The same about a file that was named: if it is not what it should be, it is the wrong file.
    pub(crate) fn of_file(what: impl Display, error: &Error) -> Self {
        let mut failure = Self::of(what, error);
        if error.kind() == ErrorKind::Invalid {
            failure.code = Code::File;
        }
        failure
    }

    /// What the system said about the file that `what` names.
    pub(crate) fn of_io(what: impl Display, error: &io::Error, advice: impl Into<String>) -> Self {
        let code = match error.kind() {
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Code::Refused,
            io::ErrorKind::OutOfMemory => Code::Memory,
            io::ErrorKind::AlreadyExists | io::ErrorKind::AddrInUse | io::ErrorKind::ResourceBusy => {
                Code::Busy
            }
            _ => Code::File,
        };
        Self::new(code, format!("{what}: {}", plain(error)), advice)
    }

    /// The same with other advice.
    pub(crate) fn advise(self, advice: impl Into<String>) -> Self {
        Self { advice: advice.into(), ..self }
    }

    /// Says it as a note, where it concerns somebody else: `whom` says whom.
    pub(crate) fn tell_as_note(&self, whom: impl Display) {
        note(format_args!("{whom}: {}. {}", self.what, self.advice));
    }

    /// The same, saying first where it was met.
    pub(crate) fn within(self, place: impl Display) -> Self {
        Self { what: format!("{place}: {}", self.what), ..self }
    }
}

/// A system error without its number.
pub(crate) fn plain(error: &io::Error) -> String {
    without_number(&error.to_string())
}

/// What an error says, and the advice in it.
fn explain(error: &Error) -> (String, Option<String>) {
    let (mut why, mut advice) = split_advice(&error.to_string());
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let (text, more) = split_advice(&without_number(&cause.to_string()));
        let _ = write!(why, ": {text}");
        advice = advice.or(more);
        source = cause.source();
    }
    if let ErrorKind::Invalid
    | ErrorKind::NotFound
    | ErrorKind::Permission
    | ErrorKind::Busy
    | ErrorKind::KeyRejected
    | ErrorKind::Unsupported
    | ErrorKind::NoFallback = error.kind()
    {
        // What follows says it better: which file is not there, who has it.
        let general = Error::new(error.kind(), error.op()).to_string();
        if let Some(special) = why.strip_prefix(&general).and_then(|rest| rest.strip_prefix(": ")) {
            why = special.to_owned();
        }
    }
    (why, advice.map(|advice| sentence(&advice)))
}

fn split_advice(text: &str) -> (String, Option<String>) {
    match text.split_once("; ") {
        Some((why, advice)) => (why.to_owned(), Some(advice.to_owned())),
        None => (text.to_owned(), None),
    }
}

fn without_number(text: &str) -> String {
    text.rsplit_once(" (os error ").map_or(text, |(text, _number)| text).to_owned()
}

/// First letter in upper case.
fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

/// What to do when the message itself does not say.
fn default_advice(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Invalid | ErrorKind::Misaligned | ErrorKind::OutOfRange | ErrorKind::PastEnd => {
            "Correct the value; `inlinecrypt help serve` lists what is possible."
        }
        ErrorKind::ReadOnly => "Serve it with --read-only, or make it writable.",
        ErrorKind::Unsupported | ErrorKind::NoFallback => {
            "`inlinecrypt engine info` shows what the engine can do; choose one of that."
        }
        ErrorKind::KeyInUse | ErrorKind::Busy => "Wait until it is free, or stop who has it.",
        ErrorKind::KeyRejected => "Give the key that belongs to it, under the root that wrapped it.",
        ErrorKind::Permission => "Run as a user who may, or change the permissions.",
        ErrorKind::NotFound => "Check the name.",
        ErrorKind::Backing | ErrorKind::FlushLost => {
            "Check the medium (the kernel's log says more) before going on."
        }
        ErrorKind::NoSpace => "Make room, or choose another place.",
        ErrorKind::OutOfMemory => "Free memory, or serve less at once.",
        ErrorKind::Stopping => "Wait until the server has stopped, then start it again.",
        ErrorKind::EngineFailed | ErrorKind::EngineGone | ErrorKind::Interrupted | ErrorKind::NoKey => {
            "Start again; if it stays, the log (-vv) says more."
        }
        _ => "Please report this: it should not happen.",
    }
}

/// One or more failures, all of which are reported.
#[derive(Debug)]
pub(crate) struct Failures(Vec<Failure>);

impl From<Failure> for Failures {
    fn from(failure: Failure) -> Self {
        Self(vec![failure])
    }
}

impl Failures {
    /// `Err` if there are any.
    pub(crate) fn check(failures: Vec<Failure>) -> Result<(), Self> {
        if failures.is_empty() { Ok(()) } else { Err(Self(failures)) }
    }

    /// Prints all and gives the first one's code.
    pub(crate) fn report(&self) -> ExitCode {
        let mut error = io::stderr().lock();
        for Failure { code: _, what, advice } in &self.0 {
            // If nobody reads it, the code still tells.
            let _ = writeln!(error, "inlinecrypt: {}\n  {}", printable(what), printable(advice));
        }
        if self.0.len() > 1 {
            let _ = writeln!(error, "inlinecrypt: {} problems", self.0.len());
        }
        self.0.first().map_or(Code::Wrong, |failure| failure.code).into()
    }
}

/// Names may hold anything; a terminal must not obey it.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Says something that is no failure but that a person should know.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(io::stderr().lock(), "note: {}", printable(&text.to_string()));
}

/// Prints to standard output, whole. A reader that has gone is no failure of ours.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    print_bytes(text.as_bytes())
}

pub(crate) fn print_bytes(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::of_io("cannot write to standard output", &error, "Make room, or send it elsewhere."))
        }
        _ => Ok(()),
    }
}

/// A value as JSON on standard output.
pub(crate) fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text =
        serde_json::to_string_pretty(value).expect("our own types have string keys and no failing values");
    print(&format!("{text}\n"))
}

/// Sends the log to standard error. Levels come from `-v`, or as `filter` says.
pub(crate) fn start_log(verbose: u8, filter: Option<&str>) -> Result<(), Failure> {
    use tracing_subscriber::EnvFilter;
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::builder().parse(filter.unwrap_or(level)).map_err(|error| {
        Failure::new(
            Code::Wrong,
            format!("--log {:?}: {error}", filter.unwrap_or(level)),
            "Write a level (error, warn, info, debug, trace), or TARGET=LEVEL, several separated by commas.",
        )
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .with_target(false)
        .init();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use inlinecrypt_core::error::Op;

    /// Scripts depend on these numbers.
    #[test]
    fn every_kind_has_the_code_that_the_manual_says() {
        let codes: Vec<(String, u8)> =
            ErrorKind::ALL.iter().map(|&kind| (format!("{kind:?}"), Code::of(kind) as u8)).collect();
        let expected = [
            ("Invalid", 1),
            ("Misaligned", 1),
            ("OutOfRange", 1),
            ("PastEnd", 1),
            ("ReadOnly", 2),
            ("Unsupported", 1),
            ("NoFallback", 1),
            ("KeyInUse", 5),
            ("Busy", 5),
            ("Overflow", 1),
            ("KeyRejected", 2),
            ("Permission", 2),
            ("NotFound", 4),
            ("NoKey", 4),
            ("EngineFailed", 4),
            ("EngineGone", 4),
            ("Interrupted", 4),
            ("Backing", 4),
            ("NoSpace", 4),
            ("FlushLost", 4),
            ("OutOfMemory", 3),
            ("Stopping", 5),
            ("Bug", 1),
        ];
        let codes: Vec<(&str, u8)> = codes.iter().map(|(name, code)| (name.as_str(), *code)).collect();
        assert_eq!(codes, expected);
    }

    #[test]
    fn advice_in_an_error_becomes_the_second_line() {
        let error = Error::new(ErrorKind::Busy, Op::Open).detail("v is served by process 7; stop it first");
        let failure = Failure::of("cannot serve v", &error);
        assert_eq!(failure.code, Code::Busy);
        assert!(failure.what.ends_with("v is served by process 7"), "{}", failure.what);
        assert_eq!(failure.advice, "Stop it first");
        let rooted = Error::new(ErrorKind::NotFound, Op::Open)
            .detail("root file r is not there; correct the name")
            .because(io::Error::from_raw_os_error(2));
        let failure = Failure::of("engine e", &rooted);
        assert_eq!(failure.what, "engine e: root file r is not there: No such file or directory");
        assert_eq!(failure.advice, "Correct the name");
        let silent = Failure::of("cannot serve v", &Error::new(ErrorKind::NotFound, Op::Open));
        assert!(!silent.advice.is_empty());
    }

    #[test]
    fn names_cannot_play_with_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }
}
