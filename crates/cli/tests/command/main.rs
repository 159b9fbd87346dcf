//! The command as a person meets it: what it makes, what it says, and how it refuses.
//!
//! ```text
//!   main_job      one command, and the next
//!   volumes       bad sizes, files, layouts; descriptions
//!   keys          bad keys and roots; the ladder
//!   key_devices   keys by the hardware of disks
//!   reencrypt     another key or layout for a volume, and how that is refused
//!   roots         roots of every kind
//!   configs       configs, and `check`
//!   tables        lines of dm tables, IV layouts, offsets
//!   luks          LUKS containers
//!   luks_edges    those that are cut short, half done, detached, or to be served plain
//!   plain         volumes without encryption
//!   bench         what can be measured
//!   control       `status`
//!   stopping      signals, sockets, service managers
//!   pages         help, manual pages, completions
//!   probe         what the machine can do, from copies of sysfs
//!   fscrypt       encrypted files on an ext4 image that Linux wrote
//!     place       a home of its own for each test, and the command in it
//! ```
//!
//! System tests with real clients are in `tests/system`.

mod bench;
mod configs;
mod control;
mod engines;
mod fscrypt;
mod key_devices;
mod keys;
mod luks;
mod luks_edges;
mod main_job;
mod pages;
mod place;
mod plain;
mod probe;
mod reencrypt;
mod roots;
mod stopping;
mod tables;
mod volumes;
