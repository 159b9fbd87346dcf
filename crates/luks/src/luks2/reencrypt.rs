//! Re-encryption, as cryptsetup writes it into headers.
//!
//! ```text
//!   requirement   online-reencrypt-v2: who does not know it leaves the container alone
//!   LUKS keyslot  of type `reencrypt`: what protects the zone at hand, and the area where that lies
//!   segments      0 ..: what the data is now        | then two backups: what it was, and what it becomes
//!                 [ new | in-reencryption | old ]   | backup-previous, backup-final
//!   digests       of the old key, of the new one, and of both keys with LUKS keyslot and backups
//! ```
//!
//! LUKS keyslots of the new key have the numbers of those of the old one, which have others until they go: so whoever finishes, each
//! passphrase is where it was.
//!
//! The border of the new and the old segment is how far it is. A zone is protected by its old ciphertext (`journal`), or by a
//! hash of each block of that (`checksum`), in the area of the LUKS keyslot. In order, each stable before the next:
//!
//! ```text
//!   1 area     what protects the zone                          the data is untouched
//!   2 header   the zone is a segment in-reencryption           from here on a crash is repaired by the area
//!   3 data     the zone's new ciphertext
//!   4 header   the border is behind the zone                   after the last zone: the old key is gone with it
//! ```
//!
//! Known by the LUKS2 on-disk format specification 1.1.1, which leaves most of this open, and by what cryptsetup 2.6.1 writes and
//! takes.

use super::container::{Container, Opened, area_bytes, gap, object};
use super::metadata::{ALIGN_BYTES, Digest, Metadata, OBJECTS_MAX, Segment};
use crate::kdf::Kdf;
use crate::{Error, ErrorKind, Hash, Random, Storage, encryption};
use inlinecrypt_cipher::Mode;
use serde_json::{Map, Value, json};
use std::fmt;
use zeroize::Zeroizing;

/// The requirement of a header that is being re-encrypted.
const REQUIREMENT: &str = "online-reencrypt-v2";
/// Begins what the digest of a re-encryption is made of: the same version.
const DIGEST_MAGIC: &[u8; 2] = b"v2";
/// The type of LUKS keyslot.
const KEYSLOT_TYPE: &str = "reencrypt";
/// Longest text that goes into the digest, in bytes.
const TEXT_BYTES_MAX: usize = 64;
const SECTOR_BYTES: u64 = 512;

/// What protects the zone at hand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resilience {
    /// A hash of each block of old ciphertext: what a block is, is seen by it. A block must be written whole or not at all.
    Checksum {
        /// The hash.
        hash: Hash,
        /// Length of a block in bytes.
        block_bytes: u32,
    },
    /// The old ciphertext.
    Journal,
}

/// A container that is being re-encrypted, from the front to the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reencryption {
    /// The LUKS keyslot whose area protects the zone at hand.
    pub keyslot: u32,
    /// How.
    pub resilience: Resilience,
    /// Where that area begins, in bytes.
    pub area_offset: u64,
    /// Its length in bytes.
    pub area_bytes: u64,
    /// What the data was.
    pub previous: Segment,
    /// What it becomes.
    pub next: Segment,
    /// The digest of the old key.
    pub previous_digest: u32,
    /// The digest of the new one.
    pub next_digest: u32,
    /// Bytes under the new key; `None` if all are.
    pub boundary: Option<u64>,
    /// Length of the zone behind the boundary, in bytes, if that was being written.
    pub hot_bytes: Option<u64>,
    /// Length of the data, in bytes, if the segments say one; else it goes to the end. cryptsetup says it of a device that is in use. Where
    /// the data is longer than that, it is not what is being re-encrypted.
    pub fixed_bytes: Option<u64>,
}

/// What a container is to become.
#[derive(Clone, Copy, Debug)]
pub struct NewData<'a> {
    /// How its data is to be encrypted.
    pub mode: Mode,
    /// Length of its sectors, in bytes.
    pub sector_bytes: u32,
    /// The new volume key.
    pub key: &'a [u8],
    /// Iterations of its digest, and of that of the re-encryption.
    pub iterations: u32,
    /// What protects the zone at hand.
    pub resilience: Resilience,
    /// How long a zone is at least, in bytes.
    pub zone_bytes_min: u64,
}

