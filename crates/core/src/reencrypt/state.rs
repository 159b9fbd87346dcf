//! How far a re-encryption has come, on stable storage: what makes it survive a kill or a power cut at any moment.
//!
//! ```text
//!        0   header, 512 bytes
//!     4096   the same once more
//!     8192   plan: what becomes of the volume, a text that means nothing here; at most 56 KiB
//!    64 KiB  journal: the new ciphertext of one zone
//! ```
//!
//! A zone goes through four steps, each stable before the next:
//!
//! ```text
//!   1 journal   the zone's new ciphertext                       the volume is untouched: as if nothing had begun
//!   2 header    "the zone behind the boundary is in the journal"  from here on the journal is what counts
//!   3 volume    the zone, from the journal                      old and new sectors mixed: written again from the journal
//!   4 header    "the boundary is behind the zone"               done; only now clients may write to it
//! ```
//!
//! So whoever finds a header of step 2 writes the zone from the journal once more, for which no key is needed, and who finds
//! another header has nothing to repair. Both headers are written before either is acted upon: one that is damaged is
//! made good by the other. All numbers are little-endian.

use super::ledger::{Keeps, Ledger};
use crate::backing::{Backing, Durability};
use crate::disk::CHUNK_BYTES;
use crate::error::{Error, ErrorKind, Op};
use crate::memory::{HeapSource, MemorySource as _};
use inlinecrypt_cipher::digest::{DIGEST_BYTES, Digest};
use std::ops::Range;
use std::sync::Arc;

/// What a state begins with.
pub const MAGIC: &[u8; 24] = b"inlinecrypt reencryption";
/// Version of the format.
pub const VERSION: u32 = 1;

const HEADER_BYTES: usize = 512;
/// Where the header's own digest is.
const HEADER_DIGEST_AT: usize = HEADER_BYTES - DIGEST_BYTES;
/// Where the headers are. Apart from each other by the largest block that disks write at once.
const HEADERS_AT: [usize; 2] = [0, 4096];
const PLAN_AT: usize = 8192;
/// Where the journal begins, and what of a state has to be read to know how far it is, in bytes.
pub const PREFIX_BYTES: usize = 64 * 1024;
/// Longest plan, in bytes.
pub const PLAN_BYTES_MAX: usize = PREFIX_BYTES - PLAN_AT;
/// Largest zone, in bytes.
pub const ZONE_BYTES_MAX: u64 = 64 << 20;

const PHASE_AT_REST: u32 = 0;
const PHASE_IN_JOURNAL: u32 = 1;

/// A zone whose new ciphertext is in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct InJournal {
    len_bytes: u64,
    digest: [u8; DIGEST_BYTES],
}

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Header {
    sequence: u64,
    size_bytes: u64,
    zone_bytes: u64,
    boundary: u64,
    plan_len: u64,
    plan_digest: [u8; DIGEST_BYTES],
    zone: Option<InJournal>,
}

