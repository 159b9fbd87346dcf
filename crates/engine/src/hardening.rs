//! What a process does before it holds keys, so that they do not end up where others can read them.

use inlinecrypt_core::error::{Error, ErrorKind, Op};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

/// Keeps this process's memory out of core dumps and away from debuggers. Call it before the first key arrives.
///
/// 1. The process is no longer dumpable (`prctl(2)`, `PR_SET_DUMPABLE`): no core dump, not even through a handler that
///    `core_pattern` names; other processes of the same user can neither trace it nor read `/proc/PID/mem`.
/// 2. Its limit for core files is zero, for children that become dumpable again when they execute another program.
///
/// Whoever has `CAP_SYS_PTRACE`, root above all, can still read everything. Files under `/proc/PID` belong to root
/// from now on, so an unprivileged process cannot inspect itself through some of them either.
///
/// # Errors
///
/// [`EngineFailed`](ErrorKind::EngineFailed) if the system refuses: a sandbox that forbids one of the calls.
pub fn harden_process() -> Result<(), Error> {
    let refused = |what: &'static str| {
        move |errno: rustix::io::Errno| {
            Error::new(ErrorKind::EngineFailed, Op::Open).detail(what).because(std::io::Error::from(errno))
        }
    };
    // The library reads the auxiliary vector when it is first asked for something in it. Before Linux 6.4 that takes
    // /proc/self/auxv, which nobody but root can open from here on.
    let _ = rustix::param::page_size();
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(refused("cannot make the process undumpable (PR_SET_DUMPABLE)"))?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(refused("cannot forbid core dumps (RLIMIT_CORE)"))
}
