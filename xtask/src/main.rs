//! `cargo xtask VERB`: what a developer runs, and what CI runs, so that both run the same.

mod count;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const HELP: &str = "\
cargo xtask VERB
  check               formatting, lints, documentation links, tidy: before each commit
  tidy                dependency edges, where unsafe may stand, words, links
  loom [PREEMPTIONS]  every interleaving of the locks (2 preemptions; 3 takes long)
  prove [BOUNDS]      every history of the state machines up to the bounds: small, usual (a minute) or large
  sim [SEEDS]         so many simulated worlds (1000; 10000 for a real run)
  fuzz [SECONDS]      each fuzz target for so long (10 in CI; 3600 for a real run); needs a nightly toolchain
  miri [WORD]         the ciphers' vector code, and pure parts of the framework, under Miri, which sees undefined behaviour;
                      tests with WORD in their names alone; minutes; needs a nightly toolchain with Miri
  soak [MINUTES]      the long forms of the crash, power-cut and many-volumes tests
  count [--write]     instructions of the hot paths against those written down; needs valgrind
  bench               the cipher beside the library underneath it
  bench-peers [ARGS]  served volumes beside nbdkit and qemu-nbd in one run (benches/compare/peers.py ARGS)
  ci                  check, loom, prove, sim, count, and a slice of fuzzing; the tests are `cargo test --workspace`
";

type Outcome = Result<(), String>;

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let verb = args.next().unwrap_or_default();
    let rest: Vec<String> = args.collect();
    let outcome = match verb.as_str() {
        "check" => check(),
        "tidy" => tidy::run(&root()),
        "loom" => loom(rest.first().map_or("2", String::as_str)),
        "prove" => simulate("prove", rest.first().map_or("usual", String::as_str)),
        "sim" => simulate("run", rest.first().map_or("1000", String::as_str)),
        "fuzz" => fuzz(rest.first().map_or("10", String::as_str)),
        "miri" => miri(rest.first().map_or("", String::as_str)),
        "soak" => soak(rest.first().map_or("10", String::as_str)),
        "count" => count::run(&root(), rest.first().is_some_and(|arg| arg == "--write")),
        "bench" => cargo(&["bench", "-p", "inlinecrypt-cipher"], &[]),
        "bench-peers" => bench_peers(&rest),
        "ci" => check()
            .and_then(|()| loom("2"))
            .and_then(|()| simulate("prove", "usual"))
            .and_then(|()| simulate("run", "1000"))
            .and_then(|()| count::run(&root(), false))
            .and_then(|()| fuzz("10")),
        _ => {
            eprint!("{HELP}");
            return if verb == "help" { ExitCode::SUCCESS } else { ExitCode::from(1) };
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("xtask {verb}: {why}");
            ExitCode::FAILURE
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_owned()
}

fn cargo(args: &[&str], env: &[(&str, &str)]) -> Outcome {
    run(Command::new("cargo").args(args).envs(env.iter().copied()))
}

fn run(command: &mut Command) -> Outcome {
    command.current_dir(root());
    eprintln!("+ {command:?}");
    let status = command.status().map_err(|error| format!("{command:?}: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?}: {status}")) }
}

fn check() -> Outcome {
    cargo(&["fmt", "--all", "--check"], &[])?;
    cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"], &[])?;
    cargo(&["doc", "--workspace", "--no-deps", "--quiet"], &[("RUSTDOCFLAGS", "-D warnings")])?;
    tidy::run(&root())
}

/// A target directory of its own: `--cfg loom` would rebuild everything else there and back.
fn loom(preemptions: &str) -> Outcome {
    cargo(
        &[
            "test",
            "-p",
            "inlinecrypt-core",
            "--lib",
            "--release",
            "--target-dir",
            "target/loom",
            "--",
            "loom_tests",
        ],
        &[("RUSTFLAGS", "--cfg loom"), ("LOOM_MAX_PREEMPTIONS", preemptions)],
    )
}

/// The model check and the simulation are a program of their own.
fn simulate(verb: &str, arg: &str) -> Outcome {
    cargo(&["run", "--release", "--quiet", "-p", "inlinecrypt-sim", "--", verb, arg], &[])
}

fn fuzz(seconds: &str) -> Outcome {
    let targets =
        std::fs::read_dir(root().join("fuzz/fuzz_targets")).map_err(|error| format!("fuzz: {error}"))?;
    let mut names: Vec<String> =
        targets.filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned())).collect();
    names.sort();
    for name in names {
        run(Command::new("cargo").args([
            "+nightly",
            "fuzz",
            "run",
            &name,
            "--",
            &format!("-max_total_time={seconds}"),
            // Sessions have threads whose stacks the system frees a moment after they end.
            "-detect_leaks=0",
        ]))?;
    }
    Ok(())
}

/// Miri runs what it knows: Rust, and vector instructions that are said to be there; so the ciphers' kernels run, and what they
/// are compared with is the libraries' portable code. No C, no other process: see `cfg(miri)` in the cipher.
fn miri(word: &str) -> Outcome {
    let flags = "-C target-feature=+aes,+pclmulqdq,+ssse3,+avx2,+vaes,+vpclmulqdq,+gfni,+avx512f,+avx512bw \
        --cfg aes_backend=\"soft\" --cfg chacha20_backend=\"soft\" --cfg sha2_backend=\"soft\"";
    // Property tests ask for the folder that they are in, and are long enough with two cases.
    let env = [("RUSTFLAGS", flags), ("MIRIFLAGS", "-Zmiri-disable-isolation"), ("PROPTEST_CASES", "2")];
    // Of the framework what is quick enough; loom has its locks.
    let of_core = if word.is_empty() { &["batch", "context", "lru", "memory"][..] } else { &[word] };
    let of_cipher = if word.is_empty() { &[][..] } else { &[word] };
    for (package, words) in [("inlinecrypt-cipher", of_cipher), ("inlinecrypt-core", of_core)] {
        let args = ["+nightly", "miri", "test", "--target-dir", "target/miri", "-p", package, "--lib", "--"];
        cargo(&[&args, words].concat(), &env)?;
    }
    Ok(())
}

fn soak(minutes: &str) -> Outcome {
    let minutes: u64 = minutes.parse().map_err(|error| format!("MINUTES {minutes}: {error}"))?;
    cargo(
        &["test", "--release", "--workspace", "--", "soak_"],
        &[("INLINECRYPT_SOAK_SECONDS", &(minutes * 60).to_string())],
    )
}

fn bench_peers(args: &[String]) -> Outcome {
    cargo(&["build", "--release"], &[])?;
    run(Command::new("python3").arg("benches/compare/peers.py").args(args))
}
