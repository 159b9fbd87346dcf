//! What the JSON says. It is kept as it was read, also what is not known here, and looked at through views that are checked
//! once, when it is read.

use super::header::BINARY_BYTES;
use crate::kdf::{Argon2Variant, Kdf};
use crate::{Error, Hash, encryption};
use base64ct::{Base64, Encoding as _};
use inlinecrypt_cipher::Mode;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Most LUKS keyslots, and most tokens (cryptsetup's `LUKS2_KEYSLOTS_MAX`, `LUKS2_TOKENS_MAX`).
pub(super) const OBJECTS_MAX: u32 = 32;
/// Areas and data begin at multiples of this, in bytes.
pub(super) const ALIGN_BYTES: u64 = 4096;
/// Most bytes for the areas of LUKS keyslots (cryptsetup's `LUKS2_MAX_KEYSLOTS_SIZE`).
pub(super) const KEYSLOTS_BYTES_MAX: u64 = 128 << 20;
/// Most stripes: everybody has 4000.
const STRIPES_MAX: u32 = 16_384;
/// Longest volume key in bytes.
const KEY_BYTES_MAX: u32 = 512;

/// A LUKS2 header's JSON.
#[derive(Clone, Debug)]
pub struct Metadata {
    json: Map<String, Value>,
    keyslots: BTreeMap<u32, Keyslot>,
    segments: BTreeMap<u32, Segment>,
    digests: BTreeMap<u32, Digest>,
    keyslots_bytes: u64,
}

/// A LUKS keyslot of the kind that passphrases open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keyslot {
    /// Length of the volume key in it, in bytes.
    pub key_bytes: usize,
    /// 0: not tried unless asked for; 1: normal; 2: tried first.
    pub priority: u32,
    /// What makes its area's key of a passphrase; why not, if it is none that is known here.
    pub kdf: Result<Kdf, String>,
    /// How its area is encrypted; why not, if it is in no way that is known here.
    pub encryption: Result<Mode, String>,
    /// How it names that.
    pub encryption_name: String,
    /// Stripes of its area.
    pub stripes: usize,
    /// The hash between stripes; why not, if it is none that is known here.
    pub af_hash: Result<Hash, String>,
    /// Where its area begins, in bytes.
    pub area_offset: u64,
    /// Length of its area, in bytes.
    pub area_bytes: u64,
    pub(super) salt: Vec<u8>,
}

/// A part of the data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// What it is: `crypt`, or something that is not served here.
    pub kind: String,
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its length in bytes; `None` for all that is there.
    pub size: Option<u64>,
    /// What is added to the sector number before it becomes an IV, in sectors of 512 bytes.
    pub iv_tweak: u64,
    /// How it is encrypted, as dm-crypt names it.
    pub encryption: String,
    /// Length of its sectors: of what has an IV of its own.
    pub sector_bytes: u32,
    /// Whether it has integrity tags.
    pub has_integrity: bool,
    /// What else it is: a backup, say, while it is re-encrypted.
    pub flags: Vec<String>,
}

/// What tells the right volume key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// The LUKS keyslots that hold its key.
    pub keyslots: Vec<u32>,
    /// The segments that are encrypted with its key.
    pub segments: Vec<u32>,
    /// How the digest is made; why not, if in no way that is known here.
    pub kdf: Result<Kdf, String>,
    pub(super) salt: Vec<u8>,
    pub(super) value: Vec<u8>,
}

#[derive(Deserialize)]
struct KeyslotJson {
    key_size: u32,
    priority: Option<u32>,
    af: AfJson,
    area: AreaJson,
    kdf: KdfJson,
}

#[derive(Deserialize)]
struct AfJson {
    #[serde(rename = "type")]
    kind: String,
    stripes: u32,
    hash: String,
}

#[derive(Deserialize)]
struct AreaJson {
    #[serde(rename = "type")]
    kind: String,
    #[serde(deserialize_with = "decimal")]
    offset: u64,
    #[serde(deserialize_with = "decimal")]
    size: u64,
    encryption: Option<String>,
    key_size: Option<u32>,
}