impl Header {
    fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let Self { sequence, size_bytes, zone_bytes, boundary, plan_len, plan_digest, zone } = self;
        let (phase, zone_len, zone_digest) = match zone {
            None => (PHASE_AT_REST, 0, [0; DIGEST_BYTES]),
            Some(InJournal { len_bytes, digest }) => (PHASE_IN_JOURNAL, *len_bytes, *digest),
        };
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        let mut put = |field: &[u8]| {
            bytes[at..at + field.len()].copy_from_slice(field);
            at += field.len();
        };
        put(MAGIC);
        put(&VERSION.to_le_bytes());
        put(&phase.to_le_bytes());
        for number in [*sequence, *size_bytes, *zone_bytes, *boundary, *plan_len, zone_len] {
            put(&number.to_le_bytes());
        }
        put(plan_digest);
        put(&zone_digest);
        let digest = Digest::of(&bytes[..HEADER_DIGEST_AT]);
        bytes[HEADER_DIGEST_AT..].copy_from_slice(&digest);
        bytes
    }

    /// What `bytes` say, or why they say nothing.
    fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        let mut rest = bytes;
        let mut take = |len: usize| -> &[u8] {
            let (field, others) = rest.split_at(len);
            rest = others;
            field
        };
        if bytes.len() != HEADER_BYTES || take(MAGIC.len()) != MAGIC {
            return Err("it does not begin as one does");
        }
        // Before the digest: another version may have another.
        let mut word = || u32::from_le_bytes(take(4).try_into().expect("four bytes"));
        if word() != VERSION {
            return Err("its version is not known here");
        }
        if Digest::of(&bytes[..HEADER_DIGEST_AT]) != bytes[HEADER_DIGEST_AT..] {
            return Err("its header is damaged");
        }
        let phase = word();
        let mut number = || u64::from_le_bytes(take(8).try_into().expect("eight bytes"));
        let (sequence, size_bytes, zone_bytes) = (number(), number(), number());
        let (boundary, plan_len, zone_len) = (number(), number(), number());
        let plan_digest = take(DIGEST_BYTES).try_into().expect("as many");
        let digest = take(DIGEST_BYTES).try_into().expect("as many");
        let zone = match phase {
            PHASE_AT_REST => None,
            PHASE_IN_JOURNAL => Some(InJournal { len_bytes: zone_len, digest }),
            _ => return Err("its phase is not known here"),
        };
        let chunk = CHUNK_BYTES as u64;
        let is_border = |at: u64| at == size_bytes || (at < size_bytes && at.is_multiple_of(chunk));
        let zone_fits = zone.is_none_or(|InJournal { len_bytes, .. }| {
            (1..=zone_bytes).contains(&len_bytes) && boundary.checked_add(len_bytes).is_some_and(is_border)
        });
        if size_bytes == 0
            || check_zone(zone_bytes).is_err()
            || plan_len > PLAN_BYTES_MAX as u64
            || !is_border(boundary)
            || !zone_fits
        {
            return Err("its numbers contradict each other");
        }
        Ok(Self { sequence, size_bytes, zone_bytes, boundary, plan_len, plan_digest, zone })
    }
}

/// Refuses a zone that is not whole chunks, or too large.
fn check_zone(zone_bytes: u64) -> Result<(), Error> {
    if (1..=ZONE_BYTES_MAX).contains(&zone_bytes) && zone_bytes.is_multiple_of(CHUNK_BYTES as u64) {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Invalid, Op::Reencrypt).detail(format!(
        "a zone of {zone_bytes} bytes; it is a multiple of {CHUNK_BYTES} up to {ZONE_BYTES_MAX}"
    )))
}

/// What a state says, without opening it for anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateFacts {
    /// Size of the volume, in bytes.
    pub size_bytes: u64,
    /// Everything before is under the new key, in bytes.
    pub boundary: u64,
    /// Size of a zone, in bytes.
    pub zone_bytes: u64,
    /// Whether a zone was being written: the volume is whole again only once it has been written from the journal.
    pub is_interrupted: bool,
    /// What becomes of the volume.
    pub plan: Vec<u8>,
}

impl StateFacts {
    /// Reads the first [`PREFIX_BYTES`] of a state.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if they are no state, or one that is damaged or of an unknown version.
    pub fn parse(prefix: &[u8]) -> Result<Self, Error> {
        let (header, plan) = parse_prefix(prefix)?;
        let Header { size_bytes, zone_bytes, boundary, zone, .. } = header;
        Ok(Self { size_bytes, boundary, zone_bytes, is_interrupted: zone.is_some(), plan })
    }

    /// Whether all of the volume is under the new key.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.boundary == self.size_bytes
    }
}

