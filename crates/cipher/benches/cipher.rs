//! How fast the modes are, in every way that this CPU has, and what share of the CPU's AES rounds AES-256-XTS uses.
//!
//! One thread, in place. Everything is measured in turn, round after round, and medians are shown, so that a change of the
//! machine's speed meets all alike: compare within one run, as machines differ and are shared.
//!
//! `cargo bench -p inlinecrypt-cipher`, or with a word after `--` what has it in its name alone.

use inlinecrypt_cipher::{Dun, MODES, Mode, ModeInfo, UnitCipher, beneath};
use std::cell::RefCell;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// Stays in the second-level cache.
const HOT_BYTES: usize = 256 * 1024;
/// Larger than caches, or than our share of them.
const COLD_BYTES: usize = 256 * 1024 * 1024;
/// What a request has at the most, and so what one call gets of the cold data.
const COLD_CALL_BYTES: usize = 1024 * 1024;
const UNIT_BYTES: [usize; 3] = [512, 4096, 65_536];
const ROUNDS: usize = 31;
/// Of what takes no longer than asking the clock.
const CALLS: usize = 64;

/// Something to measure.
struct Job<'a> {
    name: String,
    /// Does it once; says how many bytes, or calls, that were.
    work: Box<dyn FnMut() -> usize + 'a>,
    /// Each round's bytes, or calls, per second.
    rates: Vec<f64>,
}

impl<'a> Job<'a> {
    fn new(name: impl Into<String>, work: impl FnMut() -> usize + 'a) -> Self {
        Self { name: name.into(), work: Box::new(work), rates: Vec::new() }
    }

    /// Repeats the work for `time`; once at the least.
    fn measure(&mut self, time: Duration) {
        let start = Instant::now();
        let mut done = 0;
        let elapsed = loop {
            done += (self.work)();
            let elapsed = start.elapsed();
            if elapsed >= time {
                break elapsed;
            }
        };
        self.rates.push(done as f64 / elapsed.as_secs_f64());
    }

    fn median(&self) -> f64 {
        let mut rates = self.rates.clone();
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    }
}

/// Measures all jobs in turn, `rounds` times.
fn run(rounds: usize, time: Duration, jobs: &mut [Job<'_>]) {
    for _ in 0..rounds {
        for job in &mut *jobs {
            job.measure(time);
        }
    }
}

fn key(info: &ModeInfo) -> Vec<u8> {
    (0..=255).cycle().take(info.key_bytes).collect()
}

/// A mode's cipher in every way, by name.
fn ciphers(info: &ModeInfo) -> Vec<(&'static str, Box<dyn UnitCipher>)> {
    beneath::ways(info.mode).into_iter().map(|(way, expand)| (way, expand(&key(info)))).collect()
}

/// The rounds of AES-256 alone, if the CPU has them.
fn limit() -> Option<Job<'static>> {
    beneath::aes_256_rounds(0)?;
    Some(Job::new("AES-256 rounds alone", || beneath::aes_256_rounds(HOT_BYTES).unwrap_or_default()))
}

/// All the ways of a mode, forwards and backwards, with each unit size; `call_bytes` of `data` at a time.
fn jobs<'a>(
    ways: &'a [(&'static str, Box<dyn UnitCipher>)],
    mode: Mode,
    call_bytes: usize,
    data: &'a RefCell<Vec<u8>>,
) -> Vec<Job<'a>> {
    let mut jobs = Vec::new();
    for (way, cipher) in ways {
        for (direction, encrypt) in [("encrypt", true), ("decrypt", false)] {
            for unit_bytes in UNIT_BYTES {
                jobs.push(Job::new(format!("{mode} {way} {direction} {unit_bytes}"), move || {
                    let mut data = data.borrow_mut();
                    for part in data.chunks_mut(call_bytes) {
                        let first = black_box(Dun::from(1));
                        if encrypt {
                            cipher.encrypt(first, unit_bytes, part);
                        } else {
                            cipher.decrypt(first, unit_bytes, part);
                        }
                    }
                    data.len()
                }));
            }
        }
    }
    jobs
}