#[derive(Deserialize)]
struct KdfJson {
    #[serde(rename = "type")]
    kind: String,
    #[serde(deserialize_with = "base64")]
    salt: Vec<u8>,
    hash: Option<String>,
    iterations: Option<u32>,
    time: Option<u32>,
    memory: Option<u32>,
    cpus: Option<u32>,
}

#[derive(Deserialize)]
struct SegmentJson {
    #[serde(rename = "type")]
    kind: String,
    #[serde(deserialize_with = "decimal")]
    offset: u64,
    size: String,
    #[serde(default, deserialize_with = "decimal_if_any")]
    iv_tweak: Option<u64>,
    encryption: Option<String>,
    sector_size: Option<u32>,
    integrity: Option<Value>,
    #[serde(default)]
    flags: Vec<String>,
}

#[derive(Deserialize)]
struct DigestJson {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    segments: Vec<String>,
    hash: Option<String>,
    iterations: Option<u32>,
    #[serde(deserialize_with = "base64")]
    salt: Vec<u8>,
    #[serde(deserialize_with = "base64")]
    digest: Vec<u8>,
}

#[derive(Deserialize)]
struct ConfigJson {
    #[serde(deserialize_with = "decimal")]
    json_size: u64,
    #[serde(deserialize_with = "decimal")]
    keyslots_size: u64,
}

/// Numbers of 64 bits are written as text, since JSON's own are not sure to hold them.
fn decimal<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    number(&String::deserialize(from)?).ok_or_else(|| D::Error::custom("a number in quotes is expected"))
}

fn decimal_if_any<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    decimal(from).map(Some)
}

fn base64<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(from)?;
    Base64::decode_vec(&text).map_err(|_why| D::Error::custom("what should be base64 is not"))
}

/// Digits alone, and no zero before others: a number is written in one way.
fn number<T: std::str::FromStr>(text: &str) -> Option<T> {
    let is_usual =
        text.bytes().all(|byte| byte.is_ascii_digit()) && (text.len() == 1 || !text.starts_with('0'));
    text.parse().ok().filter(|_| is_usual)
}

impl Metadata {
    /// Reads and checks the JSON of a header whose copies have `size` bytes.
    pub(super) fn parse(json: &[u8], size: u64) -> Result<Self, Error> {
        let value: Value = serde_json::from_slice(json)
            .map_err(|why| Error::damaged(format!("its JSON cannot be read: {why}")))?;
        let Value::Object(json) = value else {
            return Err(Error::damaged("its JSON is no object"));
        };
        Self::of(json, size)
    }

    fn of(json: Map<String, Value>, size: u64) -> Result<Self, Error> {
        let config: ConfigJson = view("config", json.get("config").cloned().unwrap_or_default())?;
        if config.json_size != size - BINARY_BYTES as u64 {
            return Err(Error::damaged(format!(
                "its JSON says to have {} bytes of room, and has {}",
                config.json_size,
                size - BINARY_BYTES as u64
            )));
        }
        if !config.keyslots_size.is_multiple_of(ALIGN_BYTES) || config.keyslots_size > KEYSLOTS_BYTES_MAX {
            return Err(Error::damaged(format!(
                "its areas of LUKS keyslots have {} bytes, which none have",
                config.keyslots_size
            )));
        }
        let mut metadata = Self {
            keyslots: BTreeMap::new(),
            segments: BTreeMap::new(),
            digests: BTreeMap::new(),
            keyslots_bytes: config.keyslots_size,
            json,
        };
        metadata.look(size)?;
        Ok(metadata)
    }

