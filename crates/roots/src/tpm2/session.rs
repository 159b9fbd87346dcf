//! Sessions that whoever listens between us and the TPM learns nothing from: salted, so that only the TPM that has the
//! storage root key can compute their keys, with HMACs, and with the first parameter encrypted.
//!
//! "TPM 2.0 Library", part 1, revision 1.59: 11.4.10 (KDFa, KDFe), 19.6 (HMACs, session keys), 21.3 (parameter encryption
//! with CFB).

use aws_lc_rs::agreement::{self, ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey, agree_ephemeral};
use aws_lc_rs::cipher::{
    AES_128, DecryptingKey, DecryptionContext, EncryptingKey, EncryptionContext, UnboundCipherKey,
};
use aws_lc_rs::error::Unspecified;
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::{digest, hmac, rand};
use zeroize::Zeroizing;

/// SHA-256 over the pieces.
pub(super) fn sha256(pieces: &[&[u8]]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    pieces.iter().for_each(|piece| context.update(piece));
    context.finish().as_ref().try_into().expect("SHA-256 gives 32 bytes")
}

pub(super) fn hmac_sha256(key: &[u8], pieces: &[&[u8]]) -> [u8; 32] {
    let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    pieces.iter().for_each(|piece| context.update(piece));
    context.sign().as_ref().try_into().expect("HMAC-SHA-256 gives 32 bytes")
}

/// KDFa for 256 bits, which is one block of SHA-256.
fn kdf_a(key: &[u8], label: &[u8], u: &[u8], v: &[u8]) -> Zeroizing<[u8; 32]> {
    let (one, bits) = (1_u32.to_be_bytes(), 256_u32.to_be_bytes());
    Zeroizing::new(hmac_sha256(key, &[&one, label, &[0], u, v, &bits]))
}

/// KDFe for 256 bits.
fn kdf_e(z: &[u8], label: &[u8], u: &[u8], v: &[u8]) -> Zeroizing<[u8; 32]> {
    Zeroizing::new(sha256(&[&1_u32.to_be_bytes(), z, label, &[0], u, v]))
}

/// A nonce of ours.
pub(super) fn nonce() -> Result<[u8; 32], Unspecified> {
    let mut nonce = [0; 32];
    rand::fill(&mut nonce)?;
    Ok(nonce)
}

/// A salt for a session, and our point, by which the TPM finds it, too.
pub(super) struct Salt {
    pub(super) salt: Zeroizing<[u8; 32]>,
    pub(super) x: [u8; 32],
    pub(super) y: [u8; 32],
}

impl Salt {
    /// For the TPM whose storage root key has this point. Fails if it is none, or without randomness.
    pub(super) fn new(point: &([u8; 32], [u8; 32])) -> Result<Self, Unspecified> {
        let ours = EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new())?;
        let public = ours.compute_public_key()?;
        let [x, y] = [1, 33].map(|at| {
            let coordinate: [u8; 32] =
                public.as_ref()[at..at + 32].try_into().expect("an uncompressed point");
            coordinate
        });
        let theirs = [&[4][..], &point.0, &point.1].concat();
        let theirs: UnparsedPublicKey<Vec<u8>> = agreement::UnparsedPublicKey::new(&ECDH_P256, theirs);
        let salt = agree_ephemeral(ours, &theirs, Unspecified, |z| Ok(kdf_e(z, b"SECRET", &x, &point.0)))?;
        Ok(Self { salt, x, y })
    }
}

/// A session under way.
pub(super) struct Session {
    pub(super) handle: u32,
    key: Zeroizing<[u8; 32]>,
    nonce_tpm: Vec<u8>,
    nonce_caller: [u8; 32],
}

impl Session {
    pub(super) fn new(handle: u32, salt: &Salt, nonce_tpm: &[u8], nonce_caller: [u8; 32]) -> Self {
        let key = kdf_a(&*salt.salt, b"ATH", nonce_tpm, &nonce_caller);
        Self { handle, key, nonce_tpm: nonce_tpm.to_vec(), nonce_caller }
    }

    /// Takes a new nonce for the next command.
    pub(super) fn turn(&mut self) -> Result<(), Unspecified> {
        self.nonce_caller = nonce()?;
        Ok(())
    }

    /// Our nonce.
    pub(super) fn nonce_caller(&self) -> &[u8; 32] {
        &self.nonce_caller
    }

    /// The TPM's new nonce, from its answer.
    pub(super) fn turned(&mut self, nonce_tpm: &[u8]) {
        self.nonce_tpm = nonce_tpm.to_vec();
    }

    /// The HMAC of a command.
    pub(super) fn command_hmac(&self, auth: &[u8], cp_hash: &[u8; 32], attributes: u8) -> [u8; 32] {
        hmac_sha256(&self.value(auth), &[cp_hash, &self.nonce_caller, &self.nonce_tpm, &[attributes]])
    }

    /// The HMAC of an answer.
    pub(super) fn answer_hmac(&self, auth: &[u8], rp_hash: &[u8; 32], attributes: u8) -> [u8; 32] {
        hmac_sha256(&self.value(auth), &[rp_hash, &self.nonce_tpm, &self.nonce_caller, &[attributes]])
    }

    /// Encrypts a command's first parameter.
    pub(super) fn encrypt(&self, auth: &[u8], bytes: &mut [u8]) -> Result<(), Unspecified> {
        let (key, iv) = self.cfb(auth, &self.nonce_caller, &self.nonce_tpm)?;
        EncryptingKey::cfb128(key)?.less_safe_encrypt(bytes, EncryptionContext::Iv128(iv)).map(drop)
    }

    /// Decrypts an answer's first parameter.
    pub(super) fn decrypt(&self, auth: &[u8], bytes: &mut [u8]) -> Result<(), Unspecified> {
        let (key, iv) = self.cfb(auth, &self.nonce_tpm, &self.nonce_caller)?;
        DecryptingKey::cfb128(key)?.decrypt(bytes, DecryptionContext::Iv128(iv)).map(drop)
    }

    fn cfb(
        &self,
        auth: &[u8],
        newer: &[u8],
        older: &[u8],
    ) -> Result<(UnboundCipherKey, FixedLength<16>), Unspecified> {
        let bytes = kdf_a(&self.value(auth), b"CFB", newer, older);
        let (key, iv) = bytes.split_at(16);
        let iv: [u8; 16] = iv.try_into().expect("32 bytes, less 16");
        Ok((UnboundCipherKey::new(&AES_128, key)?, FixedLength::from(iv)))
    }

    /// The session's key and, behind it, the authorization value of what it is used for.
    fn value(&self, auth: &[u8]) -> Zeroizing<Vec<u8>> {
        let mut value = Zeroizing::new(Vec::with_capacity(64));
        value.extend(&*self.key);
        value.extend(auth);
        value
    }
}