fn parse_prefix(prefix: &[u8]) -> Result<(Header, Vec<u8>), Error> {
    let invalid = |why: &str| Error::new(ErrorKind::Invalid, Op::Reencrypt).detail(why.to_owned());
    if prefix.len() < PREFIX_BYTES {
        return Err(invalid("it is too short"));
    }
    let headers = HEADERS_AT.map(|at| Header::parse(&prefix[at..at + HEADER_BYTES]));
    let header = match headers {
        [Ok(first), Ok(second)] => {
            let newer = if first.sequence >= second.sequence { first } else { second };
            Ok(newer)
        }
        [Ok(only), Err(_)] | [Err(_), Ok(only)] => Ok(only),
        [Err(why), Err(_)] => Err(invalid(why)),
    }?;
    let plan_len = usize::try_from(header.plan_len).expect("checked when it was parsed");
    let plan = &prefix[PLAN_AT..PLAN_AT + plan_len];
    if Digest::of(plan) != header.plan_digest {
        return Err(invalid("its plan is damaged"));
    }
    Ok((header, plan.to_vec()))
}

/// For fuzzing alone: gives the first header and the plan the digests that they should have.
#[doc(hidden)]
pub fn repair_digests(prefix: &mut [u8]) {
    let plan_len_at = MAGIC.len() + 8 + 4 * 8;
    let plan_len = u64::from_le_bytes(prefix[plan_len_at..plan_len_at + 8].try_into().expect("eight bytes"));
    let plan_len = usize::try_from(plan_len).unwrap_or(0).min(PLAN_BYTES_MAX);
    let plan_digest = Digest::of(&prefix[PLAN_AT..PLAN_AT + plan_len]);
    prefix[plan_len_at + 16..plan_len_at + 16 + DIGEST_BYTES].copy_from_slice(&plan_digest);
    let digest = Digest::of(&prefix[..HEADER_DIGEST_AT]);
    prefix[HEADER_DIGEST_AT..HEADER_BYTES].copy_from_slice(&digest);
}

/// The state of a re-encryption on a medium of its own.
#[derive(Debug)]
pub struct State {
    medium: Arc<dyn Backing>,
    header: Header,
    plan: Vec<u8>,
    /// Of what was put of the next zone, and up to where that goes.
    prepared: (Digest, u64),
}

impl State {
    /// How long a medium must be for zones of `zone_bytes`.
    #[must_use]
    pub fn medium_bytes(zone_bytes: u64) -> u64 {
        PREFIX_BYTES as u64 + zone_bytes
    }

    /// Writes a new state over what is on `medium`: nothing is under the new key yet. Stable when this returns, with room for
    /// the journal.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the zone is not a multiple of 256 KiB up to [`ZONE_BYTES_MAX`], the plan too long, or
    /// the medium too short; what the medium says.
    pub fn create(
        medium: Arc<dyn Backing>,
        size_bytes: u64,
        zone_bytes: u64,
        plan: &[u8],
    ) -> Result<Self, Error> {
        check_zone(zone_bytes)?;
        let invalid = |why: &str| Err(Error::new(ErrorKind::Invalid, Op::Reencrypt).detail(why.to_owned()));
        if plan.len() > PLAN_BYTES_MAX {
            return invalid("the plan is too long");
        }
        if medium.facts().len_bytes < Self::medium_bytes(zone_bytes) {
            return invalid("the medium is too short for the journal");
        }
        let header = Header {
            sequence: 0,
            size_bytes,
            zone_bytes,
            boundary: 0,
            plan_len: plan.len() as u64,
            plan_digest: Digest::of(plan),
            zone: None,
        };
        let mut state = Self { medium, header, plan: plan.to_vec(), prepared: Default::default() };
        let mut prefix = vec![0; PREFIX_BYTES];
        prefix[PLAN_AT..PLAN_AT + plan.len()].copy_from_slice(plan);
        state.medium.write(0, &prefix, Durability::Cached)?;
        // So that there is room whenever it is needed.
        let zeroes = vec![0; CHUNK_BYTES];
        for at in (0..zone_bytes).step_by(CHUNK_BYTES) {
            state.medium.write(PREFIX_BYTES as u64 + at, &zeroes, Durability::Cached)?;
        }
        state.medium.flush()?;
        state.put_header(state.header.clone())?;
        Ok(state)
    }