/// A LUKS keyslot whose passphrase is to open the new key as well.
pub struct Kept<'p> {
    /// What its passphrase opened.
    pub opened: Opened,
    /// The passphrase.
    pub passphrase: &'p [u8],
}

/// What becomes of LUKS keyslots of the data for which there is no passphrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Others {
    /// Nothing begins if there are any.
    Refused,
    /// They go with the old key.
    Dropped,
}

/// Areas that no header names any more.
#[derive(Debug)]
#[must_use = "what was in them is to be overwritten"]
pub struct Leftovers(Vec<(u64, u64)>);

/// The LUKS keyslots of the data that are not `kept`.
fn missing(metadata: &Metadata, kept: &[Kept<'_>]) -> Vec<u32> {
    let is_kept = |slot: &u32| kept.iter().any(|kept| kept.opened.keyslot == *slot);
    metadata.bound_keyslots().filter(|slot| !is_kept(slot)).collect()
}

/// Gives a LUKS keyslot another number in the list of a digest.
fn rename(digest: &mut Value, from: &str, to: &str) {
    let list = digest.get_mut("keyslots").and_then(Value::as_array_mut);
    for name in list.into_iter().flatten().filter(|name| name.as_str() == Some(from)) {
        *name = to.into();
    }
}

fn elsewhere(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, what, "Let cryptsetup finish it: cryptsetup reencrypt --resume-only")
}

impl Metadata {
    /// How far its re-encryption is, if it is being re-encrypted.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](ErrorKind::Unsupported) if it requires anything else, or is encrypted for the first time, decrypted, moved,
    /// or re-encrypted in a way that is not known here; [`Damaged`](ErrorKind::Damaged) if what it says contradicts itself.
    pub fn reencryption(&self) -> Result<Option<Reencryption>, Error> {
        match &self.requirements()[..] {
            [] => return Ok(None),
            [only] if only == REQUIREMENT => {}
            _ => return self.check_requirements().map(|()| None),
        }
        let keyslots = self.json()["keyslots"].as_object().expect("it was looked at");
        let mut slots = keyslots.iter().filter(|(_, slot)| slot["type"] == KEYSLOT_TYPE);
        let (Some((number, slot)), None) = (slots.next(), slots.next()) else {
            return Err(Error::damaged(
                "it is being re-encrypted, and has not one LUKS keyslot that says how",
            ));
        };
        let keyslot = number.parse().map_err(|_why| Error::damaged("the number of a LUKS keyslot"))?;
        for (name, known) in [("mode", "reencrypt"), ("direction", "forward")] {
            if slot[name] != known {
                return Err(elsewhere(format!(
                    "it is being re-encrypted by cryptsetup with {name} {}, and {known:?} is known here",
                    slot[name]
                )));
            }
        }
        let resilience = Resilience::view(&slot["area"])?;
        let name = format!("LUKS keyslot {keyslot}");
        let areas = self.areas()?;
        let area = areas.iter().find(|(.., of)| *of == name);
        let &(area_offset, area_bytes, _) =
            area.ok_or_else(|| Error::damaged(format!("{name} has no area")))?;
        let (previous_number, previous) = self.backup("backup-previous")?;
        let (next_number, next) = self.backup("backup-final")?;
        let (previous_digest, next_digest) =
            (self.only_digest_of(previous_number)?, self.only_digest_of(next_number)?);
        if previous_digest == next_digest {
            return Err(elsewhere("it is being re-encrypted to another layout with the same key"));
        }
        if previous.offset != next.offset {
            return Err(elsewhere("its data is being moved"));
        }
        let re = Reencryption {
            keyslot,
            resilience,
            area_offset,
            area_bytes,
            previous: previous.clone(),
            next: next.clone(),
            previous_digest,
            next_digest,
            boundary: None,
            hot_bytes: None,
            fixed_bytes: None,
        };
        self.place(re).map(Some)
    }

