//! Hardening changes the whole process, so its test has one to itself.

use rustix::process::{DumpableBehavior, Resource, dumpable_behavior, getrlimit};
use std::fs;

#[test]
fn a_hardened_process_is_neither_dumpable_nor_allowed_core_files() {
    inlinecrypt_engine::harden_process().unwrap();
    // Once more, as every library in the process might.
    inlinecrypt_engine::harden_process().unwrap();

    assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
    let core = getrlimit(Resource::Core);
    assert_eq!((core.current, core.maximum), (Some(0), Some(0)));
    // The limit as the kernel shows it to others.
    let limits = fs::read_to_string("/proc/self/limits").unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().filter(|word| *word == "0").count(), 2, "{core}");
}
