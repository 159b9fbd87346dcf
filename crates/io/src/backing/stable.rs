//! What was lost stays lost.
//!
//! Linux reports a failed write-back once per open file, to whichever `fsync`, `fdatasync` or `RWF_DSYNC` write asks
//! first, and marks the pages clean: asking again succeeds although the data is gone. With many threads, one may even
//! collect the failure of another, whose own call then succeeds. [`Ledger`] makes up for both:
//!
//! - the first failure is kept, and nothing is called stable after it;
//! - a durable write that found no room, and took nothing with it, is not such a failure;
//! - a medium that became shorter is such a failure too;
//! - a call that succeeded counts only once every call that overlapped it in time has told its outcome.

use super::file::{is_no_space, world_error};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use rustix::io::Errno;
use std::io;
use std::sync::{OnceLock, PoisonError, RwLock};

/// What is said of a medium that became shorter.
pub(super) const SHORTER: &str = "the file has become shorter";

/// The first failure to make something stable.
#[derive(Clone, Copy, Debug)]
struct Lost {
    op: Op,
    range: Option<(u64, u64)>,
    cause: Cause,
}

/// Why it is lost.
#[derive(Clone, Copy, Debug)]
enum Cause {
    /// The system said so.
    Failed(Errno),
    /// The medium became shorter.
    Shorter,
}

/// How making something stable failed.
#[derive(Clone, Copy, Debug)]
pub(super) enum Failed {
    /// For lack of space, before anything else was lost: nothing that was accepted is missing.
    Refused(Errno),
    /// Something that was accepted may be missing.
    Lost(Errno),
}

/// Whether all that was called stable is stable.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// Held for reading while a call is under way and until its failure is in `lost`. Taken for writing, and let go at
    /// once, to wait for all of them. Nothing else is taken while it is held.
    under_way: RwLock<()>,
    lost: OnceLock<Lost>,
}

impl Ledger {
    /// Runs `sync`, which makes a range (or everything) stable, unless something was lost before.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::FlushLost`] if anything was lost before or, meanwhile, to another thread, and for a failed flush;
    /// for a failed durable write, what its cause says. From then on every call fails, unless it was
    /// [`Refused`](Failed::Refused).
    ///
    /// # Blocking
    ///
    /// Waits for `sync`, and then for calls of other threads that overlapped it.
    pub(super) fn settle(
        &self,
        op: Op,
        range: Option<(u64, u64)>,
        sync: impl FnOnce() -> Result<(), Failed>,
    ) -> Result<(), Error> {
        {
            let _under_way = self.under_way.read().unwrap_or_else(PoisonError::into_inner);
            self.check(op, range)?;
            if let Err(failed) = sync() {
                let errno = match failed {
                    Failed::Refused(errno) => errno,
                    Failed::Lost(errno) => {
                        // Not the first failure: then the first one is the one to tell of later.
                        let _ = self.lost.set(Lost { op, range, cause: Cause::Failed(errno) });
                        if is_no_space(errno) {
                            // That would be taken for a refusal.
                            self.check(op, range)?;
                        }
                        errno
                    }
                };
                return Err(match range {
                    Some((offset, len)) => world_error(op, errno, offset, len),
                    None => Error::new(ErrorKind::FlushLost, op)
                        .detail("it failed just now")
                        .because(io::Error::from(errno)),
                });
            }
        }
        drop(self.under_way.write().unwrap_or_else(PoisonError::into_inner));
        self.check(op, range)
    }

    /// Notes that the medium was found shorter than it was, by what was done when that was seen.
    pub(super) fn note_shorter(&self, op: Op, range: Option<(u64, u64)>) {
        // Not the first failure: then the first one is the one to tell of later.
        let _ = self.lost.set(Lost { op, range, cause: Cause::Shorter });
    }

    fn check(&self, op: Op, range: Option<(u64, u64)>) -> Result<(), Error> {
        let Some(lost) = self.lost.get() else { return Ok(()) };
        let first = Error::new(ErrorKind::Backing, lost.op);
        let mut first = match lost.cause {
            Cause::Failed(errno) => first.because(io::Error::from(errno)),
            Cause::Shorter => first.detail(SHORTER).because(io::Error::from(io::ErrorKind::UnexpectedEof)),
        };
        if let Some((offset, len)) = lost.range {
            first = first.at(offset, len);
        }
        let mut error = Error::new(ErrorKind::FlushLost, op)
            .detail("stop the server, check the medium, and check the data before going on")
            .because(first);
        if let Some((offset, len)) = range {
            error = error.at(offset, len);
        }
        Err(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn after_a_failed_flush_nothing_is_ever_called_stable() {
        let ledger = Ledger::default();
        ledger.settle(Op::Flush, None, || Ok(())).expect("nothing lost yet");
        let first = ledger.settle(Op::Flush, None, || Err(Failed::Lost(Errno::IO))).unwrap_err();
        assert_eq!(first.kind(), ErrorKind::FlushLost);
        let mut ran = false;
        let later = ledger.settle(Op::Flush, None, || {
            ran = true;
            Ok(())
        });
        assert_eq!(later.unwrap_err().kind(), ErrorKind::FlushLost);
        assert!(!ran, "nothing can make good what was lost, so nothing is tried");
    }

    #[test]
    fn a_failed_durable_write_is_told_by_later_flushes() {
        let ledger = Ledger::default();
        let refused = Err(Failed::Refused(Errno::NOSPC));
        let write = ledger.settle(Op::Write, Some((512, 512)), || refused).unwrap_err();
        assert_eq!(write.kind(), ErrorKind::NoSpace);
        ledger.settle(Op::Flush, None, || Ok(())).expect("nothing that was accepted is lost");

        let other = Ledger::default();
        let write =
            other.settle(Op::Write, Some((512, 512)), || Err(Failed::Lost(Errno::NOSPC))).unwrap_err();
        assert_eq!(write.kind(), ErrorKind::FlushLost, "older data found no room");

        let lost = Err(Failed::Lost(Errno::IO));
        let write = ledger.settle(Op::Write, Some((4096, 512)), || lost).unwrap_err();
        assert_eq!(write.kind(), ErrorKind::Backing);
        let flush = ledger.settle(Op::Flush, None, || Ok(())).unwrap_err();
        assert_eq!(flush.kind(), ErrorKind::FlushLost);
        let chain = flush.chain();
        assert!(chain.contains("write at 4096+512"), "{chain}");
        assert!(chain.contains("Input/output error"), "the system's error is kept: {chain}");
    }

    /// The kernel tells a failure to one caller only. Here eight threads lose data and one is told: all must fail.
    #[test]
    fn a_failure_that_another_thread_collected_fails_all_who_overlapped() {
        for _ in 0..200 {
            const THREADS: u32 = 8;
            let ledger = Ledger::default();
            let inside = Barrier::new(THREADS as usize);
            let arrivals = AtomicU32::new(0);
            let failures = AtomicU32::new(0);
            std::thread::scope(|scope| {
                for _ in 0..THREADS {
                    scope.spawn(|| {
                        let result = ledger.settle(Op::Flush, None, || {
                            inside.wait();
                            match arrivals.fetch_add(1, Ordering::Relaxed) {
                                0 => Err(Failed::Lost(Errno::IO)),
                                _ => Ok(()),
                            }
                        });
                        failures.fetch_add(u32::from(result.is_err()), Ordering::Relaxed);
                    });
                }
            });
            assert_eq!(failures.load(Ordering::Relaxed), THREADS);
        }
    }
}