    /// Finds boundary and zone in the segments.
    fn place(&self, re: Reencryption) -> Result<Reencryption, Error> {
        let strange =
            |why: &str| Error::damaged(format!("its segments are not those of a re-encryption: {why}"));
        let Reencryption { previous, next, previous_digest, next_digest, .. } = &re;
        let regular = self.segments().iter().filter(|(_, segment)| !segment.is_backup());
        let regular: Vec<(u32, &Segment)> = regular.map(|(number, segment)| (*number, segment)).collect();
        let (mut at, mut boundary, mut hot_bytes) = (0, None, None);
        let mut is_fixed = false;
        for (index, &(number, segment)) in regular.iter().enumerate() {
            let Segment { kind, offset, size, iv_tweak, encryption, sector_bytes, has_integrity, flags } =
                segment;
            let is_last = index + 1 == regular.len();
            let is_in_place = next.offset.checked_add(at) == Some(*offset) && *iv_tweak == at / SECTOR_BYTES;
            if number as usize != index || !is_in_place || kind != "crypt" || *has_integrity {
                return Err(strange("they do not follow one another"));
            }
            let mut digests: Vec<u32> = self.digests_of(number).collect();
            digests.sort_unstable();
            let is_like =
                |other: &Segment| (encryption, sector_bytes) == (&other.encryption, &other.sector_bytes);
            let mut both = [*previous_digest, *next_digest];
            both.sort_unstable();
            if flags.iter().any(|flag| flag == "in-reencryption") {
                if hot_bytes.is_some()
                    || boundary.is_some()
                    || !is_like(next)
                    || digests != both
                    || size.is_none()
                {
                    return Err(strange("the zone that is being written"));
                }
                (boundary, hot_bytes) = (Some(at), *size);
                is_fixed = is_last;
            } else if is_like(next) && digests == [*next_digest] && boundary.is_none() && index == 0 {
                if !is_last && size.is_none() {
                    return Err(strange("one that is not the last goes to the end"));
                }
                is_fixed = is_last && size.is_some();
            } else if is_like(previous) && digests == [*previous_digest] && is_last {
                is_fixed = size.is_some();
                boundary = boundary.or(Some(at));
            } else {
                return Err(strange("one is neither old nor new"));
            }
            at = at.checked_add(size.unwrap_or(0)).ok_or_else(|| strange("they end where nothing can"))?;
        }
        let unit = u64::from(previous.sector_bytes.max(next.sector_bytes));
        if regular.is_empty() || [boundary, hot_bytes].into_iter().flatten().any(|bytes| bytes % unit != 0) {
            return Err(strange("their borders lie within sectors"));
        }
        Ok(Reencryption { boundary, hot_bytes, fixed_bytes: is_fixed.then_some(at), ..re })
    }

    /// The backup segment with this flag, if its data is of a kind that is re-encrypted here.
    fn backup(&self, flag: &str) -> Result<(u32, &Segment), Error> {
        let mut found =
            self.segments().iter().filter(|(_, segment)| segment.flags.iter().any(|known| known == flag));
        let (Some((number, segment)), None) = (found.next(), found.next()) else {
            return Err(Error::damaged(format!("it is being re-encrypted, and has not one segment {flag}")));
        };
        check_data(segment)?;
        Ok((*number, segment))
    }

    fn digests_of(&self, segment: u32) -> impl Iterator<Item = u32> + '_ {
        let digests = self.digests().iter();
        digests.filter(move |(_, digest)| digest.segments.contains(&segment)).map(|(number, _)| *number)
    }

    fn only_digest_of(&self, segment: u32) -> Result<u32, Error> {
        let mut digests = self.digests_of(segment);
        match (digests.next(), digests.next()) {
            (Some(digest), None) => Ok(digest),
            _ => Err(Error::damaged(format!("segment {segment} has not one digest"))),
        }
    }
}

/// Refuses data that is not re-encrypted here.
fn check_data(segment: &Segment) -> Result<(), Error> {
    let why = if segment.kind != "crypt" {
        format!("of the kind {:?}", segment.kind)
    } else if segment.has_integrity {
        "with integrity tags".to_owned()
    } else if segment.iv_tweak != 0 {
        format!("whose IVs begin at {}", segment.iv_tweak)
    } else if segment.size.is_some() {
        "of a fixed length".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::new(
        ErrorKind::Unsupported,
        format!("data {why} is not re-encrypted here"),
        "Use cryptsetup reencrypt.",
    ))
}

