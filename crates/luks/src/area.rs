//! The areas of LUKS keyslots: sectors of 512 bytes, numbered from 0.

use crate::Error;
use inlinecrypt_cipher::{Dun, Mode, UnitCipher};

const SECTOR_BYTES: usize = 512;

/// A cipher with its key.
pub(crate) struct AreaCipher(Box<dyn UnitCipher>);

impl AreaCipher {
    /// # Errors
    ///
    /// [`Damaged`](crate::ErrorKind::Damaged) if the key is one that the mode refuses: its length fits.
    pub(crate) fn new(mode: Mode, key: &[u8]) -> Result<Self, Error> {
        let refused = |why| Error::damaged(format!("the key of a LUKS keyslot's area: {why}"));
        mode.info().expand(key).map(Self).map_err(refused)
    }

    /// Encrypts whole sectors in place.
    pub(crate) fn encrypt(&self, data: &mut [u8]) {
        self.0.encrypt(Dun::from(0), SECTOR_BYTES, data);
    }

    /// Decrypts whole sectors in place.
    pub(crate) fn decrypt(&self, data: &mut [u8]) {
        self.0.decrypt(Dun::from(0), SECTOR_BYTES, data);
    }
}