    /// The state on `medium`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if there is none, or it is damaged; what the medium says.
    pub fn open(medium: Arc<dyn Backing>) -> Result<Self, Error> {
        let len = usize::try_from(medium.facts().len_bytes).unwrap_or(PREFIX_BYTES).min(PREFIX_BYTES);
        let mut prefix = vec![0; len];
        medium.read(0, &mut prefix)?;
        let (header, plan) = parse_prefix(&prefix)?;
        if medium.facts().len_bytes < Self::medium_bytes(header.zone_bytes) {
            return Err(Error::new(ErrorKind::Invalid, Op::Reencrypt).detail("it has lost its end"));
        }
        Ok(Self { medium, header, plan, prepared: Default::default() })
    }

    /// Everything before is under the new key, in bytes.
    #[must_use]
    pub fn boundary(&self) -> u64 {
        self.header.boundary
    }

    /// Size of the volume, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.header.size_bytes
    }

    /// What becomes of the volume.
    #[must_use]
    pub fn plan(&self) -> &[u8] {
        &self.plan
    }

    /// Whether all of the volume is under the new key.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.header.boundary == self.header.size_bytes
    }

    /// Whether a zone is in the journal, and the volume's own not to be relied on.
    #[must_use]
    pub fn is_interrupted(&self) -> bool {
        self.header.zone.is_some()
    }

    /// Puts a part of the next zone's new ciphertext, that begins at `offset` of the volume, into the journal.
    fn write_journal(&self, offset: u64, ciphertext: &[u8]) -> Result<(), Error> {
        self.medium.write(self.journal_at(offset), ciphertext, Durability::Cached)
    }

    fn journal_at(&self, offset: u64) -> u64 {
        PREFIX_BYTES as u64 + (offset - self.header.boundary)
    }

    /// Step 2: the journal has all of a zone of `len_bytes` and `digest`, and from now on it counts. If this fails, it may
    /// count or not; as nobody may use the zone then, the same journal is written again.
    fn commit_journal(&mut self, len_bytes: u64, digest: Digest) -> Result<(), Error> {
        let zone = Some(InJournal { len_bytes, digest: digest.finish() });
        self.put_header(Header { zone, ..self.header.clone() })
    }

    /// Step 3: writes the zone that is in the journal to the volume on `backing`, by way of `room`, of which there is a chunk.
    fn write_zone(&self, backing: &dyn Backing, room: &mut [u8]) -> Result<(), Error> {
        let Some(InJournal { len_bytes, .. }) = self.header.zone else { return Ok(()) };
        let start = self.header.boundary;
        for (at, len) in chunks(start..start + len_bytes) {
            let piece = &mut room[..len];
            self.medium.read(self.journal_at(at), piece)?;
            backing.write(at, piece, Durability::Cached)?;
        }
        backing.flush()
    }

    /// Step 4: the zone that was in the journal is where it belongs.
    fn advance(&mut self) -> Result<(), Error> {
        let Some(InJournal { len_bytes, .. }) = self.header.zone else { return Ok(()) };
        self.advance_to(self.header.boundary + len_bytes)
    }

    /// Completes the zone that was interrupted, if one was. Afterwards each data unit of the volume on `backing` is wholly
    /// under the one key or the other. Nobody else may use the volume meanwhile.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the journal is damaged: nothing was written then. Else what backing and medium say.
    pub fn recover(&mut self, backing: &dyn Backing) -> Result<(), Error> {
        self.check_journal()?;
        // Aligned as any backing may ask.
        let mut room = HeapSource.allocate(CHUNK_BYTES)?;
        self.write_zone(backing, room.bytes_mut())?;
        self.advance()
    }

    /// Whether what is in the journal is what was put there, if it counts.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if it is damaged; what the medium says.
    fn check_journal(&self) -> Result<(), Error> {
        let Some(InJournal { len_bytes, digest }) = self.header.zone else { return Ok(()) };
        let mut room = HeapSource.allocate(CHUNK_BYTES)?;
        let room = room.bytes_mut();
        let mut found = Digest::default();
        let start = self.header.boundary;
        for (at, len) in chunks(start..start + len_bytes) {
            self.medium.read(self.journal_at(at), &mut room[..len])?;
            found.update(&room[..len]);
        }
        if found.finish() != digest {
            return Err(Error::new(ErrorKind::Invalid, Op::Reencrypt).at(start, len_bytes).detail(
                "the journal is damaged, and this part of the volume was being written; bring the state back from a copy",
            ));
        }
        Ok(())
    }

    /// Writes a header to both places. It counts, here, once it is stable.
    fn put_header(&mut self, header: Header) -> Result<(), Error> {
        let header = Header { sequence: self.header.sequence + 1, ..header };
        let bytes = header.to_bytes();
        for at in HEADERS_AT {
            self.medium.write(at as u64, &bytes, Durability::Cached)?;
        }
        self.medium.flush()?;
        self.header = header;
        Ok(())
    }
}

