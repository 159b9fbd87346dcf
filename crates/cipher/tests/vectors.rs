//! Known answers: do we agree with the standards, and with what Linux writes? Each file in `vectors/` says where it
//! comes from.

use inlinecrypt_cipher::kdf::{self, KdfVariant};
use inlinecrypt_cipher::{Dun, MODES, Mode, beneath};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use shake::digest::{ExtendableOutput, Update, XofReader};
use std::io::Read;
use std::path::PathBuf;

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("vectors").join(name)
}

fn load<T: DeserializeOwned>(name: &str) -> T {
    let text = std::fs::read(path(name)).unwrap_or_else(|e| panic!("vectors/{name}: {e}"));
    serde_json::from_slice(&text).unwrap_or_else(|e| panic!("vectors/{name}: {e}"))
}

/// Bytes that stand in JSON as hexadecimal digits.
#[derive(Clone, PartialEq, Eq)]
struct Hex(Vec<u8>);

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let digits = String::deserialize(deserializer)?;
        hex::decode(&digits).map(Hex).map_err(serde::de::Error::custom)
    }
}

impl Hex {
    fn array<const N: usize>(&self) -> [u8; N] {
        self.0.as_slice().try_into().unwrap_or_else(|_| panic!("{N} bytes expected, {} found", self.0.len()))
    }
}

/// The DUN whose little-endian bytes start with `bytes` and go on with zeroes.
fn dun(bytes: &[u8]) -> Dun {
    let mut padded = [0; 32];
    padded[..bytes.len()].copy_from_slice(bytes);
    let mut limbs = [0; 4];
    for (limb, bytes) in limbs.iter_mut().zip(padded.as_chunks().0) {
        *limb = u64::from_le_bytes(*bytes);
    }
    Dun::from_limbs(limbs)
}

fn shake256(text: &str, len: usize) -> Vec<u8> {
    let mut hasher = shake::Shake256::default();
    hasher.update(text.as_bytes());
    let mut out = vec![0; len];
    hasher.finalize_xof().read(&mut out);
    out
}

/// The text in a rule of the form `SHAKE-256("text")`.
fn rule_text(rule: &str) -> &str {
    rule.strip_prefix("SHAKE-256(\"")
        .and_then(|rest| rest.strip_suffix("\")"))
        .expect("the only rule there is")
}

#[derive(Deserialize)]
struct ModeFile {
    mode: String,
    provenance: Vec<String>,
    cases: Vec<ModeCase>,
}

#[derive(Deserialize)]
struct ModeCase {
    source: String,
    dun: Hex,
    unit_bytes: usize,
    key: Hex,
    plaintext: Hex,
    ciphertext: Hex,
}

#[test]
fn every_mode_has_known_answers_and_gives_them() {
    for info in &MODES {
        let file: ModeFile = load(&format!("{}.json", info.name.to_lowercase()));
        assert_eq!(file.mode, info.name);
        assert!(!file.provenance.is_empty() && !file.cases.is_empty(), "{}", info.name);
        for case in &file.cases {
            assert!(!case.plaintext.0.is_empty(), "{}", case.source);
            let cipher = info.expand(&case.key.0).unwrap_or_else(|e| panic!("{}: {e}", case.source));
            let ways = beneath::ways(info.mode).into_iter().map(|(way, expand)| (way, expand(&case.key.0)));
            for (way, cipher) in ways.chain([("as the table says", cipher)]) {
                let source = format!("{}, {way}: {}", info.name, case.source);
                let mut data = case.plaintext.0.clone();
                cipher.encrypt(dun(&case.dun.0), case.unit_bytes, &mut data);
                assert!(data == case.ciphertext.0, "{source}: encryption");
                cipher.decrypt(dun(&case.dun.0), case.unit_bytes, &mut data);
                assert!(data == case.plaintext.0, "{source}: decryption");
            }
        }
    }
}

#[derive(Deserialize)]
struct DmFile {
    images: Vec<DmImage>,
}

