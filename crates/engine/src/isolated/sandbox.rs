//! The cage of an engine process, step by step. The numbers are those of `docs/threat-model.md`.
//!
//! Everything is done before the first key or root arrives. A step that the kernel cannot do is reported, and the others are
//! done all the same; who asked for all of them gets no process instead.

use super::realtime;
use crate::sys::{self, Forbidden, Schedule, SecretMemory};
use inlinecrypt_core::error::Error;
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, CompatLevel, Compatible as _, Ruleset, RulesetAttr as _,
    RulesetStatus, Scope,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::collections::BTreeMap;
use std::io;

/// What was done, and what could not be: a line each.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) steps: Vec<String>,
    pub(crate) missing: Vec<String>,
}

impl Report {
    fn note(&mut self, step: u8, what: &str, result: io::Result<()>) {
        match result {
            Ok(()) => self.steps.push(format!("{step} {what}")),
            Err(why) => self.missing.push(format!("{step} {what}: {why}")),
        }
    }

    pub(crate) fn note_memory(&mut self, memory: SecretMemory) {
        match memory {
            SecretMemory::Secret { .. } => self.steps.push(format!("4 {memory}")),
            SecretMemory::Locked { .. } | SecretMemory::Unlocked { .. } => {
                self.missing.push(format!("4 {memory}"))
            }
        }
    }

    /// Steps 1 to 3: before any memory is filled.
    pub(crate) fn begin(&mut self) {
        self.note(
            1,
            "no new privileges",
            Ok(rustix::thread::set_no_new_privs(true)).and_then(|done| Ok(done?)),
        );
        let hardened = crate::harden_process().map_err(|why| io::Error::other(why.chain()));
        self.note(2, "not dumpable, not traceable by its user", hardened);
        self.note(3, "ends with its host", sys::end_with_parent());
    }

    /// Step 5, if it was asked for: before lanes are started, which then have the calling thread's priority. What that was
    /// before, which it shall have again.
    ///
    /// # Errors
    ///
    /// If it is not permitted: then whoever asked for it gets no process.
    pub(crate) fn begin_realtime(&mut self) -> Result<Schedule, Error> {
        let usual = realtime::begin()?;
        let ms = realtime::COMPUTE_MAX.as_millis();
        self.steps.push(format!(
            "5 lanes at the lowest real-time priority (SCHED_RR, 1), ended if one computes for {ms} ms without a pause"
        ));
        Ok(usual)
    }

    /// Steps 6 to 10: after the last thread was started and the last descriptor but those of keys has come. `pid` is the number
    /// of this process.
    pub(crate) fn lock(&mut self, pid: u32) {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let unlocked = sys::guard_ordinary_memory(&maps);
        let guarded = match unlocked {
            0 if maps.is_empty() => Err(io::Error::other("/proc is not mounted")),
            0 => Ok(()),
            bytes => {
                Err(io::Error::other(format!("{bytes} bytes are not locked: RLIMIT_MEMLOCK is too low")))
            }
        };
        drop(maps);
        self.note(6, "statics and first stack locked, in no dump and no child", guarded);
        self.note(
            7,
            "limits: no files grow, no processes, few descriptors, no real-time priority by limit",
            limits(),
        );
        self.note(8, "no files, no network, no signals to others (landlock)", landlock());
        self.note(9, "few system calls (seccomp)", seccomp());
        let refused: Vec<_> = Forbidden::ALL
            .into_iter()
            .map(|call| match sys::try_forbidden(call, pid) {
                Ok(()) => Err(format!("{} is possible", call.name())),
                Err(errno) => Ok(format!("{} refused ({})", call.name(), io::Error::from(errno))),
            })
            .collect();
        for line in &refused {
            if let Err(possible) = line {
                self.missing.push(format!("10 tried from inside: {possible}"));
            }
        }
        let refused: Vec<_> = refused.into_iter().flatten().collect();
        if !refused.is_empty() {
            self.steps.push(format!("10 tried from inside: {}", refused.join(", ")));
        }
    }
}

/// Descriptors of the process: three of the start, the socket, shared memory, what comes with a root, and some to spare.
const DESCRIPTORS_MAX: u64 = 16;

