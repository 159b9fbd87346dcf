//! How the system schedules a thread.

use std::io;

/// Policy and priority of a thread. Threads that it starts have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Schedule {
    policy: libc::c_int,
    priority: libc::c_int,
}

impl Schedule {
    /// The lowest real-time priority: before everybody without one, behind everybody else with one. Those that share it on one
    /// CPU take turns (`SCHED_RR`), so that a long order does not hold up the others.
    pub(crate) const REALTIME: Self = Self { policy: libc::SCHED_RR, priority: 1 };

    /// Whether it goes before the usual ones.
    pub(crate) fn is_realtime(self) -> bool {
        [libc::SCHED_FIFO, libc::SCHED_RR, libc::SCHED_DEADLINE].contains(&self.policy)
    }

    /// That of the calling thread.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub(crate) fn current() -> io::Result<Self> {
        // SAFETY: takes a number, and touches no memory of ours; 0 is the calling thread.
        let policy = checked(unsafe { libc::syscall(libc::SYS_sched_getscheduler, 0) })?;
        // Told with it, and a matter of children.
        let policy = policy & !libc::SCHED_RESET_ON_FORK;
        let mut priority: libc::c_int = 0;
        // SAFETY: 0 is the calling thread; the system writes its `struct sched_param`, one int, where `priority` is.
        checked(unsafe { libc::syscall(libc::SYS_sched_getparam, 0, &raw mut priority) })?;
        Ok(Self { policy, priority })
    }

    /// Gives it to the calling thread.
    ///
    /// # Errors
    ///
    /// What the system says: [`PermissionDenied`](io::ErrorKind::PermissionDenied) for a real-time one without the right to it.
    pub(crate) fn apply(self) -> io::Result<()> {
        let Self { policy, priority } = self;
        // The system call, since some C libraries have no function for it that works on a thread.
        // SAFETY: 0 is the calling thread; the system reads its `struct sched_param`, one int, from where `priority` is.
        let answer = unsafe { libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const priority) };
        checked(answer).map(drop)
    }
}

fn checked(answer: libc::c_long) -> io::Result<libc::c_int> {
    // A failure is -1, and an answer a small number.
    libc::c_int::try_from(answer).ok().filter(|answer| *answer >= 0).ok_or_else(io::Error::last_os_error)
}