#[derive(Deserialize)]
struct DmImage {
    name: String,
    image: String,
    cipher: String,
    key: Hex,
    iv_offset: u64,
    sector_size: usize,
    iv_large_sectors: bool,
    data_byte_offset: usize,
    data_len: usize,
    plaintext_rule: String,
    image_sha256: Hex,
}

fn decompress(name: &str) -> Vec<u8> {
    let file = std::fs::File::open(path(&format!("{name}.zst"))).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut image = Vec::new();
    ruzstd::decoding::StreamingDecoder::new(file).unwrap().read_to_end(&mut image).unwrap();
    image
}

#[test]
fn images_that_linux_wrote_are_read_and_rewritten_to_the_byte() {
    let DmFile { images } = load("dm-crypt.json");
    assert_eq!(images.len(), 4);
    for image in images {
        let name = &image.name;
        let mode = match image.cipher.as_str() {
            "aes-xts-plain64" => Mode::Aes256Xts,
            "capi:essiv(cbc(aes),sha256)-plain64" => Mode::Aes128CbcEssiv,
            "capi:adiantum(xchacha12,aes)-plain64" => Mode::Adiantum,
            other => panic!("{name}: {other}"),
        };
        let whole = decompress(&image.image);
        assert_eq!(Sha256::digest(&whole).as_slice(), image.image_sha256.0, "{name}: damaged in our care");
        let ciphertext = &whole[image.data_byte_offset..][..image.data_len];
        // dm-crypt adds the offset in 512-byte sectors, then counts in its own sectors if told to.
        assert!(image.iv_large_sectors || image.sector_size == 512, "{name}");
        let first = Dun::from(image.iv_offset >> (image.sector_size.trailing_zeros() - 9));

        let cipher = mode.info().expand(&image.key.0).unwrap();
        let mut data = ciphertext.to_vec();
        cipher.decrypt(first, image.sector_size, &mut data);
        assert!(data == shake256(rule_text(&image.plaintext_rule), image.data_len), "{name}: decryption");
        cipher.encrypt(first, image.sector_size, &mut data);
        assert!(data == ciphertext, "{name}: encryption");
    }
}

#[derive(Deserialize)]
struct FscryptFile {
    fs_uuid: Hex,
    file_nonce: Hex,
    hardware: Vec<Hardware>,
    raw: RawKey,
}

#[derive(Deserialize)]
struct Hardware {
    master: Hex,
    inline_encryption_key: Hex,
    software_secret: Hex,
    key_identifier: Hex,
    cases: Vec<FscryptCase>,
}

#[derive(Deserialize)]
struct RawKey {
    master: Hex,
    key_identifier: Hex,
    cases: Vec<FscryptCase>,
}

#[derive(Debug, Deserialize)]
struct FscryptCase {
    mode: String,
    policy: String,
    unit_bytes: usize,
    index: u64,
    inode: u64,
    fscrypt_mode: u8,
    bytes: usize,
    first64: String,
    sha256: String,
}

impl FscryptCase {
    fn mode(&self) -> Mode {
        Mode::from_name(&self.mode).unwrap()
    }

    /// The DUN of the unit `step` after the first. `hkdf_key` is what fscrypt derives its keys from.
    fn dun(&self, step: u64, hkdf_key: &[u8], nonce: &[u8; 16]) -> Dun {
        let index = self.index + step;
        match self.policy.as_str() {
            "per-file" => Dun::from(index),
            "iv-ino-lblk-64" => Dun::from(self.inode << 32 | index),
            "iv-ino-lblk-32" => {
                let mut key = [0; 16];
                kdf::fscrypt_hkdf(hkdf_key, 7, &[], &mut key);
                let hash = siphash_2_4(&key, &self.inode.to_le_bytes());
                Dun::from(hash.wrapping_add(index) % (1 << 32))
            }
            "direct-key" => dun(&[&index.to_le_bytes()[..], nonce].concat()),
            other => panic!("{other}"),
        }
    }

