//! A container: opened with a passphrase, and changed so that a crash leaves it as it was or as it is to be.

use super::header::Header;
use super::metadata::{ALIGN_BYTES, Digest, Keyslot, Metadata, OBJECTS_MAX};
use crate::area::AreaCipher;
use crate::encryption;
use crate::kdf::Kdf;
use crate::{Error, ErrorKind, Hash, Random, Storage, VolumeKey, af};
use base64ct::{Base64, Encoding as _};
use inlinecrypt_cipher::Mode;
use serde_json::{Map, Value, json};
use std::fmt;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

/// Stripes of what is made here: everybody's.
pub(super) const STRIPES: usize = 4000;
/// Bytes of salts.
pub(super) const SALT_BYTES: usize = 32;

/// A container on `S`.
pub struct Container<S> {
    storage: S,
    header: Header,
}

/// What a passphrase opened.
pub struct Opened {
    /// The LUKS keyslot that took it.
    pub keyslot: u32,
    /// The digest that the key has.
    pub digest: u32,
    /// The key.
    pub key: VolumeKey,
}

impl<S: Storage> Container<S> {
    /// Reads the header on `storage`.
    ///
    /// # Errors
    ///
    /// Those of [`Header::read`].
    pub fn read(mut storage: S) -> Result<Self, Error> {
        let header = Header::read(&mut storage)?;
        Ok(Self { storage, header })
    }

