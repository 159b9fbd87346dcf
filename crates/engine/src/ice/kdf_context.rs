//! Labels and contexts of the hardware's key derivation, made from what they mean.
//!
//! `inlinecrypt_cipher::kdf` has them as strings of bytes, as tests of shipped hardware publish them. Here each byte has a
//! reason: the label is a *binding state vector*, which says what a derivation is bound to; the context is a text of the
//! software's, then the *key policy* of the child.
//!
//! ```text
//!   message i = BE32(i) | vector, words 2 1 0, big-endian | text, padded to 8 | policy, words 1 0, BE | 0 | BE32(bits)
//!                         `- its last byte, the mixing key selector, is 0: SP 800-108's zero byte
//! ```
//!
//! Bit positions: OP-TEE `core/drivers/crypto/qcom/hwkm_transaction.c` (`hwkm_hw_key_policy`, `hwkm_hw_kdf_bsve`,
//! `hwkm_hw_wrapping_bsve`). That label and context are made of them is inferred: it explains every byte of the variants
//! `v1` and `legacykdf`. The variant `rearranged` belongs to hardware whose policy word has another layout, which is not
//! public; its word is carried as a number, and its vector is empty.

use aes::Aes256;
use cmac::{Cmac, KeyInit, Mac};
use inlinecrypt_cipher::kdf::KdfVariant;
use zeroize::Zeroizing;

/// What a key may be used with (`enum hwkm_algo`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[expect(clippy::enum_variant_names, reason = "the hardware's names; it has AES-128 and others, too")]
pub(crate) enum Algorithm {
    Aes256Cbc = 5,
    Aes256Siv = 12,
    Aes256Xts = 16,
    Aes256Cmac = 20,
}

impl Algorithm {
    const fn from_bits(bits: u32) -> Option<Self> {
        match bits {
            5 => Some(Self::Aes256Cbc),
            12 => Some(Self::Aes256Siv),
            16 => Some(Self::Aes256Xts),
            20 => Some(Self::Aes256Cmac),
            _ => None,
        }
    }

    /// Length of a key. Those of 64 bytes are double keys: they fill a pair of slots, the first of them even.
    pub(crate) const fn key_bytes(self) -> usize {
        match self {
            Self::Aes256Cbc | Self::Aes256Cmac => 32,
            Self::Aes256Siv | Self::Aes256Xts => 64,
        }
    }
}

/// What a key is for (`enum hwkm_key_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Role {
    /// Others are derived from it.
    Derivation = 0,
    /// It wraps others.
    Wrapping = 1,
    /// It carries others between key managers.
    Transport = 3,
    /// It encrypts data.
    Generic = 4,
}

/// How much of a key software sees (`enum hwkm_key_security_lvl`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Security {
    /// Software may read and write it.
    Software = 0,
    /// Software may have it wrapped, and use it.
    Managed = 1,
    /// Software may use it.
    Hardware = 2,
}

/// Where keys may go to. The numbers are those in the published contexts and in a blob of shipped hardware; only 0 (the
/// key manager itself) has a public name.
pub(crate) mod destination {
    pub(crate) const KM_MASTER: u8 = 0;
    /// The storage engine, for `legacykdf`.
    pub(crate) const ICE_LEGACY: u8 = 3;
    /// What stored keys of HWKM v1 say.
    pub(crate) const STORAGE_SLAVE: u8 = 4;
    /// The storage engine, for `v1`.
    pub(crate) const ICE: u8 = 10;
}

/// Which worlds may command a key.
pub(crate) mod domain {
    pub(crate) const TZ: u8 = 1 << 0;
    pub(crate) const NON_SECURE: u8 = 1 << 1;
}

/// A key's policy: two words that travel with it wherever it goes (`hwkm_hw_key_policy`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KeyPolicy {
    pub(crate) algorithm: Algorithm,
    pub(crate) encrypt: bool,
    pub(crate) decrypt: bool,
    pub(crate) role: Role,
    pub(crate) depth: u8,
    pub(crate) wrap_export: bool,
    pub(crate) swap_export: bool,
    pub(crate) security: Security,
    pub(crate) destination: u8,
    /// May be wrapped with the transport key.
    pub(crate) transport: bool,
    pub(crate) domains: u8,
}

impl KeyPolicy {
    /// The key inside every blob: everything is derived from it. In words 0x52011a24 and 0x3, which is what a blob of an
    /// SM8350 has.
    pub(crate) const STORED: Self = Self {
        algorithm: Algorithm::Aes256Cmac,
        encrypt: true,
        decrypt: false,
        role: Role::Derivation,
        depth: 1,
        wrap_export: true,
        swap_export: true,
        security: Security::Managed,
        destination: destination::STORAGE_SLAVE,
        transport: true,
        domains: domain::TZ | domain::NON_SECURE,
    };