    fn check(&self, key: &[u8], hkdf_key: &[u8], nonce: &[u8; 16]) {
        let cipher = self.mode().info().expand(key).unwrap();
        let plaintext = shake256("hwkdf-oracle", self.bytes);
        let mut data = plaintext.clone();
        for (step, unit) in (0..).zip(data.chunks_exact_mut(self.unit_bytes)) {
            cipher.encrypt(self.dun(step, hkdf_key, nonce), self.unit_bytes, unit);
        }
        assert_eq!(hex::encode(&data[..64]), self.first64, "{self:?}");
        assert_eq!(hex::encode(Sha256::digest(&data)), self.sha256, "{self:?}");
        for (step, unit) in (0..).zip(data.chunks_exact_mut(self.unit_bytes)) {
            cipher.decrypt(self.dun(step, hkdf_key, nonce), self.unit_bytes, unit);
        }
        assert!(data == plaintext, "{self:?}");
    }
}

#[test]
fn hardware_wrapped_keys_encrypt_contents_as_fscrypt_expects() {
    let file: FscryptFile = load("fscrypt.json");
    let mut cases = 0;
    for hardware in &file.hardware {
        let master = hardware.master.array();
        let key = kdf::inline_encryption_key(KdfVariant::V1, &master, Mode::Aes256Xts);
        let secret = kdf::software_secret(KdfVariant::V1, &master);
        assert_eq!(*key, hardware.inline_encryption_key.0);
        assert_eq!(*secret, hardware.software_secret.array());
        assert_eq!(kdf::key_identifier_wrapped(&secret), hardware.key_identifier.array());
        for case in &hardware.cases {
            assert_eq!(case.mode(), Mode::Aes256Xts);
            case.check(&key, &*secret, &file.file_nonce.array());
            cases += 1;
        }
    }
    assert_eq!(cases, 24);
}

#[test]
fn raw_keys_encrypt_contents_as_fscrypt_does() {
    let file: FscryptFile = load("fscrypt.json");
    let master = &file.raw.master.0;
    assert_eq!(kdf::key_identifier_raw(master), file.raw.key_identifier.array());
    for case in &file.raw.cases {
        let (context, info) = match case.policy.as_str() {
            "per-file" => (2, file.file_nonce.0.clone()),
            "direct-key" => (3, vec![case.fscrypt_mode]),
            "iv-ino-lblk-64" => (4, [&[case.fscrypt_mode], &file.fs_uuid.0[..]].concat()),
            "iv-ino-lblk-32" => (6, [&[case.fscrypt_mode], &file.fs_uuid.0[..]].concat()),
            other => panic!("{other}"),
        };
        let mut key = vec![0; case.mode().info().key_bytes];
        kdf::fscrypt_hkdf(master, context, &info, &mut key);
        case.check(&key, master, &file.file_nonce.array());
    }
    assert_eq!(file.raw.cases.len(), 30);
}

/// SipHash-2-4 (Aumasson and Bernstein 2012), for the inode hash of fscrypt's IV_INO_LBLK_32.
fn siphash_2_4(key: &[u8; 16], message: &[u8; 8]) -> u64 {
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let (k0, k1) = (word(&key[..8]), word(&key[8..]));
    let mut v = [
        k0 ^ 0x736f_6d65_7073_6575,
        k1 ^ 0x646f_7261_6e64_6f6d,
        k0 ^ 0x6c79_6765_6e65_7261,
        k1 ^ 0x7465_6462_7974_6573,
    ];
    let rounds = |v: &mut [u64; 4], count: usize| {
        for _ in 0..count {
            v[0] = v[0].wrapping_add(v[1]);
            v[1] = v[1].rotate_left(13) ^ v[0];
            v[0] = v[0].rotate_left(32);
            v[2] = v[2].wrapping_add(v[3]);
            v[3] = v[3].rotate_left(16) ^ v[2];
            v[0] = v[0].wrapping_add(v[3]);
            v[3] = v[3].rotate_left(21) ^ v[0];
            v[2] = v[2].wrapping_add(v[1]);
            v[1] = v[1].rotate_left(17) ^ v[2];
            v[2] = v[2].rotate_left(32);
        }
    };
    // The message is one word; the last word holds its length alone.
    for word in [word(message), 8 << 56] {
        v[3] ^= word;
        rounds(&mut v, 2);
        v[0] ^= word;
    }
    v[2] ^= 0xff;
    rounds(&mut v, 4);
    v[0] ^ v[1] ^ v[2] ^ v[3]
}

