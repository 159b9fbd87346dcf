//! Lanes at real-time priority, if that is asked for: who may have it, and what bounds it.
//!
//! While a host's thread waits for the engine, the system may give its CPU to somebody else, who is in no hurry to give it back.
//! A lane at real-time priority is there at once (docs/performance.md). It takes the CPU from everybody without such a priority
//! until it sleeps, which it does after each order, and an order of a server takes less than a millisecond where the CPU has
//! instructions for the cipher. One that does not end is a bug,
//! and is ended by the system after [`COMPUTE_MAX`]. An engine that somebody else has taken over can sleep for a moment before
//! that, again and again: then what others get is what the kernel keeps for them, 5 % by default (docs/threat-model.md).
//!
//! Only lanes have it. The control thread opens roots, which may take it seconds of computing.

use crate::sys::Schedule;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::CapabilitySet;
use std::ffi::OsString;
use std::io;
use std::time::Duration;

/// At which priority lanes work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LanePriority {
    /// As the host does.
    #[default]
    Usual,
    /// The lowest real-time priority.
    Realtime,
}

impl LanePriority {
    /// What an engine process is told by its second argument, if there is one.
    const REALTIME: &str = "realtime";

    /// What these arguments of an engine process say, behind its [verb](super::PROCESS_VERB).
    pub fn of_arguments(mut arguments: impl Iterator<Item = OsString>) -> Self {
        let is_realtime = arguments.next().is_some_and(|argument| argument == Self::REALTIME);
        if is_realtime { Self::Realtime } else { Self::Usual }
    }

    /// The arguments that say it.
    pub(super) fn to_arguments(self) -> impl Iterator<Item = OsString> {
        (self == Self::Realtime).then(|| Self::REALTIME.into()).into_iter()
    }
}

/// For how long a lane at real-time priority may compute without a pause. Five hundred times what the longest order of a server
/// takes (256 KiB, and less than a millisecond where the CPU has instructions for the cipher); an emulated CPU that encrypts a
/// megabyte a second still does one in that time. What starts the engine may have set less (`RLIMIT_RTTIME`). Embedders whose
/// requests are larger: see [`Options::order_bytes_max`](super::Options::order_bytes_max).
pub const COMPUTE_MAX: Duration = Duration::from_millis(500);

/// How much later a thread is ended that does not hear the signal, which it may have blocked.
const GRACE: Duration = Duration::from_millis(100);

/// Whether an engine process of this one may have lanes at real-time priority. Tries it, on a thread that ends then.
///
/// # Errors
///
/// [`Permission`](ErrorKind::Permission) if not, or if the calling thread has a real-time priority itself, with what to do;
/// [`OutOfMemory`](ErrorKind::OutOfMemory) if there is no thread
/// to try it on.
pub fn check_permitted() -> Result<(), Error> {
    let no_thread = |why: io::Error| Error::new(ErrorKind::OutOfMemory, Op::Open).because(why);
    let thread = std::thread::Builder::new().name("priority".to_owned()).spawn(take);
    let tried = thread.map_err(no_thread)?.join();
    tried.unwrap_or_else(|_panic| Err(refusal(&io::Error::other("it panicked")))).map(drop)
}

/// Gives the calling thread, and those that it starts from now on, the lowest real-time priority, and bounds how long they
/// compute. What the thread had before, to have it again.
///
/// # Errors
///
/// As [`check_permitted`].
pub(super) fn begin() -> Result<Schedule, Error> {
    // First: nobody has the priority without the bound.
    bound().map_err(|why| {
        Error::new(ErrorKind::EngineFailed, Op::Open)
            .detail("how long lanes compute at real-time priority cannot be bounded (RLIMIT_RTTIME)")
            .because(why)
    })?;
    take()
}

/// Gives the calling thread back what [`begin`] has returned.
///
/// # Errors
///
/// [`Permission`](ErrorKind::Permission) if the system does not let it.
pub(super) fn end(usual: Schedule) -> Result<(), Error> {
    usual.apply().map_err(|why| {
        Error::new(ErrorKind::Permission, Op::Open).detail(format!(
            "the engine's control thread cannot leave real-time priority again ({}); leave real-time priority out",
            plain(&why)
        ))
    })
}

