//! Modes and keys that the kernel which wrote the image had not: the tree is encrypted anew, then read and verified.

use crate::rig::{contents, oracle, plain_tree, plaintext};
use crate::transcode::transcode;
use inlinecrypt_cipher::Mode;
use inlinecrypt_cipher::kdf::{KdfVariant, inline_encryption_key, software_secret};
use inlinecrypt_cipher::names::NamesMode;
use inlinecrypt_fscrypt::MasterKey;
use inlinecrypt_fscrypt::image::{Image, Keyring};
use inlinecrypt_fscrypt::policy::{ContentsMode, Derivation, KeyRef, Policy};
use inlinecrypt_fscrypt::verify::verify;

const RAW: [u8; 64] = [0x6b; 64];
const MASTER: [u8; 32] = [0x77; 32];

fn raw() -> MasterKey {
    MasterKey::raw(&RAW).unwrap()
}

fn wrapped() -> MasterKey {
    let inline = inline_encryption_key(KdfVariant::V1, &MASTER, Mode::Aes256Xts);
    MasterKey::wrapped(&software_secret(KdfVariant::V1, &MASTER), &inline).unwrap()
}

#[test]
fn every_mode_and_form_of_key_is_read_and_verified() {
    use ContentsMode as C;
    use Derivation::{DirectKey, IvInoLblk32, IvInoLblk64, PerFileKey};
    use NamesMode as N;
    type Case = (fn() -> MasterKey, ContentsMode, NamesMode, Derivation, u8);
    let cases: [Case; 9] = [
        (raw, C::Aes256Xts, N::Aes256Hctr2, PerFileKey, 0),
        (raw, C::Aes256Xts, N::Aes256Hctr2, IvInoLblk64, 0),
        (raw, C::Aes128CbcEssiv, N::Aes128Cts, PerFileKey, 10),
        (raw, C::Adiantum, N::Adiantum, PerFileKey, 0),
        (raw, C::Adiantum, N::Adiantum, DirectKey, 9),
        (raw, C::Sm4Xts, N::Sm4Cts, PerFileKey, 0),
        (wrapped, C::Aes256Xts, N::Aes256Cts, IvInoLblk64, 0),
        (wrapped, C::Aes256Xts, N::Aes256Hctr2, IvInoLblk32, 0),
        (wrapped, C::Aes256Xts, N::Aes256Cts, IvInoLblk64, 9),
    ];
    let (oracle, image) = oracle();
    let tree = plain_tree(&oracle);
    let old = MasterKey::raw(&hex::decode(&oracle.master_key).unwrap()).unwrap();
    for (key, contents_mode, names, derivation, log2) in cases {
        let name = KeyRef::Identifier(key().name().identifier);
        let policy = Policy::new(contents_mode, names, 32, derivation, log2, name).unwrap();
        let mut image = image.clone();
        // The directory xts_default.
        transcode(&mut image, 12, &old, &key(), policy);
        let mut keys = Keyring::default();
        keys.add(key(), None);
        let opened = Image::open(image, keys).unwrap();
        for against in [None, Some(tree.path().join("xts_default"))] {
            let report = verify(&opened, b"xts_default", against.as_deref()).unwrap();
            assert_eq!(report.problems, [], "{policy}");
            assert!(report.is_good(), "{policy}");
            assert_eq!((report.policies[0].policy, report.checked.files), (policy, 9));
        }
        let file = oracle.policies[0].files.iter().find(|file| file.path == "xts_default/sparse").unwrap();
        assert!(contents(&opened, &file.path).unwrap() == plaintext(file), "{policy}");
    }
}