#[derive(Deserialize)]
struct KdfFile {
    wrapped: Vec<WrappedCase>,
    raw_key_identifiers: Vec<IdentifierCase>,
    cmac: Vec<CmacCase>,
}

#[derive(Deserialize)]
struct WrappedCase {
    variant: String,
    master: Hex,
    inline_encryption_key: Option<Hex>,
    software_secret: Option<Hex>,
    key_identifier: Option<Hex>,
}

#[derive(Deserialize)]
struct IdentifierCase {
    key: Hex,
    key_identifier: Hex,
}

#[derive(Deserialize)]
struct CmacCase {
    key: Hex,
    message: Hex,
    mac: Hex,
}

#[test]
fn derived_keys_are_the_published_ones() {
    let file: KdfFile = load("kdf.json");
    let mut seen = Vec::new();
    for case in &file.wrapped {
        let variant = KdfVariant::from_name(&case.variant).unwrap();
        let master = case.master.array();
        let secret = kdf::software_secret(variant, &master);
        if let Some(expected) = &case.inline_encryption_key {
            assert_eq!(
                *kdf::inline_encryption_key(variant, &master, Mode::Aes256Xts),
                expected.0,
                "{variant}"
            );
            seen.push(variant);
        }
        if let Some(expected) = &case.software_secret {
            assert_eq!(*secret, expected.array(), "{variant}");
        }
        if let Some(expected) = &case.key_identifier {
            assert_eq!(kdf::key_identifier_wrapped(&secret), expected.array(), "{variant}");
        }
    }
    assert!(KdfVariant::ALL.iter().all(|variant| seen.contains(variant)));
}

#[test]
fn identifiers_of_raw_keys_are_the_published_ones() {
    let file: KdfFile = load("kdf.json");
    assert_eq!(file.raw_key_identifiers.len(), 3);
    for case in &file.raw_key_identifiers {
        assert_eq!(kdf::key_identifier_raw(&case.key.0), case.key_identifier.array());
    }
}

#[test]
fn cmac_gives_the_answers_of_sp_800_38b() {
    use cmac::{KeyInit, Mac};
    let file: KdfFile = load("kdf.json");
    assert_eq!(file.cmac.len(), 4);
    for case in &file.cmac {
        let mac =
            cmac::Cmac::<aes::Aes256>::new_from_slice(&case.key.0).unwrap().chain_update(&case.message.0);
        assert_eq!(mac.finalize().into_bytes().as_slice(), case.mac.0);
    }
}

#[derive(Deserialize)]
struct SivFile {
    cases: Vec<SivCase>,
}

#[derive(Deserialize)]
struct SivCase {
    source: String,
    key: Hex,
    associated: Vec<Hex>,
    plaintext: Hex,
    output: Hex,
}

#[test]
fn siv_gives_the_answers_of_rfc_5297() {
    use aes_siv::KeyInit;
    use inlinecrypt_cipher::wrap::{WrappingKey, unwrap, wrap};
    let SivFile { cases } = load("siv.json");
    assert_eq!(cases.len(), 3);
    for case in &cases {
        let associated: Vec<&[u8]> = case.associated.iter().map(|hex| hex.0.as_slice()).collect();
        // The RFC has vectors for AES-128 alone, which we do not wrap with: there they test the library below us.
        if case.key.0.len() == 32 {
            let mut siv = aes_siv::siv::Aes128Siv::new_from_slice(&case.key.0).unwrap();
            assert_eq!(
                siv.encrypt(&associated, &case.plaintext.0).unwrap(),
                case.output.0,
                "{}",
                case.source
            );
        } else {
            let kek = WrappingKey::new(&case.key.array());
            assert_eq!(wrap(&kek, &associated, &case.plaintext.0), case.output.0, "{}", case.source);
            assert_eq!(
                *unwrap(&kek, &associated, &case.output.0).unwrap(),
                case.plaintext.0,
                "{}",
                case.source
            );
        }
    }
}
