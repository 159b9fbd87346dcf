//! `completions SHELL`

use crate::cli::{Cli, Completions};
use crate::report::{Failure, print_bytes};
use clap::CommandFactory as _;

pub(super) fn run(args: &Completions) -> Result<(), Failure> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "inlinecrypt", &mut text);
    print_bytes(&text)
}
