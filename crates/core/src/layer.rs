//! Stacked profiles: a device made of others (as device mapper makes them) can do what all of them can.

use crate::admission::{Fallback, Refusal};
use crate::caps::Capabilities;
use crate::error::{Error, ErrorKind, Op};
use crate::key::{EphemeralWrappedKey, Key, LongTermWrappedKey, RawKey, SoftwareSecret};
use crate::profile::{Admission, CryptoProfile};
use std::sync::Arc;

/// A profile over other profiles. It has no keyslots of its own: those of the devices below are used
/// (`drivers/md/dm-table.c`).
#[derive(Debug)]
pub struct LayeredProfile {
    below: Vec<Option<Arc<CryptoProfile>>>,
    capabilities: Capabilities,
}

impl LayeredProfile {
    /// A layer over `below`. A device without a profile (`None`) clears every capability, since requests may go there.
    #[must_use]
    pub fn new(below: Vec<Option<Arc<CryptoProfile>>>) -> Self {
        let capabilities = intersection(&below);
        Self { below, capabilities }
    }

    /// What all devices below can do. `None` if that is no mode at all: then the layer has no profile.
    #[must_use]
    pub fn capabilities(&self) -> Option<&Capabilities> {
        let some_mode = self.capabilities.units.iter().any(|units| !units.is_empty());
        some_mode.then_some(&self.capabilities)
    }

    /// Puts other devices below.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if a capability would be lost: upper layers rely on it. Nothing is changed then.
    pub fn replace(&mut self, below: Vec<Option<Arc<CryptoProfile>>>) -> Result<(), Error> {
        let capabilities = intersection(&below);
        if !capabilities.covers(&self.capabilities) {
            return Err(Error::new(ErrorKind::Invalid, Op::Open)
                .detail("the new devices can do less than what has been advertised"));
        }
        *self = Self { below, capabilities };
        Ok(())
    }

    /// Admits `key` on every device below, or on none.
    ///
    /// # Errors
    ///
    /// The first refusal.
    pub fn admit(&self, key: &Arc<Key>, fallback: Fallback) -> Result<Vec<Admission>, Refusal> {
        self.profiles().map(|profile| profile.admit(key.clone(), fallback)).collect()
    }

    /// Evicts `key` from every device below.
    ///
    /// # Errors
    ///
    /// The last failure; the others are tried all the same.
    pub fn evict(&self, key: &Key) -> Result<(), Error> {
        self.profiles().fold(Ok(()), |result, profile| profile.evict(key).and(result))
    }

    /// Imports a raw key on the first device below.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Unsupported`] if the layer does not take wrapped keys; what the device says.
    pub fn import(&self, raw: &RawKey) -> Result<LongTermWrappedKey, Error> {
        self.first(Op::Import)?.import(raw)
    }

    /// Generates a key on the first device below.
    ///
    /// # Errors
    ///
    /// As [`import`](Self::import).
    pub fn generate(&self) -> Result<LongTermWrappedKey, Error> {
        self.first(Op::Generate)?.generate()
    }

    /// Prepares a key on the first device below.
    ///
    /// # Errors
    ///
    /// As [`import`](Self::import).
    pub fn prepare(&self, long_term: &LongTermWrappedKey) -> Result<EphemeralWrappedKey, Error> {
        self.first(Op::Prepare)?.prepare(long_term)
    }

    /// Derives a software secret on the first device below.
    ///
    /// # Errors
    ///
    /// As [`import`](Self::import).
    pub fn derive_software_secret(&self, ephemeral: &EphemeralWrappedKey) -> Result<SoftwareSecret, Error> {
        self.first(Op::DeriveSecret)?.derive_software_secret(ephemeral)
    }

    fn profiles(&self) -> impl Iterator<Item = &Arc<CryptoProfile>> {
        self.below.iter().flatten()
    }

    fn first(&self, op: Op) -> Result<&Arc<CryptoProfile>, Error> {
        let wrapped = self.capabilities.key_types.contains(crate::config::KeyType::HardwareWrapped);
        self.profiles().next().filter(|_| wrapped).ok_or_else(|| Error::new(ErrorKind::Unsupported, op))
    }
}

fn intersection(below: &[Option<Arc<CryptoProfile>>]) -> Capabilities {
    let all = if below.is_empty() { Capabilities::NONE } else { Capabilities::ALL };
    below.iter().fold(all, |common, profile| common.intersect(profile.as_ref().map(|p| p.capabilities())))
}
