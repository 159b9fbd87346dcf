//! `bench`: what this machine can do, by the code that serves, with the machine's own limits beside it.
//!
//! Ciphers and engines are here; the path is in `path.rs`, with a client (`client.rs`), the same bytes without a server
//! (`echo.rs`), a file that nobody sees (`scratch.rs`), and memory and nothing in its place (`memory.rs`, `nothing.rs`).
//!
//! Every figure is the median of several rounds. On a machine that does other things, compare figures of one run.

mod client;
mod echo;
mod memory;
mod nothing;
mod path;
mod scratch;

use self::path::PathReport;
use crate::ask::Asker;
use crate::cli::{Bench, BenchArg, PassphraseArgs};
use crate::engine_process::{self, EngineHome};
use crate::plan;
use crate::report::{Failure, print, print_json};
use inlinecrypt_core::config::{DataUnitSize, Hardware, KeyType, Mode};
use inlinecrypt_core::engine::{Direction, Engine, KeyRef, Piece, SlotIndex};
use inlinecrypt_core::error::Error;
use inlinecrypt_core::key::{Key, KeyForm, RawKey};
use serde::Serialize;
use std::fmt::Write as _;
use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rounds of which the median counts.
const ROUNDS: usize = 7;
/// Length of a round.
const ROUND: Duration = Duration::from_millis(30);

#[derive(Serialize)]
struct Report {
    version: u32,
    copy_gb_per_s: f64,
    /// Empty if not asked for.
    cipher: Vec<CipherFigure>,
    /// Empty if not asked for.
    engines: Vec<EngineFigure>,
    /// `null` if not asked for.
    path: Option<PathReport>,
}

/// One thread, 256 KiB that stay in its cache.
#[derive(Serialize)]
struct CipherFigure {
    mode: &'static str,
    data_unit_bytes: u32,
    encrypt_gb_per_s: f64,
    decrypt_gb_per_s: f64,
}

/// One thread, AES-256-XTS, data units of 4096 bytes.
#[derive(Serialize)]
struct EngineFigure {
    engine: String,
    process: &'static str,
    order: &'static str,
    microseconds: f64,
    gb_per_s: f64,
}

pub(super) fn run(args: &Bench) -> Result<(), Failure> {
    let Bench { what, json, .. } = args;
    let asked = |this: BenchArg| what.is_empty() || what.contains(&this);
    if !asked(BenchArg::Path) {
        path::refuse_without(args)?;
    }
    // First: it is what can be refused.
    let path = asked(BenchArg::Path).then(|| path::measure(args)).transpose()?;
    let report = Report {
        version: 1,
        copy_gb_per_s: copy(),
        cipher: if asked(BenchArg::Cipher) { ciphers() } else { Vec::new() },
        engines: if asked(BenchArg::Engine) { engines(args)? } else { Vec::new() },
        path,
    };
    if *json {
        return print_json(&report);
    }
    print(&report.describe())
}

fn engines(args: &Bench) -> Result<Vec<EngineFigure>, Failure> {
    let mut figures = Vec::new();
    for (process, home) in [("in this process", EngineHome::None), ("in one of its own", EngineHome::Own)] {
        let mut plan = plan::engine_from(&args.engine)?;
        plan.home = Some(home);
        let failed = |error: Error| Failure::of("cannot measure the engine", &error);
        let mut asker = Asker::new(&PassphraseArgs::default());
        let started = engine_process::start(&plan, false, None, &mut asker).map_err(failed)?;
        measure_engine(&*started.engine, &plan.spec.to_string(), process, &mut figures).map_err(failed)?;
    }
    Ok(figures)
}