fn take() -> Result<Schedule, Error> {
    let usual = Schedule::current().map_err(|why| refusal(&why))?;
    if usual.is_realtime() {
        // The control thread would have it, too, and the bound with it: opening a root takes longer.
        return Err(Error::new(ErrorKind::Permission, Op::Open).detail(
            "engines may not work at real-time priority if who starts them has one already; start it at the usual priority (no \
             chrt, no CPUSchedulingPolicy= in its unit), or leave real-time priority out",
        ));
    }
    Schedule::REALTIME.apply().map_err(|why| refusal(&why))?;
    Ok(usual)
}

fn bound() -> io::Result<()> {
    let us = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    // Who started us may have wanted less.
    let Rlimit { current, maximum } = getrlimit(Resource::Rttime);
    let least = |known: Option<u64>, ours| Some(known.map_or(ours, |known| known.min(ours)));
    let limit =
        Rlimit { current: least(current, us(COMPUTE_MAX)), maximum: least(maximum, us(COMPUTE_MAX + GRACE)) };
    Ok(setrlimit(Resource::Rttime, limit)?)
}

/// What is missing, as far as it can be known, and what to do.
fn refusal(why: &io::Error) -> Error {
    let is_capable = rustix::thread::capabilities(None)
        .is_ok_and(|capabilities| capabilities.effective.contains(CapabilitySet::SYS_NICE));
    let is_within_limit = getrlimit(Resource::Rtprio).current.is_none_or(|most| most > 0);
    let advice = if is_capable || is_within_limit {
        "CAP_SYS_NICE or RLIMIT_RTPRIO is there, so it is a container that forbids it, or a control group without real-time budget \
         (cpu.rt_runtime_us): allow it there, or leave real-time priority out"
    } else {
        "it takes CAP_SYS_NICE or RLIMIT_RTPRIO of at least 1: LimitRTPRIO=1 in a systemd unit, or `ulimit -r 1` in the shell that \
         starts it, where the hard limit allows it; or leave real-time priority out"
    };
    Error::new(ErrorKind::Permission, Op::Open)
        .detail(format!("engines may not work at real-time priority ({}); {advice}", plain(why)))
}

/// Without its number.
fn plain(why: &io::Error) -> String {
    let text = why.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_to_a_process_is_understood_by_it() {
        for priority in [LanePriority::Usual, LanePriority::Realtime] {
            assert_eq!(LanePriority::of_arguments(priority.to_arguments()), priority);
        }
        assert_eq!(LanePriority::of_arguments(["else".into()].into_iter()), LanePriority::Usual);
    }

    /// Whoever asks for it in vain goes on as before; whoever may have it gets it on the thread of the trial alone.
    #[test]
    fn to_ask_whether_it_is_permitted_changes_nothing() {
        let before = Schedule::current().unwrap();
        assert_ne!(before, Schedule::REALTIME);
        if let Err(error) = check_permitted() {
            assert_eq!(error.kind(), ErrorKind::Permission);
            assert!(error.to_string().contains("real-time priority"), "{error}");
        }
        assert_eq!(Schedule::current().unwrap(), before);
    }

    /// Who has a real-time priority itself is refused, whatever else it may, and keeps it.
    #[test]
    fn whoever_is_at_real_time_priority_is_told_to_leave_it() {
        let tried = std::thread::spawn(|| {
            Schedule::REALTIME.apply().ok()?;
            let error = check_permitted().unwrap_err();
            assert_eq!(Schedule::current().unwrap(), Schedule::REALTIME);
            Some(error)
        });
        let Some(error) = tried.join().unwrap() else {
            eprintln!("SKIPPED: no real-time priority here");
            return;
        };
        assert_eq!(error.kind(), ErrorKind::Permission);
        assert!(error.to_string().contains("start it at the usual priority"), "{error}");
    }
}
