//! LUKS1: read and opened, never changed.
//!
//! ```text
//!   offset  bytes  big-endian
//!        0      6  "LUKS", 0xba, 0xbe
//!        6      2  version, 1
//!        8     32  cipher      40  32  its mode       72  32  hash
//!      104      4  where the data begins, in sectors of 512 bytes; 0 with a detached header
//!      108      4  bytes of the volume key
//!      112     20  digest     132  32  its salt      164   4  its iterations
//!      168     40  UUID
//!      208   8*48  LUKS keyslots: active, iterations, salt (32), where their area begins (sectors), stripes
//! ```

use crate::area::AreaCipher;
use crate::kdf::Kdf;
use crate::{Error, Hash, Storage, VolumeKey, af, encryption};
use inlinecrypt_cipher::Mode;
use subtle::ConstantTimeEq as _;
use zeroize::Zeroizing;

const HEADER_BYTES: usize = 592;
const SECTOR_BYTES: u64 = 512;
const ENABLED: u32 = 0x00ac_71f3;
const DISABLED: u32 = 0x0000_dead;
const DIGEST_BYTES: usize = 20;
/// Most stripes: everybody has 4000.
const STRIPES_MAX: u32 = 16_384;

/// A header.
#[derive(Debug)]
pub struct Header {
    /// What the data is encrypted with, as the header names it.
    pub cipher: String,
    /// The hash of LUKS keyslots and digest.
    pub hash: Hash,
    /// Where the data begins, in bytes; 0 with a detached header.
    pub data_offset: u64,
    /// Length of the volume key, in bytes.
    pub key_bytes: usize,
    /// What names the container.
    pub uuid: String,
    digest: [u8; DIGEST_BYTES],
    digest_salt: [u8; 32],
    digest_iterations: u32,
    keyslots: Vec<Keyslot>,
}

/// A LUKS keyslot that is in use.
#[derive(Debug)]
pub struct Keyslot {
    /// Its number, 0 to 7.
    pub number: u32,
    /// Iterations of PBKDF2.
    pub iterations: u32,
    /// Stripes of its area.
    pub stripes: u32,
    salt: [u8; 32],
    area_offset: u64,
}

impl Header {
    /// Reads the header.
    ///
    /// # Errors
    ///
    /// [`NotLuks`](crate::ErrorKind::NotLuks), [`Damaged`](crate::ErrorKind::Damaged),
    /// [`Unsupported`](crate::ErrorKind::Unsupported), [`Io`](crate::ErrorKind::Io).
    pub fn read(storage: &mut dyn Storage) -> Result<Self, Error> {
        let mut bytes = [0; HEADER_BYTES];
        if storage.len_bytes() < HEADER_BYTES as u64 {
            return Err(Error::damaged("it ends before the LUKS1 header does"));
        }
        storage.read(0, &mut bytes).map_err(Error::io)?;
        let word = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        if bytes[..6] != *b"LUKS\xba\xbe" || bytes[6..8] != [0, 1] {
            return Err(Error::new(crate::ErrorKind::NotLuks, "there is no LUKS1 header", "Check the name."));
        }
        let (name, mode) = (text(&bytes[8..40], "cipher")?, text(&bytes[40..72], "mode")?);
        let key_bytes = word(108) as usize;
        if !(16..=512).contains(&key_bytes) {
            return Err(Error::damaged(format!("its volume key has {key_bytes} bytes")));
        }
        let mut keyslots = Vec::new();
        for number in 0..8_u32 {
            let at = 208 + 48 * number as usize;
            match word(at) {
                DISABLED => continue,
                ENABLED => {}
                other => {
                    return Err(Error::damaged(format!(
                        "LUKS keyslot {number} is neither on nor off, but {other:#x}"
                    )));
                }
            }
            let slot = Keyslot {
                number,
                iterations: word(at + 4),
                salt: bytes[at + 8..at + 40].try_into().expect("32 bytes"),
                area_offset: u64::from(word(at + 40)) * SECTOR_BYTES,
                stripes: word(at + 44),
            };
            let end = slot.area_offset + slot.area_bytes(key_bytes) as u64;
            if !(1..=STRIPES_MAX).contains(&slot.stripes)
                || slot.area_offset < 2 * SECTOR_BYTES
                || end > storage.len_bytes()
            {
                return Err(Error::damaged(format!(
                    "the area of LUKS keyslot {number} lies where none can be"
                )));
            }
            keyslots.push(slot);
        }
        Ok(Self {
            cipher: format!("{name}-{mode}"),
            hash: Hash::parse(&text(&bytes[72..104], "hash")?)?,
            data_offset: u64::from(word(104)) * SECTOR_BYTES,
            key_bytes,
            uuid: text(&bytes[168..208], "UUID")?,
            digest: bytes[112..132].try_into().expect("20 bytes"),
            digest_salt: bytes[132..164].try_into().expect("32 bytes"),
            digest_iterations: word(164),
            keyslots,
        })
    }