impl Resilience {
    fn view(area: &Value) -> Result<Self, Error> {
        match area["type"].as_str().unwrap_or_default() {
            "journal" => Ok(Self::Journal),
            "checksum" => {
                let hash = Hash::parse(area["hash"].as_str().unwrap_or_default())?;
                let block_bytes = area["sector_size"].as_u64().unwrap_or(0);
                if !(512..=65_536).contains(&block_bytes) || !block_bytes.is_power_of_two() {
                    return Err(Error::damaged(format!("checksums of {block_bytes} bytes each")));
                }
                Ok(Self::Checksum { hash, block_bytes: block_bytes.try_into().expect("at most 64 KiB") })
            }
            other => Err(elsewhere(format!(
                "it is being re-encrypted by cryptsetup with resilience {other:?}, and checksum and journal are known here"
            ))),
        }
    }

    fn to_json(self, offset: u64, bytes: u64) -> Value {
        let (offset, size) = (offset.to_string(), bytes.to_string());
        match self {
            Self::Journal => json!({ "type": "journal", "offset": offset, "size": size }),
            Self::Checksum { hash, block_bytes } => json!({
                "type": "checksum", "offset": offset, "size": size,
                "hash": hash.name(), "sector_size": block_bytes,
            }),
        }
    }

    /// The longest zone that an area of so many bytes protects, in bytes.
    #[must_use]
    pub fn zone_bytes_max(self, area_bytes: u64) -> u64 {
        match self {
            Self::Journal => area_bytes,
            Self::Checksum { hash, block_bytes } => {
                (area_bytes / hash.bytes() as u64).saturating_mul(block_bytes.into())
            }
        }
    }

    /// The hash of a block, if blocks are hashed.
    #[must_use]
    pub fn checksum(self, block: &[u8]) -> Option<Vec<u8>> {
        match self {
            Self::Journal => None,
            Self::Checksum { hash, .. } => {
                let mut sum = vec![0; hash.bytes()];
                hash.digest(&[block], &mut sum);
                Some(sum)
            }
        }
    }
}

