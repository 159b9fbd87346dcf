//! `inlinecrypt-sim VERB`: the model check and the simulation.
#![forbid(unsafe_code)]

use inlinecrypt_sim::prove::{self, plans::Bounds};
use inlinecrypt_sim::simulation;
use std::process::ExitCode;
use std::time::Instant;

const HELP: &str = "\
inlinecrypt-sim VERB
  prove [small|usual|large]  every history of the state machines up to the bounds, and the other designs' stories
  run [SEEDS]                so many simulated worlds, after those that once failed
  replay SEED                one of them
";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let verb = args.next().unwrap_or_default();
    let outcome = match verb.as_str() {
        "prove" => prove(args.next().as_deref()),
        "run" => run(args.next().as_deref()),
        "replay" => replay(args.next().as_deref()),
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(1);
        }
    };
    match outcome {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(text) => {
            eprint!("{text}");
            ExitCode::FAILURE
        }
    }
}

fn prove(bounds: Option<&str>) -> Result<String, String> {
    let bounds = match bounds {
        None | Some("usual") => Bounds::Usual,
        Some("small") => Bounds::Small,
        Some("large") => Bounds::Large,
        Some(other) => return Err(format!("bounds are small, usual or large, not {other}\n")),
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    prove::report(bounds, threads)
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|why| format!("{text:?}: {why}\n"))
}

fn run(seeds: Option<&str>) -> Result<String, String> {
    let seeds = seeds.map_or(Ok(1000), number)?;
    let begun = Instant::now();
    simulation::name_the_seed_on_panic();
    match simulation::run_all(seeds) {
        Ok(seen) => {
            Ok(format!("{seeds} seeds in {:.1} s, nothing wrong:\n{seen}", begun.elapsed().as_secs_f64()))
        }
        Err(failure) => Err(format!("{failure}\n")),
    }
}

fn replay(seed: Option<&str>) -> Result<String, String> {
    let seed = number(seed.ok_or_else(|| HELP.to_owned())?)?;
    simulation::name_the_seed_on_panic();
    match simulation::run(seed, None) {
        Ok(seen) => Ok(format!("seed {seed}: nothing wrong\n{seen}")),
        Err(failure) => Err(format!("{failure}\n")),
    }
}
