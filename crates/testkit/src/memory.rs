//! What whoever reads a process's memory finds in it: given bytes, and anything shaped like an AES key schedule.
//!
//! ```text
//!   scan_process   /proc/PID/maps, /proc/PID/mem: all that is readable, the holes of shared memory left out
//!   scan_core      the segments of a core dump
//!     Search       secrets, whole and in halves; key schedules; at every address
//! ```
//!
//! A schedule is found by its recurrence: AES-128 and AES-256; as bytes and as numbers of the other byte order; first round key
//! first or last; as it is and as decryption wants it (InvMixColumns). A stretch of it is enough, so one that was partly
//! overwritten is found, too. What is not found: bit-sliced schedules, and ones whose round keys lie apart. Runs of zeroes are
//! none, since no schedule has them.

use memchr::memmem::Finder;
use rustix::fs::SeekFrom;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::LazyLock;

/// How much is looked at at once, in bytes.
const CHUNK_BYTES: usize = 4 << 20;
/// How far a chunk reaches into the next one, in bytes: more than any schedule or secret is long.
const OVERLAP_BYTES: usize = 512;

/// What is searched for.
#[derive(Debug, Default)]
pub struct Search(Vec<(String, Finder<'static>)>);

impl Search {
    /// For key schedules only.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// And for `secret`, and each half of it that has at least 16 bytes.
    ///
    /// # Panics
    ///
    /// If it has less than 16 bytes, which would be found by chance, or more than 256.
    #[must_use]
    pub fn secret(mut self, name: &str, secret: &[u8]) -> Self {
        assert!((16..=256).contains(&secret.len()), "a secret of some length");
        self.0.push((name.to_owned(), Finder::new(secret).into_owned()));
        if secret.len() >= 32 {
            let (first, second) = secret.split_at(secret.len() / 2);
            self.0.push((format!("first half of {name}"), Finder::new(first).into_owned()));
            self.0.push((format!("second half of {name}"), Finder::new(second).into_owned()));
        }
        self
    }
}

/// What was looked at, and what was found.
#[derive(Debug, Default)]
pub struct Scan {
    /// How much was read, in bytes.
    pub bytes: u64,
    /// Mappings that cannot be read, or not entirely.
    pub unreadable: Vec<String>,
    /// Secrets that were found.
    pub secrets: Vec<Finding>,
    /// Key schedules that were found.
    pub schedules: Vec<Finding>,
}

impl Scan {
    /// Whether nothing was found.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.secrets.is_empty() && self.schedules.is_empty()
    }

    /// Whether a secret of this name was found, whole.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.secrets.iter().any(|found| found.what == name)
    }
}

/// Something that was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// A secret's name, or what kind of schedule it is.
    pub what: String,
    /// Its address.
    pub at: u64,
    /// The mapping that it is in, as the system describes it.
    pub mapping: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x} in {}", self.what, self.at, self.mapping)
    }
}

/// A piece of a process's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its first address.
    pub start: u64,
    /// The one behind its last.
    pub end: u64,
    /// Whether the process may read it.
    pub is_readable: bool,
    /// Where its file begins to be mapped.
    pub file_offset: u64,
    /// The file, or what else the system calls it; empty for memory of its own.
    pub name: String,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let rights = words.next()?;
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        let file_offset = number(words.next()?)?;
        let name = words.skip(2).collect::<Vec<_>>().join(" ");
        Some(Self {
            start: number(start)?,
            end: number(end)?,
            is_readable: rights.starts_with('r'),
            file_offset,
            name,
        })
    }
}

impl fmt::Display for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{:x} {}", self.start, self.end, self.name)
    }
}

/// The memory of a process, piece by piece.
///
/// # Errors
///
/// The system's.
pub fn mappings(pid: u32) -> io::Result<Vec<Mapping>> {
    Ok(fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().filter_map(Mapping::parse).collect())
}

/// Reads memory of another process as a debugger does: `/proc/PID/mem`.
///
/// # Errors
///
/// The system's.
pub fn read_by_file(pid: u32, at: u64, into: &mut [u8]) -> io::Result<usize> {
    File::open(format!("/proc/{pid}/mem"))?.read_at(into, at)
}