impl Ledger for State {
    fn size_bytes(&self) -> u64 {
        self.header.size_bytes
    }

    fn boundary(&self) -> u64 {
        self.header.boundary
    }

    fn is_interrupted(&self) -> bool {
        self.header.zone.is_some()
    }

    fn next_zone(&self) -> Range<u64> {
        let Header { boundary, size_bytes, zone_bytes, zone, .. } = &self.header;
        let len = zone.map_or(*zone_bytes, |InJournal { len_bytes, .. }| len_bytes);
        *boundary..(*size_bytes).min(boundary.saturating_add(len))
    }

    fn keeps(&self) -> Keeps {
        Keeps::Future
    }

    fn check(&mut self) -> Result<(), Error> {
        self.check_journal()
    }

    fn put(&mut self, offset: u64, ciphertext: &[u8]) -> Result<(), Error> {
        if offset == self.header.boundary {
            self.prepared = Default::default();
        }
        let (digest, end) = &mut self.prepared;
        digest.update(ciphertext);
        *end = offset + ciphertext.len() as u64;
        self.write_journal(offset, ciphertext)
    }

    fn seal(&mut self) -> Result<(), Error> {
        self.medium.flush()
    }

    fn commit(&mut self, zone: &Range<u64>) -> Result<(), Error> {
        let (digest, end) = std::mem::take(&mut self.prepared);
        assert!(*zone == (self.header.boundary..end), "all of the zone was put");
        self.commit_journal(zone.end - zone.start, digest)
    }

    fn recall(&mut self, _: &dyn Backing, offset: u64, room: &mut [u8]) -> Result<Vec<Range<usize>>, Error> {
        self.medium.read(self.journal_at(offset), room)?;
        // All of it is one part.
        Ok(std::iter::once(0..room.len()).collect())
    }

    fn advance_to(&mut self, boundary: u64) -> Result<(), Error> {
        self.put_header(Header { boundary, zone: None, ..self.header.clone() })
    }
}