impl<S: Storage> Container<S> {
    /// Writes down that the data is to be re-encrypted to what `new` says. Nothing is re-encrypted yet.
    ///
    /// Each of the LUKS keyslots `kept` opens the new key as well: there its number, priority and cost stay what they are, and the one
    /// with the old key gets a number that is free, under which it goes in the end.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) or [`Unsupported`](ErrorKind::Unsupported) if that cannot be, with the header as it was;
    /// [`Io`](ErrorKind::Io): it is begun or not.
    ///
    /// # Blocking
    ///
    /// As long as the key derivations of all that are kept take.
    pub fn begin_reencryption(
        &mut self,
        kept: &[Kept<'_>],
        others: Others,
        new: NewData<'_>,
        random: &mut Random<'_>,
    ) -> Result<(), Error> {
        let metadata = &self.header().metadata;
        let (number, segment) = metadata.data()?;
        check_data(segment)?;
        if number != 0 {
            return Err(Error::unsupported(format!(
                "its data is segment {number}, and 0 is re-encrypted here"
            )));
        }
        let previous = segment.clone();
        let Some(Kept { opened: first, .. }) = kept.first() else { return Err(Error::passphrase()) };
        let missing = missing(metadata, kept);
        if !missing.is_empty() && others == Others::Refused {
            let missing: Vec<String> = missing.iter().map(u32::to_string).collect();
            return Err(Error::invalid(
                format!(
                    "there are LUKS keyslots whose passphrases were not given, and would not open it afterwards ({})",
                    missing.join(", ")
                ),
                "Give their passphrases as well, or say that they shall be dropped.",
            ));
        }
        let mut plans: Vec<(u32, Kdf, u32)> = Vec::new();
        for Kept { opened: Opened { keyslot, digest, .. }, .. } in kept {
            let slot = metadata.keyslots().get(keyslot).ok_or_else(|| Error::no_such_slot(*keyslot))?;
            if *digest != first.digest || plans.iter().any(|(number, ..)| number == keyslot) {
                return Err(Error::invalid(
                    format!("LUKS keyslot {keyslot} is named twice, or has another key"),
                    "Report this.",
                ));
            }
            plans.push((*keyslot, slot.kdf.clone().map_err(Error::unsupported)?, slot.priority));
        }
        self.repair(random)?;
        let metadata = &self.header().metadata;
        let taken_numbers = metadata.json()["keyslots"].as_object().expect("it was looked at");
        let mut free_numbers =
            (0..OBJECTS_MAX).filter(|number| !taken_numbers.contains_key(&number.to_string()));
        let old_numbers: Vec<u32> = free_numbers.by_ref().take(kept.len()).collect();
        let no_room = || {
            Error::invalid(
                "there is no room in the header for what a re-encryption needs: as many LUKS keyslots again, and one more",
                "Remove LUKS keyslots first, or make the container with a larger header.",
            )
        };
        // The first that are free are for the old ones, so that they are there if this one is.
        let reencrypt_number = free_numbers.next().ok_or_else(no_room)?;
        // All places are found before anything is written.
        let mut taken: Vec<(u64, u64)> =
            metadata.areas()?.into_iter().map(|(offset, bytes, _)| (offset, bytes)).collect();
        let begin = 2 * self.header().size;
        let end = begin + metadata.keyslots_bytes();
        let mut places = Vec::new();
        for _ in kept {
            let bytes = area_bytes(new.key);
            let place = gap(taken.clone(), begin, end, bytes).ok_or_else(no_room)?;
            taken.push((place, bytes));
            places.push(place);
        }
        let (area_offset, area_bytes) = widest(&taken, begin, end);
        if new.resilience.zone_bytes_max(area_bytes) < new.zone_bytes_min.max(1) {
            return Err(no_room());
        }
        let mut slots = Vec::new();
        for (((number, kdf, priority), Kept { passphrase, .. }), place) in plans.iter().zip(kept).zip(places)
        {
            slots.push((*number, self.write_area_at(place, new.key, passphrase, *kdf, *priority, random)?));
        }
        let digests = self.header().metadata.json()["digests"].as_object().expect("it was looked at");
        let mut free = (0..).filter(|number: &u32| !digests.contains_key(&number.to_string()));
        let (next_digest, both_digest) =
            (free.next().expect("there are many"), free.next().expect("there are many"));
        let mut next_json = Digest::make(Some((new.key, new.iterations)), random)?;
        next_json["keyslots"] = slots.iter().map(|(number, _)| number.to_string()).collect();
        next_json["segments"] = json!([]);

        let next = Segment {
            encryption: encryption::name(new.mode).to_owned(),
            sector_bytes: new.sector_bytes,
            ..previous.clone()
        };
        let re = Reencryption {
            keyslot: reencrypt_number,
            resilience: new.resilience,
            area_offset,
            area_bytes,
            previous,
            next,
            previous_digest: first.digest,
            next_digest,
            boundary: Some(0),
            hot_bytes: None,
            fixed_bytes: None,
        };
        let keyslot_json = json!({
            "type": KEYSLOT_TYPE, "key_size": 1, "priority": 0, "mode": "reencrypt", "direction": "forward",
            "area": new.resilience.to_json(area_offset, area_bytes),
        });
        let signed = signed(
            &first.key,
            new.key,
            &keyslot_json,
            [&re.previous.to_json(Some("backup-previous")), &re.next.to_json(Some("backup-final"))],
        )?;
        let mut both_json = Digest::make(Some((&signed, new.iterations)), random)?;
        both_json["keyslots"] = json!([reencrypt_number.to_string()]);
        both_json["segments"] = json!([]);
        let begin = |json: &mut Map<String, Value>, re: &Reencryption| {
            for ((number, slot), old) in slots.iter().zip(&old_numbers) {
                let (name, old) = (number.to_string(), old.to_string());
                let keyslots = object(json, "keyslots");
                let former = keyslots.insert(name.clone(), slot.to_json()).expect("it was opened");
                keyslots.insert(old.clone(), former);
                for digest in object(json, "digests").values_mut() {
                    rename(digest, &name, &old);
                }
                // What leads to the old one leads to the new one as well, by the number that it knows.
                for token in object(json, "tokens").values_mut() {
                    if let Some(list) = token.get_mut("keyslots").and_then(Value::as_array_mut)
                        && list.iter().any(|known| known.as_str() == Some(&name))
                    {
                        list.push(old.clone().into());
                    }
                }
            }
            object(json, "keyslots").insert(reencrypt_number.to_string(), keyslot_json.clone());
            let digests = object(json, "digests");
            digests.insert(next_digest.to_string(), next_json.clone());
            digests.insert(both_digest.to_string(), both_json.clone());
            re.set_segments(json);
            let config = object(json, "config");
            let requirements = config.entry("requirements").or_insert_with(|| json!({}));
            requirements["mandatory"] = json!([REQUIREMENT]);
        };
        // There must be room for what it says on its way, which is longer.
        let longest = Reencryption { boundary: Some(1 << 62), hot_bytes: Some(1 << 62), ..re.clone() };
        let header = self.header();
        header.metadata.check_room(header.size, |json| begin(json, &longest))?;
        self.change(random, |json| begin(json, &re))
    }

    /// Its re-encryption.
    ///
    /// # Errors
    ///
    /// Those of [`Metadata::reencryption`], and [`Invalid`](ErrorKind::Invalid) if there is none.
    pub fn reencryption(&self) -> Result<Reencryption, Error> {
        self.header().metadata.reencryption()?.ok_or_else(|| {
            Error::invalid("it is not being re-encrypted", "To begin: inlinecrypt volume reencrypt")
        })
    }

    /// Opens the key of a digest.
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open).
    pub fn open_digest(&mut self, passphrase: &[u8], digest: u32) -> Result<Opened, Error> {
        let mut order = self.order();
        order.retain(|slot| {
            self.header().metadata.digest_of_keyslot(*slot).is_some_and(|(of, _)| of == digest)
        });
        self.open_one_of(passphrase, order)
    }