    /// Where header and areas end, in bytes.
    #[must_use]
    pub fn end(&self) -> u64 {
        let areas =
            self.keyslots.iter().map(|slot| slot.area_offset + slot.area_bytes(self.key_bytes) as u64);
        areas.fold(HEADER_BYTES as u64, u64::max)
    }

    /// The LUKS keyslots that are in use.
    #[must_use]
    pub fn keyslots(&self) -> &[Keyslot] {
        &self.keyslots
    }

    /// What the data and the areas are encrypted with.
    ///
    /// # Errors
    ///
    /// [`Unsupported`](crate::ErrorKind::Unsupported).
    pub fn mode(&self) -> Result<Mode, Error> {
        encryption::mode(&self.cipher, self.key_bytes)
    }

    /// Opens it with the first LUKS keyslot that takes `passphrase`: the volume key, and which it was.
    ///
    /// # Errors
    ///
    /// [`Passphrase`](crate::ErrorKind::Passphrase) if none does; else why none could be tried.
    ///
    /// # Blocking
    ///
    /// As long as the header says.
    pub fn open(&self, storage: &mut dyn Storage, passphrase: &[u8]) -> Result<(u32, VolumeKey), Error> {
        self.open_with(storage, passphrase, None)
    }

    /// The same, with `only` by that LUKS keyslot.
    ///
    /// # Errors
    ///
    /// Those of [`open`](Self::open), and [`Invalid`](crate::ErrorKind::Invalid) if `only` is not in use.
    ///
    /// # Blocking
    ///
    /// As long as the header says.
    pub fn open_with(
        &self,
        storage: &mut dyn Storage,
        passphrase: &[u8],
        only: Option<u32>,
    ) -> Result<(u32, VolumeKey), Error> {
        if let Some(number) = only
            && !self.keyslots.iter().any(|slot| slot.number == number)
        {
            return Err(Error::no_such_slot(number));
        }
        let mode = self.mode()?;
        Kdf::Pbkdf2 { hash: self.hash, iterations: self.digest_iterations }.check()?;
        let mut trouble = None;
        let wanted = |slot: &&Keyslot| only.is_none_or(|only| only == slot.number);
        for slot in self.keyslots.iter().filter(wanted) {
            match self.try_slot(slot, mode, storage, passphrase) {
                Ok(Some(key)) => return Ok((slot.number, key)),
                Ok(None) => {}
                Err(error) => trouble = Some(error),
            }
        }
        Err(trouble.unwrap_or_else(Error::passphrase))
    }

    fn try_slot(
        &self,
        slot: &Keyslot,
        mode: Mode,
        storage: &mut dyn Storage,
        passphrase: &[u8],
    ) -> Result<Option<VolumeKey>, Error> {
        let kdf = Kdf::Pbkdf2 { hash: self.hash, iterations: slot.iterations };
        let area_key = kdf.derive(passphrase, &slot.salt, self.key_bytes)?;
        let mut area = Zeroizing::new(vec![0; slot.area_bytes(self.key_bytes)]);
        storage.read(slot.area_offset, &mut area).map_err(Error::io)?;
        AreaCipher::new(mode, &area_key)?.decrypt(&mut area);
        let stripes = slot.stripes as usize;
        let key = af::merge(&area[..self.key_bytes * stripes], self.key_bytes, stripes, self.hash);
        let mut digest = [0; DIGEST_BYTES];
        self.hash.pbkdf2(&key, &self.digest_salt, self.digest_iterations, &mut digest);
        Ok(bool::from(digest.ct_eq(&self.digest)).then_some(key))
    }
}

impl Keyslot {
    /// Whole sectors.
    fn area_bytes(&self, key_bytes: usize) -> usize {
        (key_bytes * self.stripes as usize).next_multiple_of(512)
    }
}

/// A field of text that ends with a NUL or with the field.
pub(crate) fn text(field: &[u8], what: &str) -> Result<String, Error> {
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(field.len());
    let text = &field[..end];
    if text.iter().all(|byte| (b' '..=b'~').contains(byte)) {
        Ok(String::from_utf8_lossy(text).into_owned())
    } else {
        Err(Error::damaged(format!("its {what} is no text")))
    }
}