fn limits() -> io::Result<()> {
    let none = |resource, most| setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    none(Resource::Fsize, 0)?;
    none(Resource::Nproc, 0)?;
    none(Resource::Nofile, DESCRIPTORS_MAX)?;
    none(Resource::Msgqueue, 0)?;
    // What threads have they keep. With CAP_SYS_NICE it forbids nothing: step 9 does.
    none(Resource::Rtprio, 0)?;
    Ok(())
}

fn landlock() -> io::Result<()> {
    let abi = ABI::V6;
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))
        .and_then(|rules| rules.handle_access(AccessNet::from_all(abi)))
        .and_then(|rules| rules.scope(Scope::from_all(abi)))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.restrict_self())
        .map_err(io::Error::other)?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        RulesetStatus::PartiallyEnforced => Err(io::Error::other("only in part: the kernel is older")),
        RulesetStatus::NotEnforced => Err(io::Error::other("the kernel has none of it")),
    }
}

/// A system call by its number and name, and the code that needs it.
macro_rules! calls {
    ($($number:ident: $reason:literal,)*) => { &[$((libc::$number, stringify!($number), $reason)),*] };
}

/// The system calls that an engine process makes, each with the code that needs it. Anything else gets EPERM, as a test from
/// inside must be able to tell.
const ALLOWED: &[(i64, &str, &str)] = calls![
    SYS_recvmsg: "orders: isolated/process.rs",
    SYS_sendmsg: "answers: isolated/process.rs",
    SYS_read: "a root file or the pipe of a root's helper, by descriptor: root.rs",
    SYS_close: "those descriptors",
    SYS_fstat: "how long such a file is",
    SYS_lseek: "reading one from its beginning",
    SYS_futex: "waiting for orders and waking the host: isolated/ring.rs; locks",
    SYS_sched_yield: "locks of the standard library under contention",
    SYS_getrandom: "new keys: random.rs",
    SYS_clock_nanosleep: "the time that the ICE model takes to program: ice/mod.rs",
    SYS_clock_gettime: "clocks, where the kernel does not answer in user space",
    SYS_madvise: "what an allocation of megabytes is marked with: sys/secret.rs",
    SYS_munmap: "the end of one",
    SYS_rt_sigprocmask: "the C library ends a thread",
    SYS_rt_sigreturn: "the end of a signal handler",
    SYS_restart_syscall: "the kernel continues a sleep after a stop",
    SYS_exit: "the end of a thread",
    SYS_exit_group: "the end of the process",
];

/// Those that are allowed with some arguments only: [`seccomp`] says which.
const ALLOWED_IN_PART: &[(i64, &str, &str)] = calls![
    SYS_mmap: "memory for opening a root with a passphrase: anonymous, and nothing that can be executed",
    SYS_write: "the last words of a panic, on standard error",
    SYS_writev: "likewise",
    SYS_sched_setaffinity: "a lane follows its host thread to another CPU: isolated/process.rs; of the calling thread (0) only",
];

/// The names of the system calls that an engine process is allowed, and the code that needs each.
pub(crate) fn allowed() -> impl Iterator<Item = (&'static str, &'static str)> {
    let all = ALLOWED.iter().chain(ALLOWED_IN_PART);
    all.map(|(_number, name, reason)| (name.trim_start_matches("SYS_"), *reason))
}

fn seccomp() -> io::Result<()> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|(number, ..)| (*number, Vec::new())).collect();
    let anonymous = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).unsigned_abs().into();
    let data = (libc::PROT_READ | libc::PROT_WRITE).unsigned_abs().into();
    let condition = |argument, value| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
            .map_err(io::Error::other)
    };
    let memory =
        SeccompRule::new(vec![condition(2, data)?, condition(3, anonymous)?]).map_err(io::Error::other)?;
    rules.insert(libc::SYS_mmap, vec![memory]);
    // With a number it could be any process whose user is ours, or any at all with CAP_SYS_NICE.
    let calling_thread = SeccompRule::new(vec![condition(0, 0)?]).map_err(io::Error::other)?;
    rules.insert(libc::SYS_sched_setaffinity, vec![calling_thread]);
    let standard_error = || SeccompRule::new(vec![condition(0, 2)?]).map_err(io::Error::other);
    rules.insert(libc::SYS_write, vec![standard_error()?]);
    rules.insert(libc::SYS_writev, vec![standard_error()?]);
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into().map_err(io::Error::other)?,
    )
    .map_err(io::Error::other)?;
    let program: BpfProgram = filter.try_into().map_err(io::Error::other)?;
    sys::restrict_system_calls(&program)
}