impl Report {
    /// For people.
    fn describe(&self) -> String {
        let mut sections = Vec::new();
        if !self.cipher.is_empty() || !self.engines.is_empty() {
            sections.push(format!(
                "one thread, 256 KiB in its cache, medians of {ROUNDS} rounds; copying them: {:.1} GB/s\n",
                self.copy_gb_per_s
            ));
        }
        if !self.cipher.is_empty() {
            let mut text = "cipher                data unit    encrypt    decrypt   GB/s\n".to_owned();
            for figure in &self.cipher {
                let CipherFigure { mode, data_unit_bytes, encrypt_gb_per_s, decrypt_gb_per_s } = figure;
                let _ = writeln!(
                    text,
                    "  {mode:<18}  {data_unit_bytes:>9}  {encrypt_gb_per_s:>9.2}  {decrypt_gb_per_s:>9.2}"
                );
            }
            sections.push(text);
        }
        if !self.engines.is_empty() {
            let mut text =
                "engine, AES-256-XTS, data unit 4096                    us an order       GB/s\n".to_owned();
            for EngineFigure { engine, process, order, microseconds, gb_per_s } in &self.engines {
                let what = format!("{engine} {process}");
                let _ = writeln!(text, "  {what:<34}  {order:<16}  {microseconds:>9.2}  {gb_per_s:>9.2}");
            }
            sections.push(text);
        }
        sections.extend(self.path.as_ref().map(PathReport::describe));
        sections.join("\n")
    }
}

const BYTES: usize = 256 * 1024;

fn copy() -> f64 {
    let from = vec![1u8; BYTES];
    let mut into = vec![0u8; BYTES];
    let seconds = median(|| {
        black_box(&mut into[..]).copy_from_slice(black_box(&from));
    });
    gigabytes(BYTES, seconds)
}

fn ciphers() -> Vec<CipherFigure> {
    let mut figures = Vec::new();
    for mode in Mode::ALL {
        for data_unit_bytes in [512, 4096, 65_536] {
            let key: Vec<u8> = (0u8..).take(mode.info().key_bytes).collect();
            let cipher = mode.info().expand(&key).expect("halves that differ, and the mode's length");
            let mut data = vec![0u8; BYTES];
            let unit = data_unit_bytes as usize;
            let encrypt = median(|| cipher.encrypt(0.into(), unit, black_box(&mut data)));
            let decrypt = median(|| cipher.decrypt(0.into(), unit, black_box(&mut data)));
            figures.push(CipherFigure {
                mode: mode.info().name,
                data_unit_bytes,
                encrypt_gb_per_s: gigabytes(BYTES, encrypt),
                decrypt_gb_per_s: gigabytes(BYTES, decrypt),
            });
        }
    }
    figures
}

fn measure_engine(
    engine: &dyn Engine,
    name: &str,
    process: &'static str,
    figures: &mut Vec<EngineFigure>,
) -> Result<(), Error> {
    if let Some(exclusive) = engine.exclusive() {
        exclusive.commit(KeyType::Raw)?;
    }
    let raw: Vec<u8> = (0u8..64).collect();
    let form = KeyForm::Raw(RawKey::new(&raw));
    let key: Arc<Key> =
        Key::new(Mode::Aes256Xts, DataUnitSize::DEFAULT, 4, form, Hardware::Allowed).expect("a good key");
    let slot = SlotIndex(0);
    let key_ref = if engine.capabilities().keyslots > 0 {
        engine.program(slot, &key)?;
        KeyRef::Slot(slot)
    } else {
        KeyRef::Inline(&key)
    };
    let mut memory = engine.memory().allocate(BYTES)?;
    for (order, pieces, len) in [("4 KiB", 1, 4096), ("32 of 4 KiB", 32, 4096), ("256 KiB", 1, BYTES)] {
        let mut failure = None;
        let whole: Vec<Piece> = (0..pieces)
            .map(|index| Piece { first: 0.into(), range: index * len..(index + 1) * len })
            .collect();
        let mut work = whole.clone();
        let seconds = median(|| {
            work.clone_from(&whole);
            failure = engine.crypt(key_ref, Direction::Encrypt, &mut *memory, &mut work).err();
        });
        if let Some(error) = failure {
            return Err(error);
        }
        figures.push(EngineFigure {
            engine: name.to_owned(),
            process,
            order,
            microseconds: seconds * 1e6,
            gb_per_s: gigabytes(pieces * len, seconds),
        });
    }
    Ok(())
}

/// Seconds that `work` takes, median of rounds.
fn median(mut work: impl FnMut()) -> f64 {
    let mut rounds = [0.0; ROUNDS];
    for round in &mut rounds {
        let (start, mut times) = (Instant::now(), 0u32);
        while start.elapsed() < ROUND {
            // The clock is not asked for each.
            for _ in 0..8 {
                work();
            }
            times += 8;
        }
        *round = start.elapsed().as_secs_f64() / f64::from(times);
    }
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

fn gigabytes(bytes: usize, seconds: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    let bytes = bytes as f64;
    bytes / seconds / 1e9
}