    /// Makes the views anew, and checks them.
    fn look(&mut self, size: u64) -> Result<(), Error> {
        let keyslots = self.objects("keyslots", OBJECTS_MAX)?.into_iter();
        self.keyslots = keyslots
            // Others are left alone, and their areas with them.
            .filter(|(_, value)| value.get("type").and_then(Value::as_str) == Some("luks2"))
            .map(|(number, value)| Ok((number, Keyslot::view(number, value.clone())?)))
            .collect::<Result<_, Error>>()?;
        let segments = self.objects("segments", u32::MAX)?.into_iter();
        self.segments = segments
            .map(|(number, value)| Ok((number, Segment::view(number, value.clone())?)))
            .collect::<Result<_, Error>>()?;
        let digests = self.objects("digests", u32::MAX)?.into_iter();
        self.digests = digests
            .map(|(number, value)| Ok((number, Digest::view(number, value.clone())?)))
            .collect::<Result<_, Error>>()?;
        self.objects("tokens", OBJECTS_MAX)?;
        for (number, digest) in &self.digests {
            let known = self.json.get("keyslots").and_then(Value::as_object);
            let is_known = |slot: &u32| known.is_some_and(|known| known.contains_key(&slot.to_string()));
            if !digest.keyslots.iter().all(is_known)
                || !digest.segments.iter().all(|segment| self.segments.contains_key(segment))
            {
                return Err(Error::damaged(format!("digest {number} is of something that is not there")));
            }
        }
        let areas = self.areas()?;
        let (begin, end) = (2 * size, 2 * size + self.keyslots_bytes);
        for &(offset, bytes, ref name) in &areas {
            if offset < begin || bytes > self.keyslots_bytes || offset > end - bytes {
                return Err(Error::damaged(format!(
                    "the area of {name} lies at byte {offset}, {bytes} bytes of it, and areas lie from {begin} to {end}"
                )));
            }
        }
        for pair in areas.windows(2) {
            let ((offset, bytes, name), (next, _, other)) = (&pair[0], &pair[1]);
            if offset + bytes > *next {
                return Err(Error::damaged(format!("the areas of {name} and {other} overlap")));
            }
        }
        Ok(())
    }

    /// All areas of LUKS keyslots, also of kinds that are not known here: offset, bytes, name; in order.
    pub(super) fn areas(&self) -> Result<Vec<(u64, u64, String)>, Error> {
        let mut areas = Vec::new();
        for (slot, value) in self.objects("keyslots", OBJECTS_MAX)? {
            let area = value.get("area").cloned().unwrap_or_default();
            if area.get("offset").is_some() {
                let area: AreaJson = view(&format!("the area of LUKS keyslot {slot}"), area)?;
                areas.push((area.offset, area.size, format!("LUKS keyslot {slot}")));
            }
        }
        areas.sort_unstable();
        Ok(areas)
    }

    fn objects(&self, what: &str, max: u32) -> Result<Vec<(u32, &Value)>, Error> {
        let Some(value) = self.json.get(what) else {
            return Err(Error::damaged(format!("its JSON has no {what}")));
        };
        let Some(map) = value.as_object() else {
            return Err(Error::damaged(format!("its JSON has {what} that are no object")));
        };
        map.iter()
            .map(|(name, value)| match number(name) {
                Some(number) if number < max && value.is_object() => Ok((number, value)),
                _ => Err(Error::damaged(format!("its JSON has {name:?} among its {what}"))),
            })
            .collect()
    }

    /// As it is stored: checked once more, and bound to fit a copy of `size` bytes.
    pub(super) fn to_json(&self, size: u64) -> Result<Vec<u8>, Error> {
        let text = fitting(&self.json, size)?;
        Self::parse(&text, size)?;
        Ok(text)
    }

    /// Whether it would fit a copy of `size` bytes, changed so.
    pub(super) fn check_room(
        &self,
        size: u64,
        change: impl FnOnce(&mut Map<String, Value>),
    ) -> Result<(), Error> {
        let mut json = self.json.clone();
        change(&mut json);
        fitting(&json, size).map(drop)
    }

    /// All of it.
    #[must_use]
    pub fn json(&self) -> &Map<String, Value> {
        &self.json
    }

    /// The LUKS keyslots that passphrases open.
    #[must_use]
    pub fn keyslots(&self) -> &BTreeMap<u32, Keyslot> {
        &self.keyslots
    }

    /// The parts of the data.
    #[must_use]
    pub fn segments(&self) -> &BTreeMap<u32, Segment> {
        &self.segments
    }

    /// What tells right volume keys.
    #[must_use]
    pub fn digests(&self) -> &BTreeMap<u32, Digest> {
        &self.digests
    }

    /// The tokens, by their numbers.
    #[must_use]
    pub fn tokens(&self) -> BTreeMap<u32, &Value> {
        self.objects("tokens", OBJECTS_MAX).unwrap_or_default().into_iter().collect()
    }

