//! The `inlinecrypt` command: encrypted volumes over NBD, and the keys for them.
//!
//! ```text
//!   cli          what can be written on the command line: the one definition for parsing, help, man pages, completions
//!     luks, fscrypt   the same for what stands behind these verbs
//!   cmd/VERB     one file per verb
//!     config     TOML files: configs, and the descriptions that lie beside volumes
//!     plan       command line + config + descriptions -> what is to be served; every problem found is reported
//!     table      volumes as dm-crypt's tables give them
//!     host       plan -> engines, keys, admissions, volumes
//!     engine_process   where engines run
//!     create     new volumes: key, description and image, in an order that a crash cannot spoil
//!     control    the socket by which `status` asks a running server
//!     plain      volumes without encryption
//!     reencrypt   another key for a volume: what is written down, and who does the work
//!     take_over   live upgrade: one server takes over from another
//!   luks/        LUKS containers: what they say about their data, and the process that opens them
//!   ask          passphrases and PINs, and the process that talks to TPMs and tokens
//!   probe        what hardware and kernel can do
//!   report       messages and exit codes
//!   engine-process   not for people: this program as the process in which engines run (`inlinecrypt_engine::isolated`)
//! ```
//!
//! Start reading at `cmd/serve.rs`.
#![forbid(unsafe_code)]

mod ask;
mod cli;
mod cmd;
mod config;
mod control;
mod create;
mod engine_process;
mod files;
mod host;
mod identifier;
mod keyfile;
mod luks;
mod orders;
mod places;
mod plain;
mod plan;
mod probe;
mod reencrypt;
mod report;
mod size;
mod table;
mod take_over;
mod watch;

use clap::Parser as _;
use inlinecrypt_engine::isolated;
use report::{Code, Failure, Failures};
use std::os::fd::AsFd as _;
use std::process::ExitCode;

/// The system's allocator, but in an engine process, where all memory is secret memory.
#[global_allocator]
static ALLOCATOR: inlinecrypt_engine::SecretAllocator = inlinecrypt_engine::SecretAllocator;

fn main() -> ExitCode {
    // Before anything else opens a descriptor, starts a thread or reads what it does not need.
    let mut words = std::env::args_os().skip(1);
    if words.next().is_some_and(|verb| verb == isolated::PROCESS_VERB) {
        return match std::io::stdin().as_fd().try_clone_to_owned() {
            Ok(socket) => isolated::process::run(socket, isolated::LanePriority::of_arguments(words)),
            Err(_closed) => Code::Wrong.into(),
        };
    }
    let arguments = match cli::Cli::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way, too.
            let _ = error.print();
            return if error.use_stderr() { Code::Wrong.into() } else { ExitCode::SUCCESS };
        }
    };
    let done = prepare(&arguments).map_err(Failures::from).and_then(|()| cmd::run(arguments.command));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failures) => failures.report(),
    }
}

/// What comes before anything else: no core dumps before the first key arrives, and a place for the log.
fn prepare(arguments: &cli::Cli) -> Result<(), Failure> {
    inlinecrypt_engine::harden_process()
        .map_err(|error| Failure::of("cannot protect this process", &error))?;
    report::start_log(arguments.verbose, arguments.log.as_deref())
}