    /// The chip's own key, from which those that wrap are derived.
    pub(crate) const CHIP: Self = Self {
        wrap_export: false,
        swap_export: false,
        security: Security::Hardware,
        destination: destination::KM_MASTER,
        transport: false,
        domains: domain::TZ,
        depth: 8,
        ..Self::STORED
    };

    /// A key that wraps others for storage or for this boot.
    pub(crate) const WRAPPING: Self = Self {
        algorithm: Algorithm::Aes256Siv,
        encrypt: true,
        decrypt: true,
        role: Role::Wrapping,
        depth: 0,
        ..Self::CHIP
    };

    /// The key that carries others to the storage engine.
    pub(crate) const TRANSPORT: Self = Self { role: Role::Transport, ..Self::WRAPPING };

    /// The key that encrypts data. It leaves the key manager for the storage engine and nowhere else.
    pub(crate) const fn inline_key(variant: KdfVariant) -> Self {
        let (destination, domains) = match variant {
            KdfVariant::V1 | KdfVariant::Rearranged => (destination::ICE, domain::NON_SECURE),
            KdfVariant::LegacyKdf => (destination::ICE_LEGACY, domain::TZ),
        };
        Self {
            algorithm: Algorithm::Aes256Xts,
            encrypt: true,
            decrypt: true,
            role: Role::Generic,
            depth: 0,
            wrap_export: false,
            swap_export: false,
            security: Security::Managed,
            destination,
            transport: false,
            domains,
        }
    }

    /// The secret that software may read.
    pub(crate) const SOFTWARE_SECRET: Self = Self {
        algorithm: Algorithm::Aes256Cbc,
        security: Security::Software,
        ..Self::inline_key(KdfVariant::V1)
    };

    /// Words 0 and 1.
    pub(crate) const fn to_words(self) -> [u32; 2] {
        let low = (self.transport as u32) << 2
            | (self.destination as u32) << 3
            | (self.security as u32) << 9
            | (self.swap_export as u32) << 11
            | (self.wrap_export as u32) << 12
            | (self.role as u32) << 13
            | (self.depth as u32) << 16
            | (self.decrypt as u32) << 24
            | (self.encrypt as u32) << 25
            | (self.algorithm as u32) << 26;
        [low, self.domains as u32]
    }

    /// The policy in these words, if each bit of them has a meaning here.
    pub(crate) fn from_words(words: [u32; 2]) -> Option<Self> {
        let [low, high] = words;
        let bit = |at: u32| low & (1 << at) != 0;
        let policy = Self {
            algorithm: Algorithm::from_bits(low >> 26)?,
            encrypt: bit(25),
            decrypt: bit(24),
            role: match (low >> 13) & 7 {
                0 => Role::Derivation,
                1 => Role::Wrapping,
                3 => Role::Transport,
                4 => Role::Generic,
                _ => return None,
            },
            depth: low.to_le_bytes()[2],
            wrap_export: bit(12),
            swap_export: bit(11),
            security: match (low >> 9) & 3 {
                0 => Security::Software,
                1 => Security::Managed,
                2 => Security::Hardware,
                _ => return None,
            },
            destination: u8::try_from((low >> 3) & 15).ok()?,
            transport: bit(2),
            domains: u8::try_from(high).ok()?,
        };
        (policy.to_words() == words).then_some(policy)
    }

    /// As in blobs: both words, little-endian.
    pub(crate) fn to_le_bytes(self) -> [u8; 8] {
        let mut bytes = [0; 8];
        for (part, word) in bytes.chunks_exact_mut(4).zip(self.to_words()) {
            part.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    pub(crate) fn from_le_bytes(bytes: [u8; 8]) -> Option<Self> {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self::from_words([u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])])
    }
}

/// What a derivation is bound to (`hwkm_hw_kdf_bsve`). Only what is used has a field; everything else is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct KdfBinding {
    /// Bits 7:0: which slot's key is mixed in.
    pub(crate) mixing_slot: u8,
    /// Bit 13, `swc_en`: the context that software gives counts.
    pub(crate) software_context: bool,
    /// Bit 78, `child_key_policy_en`: the child's policy counts.
    pub(crate) child_policy: bool,
}

impl KdfBinding {
    /// What all derivations here are bound to.
    pub(crate) const CHILD: Self = Self { mixing_slot: 0, software_context: true, child_policy: true };

    /// Words 0, 1 and 2.
    pub(crate) const fn to_words(self) -> [u32; 3] {
        let word0 = self.mixing_slot as u32 | (self.software_context as u32) << 13;
        [word0, 0, (self.child_policy as u32) << (78 - 64)]
    }