    /// Whether what the header says of the re-encryption is what whoever had both keys wrote there.
    ///
    /// # Errors
    ///
    /// [`Damaged`](ErrorKind::Damaged) if not.
    pub fn check_reencryption(&self, old_key: &[u8], new_key: &[u8]) -> Result<(), Error> {
        let re = self.reencryption()?;
        let metadata = &self.header().metadata;
        let json = metadata.json();
        let backup = |flag| metadata.backup(flag).map(|(number, _)| &json["segments"][number.to_string()]);
        let signed = signed(
            old_key,
            new_key,
            &json["keyslots"][re.keyslot.to_string()],
            [backup("backup-previous")?, backup("backup-final")?],
        )?;
        let digest = metadata.digests().values().find(|digest| digest.keyslots == [re.keyslot]);
        match digest {
            Some(digest) if digest.matches(&signed)? => Ok(()),
            _ => Err(Error::damaged(
                "what its header says of its re-encryption was changed by somebody without its keys",
            )),
        }
    }

    /// Writes down how far it is: `boundary` bytes are under the new key, and the zone behind it, of `hot_bytes`, may be written
    /// from now on. `size` is that of the data.
    ///
    /// # Errors
    ///
    /// [`Io`](ErrorKind::Io): the header says the one or the other.
    pub fn set_boundary(
        &mut self,
        boundary: u64,
        hot_bytes: Option<u64>,
        size: u64,
        random: &mut Random<'_>,
    ) -> Result<(), Error> {
        let re = Reencryption { boundary: Some(boundary), hot_bytes, ..self.reencryption()? };
        let ends_hot = boundary.checked_add(hot_bytes.unwrap_or(0)).filter(|end| *end <= size);
        let fits = boundary < size && re.next.offset.checked_add(size).is_some();
        let Some(end) = ends_hot.filter(|_| fits) else {
            return Err(Error::invalid(
                format!("a zone at byte {boundary} of {size} bytes of data"),
                "Report this.",
            ));
        };
        self.change(random, |json| re.set_segments_to(json, end == size))
    }

