//! `inlinecrypt-sim VERB`: the model check and the simulation.
#![forbid(unsafe_code)]

use inlinecrypt_sim::prove::{self, plans::Bounds};
use std::process::ExitCode;

const HELP: &str = "\
inlinecrypt-sim VERB
  prove [small|usual|large]  every history of the state machines up to the bounds, and the other designs' stories
";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let verb = args.next().unwrap_or_default();
    let outcome = match verb.as_str() {
        "prove" => prove(args.next().as_deref()),
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