/// The same by `process_vm_readv(2)`.
///
/// # Errors
///
/// The system's.
pub fn read_by_call(pid: u32, at: u64, into: &mut [u8]) -> io::Result<usize> {
    let out_of_range = |_too_large| io::Error::from(io::ErrorKind::InvalidInput);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).map_err(out_of_range)?);
    let base = usize::try_from(at).map_err(out_of_range)?;
    let remote = nix::sys::uio::RemoteIoVec { base, len: into.len() };
    let mut local = [io::IoSliceMut::new(into)];
    Ok(nix::sys::uio::process_vm_readv(pid, &mut local, &[remote])?)
}

/// Looks through all readable memory of a process, which goes on meanwhile.
///
/// # Errors
///
/// The system's, if it lets us not read the process at all.
pub fn scan_process(pid: u32, search: &Search) -> io::Result<Scan> {
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut scan = Scan::default();
    for mapping in mappings(pid)?.iter().filter(|mapping| mapping.is_readable) {
        // Reading a hole of shared memory would fill it.
        let stretches =
            data_of(pid, mapping).unwrap_or_else(|_no_shared_memory| vec![(mapping.start, mapping.end)]);
        let mut is_whole = true;
        for (start, end) in stretches {
            is_whole &= scan
                .stretch(search, &mapping.to_string(), start, end, |at, into| read_pages(&memory, at, into));
        }
        if !is_whole {
            scan.unreadable.push(mapping.to_string());
        }
    }
    Ok(scan)
}

/// Looks through the memory in a core dump: ELF, 64 bits, little-endian.
///
/// # Errors
///
/// The system's; [`InvalidData`](io::ErrorKind::InvalidData) if it is no such file.
pub fn scan_core(path: &Path, search: &Search) -> io::Result<Scan> {
    let file = File::open(path)?;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    if header[..6] != *b"\x7fELF\x02\x01" {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "no ELF file of our kind"));
    }
    let long =
        |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
    let short = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let (table, size, count) = (long(&header, 32), short(&header, 54), short(&header, 56));
    let mut scan = Scan::default();
    for index in 0..u64::from(count) {
        let mut segment = [0; 56];
        file.read_exact_at(&mut segment, table + index * u64::from(size))?;
        // PT_LOAD
        if segment[..4] != [1, 0, 0, 0] {
            continue;
        }
        let (offset, address, len) = (long(&segment, 8), long(&segment, 16), long(&segment, 32));
        let name = format!("segment {index} of the dump");
        scan.stretch(search, &name, address, address + len, |at, into| {
            file.read_exact_at(into, at - address + offset).map_or(0, |()| into.len())
        });
    }
    Ok(scan)
}

/// Reads a chunk, page by page if it cannot be read at once. What cannot be read is zeroed. How much could be read.
fn read_pages(memory: &File, at: u64, into: &mut [u8]) -> usize {
    if memory.read_exact_at(into, at).is_ok() {
        return into.len();
    }
    let mut known = 0;
    for (page, number) in into.chunks_mut(4096).zip(0u64..) {
        match memory.read_exact_at(page, at + number * 4096) {
            Ok(()) => known += page.len(),
            Err(_) => page.fill(0),
        }
    }
    known
}

/// Where shared memory has pages.
fn data_of(pid: u32, mapping: &Mapping) -> io::Result<Vec<(u64, u64)>> {
    if !mapping.name.starts_with("/memfd:") {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let file = File::open(format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end))?;
    let (mut at, end) = (mapping.file_offset, mapping.file_offset + (mapping.end - mapping.start));
    let mut stretches = Vec::new();
    while at < end {
        let begins = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(begins) if begins < end => begins,
            Ok(_) | Err(rustix::io::Errno::NXIO) => break,
            Err(why) => return Err(why.into()),
        };
        at = rustix::fs::seek(&file, SeekFrom::Hole(begins))?.min(end);
        let address = |offset: u64| offset - mapping.file_offset + mapping.start;
        stretches.push((address(begins), address(at)));
    }
    Ok(stretches)
}

