//! The areas of LUKS keyslots: sectors of 512 bytes, numbered from 0.

use crate::{Encryption, Error};
use aes::Aes128;
use aes::cipher::{Block, BlockCipherDecrypt as _, BlockCipherEncrypt as _, KeyInit as _};
use inlinecrypt_cipher::{Dun, UnitCipher};

const SECTOR_BYTES: usize = 512;

/// A cipher with its key.
pub(crate) enum AreaCipher {
    Unit(Box<dyn UnitCipher>),
    Aes128Xts(Box<(Aes128, Aes128)>),
}

impl AreaCipher {
    /// # Errors
    ///
    /// [`Damaged`](crate::ErrorKind::Damaged) if the key is one that the mode refuses: its length fits.
    pub(crate) fn new(encryption: Encryption, key: &[u8]) -> Result<Self, Error> {
        match encryption {
            Encryption::Mode(mode) => mode
                .info()
                .expand(key)
                .map(Self::Unit)
                .map_err(|why| Error::damaged(format!("the key of a LUKS keyslot's area: {why}"))),
            Encryption::Aes128Xts => {
                let half = |at: usize| {
                    Aes128::new_from_slice(&key[at..at + 16])
                        .expect("a key of 32 bytes, of which this is half")
                };
                Ok(Self::Aes128Xts(Box::new((half(0), half(16)))))
            }
        }
    }

    /// Encrypts whole sectors in place.
    pub(crate) fn encrypt(&self, data: &mut [u8]) {
        match self {
            Self::Unit(cipher) => cipher.encrypt(Dun::from(0), SECTOR_BYTES, data),
            Self::Aes128Xts(keys) => xts(keys, data, |key, block| key.encrypt_block(block)),
        }
    }

    /// Decrypts whole sectors in place.
    pub(crate) fn decrypt(&self, data: &mut [u8]) {
        match self {
            Self::Unit(cipher) => cipher.decrypt(Dun::from(0), SECTOR_BYTES, data),
            Self::Aes128Xts(keys) => xts(keys, data, |key, block| key.decrypt_block(block)),
        }
    }
}

/// IEEE 1619, one block after the other: areas are read once, so nothing is gained by more.
fn xts(keys: &(Aes128, Aes128), data: &mut [u8], step: impl Fn(&Aes128, &mut Block<Aes128>)) {
    for (number, sector) in data.chunks_exact_mut(SECTOR_BYTES).enumerate() {
        let mut first = Block::<Aes128>::default();
        first[..8].copy_from_slice(&(number as u64).to_le_bytes());
        keys.1.encrypt_block(&mut first);
        let mut tweak = u128::from_le_bytes(first.into());
        for piece in sector.chunks_exact_mut(16) {
            let mask = tweak.to_le_bytes();
            let mut block = Block::<Aes128>::default();
            block.iter_mut().zip(piece.iter().zip(mask)).for_each(|(out, (data, mask))| *out = data ^ mask);
            step(&keys.0, &mut block);
            piece.iter_mut().zip(block.iter().zip(mask)).for_each(|(out, (data, mask))| *out = data ^ mask);
            // Times x in GF(2^128) mod x^128 + x^7 + x^2 + x + 1.
            tweak = (tweak << 1) ^ if tweak >> 127 == 1 { 0x87 } else { 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// IEEE 1619-2007 annex B, vector 4 (AES-128, data unit 0, 512 bytes of a counter): first and last block.
    #[test]
    fn aes_128_is_that_of_the_standard() {
        let key = hex::decode("2718281828459045235360287471352631415926535897932384626433832795").unwrap();
        let mut data: Vec<u8> = (0..512).map(|i: usize| u8::try_from(i % 256).unwrap()).collect();
        let plain = data.clone();
        let cipher = AreaCipher::new(Encryption::Aes128Xts, &key).unwrap();
        cipher.encrypt(&mut data);
        assert_eq!(hex::encode(&data[..16]), "27a7479befa1d476489f308cd4cfa6e2");
        assert_eq!(hex::encode(&data[496..]), "0a282df920147beabe421ee5319d0568");
        cipher.decrypt(&mut data);
        assert_eq!(data, plain);
    }
}