/// Prints GB/s, one line for each way and direction, with shares of the limit if there is one.
fn print_rates(title: &str, limit: Option<f64>, jobs: &[Job<'_>]) {
    println!("\n{title}");
    if let Some(limit) = limit {
        println!("{:38} {:>14.2}", "AES-256 rounds alone", limit / 1e9);
    }
    println!("{:38} {:>14} {:>14} {:>14}", "GB/s at data units of", 512, 4096, 65_536);
    for line in jobs.chunks(UNIT_BYTES.len()) {
        let (name, _) = line[0].name.rsplit_once(' ').expect("a name ends with the unit size");
        print!("{name:38}");
        for job in line {
            let rate = job.median();
            let share = limit.map_or(String::new(), |limit| format!(" ({:.0} %)", rate / limit * 100.0));
            print!(" {:>14}", format!("{:.2}{share}", rate / 1e9));
        }
        println!();
    }
}

fn main() {
    // Cargo passes `--bench`.
    let word = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let wanted = |title: &str| title.to_lowercase().contains(&word.to_lowercase());

    let hot = RefCell::new(vec![0; HOT_BYTES]);
    for info in &MODES {
        let title = format!("{}, {} KiB in the cache", info.name, HOT_BYTES / 1024);
        if wanted(&title) {
            let ways = ciphers(info);
            let mut jobs = jobs(&ways, info.mode, HOT_BYTES, &hot);
            // The rounds of AES-256 say nothing of other ciphers.
            let limit = if info.mode == Mode::Aes256Xts { limit() } else { None };
            let has_limit = limit.is_some();
            jobs.extend(limit);
            run(ROUNDS, Duration::from_millis(4), &mut jobs);
            let limit = if has_limit { jobs.pop() } else { None };
            print_rates(&title, limit.map(|limit| limit.median()), &jobs);
        }
    }

    let info = Mode::Aes256Xts.info();
    let title = format!("{}, cold: {} MiB", info.name, COLD_BYTES / 1024 / 1024);
    if wanted(&title) {
        let cold = RefCell::new(vec![1; COLD_BYTES]);
        let ways = ciphers(info);
        let mut jobs = jobs(&ways, info.mode, COLD_CALL_BYTES, &cold);
        jobs.push(Job::new("no cipher, each word changed", || {
            let mut data = cold.borrow_mut();
            let change = black_box(1);
            for word in data.as_chunks_mut().0 {
                *word = (u64::from_le_bytes(*word) ^ change).to_le_bytes();
            }
            data.len()
        }));
        run(ROUNDS / 4, Duration::ZERO, &mut jobs);
        let memory = jobs.pop().expect("pushed above");
        print_rates(&title, None, &jobs);
        println!("{:38} {:>14.2}", memory.name, memory.median() / 1e9);
    }

    let title = "Key set-up, the key dropped again";
    if wanted(title) {
        println!(
            "\n{title}: ns alone, and with one data unit of 512 bytes, as the library expands a key at its first use"
        );
        for info in &MODES {
            let key = key(info);
            for (way, expand) in beneath::ways(info.mode) {
                let unit = RefCell::new([0; 512]);
                let mut jobs = [
                    Job::new("alone", || {
                        for _ in 0..CALLS {
                            black_box(expand(black_box(&key)));
                        }
                        CALLS
                    }),
                    Job::new("one unit", || {
                        for _ in 0..CALLS {
                            expand(black_box(&key)).encrypt(Dun::ZERO, 512, &mut *unit.borrow_mut());
                        }
                        CALLS
                    }),
                ];
                run(ROUNDS, Duration::from_millis(4), &mut jobs);
                let [alone, unit] = jobs.map(|job| 1e9 / job.median());
                println!("{:38} {alone:>14.0} {unit:>14.0}", format!("{} {way}", info.name));
            }
        }
    }
}
