//! `man [DIR]`

use crate::cli::{Cli, Man};
use crate::report::{Failure, print_bytes};
use clap::CommandFactory as _;

pub(super) fn run(args: &Man) -> Result<(), Failure> {
    let Some(directory) = &args.directory else {
        let mut page = Vec::new();
        clap_mangen::Man::new(Cli::command()).render(&mut page).map_err(|error| {
            Failure::of_io("cannot render the manual page", &error, "Please report this.")
        })?;
        return print_bytes(&page);
    };
    std::fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(Cli::command(), directory))
        .map_err(|error| {
            let what = format!("cannot write manual pages to {}", directory.display());
            Failure::of_io(what, &error, "Choose a directory that you may write in.")
        })
}
