//! On which core a thread runs, where the scheduler's choice costs too much.
//!
//! Two threads of ours that wake each other and sleep often are drawn to one core, and stay there while another has nothing to do:
//! whoever is woken is put beside his waker, and what a core is idle for between two pieces is too short for it to fetch work
//! from others. So one of the two can go to another core.

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// The core that this thread runs on, as the system counts them. It may be another by now.
pub(super) fn current_core() -> usize {
    sched_getcpu()
}

/// Has this thread run on any core that `other`, a thread that never does this, may run on, but not on `core`. Stays as it is
/// if that leaves none, or if the system does not let us.
pub(super) fn keep_off(core: usize, other: Pid) {
    // Asked each time: what others decide about our cores is to be kept.
    let Ok(mut cores) = sched_getaffinity(Some(other)) else { return };
    if core < CpuSet::MAX_CPU {
        cores.unset(core);
        if cores.count() > 0 {
            let _ = sched_setaffinity(None, &cores);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;
    use std::thread;

    /// In a thread that may run on `cores` beside another that may, too. `None`: as they are.
    fn beside(cores: Option<CpuSet>, check: impl FnOnce(Pid) + Send) {
        let (tell, told) = channel();
        let (done, is_done) = channel::<()>();
        thread::scope(|scope| {
            scope.spawn(move || {
                cores.inspect(|cores| sched_setaffinity(None, cores).unwrap());
                tell.send(rustix::thread::gettid()).unwrap();
                let _ = is_done.recv();
            });
            let other = told.recv().unwrap();
            scope.spawn(move || check(other)).join().unwrap();
            drop(done);
        });
    }

    fn cores() -> CpuSet {
        sched_getaffinity(None).unwrap()
    }

    #[test]
    fn a_thread_leaves_a_core_and_may_come_back_to_it() {
        beside(None, |other| {
            let given = cores();
            for _ in 0..4 {
                let here = current_core();
                keep_off(here, other);
                if given.count() > 1 {
                    assert_ne!(current_core(), here);
                    assert_eq!(cores().count(), given.count() - 1, "one at a time");
                }
            }
        });
    }

    #[test]
    fn it_goes_where_the_other_one_may_be_and_nowhere_else() {
        let here = current_core();
        let mut only = CpuSet::new();
        only.set(here);
        beside(Some(only), |other| {
            let given = cores();
            for nowhere in [here, CpuSet::MAX_CPU, usize::MAX] {
                keep_off(nowhere, other);
                assert!(cores() == given, "{nowhere}");
            }
            keep_off((here + 1) % CpuSet::MAX_CPU, other);
            assert!(cores() == only);
        });
    }
}
