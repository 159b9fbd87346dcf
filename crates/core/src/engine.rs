//! The bargain between the framework and what encrypts.

use crate::caps::Capabilities;
use crate::config::KeyType;
use crate::error::{Error, ErrorKind, Op};
use crate::key::{
    EphemeralWrappedKey, KEY_IDENTIFIER_BYTES, Key, KeyForm, LongTermWrappedKey, RawKey, SoftwareSecret,
};
use crate::memory::{Memory, MemorySource};
use inlinecrypt_cipher::Dun;
use inlinecrypt_cipher::kdf::{key_identifier_raw, key_identifier_wrapped};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Which keyslot of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotIndex(pub u32);

impl fmt::Display for SlotIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Which way data goes through an engine. A write encrypts, a read decrypts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Plaintext to ciphertext.
    Encrypt,
    /// Ciphertext to plaintext.
    Decrypt,
}

/// Work for [`Engine::crypt`]: whole data units that lie side by side in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// DUN of the first data unit.
    pub first: Dun,
    /// Where the data units lie in the memory, in bytes.
    pub range: Range<usize>,
}

impl Piece {
    /// Takes everything off the piece: it is done.
    pub fn finish(&mut self) {
        self.range.start = self.range.end;
    }

    /// Whether nothing is left of it.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.range.is_empty()
    }
}

/// The key of one request.
#[derive(Clone, Copy, Debug)]
pub enum KeyRef<'k> {
    /// The key that the framework programmed into this keyslot.
    Slot(SlotIndex),
    /// The key itself: engines without keyslots take it with every request.
    Inline(&'k Key),
}

/// A device that turns plaintext data units into ciphertext and back.
///
/// # What the framework promises
///
/// - `program` and `evict` on one engine never overlap each other, and never touch a keyslot in which a request is
///   granted, except to put the same key back after a reset.
/// - `crypt` gets only a keyslot that a successful `program` filled ([`KeyRef::Inline`] on an engine with no
///   keyslots), a config that [`capabilities`](Self::capabilities) allow, memory from
///   [`memory`](Self::memory), and pieces that are whole numbers of the key's data units and do not overlap.
/// - The key ladder is only used if `capabilities` list hardware-wrapped keys.
///
/// # What an implementation owes
///
/// - After a failed `program` or `evict` the keyslot is **empty**: `crypt` answers
///   [`NoKey`](crate::error::ErrorKind::NoKey). It never keeps the former key.
/// - `crypt` transforms all pieces, or returns an error. `NoKey` means that what was transformed has been taken off the
///   pieces and what they still name is untouched, so that the call can be made again with another keyslot; after any
///   other error the content of all pieces is meaningless and the caller discards it.
/// - A decryption may end with [`Interrupted`](crate::error::ErrorKind::Interrupted): the keyslot is empty and the content
///   meaningless, but the engine is there again, and who reads the ciphertext again can have it decrypted. An encryption
///   may not, since nobody else has its plaintext.
/// - `crypt` runs on many threads at once, also on one keyslot, and does not wait for other requests.
/// - Ciphertext depends on key, mode, data unit size and DUN alone, so that any two engines agree byte for byte.
pub trait Engine: fmt::Debug + Send + Sync {
    /// The name by which people know it, such as `software`.
    fn name(&self) -> &str;

    /// What this engine can do. Constant for its lifetime.
    fn capabilities(&self) -> &Capabilities;

    /// Where memory comes from that this engine can reach.
    fn memory(&self) -> &dyn MemorySource;

    /// Puts `key` into `slot`, replacing whatever was there. May block.
    ///
    /// # Errors
    ///
    /// [`KeyRejected`](crate::error::ErrorKind::KeyRejected) for a blob that does not authenticate, else
    /// [`EngineFailed`](crate::error::ErrorKind::EngineFailed). The keyslot is empty then.
    fn program(&self, slot: SlotIndex, key: &Key) -> Result<(), Error>;

    /// Removes `key` from `slot`, or, on an engine without keyslots (`None`), whatever it remembers of it. Evicting
    /// an empty keyslot succeeds. May block.
    ///
    /// # Errors
    ///
    /// [`EngineFailed`](crate::error::ErrorKind::EngineFailed). The keyslot is empty then, too.
    fn evict(&self, slot: Option<SlotIndex>, key: &Key) -> Result<(), Error>;

