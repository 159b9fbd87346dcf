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
        let mut result = Ok(());
        for profile in self.profiles() {
            result = profile.evict(key).and(result);
        }
        result
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::caps::{KeyTypes, UnitMask};
    use crate::config::{DataUnitSize, Hardware, Mode};
    use crate::key::KeyForm;
    use crate::keyslot::Policy;
    use crate::memory::MemoryPool;
    use crate::testing::FakeEngine;
    use proptest::prelude::*;

    fn capabilities(units: u32, dun_bytes_max: u8) -> Capabilities {
        let units = [UnitMask::from_bits(units); Mode::ALL.len()];
        Capabilities { units, dun_bytes_max, key_types: KeyTypes::RAW, keyslots: 2 }
    }

    fn profile(capabilities: Capabilities) -> Arc<CryptoProfile> {
        let engine = Arc::new(FakeEngine::with_capabilities(capabilities));
        Arc::new(CryptoProfile::new(engine, MemoryPool::new(4096, 0), Policy::default()).unwrap())
    }

    fn key(unit: u32) -> Arc<Key> {
        let bytes: Vec<u8> = (0..64).collect();
        let unit = DataUnitSize::from_bytes(unit).unwrap();
        Key::new(Mode::Aes256Xts, unit, 8, KeyForm::Raw(RawKey::new(&bytes)), Hardware::Allowed).unwrap()
    }

    #[test]
    fn a_layer_can_do_what_all_below_can() {
        let (wide, narrow) = (profile(capabilities(0x1fe00, 32)), profile(capabilities(0x1200, 8)));
        let layer = LayeredProfile::new(vec![Some(wide.clone()), Some(narrow)]);
        let offered = layer.capabilities().unwrap();
        assert_eq!((offered.units[0].bits(), offered.dun_bytes_max, offered.keyslots), (0x1200, 8, 0));
        assert!(LayeredProfile::new(vec![Some(wide), None]).capabilities().is_none());
        assert!(LayeredProfile::new(Vec::new()).capabilities().is_none());
    }

    #[test]
    fn devices_that_can_do_less_are_refused_later_and_more_are_welcome() {
        let mut layer = LayeredProfile::new(vec![Some(profile(capabilities(0x1200, 8)))]);
        let shrunk = layer.replace(vec![Some(profile(capabilities(0x200, 8)))]).unwrap_err();
        assert_eq!(shrunk.errno().raw(), 22);
        assert_eq!(layer.capabilities().unwrap().units[0].bits(), 0x1200);
        layer.replace(vec![Some(profile(capabilities(0x1fe00, 32)))]).unwrap();
        assert_eq!(layer.capabilities().unwrap().units[0].bits(), 0x1fe00);
    }

    #[test]
    fn a_key_is_admitted_below_everywhere_or_nowhere() {
        let (wide, narrow) = (profile(capabilities(0x1200, 8)), profile(capabilities(0x200, 8)));
        let layer = LayeredProfile::new(vec![Some(wide.clone()), Some(narrow.clone())]);
        let admitted = layer.admit(&key(512), Fallback::Off).unwrap();
        assert_eq!((admitted.len(), wide.status().keys, narrow.status().keys), (2, 1, 1));
        drop(admitted);
        assert!(layer.admit(&key(4096), Fallback::Off).is_err());
        assert_eq!((wide.status().keys, narrow.status().keys), (0, 0));
        assert!(layer.evict(&key(512)).is_ok(), "evicting what is not there is fine");
        assert_eq!(layer.generate().unwrap_err().errno().raw(), 95);
    }

    proptest! {
        /// An intersection is covered by both, and covers whatever both cover.
        #[test]
        fn intersection_is_the_greatest_common_part(
            a in any::<(u32, u8)>(), b in any::<(u32, u8)>(), c in any::<(u32, u8)>()
        ) {
            let [a, b, c] = [a, b, c].map(|(units, dun_bytes)| capabilities(units, dun_bytes % 33));
            let both = a.intersect(Some(&b));
            prop_assert!(a.covers(&both) && b.covers(&both));
            prop_assert_eq!(both.covers(&c), a.covers(&c) && b.covers(&c));
        }
    }
}
