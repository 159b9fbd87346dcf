//! On which core a thread runs, where the scheduler's choice costs too much.
//!
//! Two threads of ours that wake each other and sleep often are drawn to one core, and stay there while another has nothing to do:
//! whoever is woken is put beside his waker, and what a core is idle for between two pieces is too short for it to fetch work
//! from others. So one of the two can keep off the other's core. What others decide about its cores stays.

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// The core that this thread runs on, as the system counts them. It may be another by now.
pub(super) fn current_core() -> usize {
    sched_getcpu()
}

/// Where this thread may run, as it chose among the cores that it was given.
#[derive(Debug, Default)]
pub(super) struct Place {
    /// What it was given, and what it chose.
    chosen: Option<(CpuSet, CpuSet)>,
}

impl Place {
    /// From now on this thread runs on any core that it was given but `core`, instead of what it kept off before. Does nothing
    /// if that is its only one, or if the system does not let us.
    pub(super) fn keep_off(&mut self, core: usize) {
        let Ok(now) = sched_getaffinity(None) else { return };
        let given = match self.chosen {
            Some((given, ours)) if ours == now => given,
            // Somebody else has chosen meanwhile.
            _ => now,
        };
        if core >= CpuSet::MAX_CPU {
            return;
        }
        let mut rest = given;
        rest.unset(core);
        if rest.count() > 0 && sched_setaffinity(None, &rest).is_ok() {
            self.chosen = Some((given, rest));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cores() -> CpuSet {
        sched_getaffinity(None).unwrap()
    }

    fn only(core: usize) -> CpuSet {
        let mut set = CpuSet::new();
        set.set(core);
        set
    }

    /// In a thread of its own, whose cores are forgotten afterwards.
    fn alone(check: impl FnOnce() + Send) {
        std::thread::scope(|scope| scope.spawn(check).join().unwrap());
    }

    #[test]
    fn a_thread_leaves_the_core_that_it_keeps_off_and_may_come_back_to_it() {
        alone(|| {
            let given = cores();
            let mut place = Place::default();
            for _ in 0..4 {
                let here = current_core();
                place.keep_off(here);
                if given.count() > 1 {
                    assert_ne!(current_core(), here);
                    assert_eq!(cores().count(), given.count() - 1, "one at a time");
                }
            }
        });
    }

    #[test]
    fn an_only_core_is_kept() {
        alone(|| {
            let here = only(current_core());
            sched_setaffinity(None, &here).unwrap();
            let mut place = Place::default();
            place.keep_off(current_core());
            place.keep_off(usize::MAX);
            assert!(cores() == here);
        });
    }

    #[test]
    fn what_others_decide_stays() {
        alone(|| {
            let mut place = Place::default();
            let others = only(current_core());
            place.keep_off(current_core());
            // As by taskset(1).
            sched_setaffinity(None, &others).unwrap();
            for _ in 0..2 {
                place.keep_off(current_core());
                assert!(cores() == others);
                place.keep_off(CpuSet::MAX_CPU - 1);
                assert!(cores() == others);
            }
        });
    }
}