    /// As a derivation takes it in: the highest word first, each big-endian.
    pub(crate) fn to_message(self) -> Vec<u8> {
        self.to_words().into_iter().rev().flat_map(u32::to_be_bytes).collect()
    }
}

/// One derivation: everything but the parent.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    /// The text that software gives, already padded.
    pub(crate) context: Vec<u8>,
    pub(crate) binding: KdfBinding,
    /// The child's policy, as it is enforced.
    pub(crate) policy: KeyPolicy,
}

impl Recipe {
    /// The key that encrypts data.
    pub(crate) fn inline_key(variant: KdfVariant) -> Self {
        let text: &[u8] = match variant {
            KdfVariant::V1 | KdfVariant::LegacyKdf => b"inline encryption key",
            KdfVariant::Rearranged => b"inline encryption storagekey ctx",
        };
        Self { context: padded(text), binding: KdfBinding::CHILD, policy: KeyPolicy::inline_key(variant) }
    }

    /// The secret that software may read.
    pub(crate) fn software_secret(variant: KdfVariant) -> Self {
        let (text, child_policy): (&[u8], _) = match variant {
            KdfVariant::V1 | KdfVariant::LegacyKdf => (b"raw secret", true),
            KdfVariant::Rearranged => (b"derive raw secret context abcdef", false),
        };
        let binding = KdfBinding { child_policy, ..KdfBinding::CHILD };
        Self { context: padded(text), binding, policy: KeyPolicy::SOFTWARE_SECRET }
    }

    /// A key that wraps others, bound to `context`.
    pub(crate) fn wrapping_key(context: &[u8]) -> Self {
        Self { context: padded(context), binding: KdfBinding::CHILD, policy: KeyPolicy::WRAPPING }
    }

    /// The fixed input data of SP 800-108: label, zero byte, context, output length in bits.
    fn fixed(&self, variant: KdfVariant) -> Vec<u8> {
        let bits = u32::try_from(self.policy.algorithm.key_bytes() * 8).expect("at most 512");
        let mut fixed = match variant {
            KdfVariant::V1 | KdfVariant::LegacyKdf => self.binding.to_message(),
            // An empty vector of eight words, then the zero byte.
            KdfVariant::Rearranged => vec![0; 33],
        };
        fixed.extend_from_slice(&self.context);
        if self.binding.child_policy {
            let [low, high] = match variant {
                KdfVariant::V1 | KdfVariant::LegacyKdf => self.policy.to_words(),
                KdfVariant::Rearranged => {
                    fixed.push(0);
                    rearranged_policy(self.policy)
                }
            };
            for word in [high, low, 0] {
                fixed.extend_from_slice(&word.to_be_bytes());
            }
        }
        fixed.extend_from_slice(&bits.to_be_bytes());
        fixed
    }

    /// The child of `parent`: SP 800-108r1 4.1 with CMAC-AES-256. As long as its algorithm's keys.
    pub(crate) fn derive(&self, variant: KdfVariant, parent: &[u8; 32]) -> Zeroizing<Vec<u8>> {
        let fixed = self.fixed(variant);
        let mut child = Zeroizing::new(vec![0; self.policy.algorithm.key_bytes()]);
        let keyed = Cmac::<Aes256>::new(parent.into());
        for (counter, block) in (1_u32..).zip(child.chunks_exact_mut(16)) {
            let mut message = [&counter.to_be_bytes(), &fixed[..]].concat();
            if variant == KdfVariant::Rearranged {
                // Pieces of 16 bytes, the last first; the short one is the start, and comes last.
                message = message.rchunks(16).collect::<Vec<_>>().concat();
            }
            let mac = keyed.clone().chain_update(&message).finalize().into_bytes();
            let mac = Zeroizing::new(<[u8; 16]>::from(mac));
            block.copy_from_slice(&*mac);
        }
        child
    }
}

/// The policy words of the hardware whose layout is not public. The inline key's are known from its context; for the
/// others, which no published answer covers, this model keeps the known layout.
fn rearranged_policy(policy: KeyPolicy) -> [u32; 2] {
    if policy == KeyPolicy::inline_key(KdfVariant::Rearranged) { [0x1070_1872, 0] } else { policy.to_words() }
}

/// `text` with zeroes up to whole 64-bit words, in which contexts travel.
fn padded(text: &[u8]) -> Vec<u8> {
    let mut padded = text.to_vec();
    padded.resize(text.len().next_multiple_of(8), 0);
    padded
}

/// A key as it travels to and from the key manager: the last byte first (`hwkm_reverse_bytes`).
pub(crate) fn key_on_bus(key: &[u8]) -> Zeroizing<Vec<u8>> {
    Zeroizing::new(key.iter().rev().copied().collect())
}

