//! What every backing must do, checked from outside.

use super::SplitMix64;
use inlinecrypt_core::backing::{Access, Backing, Durability, Extent, Part};
use inlinecrypt_core::error::{ErrorKind, Op};
use inlinecrypt_core::memory::{Buffer, HeapSource, MemoryPool};
use std::sync::Arc;

/// Longest request tried, in bytes.
const REQUEST_BYTES_MAX: usize = 1 << 20;

/// Threads that work at once in the last check.
const THREADS: u64 = 4;

/// Checks that the backings which `make` opens keep their side of the bargain. Each must be writable, at least 2 MiB
/// long, its own, and hold nothing yet.
///
/// # Panics
///
/// If one does not.
pub fn run(make: impl Fn() -> Arc<dyn Backing>) {
    facts_are_sane_and_constant(&*make());
    first_and_last_bytes_are_kept(&*make());
    what_was_written_is_read(&*make());
    parts_leave_what_they_would_one_by_one(&*make());
    long_requests_arrive_whole(&*make());
    discard_keeps_to_its_range_or_is_refused(&*make());
    extents_tile_the_range(&*make());
    threads_do_not_disturb_each_other(&*make());
}

/// Aligned memory of `len` bytes.
fn memory(len: usize) -> Buffer {
    MemoryPool::private(&HeapSource, len).expect("memory for a test")
}

fn random(rng: &mut SplitMix64, len: usize) -> Buffer {
    let mut buffer = memory(len);
    rng.fill(buffer.bytes_mut());
    buffer
}

#[track_caller]
fn expect_content(backing: &dyn Backing, offset: u64, expected: &[u8]) {
    let mut found = memory(expected.len());
    // What is not filled in is noticed.
    found.bytes_mut().fill(0x5a);
    backing.read(offset, found.bytes_mut()).unwrap_or_else(|error| panic!("{}", error.chain()));
    assert!(found.bytes() == expected, "other content at {offset}+{}", expected.len());
}

#[track_caller]
fn write(backing: &dyn Backing, offset: u64, data: &[u8], durability: Durability) {
    backing.write(offset, data, durability).unwrap_or_else(|error| panic!("{}", error.chain()));
}

fn facts_are_sane_and_constant(backing: &dyn Backing) {
    let facts = backing.facts();
    assert!(facts.align_bytes.is_power_of_two() && facts.align_bytes <= 4096, "{facts:?}");
    assert!(facts.len_bytes >= 2 * REQUEST_BYTES_MAX as u64, "the suite needs more room: {facts:?}");
    assert!(facts.len_bytes.is_multiple_of(facts.align_bytes.into()), "{facts:?}");
    assert_eq!(facts.access, Access::ReadWrite);
    backing.flush().expect("nothing to lose yet");
    assert_eq!(backing.facts(), facts);
}

fn first_and_last_bytes_are_kept(backing: &dyn Backing) {
    let facts = backing.facts();
    let rng = &mut SplitMix64::new(1);
    let len = facts.align_bytes as usize;
    let (first, last) = (random(rng, len), random(rng, len));
    let end = facts.len_bytes - len as u64;
    write(backing, 0, first.bytes(), Durability::Cached);
    write(backing, end, last.bytes(), Durability::Durable);
    expect_content(backing, 0, first.bytes());
    expect_content(backing, end, last.bytes());
    expect_content(backing, len as u64, &vec![0; len]);
}

fn what_was_written_is_read(backing: &dyn Backing) {
    let facts = backing.facts();
    let align = u64::from(facts.align_bytes);
    let rng = &mut SplitMix64::new(2);
    let mut model = vec![0; REQUEST_BYTES_MAX];
    let units = model.len() as u64 / align;
    for round in 0..400 {
        let first = rng.below(units);
        let count = 1 + rng.below((units - first).min(1 + 65_536 / align));
        let (offset, len) = (first * align, usize::try_from(count * align).expect("small"));
        let at = usize::try_from(offset).expect("small");
        if rng.below(2) == 0 {
            let data = random(rng, len);
            let durability = if rng.below(8) == 0 { Durability::Durable } else { Durability::Cached };
            write(backing, offset, data.bytes(), durability);
            model[at..at + len].copy_from_slice(data.bytes());
        } else {
            expect_content(backing, offset, &model[at..at + len]);
        }
        if round % 100 == 0 {
            backing.flush().expect("a healthy backing");
            backing.prefetch(offset, count * align);
        }
    }
    expect_content(backing, 0, &model);
}