    /// Bytes for the areas of LUKS keyslots.
    #[must_use]
    pub fn keyslots_bytes(&self) -> u64 {
        self.keyslots_bytes
    }

    /// What whoever opens it must be able to do.
    #[must_use]
    pub fn requirements(&self) -> Vec<String> {
        let Some(requirements) = self.json.get("config").and_then(|config| config.get("requirements")) else {
            return Vec::new();
        };
        match requirements.get("mandatory").and_then(Value::as_array) {
            Some(list) => list
                .iter()
                .map(|name| name.as_str().map_or_else(|| name.to_string(), str::to_owned))
                .collect(),
            // What stands there is not what we know, so we do not know what it asks for.
            None if requirements.get("mandatory").is_some() => vec!["something unknown".to_owned()],
            None => Vec::new(),
        }
    }

    /// Refuses what asks for more than is done here: neither its data nor its header may be changed then.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](crate::ErrorKind::Unsupported) with the reason.
    pub fn check_requirements(&self) -> Result<(), Error> {
        let [first, ..] = &self.requirements()[..] else { return Ok(()) };
        Err(Error::unsupported(match first.as_str() {
            "online-reencrypt" | "online-reencrypt-v2" | "online-reencrypt-v3" | "offline-reencrypt" => {
                format!("it is being re-encrypted ({first})")
            }
            other => format!("it requires {other:?}, which is not done here"),
        }))
    }

    /// What keeps a header with this JSON from taking the place of one with the other's without a doubt: the data may be under
    /// another key, or lie elsewhere. `None` if nothing does.
    #[must_use]
    pub fn differs_from(&self, other: &Self) -> Option<String> {
        fn keys(metadata: &Metadata) -> Vec<(&[u32], &[u8], &[u8])> {
            let digests = metadata.digests.values().filter(|digest| !digest.segments.is_empty());
            digests.map(|digest| (&digest.segments[..], &digest.salt[..], &digest.value[..])).collect()
        }
        if self.requirements() != other.requirements() {
            Some("one of both requires what the other does not".to_owned())
        } else if self.segments != other.segments {
            Some("their data segments differ".to_owned())
        } else if keys(self) != keys(other) {
            Some("they are of different volume keys".to_owned())
        } else {
            None
        }
    }

    /// The one segment that the data is, if it can be served.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](crate::ErrorKind::Unsupported) with the reason.
    pub fn data(&self) -> Result<(u32, &Segment), Error> {
        self.check_requirements()?;
        let (&number, segment) = match self.segments.len() {
            1 => self.segments.iter().next().expect("one"),
            0 => return Err(Error::damaged("it has no data segment")),
            count => {
                return Err(Error::unsupported(format!(
                    "its data has {count} segments, and one is served here"
                )));
            }
        };
        if segment.kind != "crypt" {
            return Err(Error::unsupported(format!("its data segment is of the kind {:?}", segment.kind)));
        }
        if segment.has_integrity {
            return Err(Error::unsupported("its data has integrity tags"));
        }
        Ok((number, segment))
    }

    /// The digest of a segment, if it has one.
    #[must_use]
    pub fn digest_of(&self, segment: u32) -> Option<(u32, &Digest)> {
        self.digests
            .iter()
            .find(|(_, digest)| digest.segments.contains(&segment))
            .map(|(number, digest)| (*number, digest))
    }

    /// The digest that tells the key in LUKS keyslot `number`, if that is the key of data. What holds another key is unbound, as
    /// cryptsetup calls it, and opens nothing.
    #[must_use]
    pub fn digest_of_keyslot(&self, number: u32) -> Option<(u32, &Digest)> {
        let mut of_data = self.segments.keys().filter_map(|segment| self.digest_of(*segment));
        of_data.find(|(_, digest)| digest.keyslots.contains(&number))
    }