impl Scan {
    /// Looks through addresses `start..end`, which `read` reads. Says whether it could read all.
    fn stretch(
        &mut self,
        search: &Search,
        mapping: &str,
        start: u64,
        end: u64,
        read: impl Fn(u64, &mut [u8]) -> usize,
    ) -> bool {
        let mut chunk = vec![0; CHUNK_BYTES + OVERLAP_BYTES];
        let (mut at, mut is_whole) = (start, true);
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let bytes = &mut chunk[..left.min(CHUNK_BYTES + OVERLAP_BYTES)];
            let known = read(at, bytes);
            is_whole &= known == bytes.len();
            if known > 0 {
                self.look(search, mapping, at, bytes);
            }
            self.bytes += known.min(CHUNK_BYTES) as u64;
            at += left.min(CHUNK_BYTES) as u64;
        }
        is_whole
    }

    fn look(&mut self, search: &Search, mapping: &str, at: u64, bytes: &[u8]) {
        let finding = |what: String, offset: usize| Finding {
            what,
            at: at + offset as u64,
            mapping: mapping.to_owned(),
        };
        for (name, finder) in &search.0 {
            for offset in finder.find_iter(bytes) {
                let found = finding(name.clone(), offset);
                // Once if it lies where chunks overlap.
                if !self.secrets.contains(&found) {
                    self.secrets.push(found);
                }
            }
        }
        for (offset, what) in schedules(bytes) {
            let found = finding(what, offset);
            let is_known = self
                .schedules
                .iter()
                .any(|known| known.at <= found.at && found.at < known.at + SCHEDULE_BYTES_MAX);
            if !is_known {
                self.schedules.push(found);
            }
        }
    }
}

/// Length of an expanded AES-256 key, in bytes.
const SCHEDULE_BYTES_MAX: u64 = 240;

/// One way in which a schedule lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shape {
    /// AES-256, else AES-128.
    long: bool,
    /// The last round key comes first.
    backwards: bool,
    /// Words are numbers of this machine, whose first byte is the key's last.
    swapped: bool,
    /// InvMixColumns was applied.
    mixed: bool,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { long, backwards, swapped, mixed } = *self;
        write!(
            f,
            "AES-{} schedule for {}{}{}",
            if long { 256 } else { 128 },
            if mixed { "decryption" } else { "encryption" },
            if backwards { ", last round key first" } else { "" },
            if swapped { ", words swapped" } else { "" }
        )
    }
}

/// Where something like a key schedule begins in `bytes`, and what it is like.
fn schedules(bytes: &[u8]) -> Vec<(usize, String)> {
    // Not at multiples of 4 only: expanded keys that are bytes to their program lie anywhere.
    let shifted = |shift: usize| {
        let found = aligned_schedules(bytes.get(shift..).unwrap_or_default());
        found.into_iter().map(move |(at, what)| (at + shift, what))
    };
    (0..4).flat_map(shifted).collect()
}

/// The longest stretch that [`is_step`] looks at, in words.
const STEP_WORDS: usize = 12;

/// The same at multiples of 4.
fn aligned_schedules(bytes: &[u8]) -> Vec<(usize, String)> {
    let words: Vec<u32> =
        bytes.chunks_exact(4).map(|word| u32::from_be_bytes(word.try_into().expect("four bytes"))).collect();
    let mut found: Vec<(usize, String)> = Vec::new();
    let (mut next, mut ends) = (0, 0);
    while next + STEP_WORDS <= words.len() {
        let at = next;
        next += 1;
        // Most memory is zero, which is no schedule, but adds up like one.
        if words[at + STEP_WORDS - 1] == 0 && words[at..at + STEP_WORDS].iter().all(|word| *word == 0) {
            let zeroes = words[at..].iter().take_while(|word| **word == 0).count();
            next = at + zeroes + 1 - STEP_WORDS;
            continue;
        }
        for (long, backwards) in [(false, false), (false, true), (true, false), (true, true)] {
            if at < ends || !is_linear(&words, at, long, backwards) {
                continue;
            }
            for (swapped, mixed) in [(false, false), (true, false), (false, true), (true, true)] {
                let shape = Shape { long, backwards, swapped, mixed };
                // Two steps at least: one may be chance in memory that is not random.
                let steps = (at..).step_by(4).take_while(|at| is_step(&words, *at, shape)).count();
                if steps >= 2 {
                    let round_keys = steps + if long { 2 } else { 1 };
                    found.push((at * 4, format!("{shape}, {round_keys} round keys")));
                    ends = at + 4 * round_keys;
                    break;
                }
            }
        }
    }
    found
}

/// Three round keys in a row, oldest first; the middle one and the last are one for AES-128.
fn round_keys(words: &[u32], at: usize, long: bool, backwards: bool) -> Option<[&[u32]; 3]> {
    let count = if long { 12 } else { 8 };
    let words = words.get(at..at + count)?;
    let (first, last) = (&words[..4], &words[count - 4..]);
    let (old, new) = if backwards { (last, first) } else { (first, last) };
    Some([old, if long { &words[4..8] } else { old }, new])
}

