//! The verbs, one file each.

mod bench;
mod check;
mod completions;
mod engine;
mod engine_serve;
mod fscrypt;
mod key;
mod key_device;
mod luks;
mod man;
mod probe;
mod reencrypt;
mod root;
mod serve;
mod status;
mod volume;

use crate::cli::Command;
use crate::report::Failures;

/// Does what was asked for.
pub(crate) fn run(command: Command) -> Result<(), Failures> {
    match command {
        Command::Serve(args) => serve::run(*args),
        Command::Volume(command) => volume::run(command),
        Command::Key(command) => Ok(key::run(command)?),
        Command::Luks(command) => Ok(luks::run(command)?),
        Command::Engine(command) => Ok(engine::run(command)?),
        Command::Root(command) => Ok(root::run(command)?),
        Command::RootHelper => Ok(root::helper()?),
        Command::LuksHelper => Ok(crate::luks::unlock::helper()?),
        Command::Fscrypt(command) => Ok(fscrypt::run(command)?),
        Command::Status(args) => status::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Probe(args) => Ok(probe::run(&args)?),
        Command::Bench(args) => Ok(bench::run(&args)?),
        Command::Completions(args) => Ok(completions::run(&args)?),
        Command::Man(args) => Ok(man::run(&args)?),
    }
}
