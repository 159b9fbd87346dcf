//! The command as a person meets it: what it makes, what it says, and how it refuses.
//!
//! ```text
//!   main_job      one command, and the next
//!   volumes       bad sizes, files, layouts; descriptions
//!   keys          bad keys and roots; the ladder
//!   reencrypt     another key or layout for a volume, and how that is refused
//!   roots         roots of every kind
//!   configs       configs, and `check`
//!   control       `status`
//!   stopping      signals, sockets, service managers
//!   pages         help, manual pages, completions
//!     place       a home of its own for each test, and the command in it
//! ```
//!
//! System tests with real clients are in `tests/system`.

mod configs;
mod control;
mod engines;
mod keys;
mod main_job;
mod pages;
mod place;
mod reencrypt;
mod roots;
mod stopping;
mod volumes;