/// What holds in every shape, as it is cheap to check: three words of four are sums.
fn is_linear(words: &[u32], at: usize, long: bool, backwards: bool) -> bool {
    round_keys(words, at, long, backwards).is_some_and(|[old, _, new]| {
        new[1] == old[1] ^ new[0] && new[2] == old[2] ^ new[1] && new[3] == old[3] ^ new[2]
    })
}

/// Whether one round key follows from those before it.
fn is_step(words: &[u32], at: usize, shape: Shape) -> bool {
    let Shape { long, backwards, swapped, mixed } = shape;
    if !is_linear(words, at, long, backwards) {
        return false;
    }
    let Some([old, before, new]) = round_keys(words, at, long, backwards) else { return false };
    let plain = |word: u32| {
        let word = if swapped { word.swap_bytes() } else { word };
        if mixed { mix_column(word) } else { word }
    };
    let change = plain(old[0]) ^ plain(new[0]);
    let last = plain(before[3]);
    let turned = change ^ substitute(last.rotate_left(8));
    let is_round_constant = turned & 0x00ff_ffff == 0 && ROUND_CONSTANTS.contains(&(turned >> 24));
    is_round_constant || long && change == substitute(last)
}

const ROUND_CONSTANTS: [u32; 10] = [0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0x1b, 0x36];

fn double(byte: u8) -> u8 {
    byte << 1 ^ if byte & 0x80 == 0 { 0 } else { 0x1b }
}

/// FIPS 197, 5.1.1: the inverse in GF(2^8), then an affine map.
static SUBSTITUTES: LazyLock<[u8; 256]> = LazyLock::new(|| {
    let mut table = [0; 256];
    // 3 generates the field, and 0xf6 is its inverse.
    let (mut number, mut inverse) = (1u8, 1u8);
    loop {
        number ^= double(number);
        for shift in [1, 2, 4] {
            inverse ^= inverse << shift;
        }
        if inverse & 0x80 != 0 {
            inverse ^= 0x09;
        }
        table[usize::from(number)] = (1..5).fold(inverse, |sum, turn| sum ^ inverse.rotate_left(turn)) ^ 0x63;
        if number == 1 {
            table[0] = 0x63;
            return table;
        }
    }
});

fn substitute(word: u32) -> u32 {
    u32::from_be_bytes(word.to_be_bytes().map(|byte| SUBSTITUTES[usize::from(byte)]))
}

