//! Data unit numbers: a 256-bit counter from which each data unit's IV is made.

/// A data unit number (DUN): the per-unit counter from which the IV is made.
///
/// Four 64-bit limbs, the first the least significant, as in Linux (`include/linux/blk-crypto.h`,
/// `BLK_CRYPTO_DUN_ARRAY_SIZE`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Dun([u64; 4]);

impl Dun {
    /// The first data unit of all.
    pub const ZERO: Self = Self([0; 4]);

    /// A DUN from its limbs, the least significant first.
    pub const fn from_limbs(limbs: [u64; 4]) -> Self {
        Self(limbs)
    }

    /// The limbs, the least significant first.
    pub const fn limbs(self) -> [u64; 4] {
        self.0
    }

    /// The DUN that lies `units` further on. A carry out of the top limb is dropped, as Linux does
    /// (`block/blk-crypto.c`, `bio_crypt_dun_increment`).
    #[must_use]
    pub const fn wrapping_add(self, units: u64) -> Self {
        self.overflowing_add(units).0
    }

    /// Like [`wrapping_add`](Self::wrapping_add), and whether a carry left the top limb.
    #[must_use]
    pub const fn overflowing_add(self, units: u64) -> (Self, bool) {
        let mut limbs = self.0;
        let mut carry = units;
        let mut i = 0;
        while i < limbs.len() {
            let (sum, over) = limbs[i].overflowing_add(carry);
            limbs[i] = sum;
            carry = over as u64;
            i += 1;
        }
        (Self(limbs), carry != 0)
    }

    /// Whether `next` is the DUN `units` further on, without wrapping past the top.
    ///
    /// The rule for merging requests: a wrap through zero is never contiguous (`block/blk-crypto.c`,
    /// `bio_crypt_dun_is_contiguous`).
    #[must_use]
    pub fn is_followed_by(self, units: u64, next: Self) -> bool {
        let (end, wrapped) = self.overflowing_add(units);
        !wrapped && end == next
    }

    /// The DUN as 32 little-endian bytes. A mode's IV is the first `iv_bytes` of them (`block/blk-crypto-fallback.c`,
    /// `blk_crypto_dun_to_iv`).
    #[must_use]
    pub fn to_le_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (chunk, limb) in bytes.chunks_exact_mut(8).zip(self.0) {
            chunk.copy_from_slice(&limb.to_le_bytes());
        }
        bytes
    }

    /// How many bytes the number needs: 0 for zero, 32 at the most.
    #[must_use]
    pub fn significant_bytes(self) -> u8 {
        let bytes = self.to_le_bytes();
        let significant = bytes.iter().rposition(|&b| b != 0).map_or(0, |last| last + 1);
        u8::try_from(significant).expect("at most 32")
    }
}

impl From<u64> for Dun {
    fn from(low: u64) -> Self {
        Self([low, 0, 0, 0])
    }
}