    pub(super) fn new(storage: S, header: Header) -> Self {
        Self { storage, header }
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What it lies on.
    pub fn storage(&self) -> &S {
        &self.storage
    }

    /// The same, for what is not the header's.
    pub fn storage_mut(&mut self) -> &mut S {
        &mut self.storage
    }

    /// What it lies on.
    pub fn into_storage(self) -> S {
        self.storage
    }

    fn metadata(&self) -> &Metadata {
        &self.header.metadata
    }

    /// The LUKS keyslots of the data in the order in which they are tried: those of high priority first, those to be ignored not at
    /// all.
    pub(super) fn order(&self) -> Vec<u32> {
        let slots = self.metadata().keyslots();
        let mut order: Vec<u32> =
            self.metadata().bound_keyslots().filter(|slot| slots[slot].priority > 0).collect();
        order.sort_by_key(|slot| (std::cmp::Reverse(slots[slot].priority), *slot));
        order
    }

    /// Opens it with the first LUKS keyslot that takes `passphrase`, or with `only` that one. Those that hold another key than that of
    /// the data are not tried.
    ///
    /// # Errors
    ///
    /// [`Passphrase`](ErrorKind::Passphrase) if none does; if none could be tried, or memory or the storage kept one from it, why.
    /// [`Invalid`](ErrorKind::Invalid) if `only` is not there, or is unbound.
    ///
    /// # Blocking
    ///
    /// As long as the header says, within bounds.
    pub fn open(&mut self, passphrase: &[u8], only: Option<u32>) -> Result<Opened, Error> {
        let order = match only {
            None => self.order(),
            Some(slot) if self.metadata().digest_of_keyslot(slot).is_some() => vec![slot],
            Some(slot) if self.metadata().keyslots().contains_key(&slot) => {
                return Err(Error::invalid(
                    format!("LUKS keyslot {slot} holds another key than that of the data (it is unbound)"),
                    "Use cryptsetup for it; inlinecrypt luks dump shows which LUKS keyslots are of segment 0.",
                ));
            }
            Some(slot) => return Err(Error::no_such_slot(slot)),
        };
        self.open_one_of(passphrase, order)
    }

    /// Opens it with the first of these LUKS keyslots that takes `passphrase`.
    pub(super) fn open_one_of(&mut self, passphrase: &[u8], order: Vec<u32>) -> Result<Opened, Error> {
        if order.is_empty() {
            return Err(Error::new(
                ErrorKind::Passphrase,
                "it has no LUKS keyslot that a passphrase opens",
                "If it was erased, restore the header from a backup: inlinecrypt luks header-restore; a wrapped key in the \
                 header takes no passphrase.",
            ));
        }
        let mut trouble: Option<Error> = None;
        let mut left_out = Vec::new();
        let mut tried = false;
        for keyslot in order {
            match self.try_slot(keyslot, passphrase) {
                Ok(Some((digest, key))) => return Ok(Opened { keyslot, digest, key }),
                Ok(None) => tried = true,
                Err(error) => {
                    if error.kind() == ErrorKind::Unsupported {
                        left_out.push(error.to_string());
                    }
                    // One that time or memory may bring back counts for more than one that never opens here.
                    trouble = match trouble {
                        Some(first)
                            if first.kind() != ErrorKind::Unsupported
                                || error.kind() == ErrorKind::Unsupported =>
                        {
                            Some(first)
                        }
                        _ => Some(error),
                    };
                }
            }
        }
        match trouble {
            Some(error) if !tried || error.kind() != ErrorKind::Unsupported => Err(error),
            Some(_) => Err(Error::passphrase_but(&left_out)),
            None => Err(Error::passphrase()),
        }
    }

    fn try_slot(&mut self, number: u32, passphrase: &[u8]) -> Result<Option<(u32, VolumeKey)>, Error> {
        let Self { storage, header } = self;
        let slot = &header.metadata.keyslots()[&number];
        let Some((digest_number, digest)) = header.metadata.digest_of_keyslot(number) else {
            // Its key is of nothing.
            return Ok(None);
        };
        let unknown = |why: &String| Error::unsupported(format!("LUKS keyslot {number}: {why}"));
        let kdf = slot.kdf.as_ref().map_err(unknown)?;
        let mode = *slot.encryption.as_ref().map_err(unknown)?;
        let hash = *slot.af_hash.as_ref().map_err(unknown)?;
        let area_key = kdf.derive(passphrase, &slot.salt, mode.info().key_bytes)?;
        let len = slot.key_bytes * slot.stripes;
        let mut area = Zeroizing::new(vec![0; len.next_multiple_of(512)]);
        storage.read(slot.area_offset, &mut area).map_err(Error::io)?;
        AreaCipher::new(mode, &area_key)?.decrypt(&mut area);
        let key = af::merge(&area[..len], slot.key_bytes, slot.stripes, hash);
        Ok(digest.matches(&key)?.then_some((digest_number, key)))
    }

    /// Makes both copies of the header the same, if they are not. Says whether anything was written.
    ///
    /// # Errors
    ///
    /// [`Io`](ErrorKind::Io).
    pub fn repair(&mut self, random: &mut Random<'_>) -> Result<bool, Error> {
        if self.header.is_whole() {
            return Ok(false);
        }
        self.header.write(&mut self.storage, random)?;
        Ok(true)
    }

    pub(super) fn change(
        &mut self,
        random: &mut Random<'_>,
        change: impl FnOnce(&mut Map<String, Value>),
    ) -> Result<(), Error> {
        let mut next = self.header.clone();
        next.metadata.change(next.size, change)?;
        next.write(&mut self.storage, random)?;
        self.header = next;
        Ok(())
    }

    /// Adds a LUKS keyslot for `key`, which has digest `digest`: its number, which is `number` if one is asked for.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) if none is free, there is no room, or the costs are out of bounds; nothing is changed
    /// then. [`Io`](ErrorKind::Io): it is added or not.
    pub fn add_keyslot(
        &mut self,
        key: &[u8],
        digest: u32,
        passphrase: &[u8],
        kdf: Kdf,
        number: Option<u32>,
        random: &mut Random<'_>,
    ) -> Result<u32, Error> {
        self.repair(random)?;
        let number = self.free_number(number)?;
        let slot = self.write_area(key, passphrase, kdf, 1, random)?;
        self.change(random, |json| {
            object(json, "keyslots").insert(number.to_string(), slot.to_json());
            list(object(json, "digests"), digest).push(number.to_string().into());
        })?;
        Ok(number)
    }

    pub(super) fn free_number(&self, wanted: Option<u32>) -> Result<u32, Error> {
        let taken = self.metadata().json()["keyslots"].as_object().expect("it was looked at");
        let is_free = |number: &u32| !taken.contains_key(&number.to_string());
        match wanted {
            Some(number) if number >= OBJECTS_MAX => Err(Error::no_such_slot(number)),
            Some(number) if !is_free(&number) => Err(Error::invalid(
                format!("LUKS keyslot {number} is in use"),
                "Choose another, or remove it first.",
            )),
            Some(number) => Ok(number),
            None => (0..OBJECTS_MAX).find(is_free).ok_or_else(|| {
                Error::invalid(
                    "all 32 LUKS keyslots are in use",
                    "Remove one first: inlinecrypt luks remove-key",
                )
            }),
        }
    }

    /// Writes key material where no copy of the header names any, and makes it stable.
    pub(super) fn write_area(
        &mut self,
        key: &[u8],
        passphrase: &[u8],
        kdf: Kdf,
        priority: u32,
        random: &mut Random<'_>,
    ) -> Result<Keyslot, Error> {
        let area_offset = self.free_area(area_bytes(key))?;
        self.write_area_at(area_offset, key, passphrase, kdf, priority, random)
    }

    /// The same, where the caller knows that there is room.
    pub(super) fn write_area_at(
        &mut self,
        area_offset: u64,
        key: &[u8],
        passphrase: &[u8],
        kdf: Kdf,
        priority: u32,
        random: &mut Random<'_>,
    ) -> Result<Keyslot, Error> {
        kdf.check()?;
        let hash = Hash::Sha256;
        let mode = Mode::Aes256Xts;
        let area_bytes = area_bytes(key);
        let mut salt = vec![0; SALT_BYTES];
        random(&mut salt).map_err(Error::io)?;
        let area_key = kdf.derive(passphrase, &salt, mode.info().key_bytes)?;
        let material = af::split(key, STRIPES, hash, random).map_err(Error::io)?;
        // Whole sectors, and room for all at once: growing would leave copies behind.
        let mut area = Zeroizing::new(vec![0; material.len().next_multiple_of(512)]);
        area[..material.len()].copy_from_slice(&material);
        drop(material);
        AreaCipher::new(mode, &area_key)?.encrypt(&mut area);
        self.storage.write(area_offset, &area).and_then(|()| self.storage.flush()).map_err(Error::io)?;
        Ok(Keyslot {
            key_bytes: key.len(),
            priority,
            kdf: Ok(kdf),
            encryption: Ok(mode),
            encryption_name: encryption::name(mode).to_owned(),
            stripes: STRIPES,
            af_hash: Ok(hash),
            area_offset,
            area_bytes,
            salt,
        })
    }

    fn free_area(&self, bytes: u64) -> Result<u64, Error> {
        let begin = 2 * self.header.size;
        let taken = self.metadata().areas()?.into_iter().map(|(offset, len, _)| (offset, len)).collect();
        gap(taken, begin, begin + self.metadata().keyslots_bytes(), bytes).ok_or_else(|| {
            Error::invalid(
                "there is no room for the area of another LUKS keyslot",
                "Remove one first: inlinecrypt luks remove-key",
            )
        })
    }

    /// Gives the key of LUKS keyslot `number` another passphrase. Until the header names the new area, the old one opens.
    ///
    /// # Errors
    ///
    /// As [`add_keyslot`](Self::add_keyslot).
    pub fn change_keyslot(
        &mut self,
        number: u32,
        key: &[u8],
        passphrase: &[u8],
        kdf: Kdf,
        random: &mut Random<'_>,
    ) -> Result<(), Error> {
        self.repair(random)?;
        let old =
            self.metadata().keyslots().get(&number).cloned().ok_or_else(|| Error::no_such_slot(number))?;
        self.free_area(area_bytes(key)).map_err(|_no_room| {
            Error::invalid(
                "there is no room for a second area, and the old one stays until the new one is there",
                "Remove another LUKS keyslot first, or use cryptsetup luksChangeKey, which writes over the old area.",
            )
        })?;
        let slot = self.write_area(key, passphrase, kdf, old.priority, random)?;
        self.change(random, |json| {
            object(json, "keyslots").insert(number.to_string(), slot.to_json());
        })?;
        self.wipe(old.area_offset, old.area_bytes, random)
    }

    /// Removes LUKS keyslots. The header forgets them first, and their salts with them; then their areas are overwritten.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) if one is not there; nothing is changed then. [`Io`](ErrorKind::Io): all are removed or
    /// none.
    pub fn remove_keyslots(&mut self, numbers: &[u32], random: &mut Random<'_>) -> Result<(), Error> {
        self.repair(random)?;
        let taken = self.metadata().json()["keyslots"].as_object().expect("it was looked at").clone();
        if let Some(missing) = numbers.iter().find(|number| !taken.contains_key(&number.to_string())) {
            return Err(Error::no_such_slot(*missing));
        }
        let names: Vec<String> = numbers.iter().map(u32::to_string).collect();
        let areas = self.metadata().areas()?;
        self.change(random, |json| {
            object(json, "keyslots").retain(|name, _| !names.contains(name));
            for what in ["digests", "tokens"] {
                for value in object(json, what).values_mut() {
                    if let Some(list) = value.get_mut("keyslots").and_then(Value::as_array_mut) {
                        list.retain(|name| name.as_str().is_none_or(|name| !names.iter().any(|n| n == name)));
                    }
                }
            }
        })?;
        let is_ours = |name: &str| names.iter().any(|number| name == format!("LUKS keyslot {number}"));
        for (offset, bytes, _) in areas.into_iter().filter(|(.., name)| is_ours(name)) {
            self.wipe(offset, bytes, random)?;
        }
        Ok(())
    }

    /// Removes all LUKS keyslots and all tokens of type `token`, in one change; then all areas are overwritten, also what earlier
    /// ones may have left.
    ///
    /// # Errors
    ///
    /// [`Io`](ErrorKind::Io): all are removed or none.
    pub fn erase(&mut self, token: &str, random: &mut Random<'_>) -> Result<(), Error> {
        self.repair(random)?;
        self.change(random, |json| {
            object(json, "keyslots").clear();
            object(json, "tokens")
                .retain(|_, value| value.get("type").and_then(Value::as_str) != Some(token));
            for what in ["digests", "tokens"] {
                for value in object(json, what).values_mut() {
                    if let Some(list) = value.get_mut("keyslots").and_then(Value::as_array_mut) {
                        list.clear();
                    }
                }
            }
        })?;
        self.wipe(2 * self.header.size, self.metadata().keyslots_bytes(), random)
    }

    /// Overwrites an area that no header names any more.
    pub(super) fn wipe(&mut self, offset: u64, bytes: u64, random: &mut Random<'_>) -> Result<(), Error> {
        let mut noise = vec![0; 64 << 10];
        let end = offset + bytes;
        let mut at = offset;
        while at < end {
            let len = usize::try_from((end - at).min(noise.len() as u64)).expect("at most 64 KiB");
            random(&mut noise[..len]).map_err(Error::io)?;
            self.storage.write(at, &noise[..len]).map_err(Error::io)?;
            at += len as u64;
        }
        self.storage.flush().map_err(Error::io)
    }

    /// Adds a token; its number.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) if there is no room; nothing is changed then. [`Io`](ErrorKind::Io).
    pub fn add_token(&mut self, token: Value, random: &mut Random<'_>) -> Result<u32, Error> {
        self.repair(random)?;
        let tokens = self.metadata().tokens();
        let number = (0..OBJECTS_MAX).find(|number| !tokens.contains_key(number)).ok_or_else(|| {
            Error::invalid("all 32 tokens are in use", "Remove one first: cryptsetup token remove")
        })?;
        self.change(random, |json| {
            object(json, "tokens").insert(number.to_string(), token);
        })?;
        Ok(number)
    }

    /// Sets how long the data segment is; `None` for all that is there.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](ErrorKind::Unsupported) if it is not one segment, [`Invalid`](ErrorKind::Invalid) if the size is not whole
    /// sectors; [`Io`](ErrorKind::Io).
    pub fn resize(&mut self, size: Option<u64>, random: &mut Random<'_>) -> Result<(), Error> {
        let (number, segment) = self.metadata().data()?;
        if let Some(bytes) = size
            && (bytes == 0 || bytes % u64::from(segment.sector_bytes) != 0)
        {
            return Err(Error::invalid(
                format!("{bytes} bytes are not whole sectors of {}", segment.sector_bytes),
                "Give a multiple of the sector size.",
            ));
        }
        self.repair(random)?;
        let text = size.map_or_else(|| "dynamic".to_owned(), |bytes| bytes.to_string());
        self.change(random, |json| {
            object(json, "segments")[&number.to_string()]["size"] = text.into();
        })
    }

    /// Sets label and subsystem; `None` leaves one as it is.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) if one is longer than 47 bytes or no plain text; [`Io`](ErrorKind::Io).
    pub fn set_label(
        &mut self,
        label: Option<&str>,
        subsystem: Option<&str>,
        random: &mut Random<'_>,
    ) -> Result<(), Error> {
        for text in [label, subsystem].into_iter().flatten() {
            super::create::check_text(text, 47, "a label")?;
        }
        self.repair(random)?;
        let mut next = self.header.clone();
        next.label = label.map_or(next.label, str::to_owned);
        next.subsystem = subsystem.map_or(next.subsystem, str::to_owned);
        next.write(&mut self.storage, random)?;
        self.header = next;
        Ok(())
    }

    /// Everything of the header: both copies and all areas, as cryptsetup's backups have it.
    ///
    /// # Errors
    ///
    /// [`Io`](ErrorKind::Io).
    pub fn backup(&mut self) -> Result<Zeroizing<Vec<u8>>, Error> {
        let len = 2 * self.header.size + self.metadata().keyslots_bytes();
        let mut bytes = Zeroizing::new(vec![0; usize::try_from(len).map_err(|_long| too_long(len))?]);
        self.storage.read(0, &mut bytes).map_err(Error::io)?;
        Ok(bytes)
    }

    /// Puts a backup back: areas first, then the copies of the header one after the other.
    ///
    /// An area of the backup that would lie over one of the present header is put elsewhere, so that the present one stays whole
    /// until it is replaced. Where there is no room for that, a crash may leave the present header without its LUKS keyslots; the
    /// backup can be put back again then.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) if it does not fit, [`Io`](ErrorKind::Io); and those of [`Header::read`] for the backup.
    pub fn restore(mut storage: S, mut backup: Vec<u8>, random: &mut Random<'_>) -> Result<Self, Error> {
        let mut header = Header::read(&mut backup)?;
        let begin = 2 * header.size;
        let end = begin + header.metadata.keyslots_bytes();
        if backup.len_bytes() < end || storage.len_bytes() < end {
            return Err(Error::invalid(
                format!(
                    "its header has {end} bytes, the backup {}, and where it belongs {}",
                    backup.len_bytes(),
                    storage.len_bytes()
                ),
                "Give the whole backup of this container.",
            ));
        }
        let present = Header::read(&mut storage).ok().filter(|present| present.size == header.size);
        let taken: Vec<(u64, u64)> = match &present {
            Some(present) => {
                present.metadata.areas()?.into_iter().map(|(offset, len, _)| (offset, len)).collect()
            }
            None => Vec::new(),
        };
        let mut kept: Vec<(u64, u64)> = Vec::new();
        let mut moved = Vec::new();
        let areas = header.metadata.areas()?;
        for &(offset, len, ref name) in &areas {
            let bytes = usize::try_from(len).map_err(|_long| too_long(len))?;
            let (mut new, mut old) = (vec![0; bytes], vec![0; bytes]);
            backup.read(offset, &mut new).map_err(Error::io)?;
            storage.read(offset, &mut old).map_err(Error::io)?;
            let overlaps =
                |&(other, other_len): &(u64, u64)| offset < other + other_len && other < offset + len;
            let place = if new == old || !taken.iter().any(overlaps) {
                offset
            } else {
                let theirs = areas.iter().map(|(offset, len, _)| (*offset, *len));
                let all = taken.iter().chain(&kept).copied().chain(theirs).collect();
                gap(all, begin, end, len).unwrap_or(offset)
            };
            if new != old || place != offset {
                storage.write(place, &new).map_err(Error::io)?;
            }
            if place != offset {
                moved.push((name.trim_start_matches("LUKS keyslot ").to_owned(), place));
            }
            kept.push((place, len));
        }
        storage.flush().map_err(Error::io)?;
        header.metadata.change(header.size, |json| {
            for (number, place) in &moved {
                object(json, "keyslots")[number]["area"]["offset"] = place.to_string().into();
            }
        })?;
        // Above what is there, so that it counts from its first copy on.
        if let Some(present) = present {
            header.sequence_id = header.sequence_id.max(present.sequence_id);
            header.copies = present.copies;
        }
        header.write(&mut storage, random)?;
        let mut restored = Self { storage, header };
        let covered = |&(offset, len): &(u64, u64)| {
            kept.iter().any(|&(other, other_len)| offset < other + other_len && other < offset + len)
        };
        for (offset, len) in taken.into_iter().filter(|area| !covered(area)) {
            restored.wipe(offset, len, random)?;
        }
        Ok(restored)
    }
}

/// Bytes of the area of a new LUKS keyslot for `key`.
pub(super) fn area_bytes(key: &[u8]) -> u64 {
    ((key.len() * STRIPES) as u64).next_multiple_of(ALIGN_BYTES)
}

/// Where `bytes` are free between `begin` and `end`, beside what is taken.
pub(super) fn gap(mut taken: Vec<(u64, u64)>, begin: u64, end: u64, bytes: u64) -> Option<u64> {
    taken.sort_unstable();
    let mut free = begin;
    for (offset, len) in taken {
        if offset.saturating_sub(free) >= bytes {
            break;
        }
        free = free.max((offset + len).next_multiple_of(ALIGN_BYTES));
    }
    (free.checked_add(bytes)? <= end).then_some(free)
}

impl Digest {
    /// Whether `key` is the right one.
    pub(super) fn matches(&self, key: &[u8]) -> Result<bool, Error> {
        let kdf = self.kdf.as_ref().map_err(|why| Error::unsupported(why.clone()))?;
        let value = kdf.derive(key, &self.salt, self.value.len())?;
        Ok(bool::from(value.ct_eq(&self.value)))
    }