/// The chunks of a range that begins at one: where each begins, and its length.
pub(super) fn chunks(range: Range<u64>) -> impl Iterator<Item = (u64, usize)> {
    let end = range.end;
    range.step_by(CHUNK_BYTES).map(move |at| {
        let len = (end - at).min(CHUNK_BYTES as u64);
        (at, usize::try_from(len).expect("at most a chunk"))
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::testing::MemBacking;
    use proptest::prelude::*;

    const ZONE: u64 = 2 * CHUNK_BYTES as u64;

    fn medium() -> Arc<MemBacking> {
        Arc::new(MemBacking::new(usize::try_from(State::medium_bytes(ZONE)).unwrap(), 1))
    }

    #[test]
    fn what_is_written_is_read_again() {
        let medium = medium();
        let mut state = State::create(medium.clone(), 5 * ZONE + 4096, ZONE, b"a plan").unwrap();
        assert_eq!(state.next_zone(), 0..ZONE);
        state.write_journal(0, &[7; CHUNK_BYTES]).unwrap();
        let mut digest = Digest::default();
        digest.update(&[7; CHUNK_BYTES]);
        state.commit_journal(CHUNK_BYTES as u64, digest).unwrap();
        let facts = StateFacts::parse(&medium.content()).unwrap();
        assert!(facts.is_interrupted && facts.boundary == 0 && facts.plan == b"a plan", "{facts:?}");
        let mut again = State::open(medium.clone()).unwrap();
        assert_eq!(again.header, state.header);
        let volume = MemBacking::new(usize::try_from(5 * ZONE + 4096).unwrap(), 1);
        again.recover(&volume).unwrap();
        assert_eq!(volume.content()[..CHUNK_BYTES], [7; CHUNK_BYTES]);
        assert_eq!(State::open(medium).unwrap().boundary(), CHUNK_BYTES as u64);
    }

    #[test]
    fn one_damaged_header_is_made_good_by_the_other_and_two_are_refused() {
        for both in [false, true] {
            for at in HEADERS_AT {
                let medium = medium();
                let mut state = State::create(medium.clone(), 5 * ZONE, ZONE, b"").unwrap();
                state.advance_to(ZONE).unwrap();
                medium.write(at as u64 + 40, &[0xff], Durability::Cached).unwrap();
                if both {
                    let other = HEADERS_AT.iter().find(|other| **other != at).unwrap();
                    medium.write(*other as u64 + 500, &[0xff], Durability::Cached).unwrap();
                }
                match State::open(medium) {
                    Ok(state) => assert!(!both && state.boundary() == ZONE),
                    Err(error) => {
                        assert!(both && error.chain().contains("damaged"), "{}", error.chain());
                    }
                }
            }
        }
    }

    #[test]
    fn a_damaged_journal_or_plan_is_refused_before_anything_is_written() {
        let medium = medium();
        let mut state = State::create(medium.clone(), 5 * ZONE, ZONE, b"plan").unwrap();
        state.write_journal(0, &[7; CHUNK_BYTES]).unwrap();
        state.commit_journal(CHUNK_BYTES as u64, Digest::default()).unwrap();
        let volume = MemBacking::new(usize::try_from(5 * ZONE).unwrap(), 1);
        let error = state.recover(&volume).unwrap_err();
        assert!(error.chain().contains("journal is damaged"), "{}", error.chain());
        assert!(volume.content().iter().all(|byte| *byte == 0));
        medium.write(PLAN_AT as u64, b"q", Durability::Cached).unwrap();
        assert!(State::open(medium).unwrap_err().chain().contains("plan is damaged"));
    }

    #[test]
    fn zones_are_whole_chunks_and_bounded() {
        let create = |zone| State::create(medium(), ZONE, zone, b"").map(drop).map_err(|error| error.kind());
        for wrong in [0, 4096, ZONE + 512, ZONE_BYTES_MAX + CHUNK_BYTES as u64, 2 * ZONE] {
            assert_eq!(create(wrong), Err(ErrorKind::Invalid), "{wrong}");
        }
        assert_eq!(create(ZONE), Ok(()));
    }

    proptest! {
        /// Whatever lies there is refused or understood, and what is understood keeps within its own bounds.
        #[test]
        fn no_header_leads_out_of_bounds(changes in prop::collection::vec((24usize..480, any::<u8>()), 0..6)) {
            let header = Header {
                sequence: 3, size_bytes: 5 * ZONE, zone_bytes: ZONE, boundary: ZONE,
                plan_len: 0, plan_digest: Digest::of(b""),
                zone: Some(InJournal { len_bytes: ZONE, digest: [0; DIGEST_BYTES] }),
            };
            let mut bytes = header.to_bytes();
            prop_assert_eq!(Header::parse(&bytes).unwrap(), header);
            for (at, value) in changes {
                bytes[at] = value;
            }
            let digest = Digest::of(&bytes[..HEADER_DIGEST_AT]);
            bytes[HEADER_DIGEST_AT..].copy_from_slice(&digest);
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert!(header.boundary <= header.size_bytes && header.zone_bytes <= ZONE_BYTES_MAX);
                if let Some(zone) = header.zone {
                    prop_assert!(zone.len_bytes <= header.zone_bytes);
                    prop_assert!(header.boundary + zone.len_bytes <= header.size_bytes);
                }
            }
        }
    }
}
