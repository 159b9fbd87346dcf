//! CBC with ciphertext stealing, the last two blocks always exchanged (CS3): `cts(cbc(aes))` of Linux.
//!
//! ```text
//!   C(0) = E(P(0) ^ IV)   C(j+1) = E(P(j+1) ^ C(j))   with P padded by zeroes to whole blocks
//!   output: C(0) .. C(n-3)  C(n-1)  C(n-2) cut to what is left        one block alone: C(0)
//! ```
//!
//! Source: SP 800-38A addendum, CBC-CS3; RFC 3962 section 5; Linux `crypto/cts.c`.

use crate::Dun;
use crate::names::{MessageCipher, assert_message};
use crate::unit::low_128_bits;
use aes::cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, BlockSizeUser, KeyInit, consts::U16};
use std::fmt;

/// AES-256-CTS-CBC with a key of 32 bytes.
pub(crate) fn aes_256(key: &[u8]) -> Box<dyn MessageCipher> {
    new::<aes::Aes256>("AES-256-CTS-CBC", key)
}

/// AES-128-CTS-CBC with a key of 16 bytes.
pub(crate) fn aes_128(key: &[u8]) -> Box<dyn MessageCipher> {
    new::<aes::Aes128>("AES-128-CTS-CBC", key)
}

/// SM4-CTS-CBC with a key of 16 bytes.
pub(crate) fn sm4(key: &[u8]) -> Box<dyn MessageCipher> {
    new::<sm4::Sm4>("SM4-CTS-CBC", key)
}

/// What a block cipher has to be for this.
trait Block16: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt {}

impl<C: BlockSizeUser<BlockSize = U16> + BlockCipherEncrypt + BlockCipherDecrypt> Block16 for C {}

fn new<C: Block16 + KeyInit + Send + Sync + 'static>(
    name: &'static str,
    key: &[u8],
) -> Box<dyn MessageCipher> {
    let block = C::new_from_slice(key).expect("length checked by NamesMode::expand");
    Box::new(CbcCts { name, block })
}

struct CbcCts<C> {
    name: &'static str,
    block: C,
}

impl<C: Block16> CbcCts<C> {
    fn encrypt_block(&self, data: u128) -> u128 {
        let mut block = Array(data.to_le_bytes());
        self.block.encrypt_block(&mut block);
        u128::from_le_bytes(block.0)
    }

    fn decrypt_block(&self, data: u128) -> u128 {
        let mut block = Array(data.to_le_bytes());
        self.block.decrypt_block(&mut block);
        u128::from_le_bytes(block.0)
    }
}

impl<C: Block16 + Send + Sync> MessageCipher for CbcCts<C> {
    fn encrypt(&self, dun: Dun, message: &mut [u8]) {
        assert_message(message);
        let (head, tail) = split(message);
        let mut last = low_128_bits(dun);
        for block in head.as_chunks_mut().0 {
            last = self.encrypt_block(u128::from_le_bytes(*block) ^ last);
            *block = last.to_le_bytes();
        }
        let Some((stolen, end)) = tail.split_first_chunk_mut::<16>() else { return };
        // The last whole block, and the one that is padded with zeroes.
        let whole = self.encrypt_block(u128::from_le_bytes(*stolen) ^ last);
        let padded = self.encrypt_block(padded(end) ^ whole);
        *stolen = padded.to_le_bytes();
        end.copy_from_slice(&whole.to_le_bytes()[..end.len()]);
    }

    fn decrypt(&self, dun: Dun, message: &mut [u8]) {
        assert_message(message);
        let (head, tail) = split(message);
        let mut last = low_128_bits(dun);
        for block in head.as_chunks_mut().0 {
            let ciphertext = u128::from_le_bytes(*block);
            *block = (self.decrypt_block(ciphertext) ^ last).to_le_bytes();
            last = ciphertext;
        }
        let Some((stolen, end)) = tail.split_first_chunk_mut::<16>() else { return };
        // What was not stolen of the last whole block of ciphertext is in the other, whose plaintext is zero there.
        let mixed = self.decrypt_block(u128::from_le_bytes(*stolen)).to_le_bytes();
        let mut whole = mixed;
        whole[..end.len()].copy_from_slice(end);
        for (byte, mixed) in end.iter_mut().zip(mixed) {
            *byte ^= mixed;
        }
        *stolen = (self.decrypt_block(u128::from_le_bytes(whole)) ^ last).to_le_bytes();
    }
}

impl<C> fmt::Debug for CbcCts<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct(self.name).finish_non_exhaustive()
    }
}

/// The blocks that are plain CBC, and the last 17 to 32 bytes; of a message of one block, the block and nothing.
fn split(message: &mut [u8]) -> (&mut [u8], &mut [u8]) {
    let at = if message.len() == 16 { 16 } else { (message.len() - 17) / 16 * 16 };
    message.split_at_mut(at)
}

fn padded(end: &[u8]) -> u128 {
    let mut block = [0; 16];
    block[..end.len()].copy_from_slice(end);
    u128::from_le_bytes(block)
}