    /// The LUKS keyslots that hold the key of data and that passphrases open.
    pub fn bound_keyslots(&self) -> impl Iterator<Item = u32> + '_ {
        self.keyslots.keys().copied().filter(|number| self.digest_of_keyslot(*number).is_some())
    }

    /// Changes the JSON by `change`, and makes the views anew. Nothing is changed if what comes out is refused.
    pub(super) fn change(
        &mut self,
        size: u64,
        change: impl FnOnce(&mut Map<String, Value>),
    ) -> Result<(), Error> {
        let mut json = self.json.clone();
        change(&mut json);
        *self = Self::of(json, size)?;
        Ok(())
    }

    pub(super) fn from_value(value: Value, size: u64) -> Result<Self, Error> {
        let Value::Object(json) = value else { unreachable!("ours is one") };
        Self::of(json, size)
    }
}

/// The text of it, if a copy of `size` bytes has room for that.
fn fitting(json: &Map<String, Value>, size: u64) -> Result<Vec<u8>, Error> {
    let text = serde_json::to_vec(json).expect("maps with text for keys, and no failing values");
    let room = size - BINARY_BYTES as u64;
    if text.len() as u64 >= room {
        return Err(Error::invalid(
            format!("the header would have {} bytes of JSON, and has room for {}", text.len(), room - 1),
            "Remove a LUKS keyslot or token first, or make the container with a larger header.",
        ));
    }
    Ok(text)
}

/// A view of a value. What it says about a mistake is where it is, and not what stands there.
fn view<T: for<'de> Deserialize<'de>>(what: &str, value: Value) -> Result<T, Error> {
    serde_json::from_value(value).map_err(|why| Error::damaged(format!("its JSON, {what}: {why}")))
}

impl Keyslot {
    fn view(number: u32, value: Value) -> Result<Self, Error> {
        let name = format!("LUKS keyslot {number}");
        let KeyslotJson { key_size, priority, af, area, kdf } = view(&name, value)?;
        let wrong = |what: &str| Error::damaged(format!("{name}: {what}"));
        if !(1..=KEY_BYTES_MAX).contains(&key_size) {
            return Err(wrong(&format!("its volume key has {key_size} bytes")));
        }
        if !(1..=STRIPES_MAX).contains(&af.stripes) || af.kind != "luks1" {
            return Err(wrong(&format!("{} stripes of the kind {:?}", af.stripes, af.kind)));
        }
        let area_key_bytes = area.key_size.filter(|bytes| (1..=KEY_BYTES_MAX).contains(bytes));
        let (Some(name_of_it), Some(area_key_bytes), "raw") = (area.encryption, area_key_bytes, &*area.kind)
        else {
            return Err(wrong("its area is not of the kind that it should be"));
        };
        let (key_bytes, stripes) = (key_size as usize, af.stripes as usize);
        if ((key_bytes * stripes).next_multiple_of(512)) as u64 > area.size {
            return Err(wrong(&format!("its area has {} bytes, and its key does not fit", area.size)));
        }
        Ok(Self {
            key_bytes,
            priority: priority.unwrap_or(1),
            encryption: encryption::mode(&name_of_it, area_key_bytes as usize).map_err(|why| why.to_string()),
            encryption_name: name_of_it,
            stripes,
            af_hash: Hash::parse(&af.hash).map_err(|why| why.to_string()),
            area_offset: area.offset,
            area_bytes: area.size,
            kdf: kdf.parse(),
            salt: kdf.salt,
        })
    }

    /// Its JSON.
    pub(super) fn to_json(&self) -> Value {
        let kdf = match self.kdf.as_ref().expect("ours is known") {
            Kdf::Pbkdf2 { hash, iterations } => json!({
                "type": "pbkdf2", "hash": hash.name(), "iterations": iterations,
                "salt": Base64::encode_string(&self.salt),
            }),
            Kdf::Argon2 { variant, passes, memory_kib, lanes } => json!({
                "type": match variant { Argon2Variant::I => "argon2i", Argon2Variant::Id => "argon2id" },
                "time": passes, "memory": memory_kib, "cpus": lanes,
                "salt": Base64::encode_string(&self.salt),
            }),
        };
        let mode = *self.encryption.as_ref().expect("ours is known");
        json!({
            "type": "luks2",
            "key_size": self.key_bytes,
            "priority": self.priority,
            "af": {
                "type": "luks1", "stripes": self.stripes,
                "hash": self.af_hash.as_ref().expect("ours is known").name(),
            },
            "area": {
                "type": "raw", "offset": self.area_offset.to_string(), "size": self.area_bytes.to_string(),
                "encryption": encryption::name(mode), "key_size": mode.info().key_bytes,
            },
            "kdf": kdf,
        })
    }
}