    /// Transforms pieces of `memory` in place; data unit `i` of a piece uses DUN `first + i`.
    ///
    /// Many pieces in one call cost an engine that is far away one journey.
    ///
    /// # Errors
    ///
    /// [`NoKey`](crate::error::ErrorKind::NoKey): the keyslot is empty; what `pieces` still name was not touched.
    /// [`EngineFailed`](crate::error::ErrorKind::EngineFailed),
    /// [`EngineGone`](crate::error::ErrorKind::EngineGone),
    /// [`Interrupted`](crate::error::ErrorKind::Interrupted) (only when decrypting): their content is meaningless now.
    fn crypt(
        &self,
        key: KeyRef<'_>,
        direction: Direction,
        memory: &mut dyn Memory,
        pieces: &mut [Piece],
    ) -> Result<(), Error>;

    /// [`crypt`](Self::crypt) with one piece.
    ///
    /// # Errors
    ///
    /// The same; how much of the range is still untouched after `NoKey` is not told.
    fn crypt_range(
        &self,
        key: KeyRef<'_>,
        direction: Direction,
        first: Dun,
        memory: &mut dyn Memory,
        range: Range<usize>,
    ) -> Result<(), Error> {
        self.crypt(key, direction, memory, &mut [Piece { first, range }])
    }

    /// The key ladder. `Some` exactly when the capabilities list hardware-wrapped keys.
    fn key_ladder(&self) -> Option<&dyn KeyLadder>;

    /// For how long a request needs its keyslot.
    fn slot_hold(&self) -> SlotHold {
        SlotHold::WhileComputing
    }

    /// The one-time choice between key types. `Some` exactly for engines that serve one of them only.
    fn exclusive(&self) -> Option<&dyn Exclusive> {
        None
    }

    /// Why it serves nothing until it is started again, if so. For status displays.
    fn stopped(&self) -> Option<String> {
        None
    }

    /// What can happen to it from outside. `None` for engines to which nothing happens.
    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        None
    }

    /// Takes a raw key into its keeping and returns the form in which to use it. Engines in this process have nowhere
    /// better to keep it and return the key itself; one in another process returns a ticket, and the key is wiped here.
    ///
    /// `again` says where the key can be had again without asking anybody, should the engine have to be started anew.
    ///
    /// # Errors
    ///
    /// [`EngineFailed`](crate::error::ErrorKind::EngineFailed), [`EngineGone`](crate::error::ErrorKind::EngineGone).
    ///
    /// # Blocking
    ///
    /// May wait for the engine.
    fn deposit(&self, raw: RawKey, again: Option<Arc<dyn RawKeySource>>) -> Result<KeyForm, Error> {
        let _ = again;
        Ok(KeyForm::Raw(raw))
    }

    /// The public name of a key, as fscrypt computes it: from the raw key, or from a wrapped key's software secret.
    ///
    /// # Errors
    ///
    /// [`KeyRejected`](crate::error::ErrorKind::KeyRejected) if a blob does not authenticate, what the engine says else.
    ///
    /// # Blocking
    ///
    /// May wait for the engine.
    fn key_identifier(&self, form: &KeyForm) -> Result<[u8; KEY_IDENTIFIER_BYTES], Error> {
        match form {
            KeyForm::Raw(key) => Ok(key_identifier_raw(key.expose())),
            KeyForm::Deposited(key) => Ok(key.identifier),
            KeyForm::Wrapped(blob) => {
                let unsupported = || Error::new(ErrorKind::Unsupported, Op::DeriveSecret);
                let secret = self.key_ladder().ok_or_else(unsupported)?.derive_software_secret(blob)?;
                Ok(key_identifier_wrapped(secret.expose()))
            }
        }
    }

    /// Why requests with this key fail, and will go on failing until a person does something; `None` if the engine knows of
    /// nothing. For status displays.
    fn trouble(&self, key: &Key) -> Option<String> {
        let _ = key;
        None
    }

    /// The process in which it runs, if that is another one.
    fn process(&self) -> Option<EngineProcess> {
        None
    }
}

/// Where a raw key can be had again without asking anybody.
pub trait RawKeySource: fmt::Debug + Send + Sync {
    /// The key.
    ///
    /// # Errors
    ///
    /// Whatever keeps it from being read.
    fn read(&self) -> Result<RawKey, Error>;
}