    /// All of the data is under the new key: the header forgets the old one, and that there was a re-encryption. With this the
    /// last zone is done, in one change.
    ///
    /// # Errors
    ///
    /// [`Io`](ErrorKind::Io): the header says the one or the other.
    pub fn finish_reencryption(&mut self, random: &mut Random<'_>) -> Result<Leftovers, Error> {
        let re = self.reencryption()?;
        let metadata = &self.header().metadata;
        let mut gone = metadata.digests()[&re.previous_digest].keyslots.clone();
        gone.push(re.keyslot);
        let names: Vec<String> = gone.iter().map(u32::to_string).collect();
        let areas = metadata.areas()?;
        let is_gone = |of: &str| names.iter().any(|name| of == format!("LUKS keyslot {name}"));
        let left: Vec<(u64, u64)> = areas
            .into_iter()
            .filter(|(.., of)| is_gone(of))
            // Of the zones there is ciphertext or hashes of it, as on the data's own disk.
            .filter(|(offset, ..)| *offset != re.area_offset)
            .map(|(offset, bytes, _)| (offset, bytes))
            .collect();
        let both: Vec<u32> = metadata
            .digests()
            .iter()
            .filter(|(_, digest)| digest.keyslots == [re.keyslot])
            .map(|(number, _)| *number)
            .collect();
        self.change(random, |json| {
            object(json, "keyslots").retain(|name, _| !names.contains(name));
            let digests = object(json, "digests");
            for number in both.iter().chain([&re.previous_digest]) {
                digests.remove(&number.to_string());
            }
            for what in ["digests", "tokens"] {
                for value in object(json, what).values_mut() {
                    if let Some(list) = value.get_mut("keyslots").and_then(Value::as_array_mut) {
                        list.retain(|name| name.as_str().is_none_or(|name| !names.iter().any(|n| n == name)));
                    }
                }
            }
            object(json, "digests")[&re.next_digest.to_string()]["segments"] = json!(["0"]);
            let segments = object(json, "segments");
            segments.clear();
            segments.insert("0".to_owned(), re.next.to_json(None));
            object(json, "config").remove("requirements");
        })?;
        Ok(Leftovers(left))
    }

    /// Overwrites what is left behind.
    ///
    /// # Errors
    ///
    /// [`Io`](ErrorKind::Io).
    pub fn wipe_leftovers(&mut self, left: Leftovers, random: &mut Random<'_>) -> Result<(), Error> {
        left.0.into_iter().try_for_each(|(offset, bytes)| self.wipe(offset, bytes, random))
    }
}

impl Reencryption {
    /// The segments that a header has at this point, which is not the end.
    fn set_segments(&self, json: &mut Map<String, Value>) {
        self.set_segments_to(json, false);
    }

    /// The same; `reaches_end` if nothing lies behind the zone that is being written.
    fn set_segments_to(&self, json: &mut Map<String, Value>, reaches_end: bool) {
        let Self { previous, next, previous_digest, next_digest, boundary, hot_bytes, .. } = self;
        let boundary = boundary.unwrap_or(0);
        let mut segments: Vec<(Value, Vec<u32>)> = Vec::new();
        let part = |of: &Segment, at: u64, size: Option<u64>| Segment {
            offset: of.offset + at,
            iv_tweak: at / SECTOR_BYTES,
            size,
            flags: Vec::new(),
            ..of.clone()
        };
        if boundary > 0 {
            segments.push((part(next, 0, Some(boundary)).to_json(None), vec![*next_digest]));
        }
        if let Some(hot) = hot_bytes {
            let hot = part(next, boundary, Some(*hot)).to_json(Some("in-reencryption"));
            segments.push((hot, vec![*previous_digest, *next_digest]));
        }
        if !reaches_end {
            let at = boundary + hot_bytes.unwrap_or(0);
            segments.push((part(previous, at, None).to_json(None), vec![*previous_digest]));
        }
        segments.push((previous.to_json(Some("backup-previous")), vec![*previous_digest]));
        segments.push((next.to_json(Some("backup-final")), vec![*next_digest]));
        let digests = object(json, "digests");
        for number in [previous_digest, next_digest] {
            let its = segments.iter().enumerate().filter(|(_, (_, digests))| digests.contains(number));
            let its: Vec<String> = its.map(|(segment, _)| segment.to_string()).collect();
            digests[&number.to_string()]["segments"] = json!(its);
        }
        let named = segments.into_iter().enumerate();
        let named = named.map(|(number, (segment, _))| (number.to_string(), segment)).collect();
        json.insert("segments".to_owned(), Value::Object(named));
    }
}

impl Segment {
    /// Its JSON, with this flag.
    fn to_json(&self, flag: Option<&str>) -> Value {
        let Self { kind, offset, size, iv_tweak, encryption, sector_bytes, has_integrity: _, flags: _ } =
            self;
        let mut json = json!({
            "type": kind,
            "offset": offset.to_string(),
            "size": size.map_or_else(|| "dynamic".to_owned(), |size| size.to_string()),
            "iv_tweak": iv_tweak.to_string(),
            "encryption": encryption,
            "sector_size": sector_bytes,
        });
        if let Some(flag) = flag {
            json["flags"] = json!([flag]);
        }
        json
    }
}