impl KdfJson {
    fn parse(&self) -> Result<Kdf, String> {
        let missing = || "its key derivation lacks a number".to_owned();
        match &*self.kind {
            "pbkdf2" => Ok(Kdf::Pbkdf2 {
                hash: Hash::parse(self.hash.as_deref().unwrap_or_default()).map_err(|why| why.to_string())?,
                iterations: self.iterations.ok_or_else(missing)?,
            }),
            kind @ ("argon2i" | "argon2id") => Ok(Kdf::Argon2 {
                variant: if kind == "argon2i" { Argon2Variant::I } else { Argon2Variant::Id },
                passes: self.time.ok_or_else(missing)?,
                memory_kib: self.memory.ok_or_else(missing)?,
                lanes: self.cpus.ok_or_else(missing)?,
            }),
            other => Err(format!("its key derivation {other:?} is not known here")),
        }
    }
}

impl Segment {
    fn view(number: u32, value: Value) -> Result<Self, Error> {
        let name = format!("segment {number}");
        let json: SegmentJson = view(&name, value)?;
        let wrong = |what: String| Error::damaged(format!("{name}: {what}"));
        let size = match &*json.size {
            "dynamic" => None,
            text => Some(number_of(text).ok_or_else(|| wrong(format!("its size is {text:?}")))?),
        };
        let is_crypt = json.kind == "crypt";
        let sector_bytes = json.sector_size.unwrap_or(512);
        if !matches!(sector_bytes, 512 | 1024 | 2048 | 4096) {
            return Err(wrong(format!("sectors of {sector_bytes} bytes")));
        }
        if !json.offset.is_multiple_of(512)
            || size.is_some_and(|size| size == 0 || size % u64::from(sector_bytes) != 0)
        {
            return Err(wrong(format!(
                "offset {} and size {} are not whole sectors",
                json.offset, json.size
            )));
        }
        if json.offset.checked_add(size.unwrap_or(0)).is_none() {
            return Err(wrong("it ends where nothing can end".to_owned()));
        }
        if is_crypt && json.encryption.is_none() {
            return Err(wrong("it does not say how it is encrypted".to_owned()));
        }
        Ok(Self {
            kind: json.kind,
            offset: json.offset,
            size,
            iv_tweak: json.iv_tweak.unwrap_or(0),
            encryption: json.encryption.unwrap_or_default(),
            sector_bytes,
            has_integrity: json.integrity.is_some(),
            flags: json.flags,
        })
    }

    /// Whether it says what data was or becomes, and not what it is.
    #[must_use]
    pub fn is_backup(&self) -> bool {
        self.flags.iter().any(|flag| flag.starts_with("backup-"))
    }
}

fn number_of(text: &str) -> Option<u64> {
    number(text)
}

impl Digest {
    /// What the right key's derivation gives: names the digest, whatever number it has.
    #[must_use]
    pub fn value(&self) -> &[u8] {
        &self.value
    }

    fn view(at: u32, value: Value) -> Result<Self, Error> {
        let name = format!("digest {at}");
        let json: DigestJson = view(&name, value)?;
        let numbers = |texts: &[String]| {
            let numbers: Option<Vec<u32>> = texts.iter().map(|text| number(text)).collect();
            numbers.ok_or_else(|| Error::damaged(format!("{name}: what it is of are no numbers")))
        };
        let kdf = match &*json.kind {
            "pbkdf2" => Hash::parse(json.hash.as_deref().unwrap_or_default())
                .map_err(|why| why.to_string())
                .map(|hash| Kdf::Pbkdf2 { hash, iterations: json.iterations.unwrap_or(0) }),
            other => Err(format!("digests of the kind {other:?} are not known here")),
        };
        if !(16..=64).contains(&json.digest.len()) {
            return Err(Error::damaged(format!("{name}: it has {} bytes", json.digest.len())));
        }
        let (keyslots, segments) = (numbers(&json.keyslots)?, numbers(&json.segments)?);
        Ok(Self { keyslots, segments, kdf, salt: json.salt, value: json.digest })
    }
}