/// An engine's own process at one moment, for status displays.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineProcess {
    /// Its number; `None` while none runs.
    pub pid: Option<u32>,
    /// How often it had to be started again.
    pub restarts: u64,
    /// For how long requests had to wait for the last restart, in nanoseconds; 0 without one.
    pub last_pause_ns: u64,
    /// Why none runs and none will be started, if that is so.
    pub stopped: Option<String>,
    /// What keeps it to itself, and what the system lacks for that: a line each.
    pub sandbox: Vec<String>,
}

/// For how long a request needs its keyslot: a property of the engine, since sizing keyslots depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SlotHold {
    /// While the engine computes.
    WhileComputing,
    /// From submission to completion, media included: engines that sit on the way to the disk.
    WholeRequest,
}

/// An engine that serves raw or hardware-wrapped keys but not both, and is told which once per start.
///
/// While undecided, [`Engine::capabilities`] list every key type that it could be told to serve. The framework does not
/// program any key before [`commit`](Self::commit) has succeeded, and calls it for one key type only.
pub trait Exclusive: Send + Sync {
    /// What the engine was told to serve, if it was.
    fn committed(&self) -> Option<KeyType>;

    /// Tells it. Telling it the same again succeeds and does nothing. May block.
    ///
    /// # Errors
    ///
    /// [`EngineFailed`](crate::error::ErrorKind::EngineFailed) if the switch did not work: the engine is poisoned then and
    /// serves nothing until it is started again. [`Unsupported`](crate::error::ErrorKind::Unsupported) if it serves the
    /// other key type already, or can never serve this one; it stays as it is.
    fn commit(&self, key_type: KeyType) -> Result<(), Error>;
}

/// What can happen to an engine while it is used: what real controllers go through.
pub trait Lifecycle: Send + Sync {
    /// A controller reset: every keyslot is empty afterwards. The caller tells the framework
    /// ([`CryptoProfile::reset`](crate::profile::CryptoProfile::reset) does both).
    ///
    /// # Errors
    ///
    /// [`EngineFailed`](crate::error::ErrorKind::EngineFailed) if the engine does not come back.
    fn reset(&self) -> Result<(), Error>;

    /// Suspends the engine: it answers [`EngineFailed`](crate::error::ErrorKind::EngineFailed) until resumed.
    ///
    /// # Errors
    ///
    /// [`EngineFailed`](crate::error::ErrorKind::EngineFailed).
    fn suspend(&self) -> Result<(), Error>;

    /// Resumes it: keyslots are empty, the mode is what it was.
    ///
    /// # Errors
    ///
    /// [`EngineFailed`](crate::error::ErrorKind::EngineFailed) if it does not come back.
    fn resume(&self) -> Result<(), Error>;
}

/// What an engine does for hardware-wrapped keys besides using them (`struct blk_crypto_ll_ops`).
///
/// All of these may block. Sizes are checked by the profile before they get here: raw keys 16 to 64 bytes, blobs up to
/// 128.
pub trait KeyLadder: Send + Sync {
    /// Wraps a raw key for storage.
    ///
    /// # Errors
    ///
    /// [`Invalid`](crate::error::ErrorKind::Invalid) if the engine does not take keys of this size.
    fn import(&self, raw: &RawKey) -> Result<LongTermWrappedKey, Error>;

    /// Makes a new random key and wraps it for storage. Nobody outside the engine ever sees it.
    ///
    /// # Errors
    ///
    /// [`EngineFailed`](crate::error::ErrorKind::EngineFailed) if there is no randomness.
    fn generate(&self) -> Result<LongTermWrappedKey, Error>;

    /// Turns a stored key into one for this boot.
    ///
    /// # Errors
    ///
    /// [`KeyRejected`](crate::error::ErrorKind::KeyRejected) if the blob does not authenticate.
    fn prepare(&self, long_term: &LongTermWrappedKey) -> Result<EphemeralWrappedKey, Error>;

    /// Whether a blob is good: what [`derive_software_secret`](Self::derive_software_secret) would say, without letting
    /// anybody see the secret.
    ///
    /// # Errors
    ///
    /// Its.
    fn check(&self, ephemeral: &EphemeralWrappedKey) -> Result<(), Error> {
        self.derive_software_secret(ephemeral).map(drop)
    }

    /// Derives the secret that software may see.
    ///
    /// # Errors
    ///
    /// [`KeyRejected`](crate::error::ErrorKind::KeyRejected) if the blob does not authenticate.
    fn derive_software_secret(&self, ephemeral: &EphemeralWrappedKey) -> Result<SoftwareSecret, Error>;
}
