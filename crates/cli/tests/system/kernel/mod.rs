//! Real kernels: Debian's, booted in a machine that qemu emulates, with our volumes as its disks and our program in it.
//!
//! ```text
//!   dm_crypt   volumes that dm-crypt opens by our line, every byte in both directions
//!   luks       containers that cryptsetup opens with dm-crypt, and half-done re-encryption
//!   block      our server on block devices, under the kernel's NBD client; `probe`, and keys of a disk's hardware
//!   fscrypt    files that a kernel encrypts through blk-crypto
//!   archive    the first filesystem of a machine
//!   kernels    which kernels there are, and their modules
//!   machine    boots one and does what a test wants, step by step
//!   init.sh    its first process
//! ```
//!
//! `.ci/kernels` fetches kernels. The newest one is tried, with `CI=true` all of them. `INLINECRYPT_QEMU_ACCEL=kvm` lets
//! hardware help, where it does.

mod archive;
mod block;
mod dm_crypt;
mod fscrypt;
mod kernels;
mod luks;
mod machine;

use crate::rig::Place;
use inlinecrypt_testkit::pattern;
use machine::Machine;
use std::fs;

/// Files of all sizes, in the place's `tree`, and in `/data/tree` of the machine.
fn tree(place: &Place, machine: &mut Machine<'_>) {
    let tree = place.path("tree");
    fs::create_dir_all(tree.join("many")).unwrap();
    fs::create_dir_all(tree.join("a/b/c")).unwrap();
    for (seed, size) in (60..).zip([0, 1, 511, 512, 4095, 4096, 4097, 70_000]) {
        fs::write(tree.join(format!("file of {size} bytes")), pattern::bytes(seed, 0, size)).unwrap();
    }
    fs::write(tree.join("large"), pattern::bytes(70, 0, 3_000_001)).unwrap();
    fs::write(tree.join("a/b/c/deep"), pattern::bytes(71, 0, 3000)).unwrap();
    fs::write(tree.join("n".repeat(143)), b"a long name").unwrap();
    for number in 0..100 {
        fs::write(tree.join(format!("many/number {number}")), pattern::bytes(number, 0, 700)).unwrap();
    }
    machine.folder(&tree, "/data/tree".as_ref());
}
