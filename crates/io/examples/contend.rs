//! What threads pay for sharing a volume: `cargo run --release -p inlinecrypt-io --example contend`.
//!
//! Requests of one data unit on a volume whose engine and backing do nothing, so that what is left is the framework: buffer,
//! range, keyslot. One thread; then two, on CPUs of their own, each with a volume and key of its own; then two that share one.

use inlinecrypt_core::admission::Fallback;
use inlinecrypt_core::backing::{Access, Backing, BackingFacts, Durability, Extent};
use inlinecrypt_core::batch::{Batch, Transfer};
use inlinecrypt_core::config::{DataUnitSize, Hardware, Mode};
use inlinecrypt_core::disk::{Disk, LARGE_BUFFER_BYTES};
use inlinecrypt_core::error::Error;
use inlinecrypt_core::key::{Key, KeyForm, RawKey};
use inlinecrypt_core::keyslot::Policy;
use inlinecrypt_core::memory::MemoryPool;
use inlinecrypt_core::profile::CryptoProfile;
use inlinecrypt_core::reencrypt::LiveVolume;
use inlinecrypt_core::testing::{IdleEngine, MemBacking};
use inlinecrypt_core::volume::{Discard, Layout, Volume};
use rustix::thread::{CpuSet, sched_setaffinity};
use std::sync::{Arc, Barrier};
use std::time::Instant;

const SIZE_BYTES: usize = 1 << 20;
const REQUESTS: u64 = 2_000_000;
const ROUNDS: usize = 5;

#[derive(Debug)]
struct IdleBacking(BackingFacts);

impl Backing for IdleBacking {
    fn facts(&self) -> BackingFacts {
        self.0
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Error> {
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8], _: Durability) -> Result<(), Error> {
        Ok(())
    }

    fn flush(&self) -> Result<(), Error> {
        Ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Result<(), Error> {
        Ok(())
    }

    fn extents(&self, _: u64, _: u64, _: usize) -> Result<Vec<Extent>, Error> {
        Ok(Vec::new())
    }

    fn prefetch(&self, _: u64, _: u64) {}
}

fn volume(profile: &Arc<CryptoProfile>, number: u8) -> LiveVolume {
    let (mode, unit) = (Mode::Aes256Xts, DataUnitSize::DEFAULT);
    let layout = Layout::new(mode, unit, None, 0, SIZE_BYTES as u64).expect("a good layout");
    let raw: Vec<u8> = (number..number + 64).collect();
    let form = KeyForm::Raw(RawKey::new(&raw));
    let key = Key::new(mode, unit, layout.dun_bytes(), form, Hardware::Allowed).expect("a good key");
    let admission = profile.admit(key, Fallback::Off).expect("raw keys are taken");
    let backing = Arc::new(IdleBacking(MemBacking::new(SIZE_BYTES, 512).facts()));
    let volume = Volume::new(layout, admission, backing, Access::ReadWrite, Discard::Pass);
    LiveVolume::new(volume.expect("they fit"))
}

fn requests(volume: &LiveVolume, from: u64) {
    for n in 0..REQUESTS {
        let mut buffer = volume.try_large_buffer().expect("there are enough");
        let span = volume.span((from + n % 64) * 4096, 4096, buffer.bytes().len());
        let mut batch = Batch::of_one(span, Transfer::Write(Durability::Cached));
        volume.transfer(&mut batch, &mut buffer);
        assert!(batch.items().iter().all(|item| item.result().is_ok()), "nothing fails");
    }
}

/// Nanoseconds for a request, if each of these volumes has a thread: the median of some rounds.
fn measure(volumes: &[&LiveVolume]) -> u64 {
    let mut rounds: Vec<u64> = (0..ROUNDS)
        .map(|_| {
            let barrier = Barrier::new(volumes.len());
            let times = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..)
                    .zip(volumes)
                    .map(|(number, volume)| {
                        let barrier = &barrier;
                        scope.spawn(move || {
                            // The scheduler may leave both on one.
                            let mut cpu = CpuSet::new();
                            cpu.set(usize::try_from(number).expect("few"));
                            sched_setaffinity(None, &cpu).expect("there are two CPUs");
                            barrier.wait();
                            let begun = Instant::now();
                            requests(volume, number * 64);
                            begun.elapsed().as_nanos()
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().expect("no panic")).max()
            });
            u64::try_from(times.expect("at least one thread")).expect("less than centuries") / REQUESTS
        })
        .collect();
    rounds.sort_unstable();
    rounds[ROUNDS / 2]
}

fn main() {
    let (engine, pool) = (Arc::new(IdleEngine::default()), MemoryPool::new(LARGE_BUFFER_BYTES, 16));
    let profile =
        Arc::new(CryptoProfile::new(engine, pool, Policy::default()).expect("it has no key ladder"));
    let (one, other) = (volume(&profile, 0), volume(&profile, 100));
    println!("one thread                {:>5} ns", measure(&[&one]));
    println!("two threads, two volumes  {:>5} ns", measure(&[&one, &other]));
    println!("two threads, one volume   {:>5} ns", measure(&[&one, &one]));
}