/// The widest gap between `begin` and `end`, beside what is taken: where it begins, and whole [`ALIGN_BYTES`] of it.
fn widest(taken: &[(u64, u64)], begin: u64, end: u64) -> (u64, u64) {
    // It begins where something else ends, so the ends are all there is to look at.
    let ends = taken.iter().map(|(offset, bytes)| (offset + bytes).next_multiple_of(ALIGN_BYTES));
    let mut widest = (begin, 0);
    for start in ends.chain([begin]).filter(|start| *start < end) {
        let behind = taken.iter().map(|(offset, _)| *offset).filter(|offset| *offset >= start).min();
        let is_taken = taken.iter().any(|(offset, bytes)| (*offset..offset + bytes).contains(&start));
        let bytes = (behind.unwrap_or(end).min(end) - start) / ALIGN_BYTES * ALIGN_BYTES;
        if !is_taken && bytes > widest.1 {
            widest = (start, bytes);
        }
    }
    widest
}

/// What the digest of a re-encryption is made of: both keys, and what must not be changed by anybody without them.
fn signed(
    old_key: &[u8],
    new_key: &[u8],
    keyslot: &Value,
    backups: [&Value; 2],
) -> Result<Zeroizing<Vec<u8>>, Error> {
    // Room for all of it: growing would leave keys behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(old_key.len() + new_key.len() + 4096));
    bytes.extend_from_slice(DIGEST_MAGIC);
    bytes.extend_from_slice(old_key);
    bytes.extend_from_slice(new_key);
    let area = &keyslot["area"];
    let mut fields = vec![
        text(&keyslot["mode"])?,
        text(&keyslot["direction"])?,
        text(&area["type"])?,
        long(&area["offset"])?,
        long(&area["size"])?,
    ];
    if area["type"] == "checksum" {
        fields.extend([text(&area["hash"])?, short(&area["sector_size"])?]);
    }
    for segment in backups {
        fields.extend([
            text(&segment["type"])?,
            long(&segment["offset"])?,
            if segment["size"] == "dynamic" { text(&segment["size"])? } else { long(&segment["size"])? },
            long(&segment["iv_tweak"])?,
            text(&segment["encryption"])?,
            short(&segment["sector_size"])?,
        ]);
    }
    bytes.extend(fields.concat());
    Ok(bytes)
}

fn strange() -> Error {
    Error::damaged("what its header says of its re-encryption is not what such headers say")
}

fn text(value: &Value) -> Result<Vec<u8>, Error> {
    let text = value.as_str().filter(|text| (1..=TEXT_BYTES_MAX).contains(&text.len()));
    text.map(|text| text.as_bytes().to_vec()).ok_or_else(strange)
}

fn long(value: &Value) -> Result<Vec<u8>, Error> {
    let number: Option<u64> = value.as_str().and_then(|text| text.parse().ok());
    number.map(|number| number.to_be_bytes().to_vec()).ok_or_else(strange)
}

fn short(value: &Value) -> Result<Vec<u8>, Error> {
    let number = value.as_u64().and_then(|number| u32::try_from(number).ok());
    number.map(|number| number.to_be_bytes().to_vec()).ok_or_else(strange)
}

/// Shows no passphrase.
impl fmt::Debug for Kept<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kept(LUKS keyslot {})", self.opened.keyslot)
    }
}

impl fmt::Display for Resilience {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Checksum { hash, block_bytes } => {
                write!(f, "checksum ({hash} of {block_bytes} bytes each)")
            }
            Self::Journal => f.write_str("journal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_widest_gap_is_found() {
        assert_eq!(widest(&[], 8192, 32_768), (8192, 24_576));
        assert_eq!(widest(&[(8192, 4096)], 8192, 32_768), (12_288, 20_480));
        assert_eq!(widest(&[(24_576, 4096), (8192, 4096)], 8192, 32_768), (12_288, 12_288));
        assert_eq!(widest(&[(8192, 24_576)], 8192, 32_768).1, 0);
    }
}
