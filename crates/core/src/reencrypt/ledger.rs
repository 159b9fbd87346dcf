//! Where it is written down how far a re-encryption has come.

use crate::backing::Backing;
use crate::error::Error;
use std::fmt;
use std::ops::Range;

/// What a ledger keeps of a zone while that is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keeps {
    /// Its new ciphertext: repairing takes no key.
    Future,
    /// Its old ciphertext, or what tells that from the new one: repairing takes both keys.
    Past,
}

/// How far a re-encryption has come, on stable storage.
///
/// # What the re-encryption promises
///
/// - For each zone: [`put`](Self::put) for all of it in order, [`seal`](Self::seal), [`commit`](Self::commit); then
///   [`recall`](Self::recall) for all of it in order, with what comes of that written to the volume and flushed; then
///   [`advance_to`](Self::advance_to) its end. What fails is done again, from the first `put` on or, once a commit has
///   returned, from the first `recall` on.
/// - Nobody else writes to the zone from before the commit until the advance has returned.
/// - A zone that is to stay as it is gets an [`advance_to`](Self::advance_to) alone.
///
/// # What an implementation owes
///
/// - After a commit that returned, a kill or power cut at any moment leaves what `recall` needs; after an advance that returned,
///   the new boundary is what is found.
/// - If a commit or advance fails, the one or the other state may be found after a kill; either is right.
pub trait Ledger: fmt::Debug + Send {
    /// Size of the volume, in bytes.
    fn size_bytes(&self) -> u64;

    /// Everything before is under the new key, in bytes.
    fn boundary(&self) -> u64;

    /// Whether a zone was committed and the boundary is not yet behind it.
    fn is_interrupted(&self) -> bool;

    /// The zone that comes next; the interrupted one, if one was. Empty at the end. Where it does not begin at the border of a
    /// chunk, it ends at the next one at the latest, unless it is an interrupted one.
    fn next_zone(&self) -> Range<u64>;

    /// What it keeps of a zone.
    fn keeps(&self) -> Keeps;

    /// Whether what was kept of an interrupted zone is what was put there.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`](crate::error::ErrorKind::Invalid) if it is damaged; what the medium says.
    fn check(&mut self) -> Result<(), Error>;

    /// Keeps a part of the next zone, which begins at `offset` of the volume: its new or old ciphertext.
    ///
    /// # Errors
    ///
    /// What the medium says.
    fn put(&mut self, offset: u64, ciphertext: &[u8]) -> Result<(), Error>;

    /// Makes what was put stable.
    ///
    /// # Errors
    ///
    /// What the medium says.
    fn seal(&mut self) -> Result<(), Error>;

    /// From now on what was put for `zone` counts.
    ///
    /// # Errors
    ///
    /// What the medium says.
    fn commit(&mut self, zone: &Range<u64>) -> Result<(), Error>;

    /// Fills `room` with the ciphertext of the committed zone from `offset` on, and says which parts of it are to be written to
    /// `backing`: as they are, or re-encrypted first if it [keeps](Self::keeps) the past.
    ///
    /// # Errors
    ///
    /// What medium and backing say.
    fn recall(
        &mut self,
        backing: &dyn Backing,
        offset: u64,
        room: &mut [u8],
    ) -> Result<Vec<Range<usize>>, Error>;

    /// The boundary is at `boundary`, and no zone is being written. At the end of the volume that is all.
    ///
    /// # Errors
    ///
    /// What the medium says.
    fn advance_to(&mut self, boundary: u64) -> Result<(), Error>;
}
