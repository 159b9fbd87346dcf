//! The format from outside: what a crash leaves, and what damage does.
#![expect(clippy::cast_possible_truncation, reason = "tests of small disks")]

mod common;
mod crash;
mod damage;
mod reencrypt;
