//! A seeded simulation of host, engine, clients, time and faults, in one thread.
//!
//! ```text
//!   seed --> random.rs --> world.rs     tables driven directly, many requests under way at once, virtual time
//!                     `--> volumes.rs   the profile and volumes as servers use them, one request at a time
//!                              |
//!              fault.rs    what goes wrong, and mistakes built in to see them caught
//!              disk.rs     a disk that forgets what was not flushed, and looks for plaintext
//!              check.rs    the shadow of each volume
//! ```
//!
//! Everything comes from the seed: the same seed is the same world, event by event. (Key bytes that engines draw by
//! themselves differ; nothing depends on them.)
//!
//! Start reading at `world.rs`.

pub mod check;
pub mod disk;
pub mod fault;
pub mod random;
mod volumes;
mod world;

use fault::Sabotage;
use inlinecrypt_engine::Root;
use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Seeds that once failed. They run before any other, and are never taken out.
const REGRESSIONS: &str = include_str!("../../regressions.txt");

/// What went wrong, and how to see it again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The world's seed.
    pub seed: u64,
    /// At which event.
    pub event: u64,
    /// What.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, event, what } = self;
        write!(
            f,
            "seed {seed}, event {event}: {what}\nreplay: cargo run --release -p inlinecrypt-sim -- replay {seed}"
        )
    }
}

macro_rules! seen {
    ($($name:ident: $what:literal,)*) => {
        /// What happened in simulated worlds: a simulation in which little happens shows little.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Seen {
            $(#[doc = $what] pub $name: u64,)*
        }

        impl Seen {
            /// Adds what happened in another world.
            pub fn add(&mut self, other: &Self) {
                let longest = self.longest_wait_ns.max(other.longest_wait_ns);
                $(self.$name += other.$name;)*
                self.longest_wait_ns = longest;
            }
        }

        impl fmt::Display for Seen {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                $(writeln!(f, "  {:>12}  {}", self.$name, $what)?;)*
                Ok(())
            }
        }
    };
}

seen! {
    events: "events",
    requests: "requests of clients",
    answers: "requests that were answered, or lost with the power",
    failed_requests: "requests that failed since the engine did not program their key, retries included",
    waits: "requests that waited for a keyslot",
    bounded_waits: "of these, in worlds where the documented bound holds, and held",
    longest_wait_ns: "longest wait for a keyslot, in nanoseconds of virtual time",
    programs: "programs",
    failed_programs: "programs that failed",
    losses: "keyslots found empty in use",
    wakes: "waits for the end of a quantum",
    admissions: "keys admitted",
    refusals: "keys refused",
    closes: "volumes closed",
    evictions: "keys evicted by hand",
    resets: "engine resets",
    restarts: "engine restarts",
    failed_restarts: "of these, whose switch failed, so that another was started",
    cures: "of these, of an engine that a failed switch had poisoned",
    power_cuts: "power cuts",
}

/// The chip and the wrapping key: one for all worlds of this process.
fn root() -> &'static Root {
    static ROOT: OnceLock<Root> = OnceLock::new();
    ROOT.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a temporary directory");
        Root::create_file(folder.path().join("root")).expect("a root in a new directory")
    })
}

/// One world of this seed.
///
/// # Errors
///
/// The first thing that was not as it must be.
pub fn run(seed: u64, sabotage: Option<Sabotage>) -> Result<Seen, Failure> {
    // Relaxed: read by the panicking thread, for people.
    CURRENT.store(seed, Ordering::Relaxed);
    // One in four is about the volumes' own work.
    if seed.is_multiple_of(4) {
        volumes::World::new(seed, sabotage).live()
    } else {
        world::World::new(seed, sabotage).live()
    }
}

static CURRENT: AtomicU64 = AtomicU64::new(0);

/// The state machines assert what must not be; lets an assertion that fails say which seed to replay.
pub fn name_the_seed_on_panic() {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        before(info);
        let (seed, what) = (CURRENT.load(Ordering::Relaxed), "an assertion failed, see above".to_owned());
        eprintln!("{}", Failure { seed, event: 0, what });
    }));
}

/// The seeds that once failed, then `0..seeds`.
///
/// # Errors
///
/// The first failure.
pub fn run_all(seeds: u64) -> Result<Seen, Failure> {
    let mut seen = Seen::default();
    for seed in regressions().chain(0..seeds) {
        seen.add(&run(seed, None)?);
    }
    Ok(seen)
}

fn regressions() -> impl Iterator<Item = u64> {
    let lines = REGRESSIONS.lines().map(|line| line.split('#').next().unwrap_or_default().trim());
    lines
        .filter(|line| !line.is_empty())
        .map(|line| line.parse().expect("a seed on each line of regressions.txt"))
}

#[cfg(test)]
mod tests;