fn parts_leave_what_they_would_one_by_one(backing: &dyn Backing) {
    let align = backing.facts().align_bytes as usize;
    let slot_bytes = 4096usize.next_multiple_of(align);
    let rng = &mut SplitMix64::new(5);
    let mut model = vec![0; REQUEST_BYTES_MAX];
    // None, one, and more than go to any medium at once.
    for count in [0, 1, 2, 63, 64, 65, 200] {
        // Places that do not overlap, in any order, and each in part only.
        let mut places: Vec<usize> = (0..REQUEST_BYTES_MAX / slot_bytes).collect();
        for index in 0..places.len() {
            let other = usize::try_from(rng.below(places.len() as u64)).expect("small");
            places.swap(index, other);
        }
        let mut data = random(rng, count * slot_bytes);
        let units = (slot_bytes / align) as u64;
        let mut parts: Vec<Part> = (0..count)
            .map(|index| {
                let len = align * usize::try_from(1 + rng.below(units)).expect("small");
                let at = index * slot_bytes;
                Part { offset: (places[index] * slot_bytes) as u64, range: at..at + len, result: Ok(()) }
            })
            .collect();
        backing.write_parts(data.bytes(), &mut parts);
        for part in &parts {
            assert!(part.result.is_ok(), "{part:?}");
            let at = usize::try_from(part.offset).expect("small");
            model[at..at + part.range.len()].copy_from_slice(&data.bytes()[part.range.clone()]);
        }
        expect_content(backing, 0, &model);
        data.bytes_mut().fill(0x5a);
        backing.read_parts(data.bytes_mut(), &mut parts);
        for part in &parts {
            assert!(part.result.is_ok(), "{part:?}");
            let at = usize::try_from(part.offset).expect("small");
            assert!(data.bytes()[part.range.clone()] == model[at..at + part.range.len()], "{part:?}");
        }
    }
}

fn long_requests_arrive_whole(backing: &dyn Backing) {
    let data = random(&mut SplitMix64::new(3), REQUEST_BYTES_MAX);
    let offset = backing.facts().len_bytes - REQUEST_BYTES_MAX as u64;
    write(backing, offset, data.bytes(), Durability::Durable);
    expect_content(backing, offset, data.bytes());
}

fn discard_keeps_to_its_range_or_is_refused(backing: &dyn Backing) {
    let facts = backing.facts();
    let data = random(&mut SplitMix64::new(4), REQUEST_BYTES_MAX);
    write(backing, 0, data.bytes(), Durability::Cached);
    let align = u64::from(facts.align_bytes);
    // Whole pages, odd edges, less than a page.
    for (offset, len) in [(65_536, 131_072), (4096 + align, 8192), (300 * 1024 + align, align)] {
        let result = backing.discard(offset, len);
        let (start, end) =
            (usize::try_from(offset).expect("small"), usize::try_from(offset + len).expect("small"));
        if facts.can_discard {
            result.unwrap_or_else(|error| panic!("advertised, but: {}", error.chain()));
        } else {
            let error = result.expect_err("not advertised");
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert_eq!(error.op(), Op::Trim);
            expect_content(backing, offset, &data.bytes()[start..end]);
        }
        // Neighbours within a page of either edge.
        let before = usize::try_from(4096.min(offset)).expect("small");
        expect_content(backing, offset - before as u64, &data.bytes()[start - before..start]);
        expect_content(backing, offset + len, &data.bytes()[end..end + 4096]);
    }
    // What was discarded can be written again.
    write(backing, 65_536, &data.bytes()[..8192], Durability::Cached);
    expect_content(backing, 65_536, &data.bytes()[..8192]);
    backing.flush().expect("a healthy backing");
}

fn extents_tile_the_range(backing: &dyn Backing) {
    let len_bytes = backing.facts().len_bytes;
    let data = random(&mut SplitMix64::new(5), 65_536);
    let written = [131_072, 524_288, 1_048_576];
    for offset in written {
        write(backing, offset, data.bytes(), Durability::Cached);
    }
    backing.flush().expect("a healthy backing");
    for (offset, len) in [(0, len_bytes), (131_072, 65_536), (135_168, 4096), (len_bytes - 4096, 4096)] {
        for extents_max in [1, 2, 3, usize::MAX] {
            let runs = extents(backing, offset, len, extents_max);
            if extents_max == usize::MAX {
                assert_eq!(runs.iter().map(|run| run.len).sum::<u64>(), len, "{runs:?}");
            }
        }
    }
    for run in extents(backing, 0, len_bytes, usize::MAX) {
        let holds_data = |at: &u64| run.offset < at + 65_536 && *at < run.offset + run.len;
        assert!(run.allocated || !written.iter().any(holds_data), "data in a hole: {run:?}");
    }
}

/// The extents of a range, checked to be in order, without gaps, not empty, within bounds.
fn extents(backing: &dyn Backing, offset: u64, len: u64, extents_max: usize) -> Vec<Extent> {
    let runs = backing.extents(offset, len, extents_max).expect("a healthy backing");
    assert!(!runs.is_empty() && runs.len() <= extents_max, "{} runs, {extents_max} wanted", runs.len());
    let mut at = offset;
    for run in &runs {
        assert!(run.offset == at && run.len > 0, "{run:?} after {at}");
        at += run.len;
    }
    assert!(at <= offset + len, "{runs:?} reach past {}", offset + len);
    runs
}

fn threads_do_not_disturb_each_other(backing: &dyn Backing) {
    let share = REQUEST_BYTES_MAX as u64 / THREADS;
    let part = usize::try_from(share).expect("small");
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                let rng = &mut SplitMix64::new(100 + thread);
                let offset = thread * share;
                for round in 0..12 {
                    let data = random(rng, part);
                    let durability = if round % 4 == 3 { Durability::Durable } else { Durability::Cached };
                    write(backing, offset, data.bytes(), durability);
                    expect_content(backing, offset, data.bytes());
                    if round % 4 == 1 {
                        backing.flush().expect("a healthy backing");
                    }
                }
            });
        }
    });
}