/// A context as it travels: the bytes of each 64-bit word the other way round (`hwkm_reorder_kdf_ctx`). Twice gives the
/// same again.
pub(crate) fn context_on_bus(context: &[u8]) -> Vec<u8> {
    context.chunks(8).flat_map(|word| word.iter().rev().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use inlinecrypt_cipher::Mode;
    use inlinecrypt_cipher::kdf;
    use proptest::prelude::*;

    fn known(variant: KdfVariant) -> (&'static str, &'static str) {
        match variant {
            KdfVariant::V1 => (
                "cbe5db40215a3d386d61e54ef2f8a7814b00bacf35b316f88e68e89a47abbab4834c27dac8a91ae1c3304f31b5f2202c14989661bafccc56cf6212d8b1f72691",
                "e26fb19b4fb6266fc7c5fc9654efad643cfebc64c097341155195595c28d5ec9",
            ),
            KdfVariant::LegacyKdf => (
                "6361f802b37aa64a075784bede2341f1d9236e646c70460f15b37ce5ff43a54f15d95693343d528b67372a7f383ed8e7c45ed0899e02825453c9419aafa3695f",
                "e26fb19b4fb6266fc7c5fc9654efad643cfebc64c097341155195595c28d5ec9",
            ),
            KdfVariant::Rearranged => (
                "dba0a67e471be39fd1ec289945f52145df12937a0b42915f7c711feb47403e6ae5b7b52968a8cc635d10ab8b8724ef5dec6236d81a1b387808c407ce01c56388",
                "4ef06e6aa984104667863f15087c12bbfb8e4715145bc06b5982abd4198385b4",
            ),
        }
    }

    /// Android kernel tests, `encryption/utils.cpp`, TestKdfVariants: master key of 32 zero bytes.
    #[test]
    fn all_published_answers_come_out() {
        for variant in KdfVariant::ALL {
            let (inline, secret) = known(variant);
            assert_eq!(hex::encode(&*Recipe::inline_key(variant).derive(variant, &[0; 32])), inline);
            assert_eq!(hex::encode(&*Recipe::software_secret(variant).derive(variant, &[0; 32])), secret);
        }
    }

    #[test]
    fn generated_labels_and_contexts_are_the_published_bytes() {
        let hex_of = |recipe: &Recipe, variant| hex::encode(recipe.fixed(variant));
        // Label of 11 bytes and the zero byte.
        let label = "000040000000000000002000";
        let iek = hex::encode(b"inline encryption key\0\0\0");
        let sws = hex::encode(b"raw secret\0\0\0\0\0\0");
        assert_eq!(
            hex_of(&Recipe::inline_key(KdfVariant::V1), KdfVariant::V1),
            format!("{label}{iek}00000002430082500000000000000200")
        );
        assert_eq!(
            hex_of(&Recipe::inline_key(KdfVariant::LegacyKdf), KdfVariant::LegacyKdf),
            format!("{label}{iek}00000001430082180000000000000200")
        );
        assert_eq!(
            hex_of(&Recipe::software_secret(KdfVariant::V1), KdfVariant::V1),
            format!("{label}{sws}00000002170080500000000000000100")
        );
    }

    #[test]
    fn the_stored_keys_policy_is_that_of_a_blob_of_shipped_hardware() {
        assert_eq!(KeyPolicy::STORED.to_words(), [0x5201_1a24, 0x3]);
        assert_eq!(hex::encode(KeyPolicy::STORED.to_le_bytes()), "241a015203000000");
    }

    #[test]
    fn bus_orders_are_their_own_inverse_and_reverse_what_they_should() {
        assert_eq!(context_on_bus(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]), [7, 6, 5, 4, 3, 2, 1, 0, 9, 8]);
        assert_eq!(**key_on_bus(&[1, 2, 3]), [3, 2, 1]);
        let bytes: Vec<u8> = (0..61).collect();
        assert_eq!(context_on_bus(&context_on_bus(&bytes)), bytes);
    }

    proptest! {
        #[test]
        fn derived_keys_equal_those_of_the_published_strings(master in prop::array::uniform32(any::<u8>())) {
            for variant in KdfVariant::ALL {
                prop_assert_eq!(
                    &**Recipe::inline_key(variant).derive(variant, &master),
                    &**kdf::inline_encryption_key(variant, &master, Mode::Aes256Xts)
                );
                prop_assert_eq!(
                    &**Recipe::software_secret(variant).derive(variant, &master),
                    &kdf::software_secret(variant, &master)[..]
                );
            }
        }

        #[test]
        fn words_that_are_a_policy_survive_and_others_are_none(low in any::<u32>(), high in 0..64_u32) {
            if let Some(policy) = KeyPolicy::from_words([low, high]) {
                prop_assert_eq!(policy.to_words(), [low, high]);
                prop_assert_eq!(KeyPolicy::from_le_bytes(policy.to_le_bytes()), Some(policy));
            }
        }
    }
}