    /// The JSON of a digest of `key` for segment 0, made with so many iterations; without a key, of one that nobody has.
    pub(super) fn make(key: Option<(&[u8], u32)>, random: &mut Random<'_>) -> Result<Value, Error> {
        let hash = Hash::Sha256;
        let mut salt = [0; SALT_BYTES];
        random(&mut salt).map_err(Error::io)?;
        let mut value = Zeroizing::new(vec![0; hash.bytes()]);
        let iterations = match key {
            Some((key, iterations)) => {
                value = Kdf::Pbkdf2 { hash, iterations }.derive(key, &salt, hash.bytes())?;
                iterations
            }
            None => {
                random(&mut value).map_err(Error::io)?;
                1000
            }
        };
        Ok(json!({
            "type": "pbkdf2",
            "keyslots": [],
            "segments": ["0"],
            "hash": hash.name(),
            "iterations": iterations,
            "salt": Base64::encode_string(&salt),
            "digest": Base64::encode_string(&value),
        }))
    }
}

pub(super) fn object<'j>(json: &'j mut Map<String, Value>, name: &str) -> &'j mut Map<String, Value> {
    json.get_mut(name).and_then(Value::as_object_mut).expect("it was looked at")
}

fn list(digests: &mut Map<String, Value>, number: u32) -> &mut Vec<Value> {
    let digest = digests.get_mut(&number.to_string()).expect("a digest that was found");
    digest["keyslots"].as_array_mut().expect("it was looked at")
}

fn too_long(bytes: u64) -> Error {
    Error::invalid(format!("a header of {bytes} bytes"), "Use a machine with more memory.")
}

/// Shows no key.
impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Opened(LUKS keyslot {})", self.keyslot)
    }
}

impl<S> fmt::Debug for Container<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Container({})", self.header.uuid)
    }
}