/// FIPS 197, 5.1.3, on one column: takes InvMixColumns back.
fn mix_column(word: u32) -> u32 {
    let bytes = word.to_be_bytes();
    let mixed = |row: usize| {
        let at = |more: usize| bytes[(row + more) % 4];
        double(at(0)) ^ double(at(1)) ^ at(1) ^ at(2) ^ at(3)
    };
    u32::from_be_bytes([mixed(0), mixed(1), mixed(2), mixed(3)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pattern;

    /// FIPS 197, 5.2, written another way than the scanner: word by word.
    fn expand(key: &[u8]) -> Vec<u32> {
        let n = key.len() / 4;
        let mut words: Vec<u32> =
            key.chunks_exact(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect();
        for index in n..4 * (n + 7) {
            let last = words[index - 1];
            let change = match index % n {
                0 => substitute(last.rotate_left(8)) ^ ROUND_CONSTANTS[index / n - 1] << 24,
                4 if n == 8 => substitute(last),
                _ => last,
            };
            words.push(words[index - n] ^ change);
        }
        words
    }

    /// As in FIPS 197, 5.3.5: its inverse three times over, since a column mixed four times is itself.
    fn inverse_mixed(word: u32) -> u32 {
        mix_column(mix_column(mix_column(word)))
    }

    fn in_shape(key: &[u8], backwards: bool, swapped: bool, mixed: bool) -> Vec<u8> {
        let words = expand(key);
        let mut rounds: Vec<Vec<u32>> = words.chunks_exact(4).map(<[u32]>::to_vec).collect();
        let count = rounds.len();
        if mixed {
            rounds[1..count - 1].iter_mut().flatten().for_each(|word| *word = inverse_mixed(*word));
        }
        if backwards {
            rounds.reverse();
        }
        rounds
            .concat()
            .into_iter()
            .flat_map(|word| if swapped { word.to_le_bytes() } else { word.to_be_bytes() })
            .collect()
    }

    /// FIPS 197, appendix A.1 and A.3: the last words. And 4.2.1, the S-box.
    #[test]
    fn the_standards_schedules_come_out() {
        let short: Vec<u8> =
            (0..16).map(|i| 0x2b7e_1516_28ae_d2a6_abf7_1588_09cf_4f3c_u128.to_be_bytes()[i]).collect();
        assert_eq!(expand(&short)[43], 0xb663_0ca6);
        let long = [
            0x603d_eb10_15ca_71be_2b73_aef0_857d_7781_u128.to_be_bytes(),
            0x1f35_2c07_3b61_08d7_2d98_10a3_0914_dff4_u128.to_be_bytes(),
        ]
        .concat();
        assert_eq!(expand(&long)[59], 0x706c_631e);
        assert_eq!((SUBSTITUTES[0x53], SUBSTITUTES[0]), (0xed, 0x63));
        // FIPS 197, 5.1.3: a column of its worked example.
        assert_eq!(mix_column(0xd4bf_5d30), 0x0466_81e5);
    }

    #[test]
    fn every_shape_is_found_at_every_place_and_in_part() {
        for (index, len) in (0..).zip([16, 32, 16, 32]) {
            let key = if index < 2 { vec![0; len] } else { pattern::bytes(index, 0, len) };
            for choice in 0..8 {
                let [backwards, swapped, mixed] = [1, 2, 4].map(|bit| choice & bit != 0);
                let schedule = in_shape(&key, backwards, swapped, mixed);
                let mut memory = pattern::bytes(9, 0, 4096);
                let place = 100 + choice;
                memory[place..place + schedule.len()].copy_from_slice(&schedule);
                let found = schedules(&memory);
                assert_eq!(found.len(), 1, "{len} {backwards} {swapped} {mixed}: {found:?}");
                let (at, what) = &found[0];
                // First and last round key of a decryption schedule are not mixed, so they are no part of the rest; unless
                // mixing changes nothing, as of zeroes.
                let begins = if mixed && (backwards || index >= 2) { place + 16 } else { place };
                assert_eq!(*at, begins, "{what}");
                assert!(what.starts_with(&format!("AES-{} ", len * 8)), "{what}");
                assert_eq!(what.contains("decryption"), mixed, "{what}");
                // The first half is gone.
                memory[place..place + schedule.len() / 2].fill(0xee);
                assert_eq!(schedules(&memory).len(), 1, "{len} {backwards} {swapped} {mixed}");
            }
        }
    }

    #[test]
    fn zeroes_patterns_and_random_bytes_are_no_schedules() {
        for fill in [0, 0x63, 0xff] {
            assert_eq!(schedules(&[fill; 1 << 16]), []);
        }
        let counting: Vec<u8> = (0..1u32 << 14).flat_map(u32::to_le_bytes).collect();
        assert_eq!(schedules(&counting), []);
        assert_eq!(schedules(&pattern::bytes(3, 0, 4 << 20)), []);
    }

    /// Another program, with something in its environment, and without what this one knows.
    #[test]
    fn a_process_is_read_to_its_last_byte() {
        let secret = pattern::bytes(11, 0, 64);
        let text: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
        let search = Search::new().secret("text", text.as_bytes()).secret("bytes", &secret);
        let mut command = std::process::Command::new("sleep");
        let child = crate::ServerProcess::start(command.arg("60").env("SECRET", &text)).unwrap();
        // Until it has become the other program, it is a copy of this one.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        loop {
            let scan = scan_process(child.pid(), &search).unwrap();
            if (scan.has("text"), scan.has("bytes")) == (true, false) {
                assert!(scan.bytes > 0 && scan.schedules.is_empty() && !scan.is_clean(), "{scan:?}");
                break;
            }
            assert!(std::time::Instant::now() < deadline, "{scan:?}");
        }
        let stack =
            mappings(child.pid()).unwrap().into_iter().find(|mapping| mapping.name == "[stack]").unwrap();
        let (mut by_file, mut by_call) = ([0; 64], [1; 64]);
        assert_eq!(read_by_file(child.pid(), stack.end - 64, &mut by_file).unwrap(), 64);
        assert_eq!(read_by_call(child.pid(), stack.end - 64, &mut by_call).unwrap(), 64);
        assert_eq!(by_file, by_call);
    }
}
