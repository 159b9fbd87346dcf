//! Known answers: what xfstests' own implementation and standards say. `vectors/` and `../cipher/vectors/` have the origin of
//! each file.

use inlinecrypt_cipher::names::NamesMode;
use inlinecrypt_cipher::{Dun, kdf};
use inlinecrypt_fscrypt::file::{FileCipher, Place};
use inlinecrypt_fscrypt::master::MasterKey;
use inlinecrypt_fscrypt::policy::{ContentsMode, Context, Derivation, KeyRef, Policy};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use shake::digest::{ExtendableOutput, Update, XofReader};
use siphasher::sip::SipHasher24;
use std::hash::Hasher;
use std::path::PathBuf;

fn load<T: DeserializeOwned>(path: &str) -> T {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path);
    let text = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn bytes(digits: &str) -> Vec<u8> {
    hex::decode(digits).unwrap()
}

fn array<const N: usize>(digits: &str) -> [u8; N] {
    bytes(digits).try_into().unwrap()
}

fn plaintext(len: usize) -> Vec<u8> {
    let mut hasher = shake::Shake256::default();
    hasher.update(b"hwkdf-oracle");
    let mut out = vec![0; len];
    hasher.finalize_xof().read(&mut out);
    out
}

#[derive(Deserialize)]
struct ContentsFile {
    fs_uuid: String,
    file_nonce: String,
    hardware: Vec<Hardware>,
    raw: Raw,
}

#[derive(Deserialize)]
struct Hardware {
    inline_encryption_key: String,
    software_secret: String,
    key_identifier: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Raw {
    master: String,
    key_identifier: String,
    cases: Vec<Case>,
}

#[derive(Debug, Deserialize)]
struct Case {
    mode: String,
    policy: String,
    unit_bytes: u32,
    index: u64,
    inode: u32,
    fscrypt_mode: u8,
    bytes: usize,
    sha256: String,
    /// Of names alone.
    #[serde(default)]
    key: String,
}

impl Case {
    fn derivation(&self) -> Option<Derivation> {
        match self.policy.as_str() {
            "per-file" => Some(Derivation::PerFileKey),
            "direct-key" => Some(Derivation::DirectKey),
            "iv-ino-lblk-64" => Some(Derivation::IvInoLblk64),
            "iv-ino-lblk-32" => Some(Derivation::IvInoLblk32),
            "bare" => None,
            other => panic!("{other}"),
        }
    }

