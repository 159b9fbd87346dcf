//! When a thread that is woken gets the core: at once, or once whoever woke it sleeps.
//!
//! A client on this machine that sends many requests in a row shall get to send them: woken by the first, a connection's thread
//! would otherwise take the core from a client of another scheduling group (another session or service) and answer each alone,
//! which leaves a third of the throughput. A thread that waits for a medium, though, shall have its turn as soon as the medium
//! has answered, whoever has the core then. So a thread says what it is about to wait for; it is remembered, so that saying
//! the same again costs nothing.
//!
//! `SCHED_BATCH` and `SCHED_OTHER` of sched(7). A process whose administrator gave it another policy than the usual one is left
//! alone, and so is a single thread of another one.

use std::cell::Cell;
use std::sync::OnceLock;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// Not asked yet.
    Unknown,
    AtOnce,
    AfterWaker,
    /// Its administrator decided, or the system does not let us.
    NotOurs,
}

thread_local! {
    static TURN: Cell<Turn> = const { Cell::new(Turn::Unknown) };
}

/// From now on this thread, when it is woken on a core that is busy, lets whoever is there go on until he sleeps or has had his
/// share. Threads and processes that it starts do likewise until they say otherwise.
pub(crate) fn let_waker_finish() {
    say(Turn::AfterWaker);
}

/// From now on this thread, when it is woken, takes the core from others if it is its turn.
pub(crate) fn take_turn_at_once() {
    say(Turn::AtOnce);
}

fn say(wanted: Turn) {
    // As it was before we first changed anything: later a thread may have its policy from one of ours that began it.
    static IS_USUAL: OnceLock<bool> = OnceLock::new();
    let known = TURN.get();
    if known == wanted || known == Turn::NotOurs {
        return;
    }
    if !IS_USUAL.get_or_init(|| ask() == Turn::AtOnce) {
        TURN.set(Turn::NotOurs);
        return;
    }
    let found = if known == Turn::Unknown { ask() } else { known };
    let is_ours = found != Turn::NotOurs && (found == wanted || set(wanted));
    TURN.set(if is_ours { wanted } else { Turn::NotOurs });
}

fn ask() -> Turn {
    // SAFETY: takes a number, and touches no memory.
    match unsafe { libc::sched_getscheduler(0) } {
        libc::SCHED_OTHER => Turn::AtOnce,
        libc::SCHED_BATCH => Turn::AfterWaker,
        _ => Turn::NotOurs,
    }
}

fn set(turn: Turn) -> bool {
    let policy = if turn == Turn::AfterWaker { libc::SCHED_BATCH } else { libc::SCHED_OTHER };
    let no_priority = libc::sched_param { sched_priority: 0 };
    // SAFETY: `no_priority` lives during the call and is only read.
    unsafe { libc::sched_setscheduler(0, policy, &raw const no_priority) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_thread_is_what_it_said_last() {
        std::thread::spawn(|| {
            let_waker_finish();
            if TURN.get() == Turn::NotOurs {
                let _ =
                    writeln!(std::io::stderr(), "SKIPPED: the scheduling policy here is not the usual one");
                return;
            }
            for _ in 0..2 {
                let_waker_finish();
                assert!(ask() == Turn::AfterWaker && TURN.get() == Turn::AfterWaker);
                let_waker_finish();
                let heir = std::thread::spawn(|| (TURN.get() == Turn::Unknown, ask() == Turn::AfterWaker));
                assert_eq!(heir.join().unwrap(), (true, true), "whom it starts begins like it");
                take_turn_at_once();
                assert!(ask() == Turn::AtOnce && TURN.get() == Turn::AtOnce);
            }
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_thread_of_another_policy_is_left_alone() {
        take_turn_at_once();
        std::thread::spawn(|| {
            let no_priority = libc::sched_param { sched_priority: 0 };
            // SAFETY: `no_priority` lives during the call and is only read. Nobody needs a privilege to be idle.
            let is_idle =
                unsafe { libc::sched_setscheduler(0, libc::SCHED_IDLE, &raw const no_priority) } == 0;
            if !is_idle {
                let _ = writeln!(std::io::stderr(), "SKIPPED: no scheduling policy may be set here");
                return;
            }
            let_waker_finish();
            take_turn_at_once();
            assert!(ask() == Turn::NotOurs && TURN.get() == Turn::NotOurs);
            // SAFETY: takes a number, and touches no memory.
            assert_eq!(unsafe { libc::sched_getscheduler(0) }, libc::SCHED_IDLE);
        })
        .join()
        .unwrap();
    }
}
