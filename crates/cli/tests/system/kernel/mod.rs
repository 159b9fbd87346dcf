//! Real kernels: Debian's, booted in a machine that qemu emulates, with our volumes as its disks and our program in it.
//!
//! ```text
//!   dm_crypt   volumes that dm-crypt opens by our line, every byte in both directions
//!   archive    the first filesystem of a machine
//!   kernels    which kernels there are, and their modules
//!   machine    boots one and does what a test wants, step by step
//!   init.sh    its first process
//! ```
//!
//! `.ci/kernels` fetches kernels. The newest one is tried, with `CI=true` all of them. `INLINECRYPT_QEMU_ACCEL=kvm` lets
//! hardware help, where it does.

mod archive;
mod dm_crypt;
mod kernels;
mod machine;