    /// Through policy, context and master key, as the kernel goes. Tells whether there is such a policy at all.
    fn check_contents(&self, key: &MasterKey, uuid: &str, nonce: &str) -> bool {
        let contents = ContentsMode::from_number(self.fscrypt_mode).unwrap();
        assert_eq!(contents.mode().info().name, self.mode);
        let names = match contents {
            ContentsMode::Aes256Xts => NamesMode::Aes256Hctr2,
            ContentsMode::Aes128CbcEssiv => NamesMode::Aes128Cts,
            ContentsMode::Sm4Xts => NamesMode::Sm4Cts,
            ContentsMode::Adiantum => NamesMode::Adiantum,
        };
        let log2 = u8::try_from(self.unit_bytes.trailing_zeros()).unwrap();
        let name = KeyRef::Identifier(key.name().identifier);
        let Ok(policy) = Policy::new(contents, names, 32, self.derivation().unwrap(), log2, name) else {
            return false;
        };
        let context = Context { policy, nonce: array(nonce) };
        let place = Place { uuid: array(uuid), inode: self.inode };
        let cipher = FileCipher::new(key, &context, place, 4096).unwrap();
        assert_eq!(cipher.unit_bytes(), self.unit_bytes);
        let plaintext = plaintext(self.bytes);
        let mut data = plaintext.clone();
        cipher.encrypt(self.index, &mut data).unwrap();
        assert_eq!(hex::encode(Sha256::digest(&data)), self.sha256, "{self:?}");
        cipher.decrypt(self.index, &mut data).unwrap();
        assert!(data == plaintext, "{self:?}");
        true
    }
}

#[test]
fn contents_under_raw_keys() {
    let file: ContentsFile = load("../cipher/vectors/fscrypt.json");
    let key = MasterKey::raw(&bytes(&file.raw.master)).unwrap();
    assert_eq!(hex::encode(key.name().identifier), file.raw.key_identifier);
    let checked =
        file.raw.cases.iter().filter(|case| case.check_contents(&key, &file.fs_uuid, &file.file_nonce));
    // 9 of XTS, 3 of each other mode with per-file keys, 3 of Adiantum with DIRECT_KEY; Linux has no other policies.
    assert_eq!(checked.count(), 18);
}

#[test]
fn contents_under_hardware_wrapped_keys() {
    let file: ContentsFile = load("../cipher/vectors/fscrypt.json");
    for hardware in &file.hardware {
        let secret = array(&hardware.software_secret);
        let key = MasterKey::wrapped(&secret, &bytes(&hardware.inline_encryption_key)).unwrap();
        assert_eq!(hex::encode(key.name().identifier), hardware.key_identifier);
        let checked =
            hardware.cases.iter().filter(|case| case.check_contents(&key, &file.fs_uuid, &file.file_nonce));
        assert_eq!(checked.count(), hardware.cases.len());
    }
}

#[derive(Deserialize)]
struct NamesFile {
    fs_uuid: String,
    file_nonce: String,
    cases: Vec<Case>,
}

/// xfstests encrypts whole data units by these modes, at any index. That is more than names have; what names have is in it.
#[test]
fn names_modes() {
    let file: NamesFile = load("vectors/names.json");
    let (uuid, nonce) = (bytes(&file.fs_uuid), array::<16>(&file.file_nonce));
    for case in &file.cases {
        let mode = NamesMode::ALL.into_iter().find(|mode| mode.name() == case.mode).unwrap();
        let master = bytes(&case.key);
        let with_uuid = [&[case.fscrypt_mode], &uuid[..]].concat();
        let mut key = vec![0; mode.key_bytes()];
        match case.derivation() {
            None => key = master.clone(),
            Some(Derivation::PerFileKey) => kdf::fscrypt_hkdf(&master, 2, &nonce, &mut key),
            Some(Derivation::DirectKey) => kdf::fscrypt_hkdf(&master, 3, &[case.fscrypt_mode], &mut key),
            Some(Derivation::IvInoLblk64) => kdf::fscrypt_hkdf(&master, 4, &with_uuid, &mut key),
            Some(Derivation::IvInoLblk32) => kdf::fscrypt_hkdf(&master, 6, &with_uuid, &mut key),
        }
        let dun = |index: u64| match case.derivation() {
            None | Some(Derivation::PerFileKey) => Dun::from(index),
            Some(Derivation::DirectKey) => {
                let limb = |at: usize| u64::from_le_bytes(nonce[at..at + 8].try_into().unwrap());
                Dun::from_limbs([index, limb(0), limb(8), 0])
            }
            Some(Derivation::IvInoLblk64) => Dun::from(u64::from(case.inode) << 32 | index),
            Some(Derivation::IvInoLblk32) => {
                let mut key = [0; 16];
                kdf::fscrypt_hkdf(&master, 7, &[], &mut key);
                let mut hasher = SipHasher24::new_with_key(&key);
                hasher.write(&u64::from(case.inode).to_le_bytes());
                Dun::from(hasher.finish().wrapping_add(index) & 0xffff_ffff)
            }
        };
        let cipher = mode.expand(&key).unwrap();
        let plaintext = plaintext(case.bytes);
        let mut data = plaintext.clone();
        for (index, unit) in (case.index..).zip(data.chunks_exact_mut(case.unit_bytes as usize)) {
            cipher.encrypt(dun(index), unit);
        }
        assert_eq!(hex::encode(Sha256::digest(&data)), case.sha256, "{case:?}");
        for (index, unit) in (case.index..).zip(data.chunks_exact_mut(case.unit_bytes as usize)) {
            cipher.decrypt(dun(index), unit);
        }
        assert!(data == plaintext, "{case:?}");
    }
    assert_eq!(file.cases.len(), 18);
}

/// RFC 8009 appendix A: Ke, confounder and plaintext, ciphertext; the IV is zero.
#[test]
fn stolen_ciphertext_is_that_of_kerberos() {
    let cases = [
        (
            NamesMode::Aes128Cts,
            "9b197dd1e8c5609d6e67c3e37c62c72e",
            "a7a4e29a4728ce10664fb64e49ad3fac000102030405060708090a0b0c0d0e0f1011121314",
            "720f73b18d9859cd6ccb4346115cd336c70f58edc0c4437c5573544c31c813bce1e6d072c1",
        ),
        (
            NamesMode::Aes256Cts,
            "56ab22bee63d82d7bc5227f6773f8ea7a5eb1c825160c38312980c442e5c7e49",
            "f764e9fa15c276478b2c7d0c4e5f58e4",
            "41f53fa5bfe7026d91faf9be959195a0",
        ),
    ];
    for (mode, key, plaintext, ciphertext) in cases {
        let cipher = mode.expand(&bytes(key)).unwrap();
        let mut data = bytes(plaintext);
        cipher.encrypt(Dun::ZERO, &mut data);
        assert_eq!(hex::encode(&data), ciphertext, "{mode}");
        cipher.decrypt(Dun::ZERO, &mut data);
        assert_eq!(hex::encode(&data), plaintext, "{mode}");
    }
}
