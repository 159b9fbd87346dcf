//! The secret, wrapped by a key on a PKCS#11 token that never leaves it.
//!
//! An AES key wraps with AES-GCM under a random IV; an RSA key, for tokens that have no other, with RSA-OAEP. OAEP is that
//! of SHA-1, the only one that all modules know; it does not rest on SHA-1 being free of collisions (RFC 8017, B.1). A key
//! that is missing is made when a root is: AES-256, neither readable nor extractable.
//!
//! ```text
//!   offset  bytes   the container's body; lengths are little-endian
//!        0      1   1 AES-GCM, 2 RSA-OAEP
//!        1     12   IV; zeroes for RSA
//!       13          five times 2 bytes of length and so many bytes:
//!                   the secret, wrapped; label and serial number of the token; label and identifier of the key
//! ```
//!
//! What the container says about token and key is for people. Which ones are used, the URI says.

use crate::{fail, secret_from};
use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error as CkError, RvError};
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsOaepParams, PkcsOaepSource};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki::types::RawAuthPin;
use inlinecrypt_core::error::{Error, ErrorKind};
use inlinecrypt_engine::root::{Pkcs11Spec, Secret};
use zeroize::Zeroizing;

const IV_BYTES: usize = 12;
const TAG_BITS: usize = 128;

/// What AES-GCM binds to the secret.
const ASSOCIATED: &[u8] = b"inlinecrypt v1 root on a token";

/// A wrapped secret.
pub(crate) struct Wrapped {
    /// Whether opening it takes a PIN.
    pub(crate) asks: bool,
    pub(crate) body: Vec<u8>,
    /// What it opens to.
    pub(crate) opened: Secret,
}

/// Wraps `secret` by the key that `spec` names, which is made if it is missing.
pub(crate) fn wrap(spec: &Pkcs11Spec, pin: Option<&[u8]>, secret: &Secret) -> Result<Wrapped, Error> {
    let module = Module::load(spec)?;
    let (slot, token) = module.find(spec)?;
    let session = Use::start(&module, slot, &token, pin, Access::MayMakeKeys)?;
    let way = match session.find_key(spec, ObjectClass::SECRET_KEY)? {
        Some(_) => Way::AesGcm,
        None if session.find_key(spec, ObjectClass::PRIVATE_KEY)?.is_some() => Way::RsaOaep,
        None => {
            session.make_key(spec, &token)?;
            Way::AesGcm
        }
    };
    let mut iv = [0; IV_BYTES];
    let sealed = match way {
        Way::AesGcm => {
            aws_lc_rs::rand::fill(&mut iv)
                .map_err(|_unspecified| fail(ErrorKind::EngineFailed, "the system gave no random bytes"))?;
            let key = session.key(spec, &token, ObjectClass::SECRET_KEY)?;
            session.call("wrap", |session| {
                with_gcm(&mut iv.clone(), |gcm| session.encrypt(gcm, key, &secret[..]))
            })?
        }
        Way::RsaOaep => {
            let key = session.key(spec, &token, ObjectClass::PUBLIC_KEY)?;
            session.call("wrap", |session| session.encrypt(&oaep(), key, &secret[..]))?
        }
    };
    let class = if way == Way::AesGcm { ObjectClass::SECRET_KEY } else { ObjectClass::PRIVATE_KEY };
    let (key_label, key_id) = session.names(session.key(spec, &token, class)?)?;
    let kept = Kept {
        way,
        iv,
        sealed,
        token_label: token.label().to_owned(),
        token_serial: token.serial_number().to_owned(),
        key_label,
        key_id,
    };
    let opened = session.open(spec, &token, &kept)?;
    Ok(Wrapped { asks: token.login_required(), body: kept.to_bytes(), opened })
}

/// Opens what [`wrap`] made.
///
/// # Errors
///
/// Told apart as well as the module lets us: no module, no token, no key, a wrong PIN and what is known about the tries
/// left, another key.
pub(crate) fn open(spec: &Pkcs11Spec, pin: Option<&[u8]>, body: &[u8]) -> Result<Secret, Error> {
    let kept = Kept::parse(body).ok_or_else(|| {
        fail(ErrorKind::KeyRejected, "is no root wrapped by a token; restore it from a copy")
    })?;
    let module = Module::load(spec)?;
    let (slot, token) = module.find(spec)?;
    Use::start(&module, slot, &token, pin, Access::Reads)?.open(spec, &token, &kept)
}

/// What people are told about a wrapped root.
pub(crate) fn describe(body: &[u8]) -> Vec<(&'static str, String)> {
    let Some(kept) = Kept::parse(body) else { return vec![("wrapped", "unreadable".to_owned())] };
    vec![
        ("mechanism", kept.way.name().to_owned()),
        ("token", format!("{} (serial {})", kept.token_label, kept.token_serial)),
        ("key", format!("{}{}", kept.key_label, with_id(&kept.key_id))),
    ]
}

fn with_id(id: &[u8]) -> String {
    if id.is_empty() { String::new() } else { format!(" (id {})", hex(id)) }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How a key wraps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    AesGcm,
    RsaOaep,
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::AesGcm => "AES-GCM",
            Self::RsaOaep => "RSA-OAEP",
        }
    }
}

fn with_gcm<T>(iv: &mut [u8], f: impl FnOnce(&Mechanism<'_>) -> Result<T, CkError>) -> Result<T, CkError> {
    f(&Mechanism::AesGcm(GcmParams::new(iv, ASSOCIATED, TAG_BITS.try_into()?)?))
}

fn oaep() -> Mechanism<'static> {
    let params = PkcsOaepParams::new(MechanismType::SHA1, PkcsMgfType::MGF1_SHA1, PkcsOaepSource::empty());
    Mechanism::RsaPkcsOaep(params)
}

/// What stands in a container.
#[derive(Debug, PartialEq, Eq)]
struct Kept {
    way: Way,
    iv: [u8; IV_BYTES],
    sealed: Vec<u8>,
    token_label: String,
    token_serial: String,
    key_label: String,
    key_id: Vec<u8>,
}

impl Kept {
    fn to_bytes(&self) -> Vec<u8> {
        let Self { way, iv, sealed, token_label, token_serial, key_label, key_id } = self;
        let mut bytes = vec![if *way == Way::AesGcm { 1 } else { 2 }];
        bytes.extend(iv);
        for part in [sealed, token_label.as_bytes(), token_serial.as_bytes(), key_label.as_bytes(), key_id] {
            // Labels are for people: the end of an endless one can be spared.
            let part = &part[..part.len().min(PART_BYTES_MAX)];
            bytes.extend(u16::try_from(part.len()).expect("at most PART_BYTES_MAX").to_le_bytes());
            bytes.extend(part);
        }
        bytes
    }

    fn parse(body: &[u8]) -> Option<Self> {
        let (first, rest) = body.split_first()?;
        let way = match first {
            1 => Way::AesGcm,
            2 => Way::RsaOaep,
            _ => return None,
        };
        let (iv, mut rest) = rest.split_first_chunk::<IV_BYTES>()?;
        let mut part = || {
            let (len, tail) = rest.split_first_chunk::<2>()?;
            let (part, tail) = tail.split_at_checked(usize::from(u16::from_le_bytes(*len)))?;
            rest = tail;
            Some(part.to_vec())
        };
        let sealed = part()?;
        let mut text = || Some(String::from_utf8_lossy(&part()?).into_owned());
        let (token_label, token_serial, key_label) = (text()?, text()?, text()?);
        let key_id = part()?;
        rest.is_empty().then_some(Self { way, iv: *iv, sealed, token_label, token_serial, key_label, key_id })
    }
}

/// Enough for a secret wrapped by RSA of 4096 bits, and for any label that is one.
const PART_BYTES_MAX: usize = 512;

/// A loaded module.
struct Module {
    name: String,
    context: Pkcs11,
}

impl Module {
    fn load(spec: &Pkcs11Spec) -> Result<Self, Error> {
        let name = spec.module.display().to_string();
        let context = Pkcs11::new(&spec.module).map_err(|why| {
            fail(
                ErrorKind::NotFound,
                format!(
                    "PKCS#11 module {name} cannot be loaded: {}; install it, or correct module-path",
                    one_line(&why)
                ),
            )
        })?;
        let this = Self { name, context };
        this.told(this.context.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)), "start")?;
        Ok(this)
    }

    /// The one token that fits.
    fn find(&self, spec: &Pkcs11Spec) -> Result<(Slot, TokenInfo), Error> {
        let slots = self.told(self.context.get_slots_with_token(), "list its tokens")?;
        let mut seen = Vec::new();
        let mut fitting = Vec::new();
        for slot in slots {
            // A token that was pulled out meanwhile is none.
            let Ok(token) = self.context.get_token_info(slot) else { continue };
            if !token.token_initialized() {
                continue;
            }
            seen.push(format!("{:?} (serial {})", token.label(), token.serial_number()));
            let fits = |wanted: &Option<String>, is: &str| wanted.as_ref().is_none_or(|wanted| wanted == is);
            if fits(&spec.token, token.label())
                && fits(&spec.serial, token.serial_number())
                && fits(&spec.manufacturer, token.manufacturer_id())
                && fits(&spec.model, token.model())
            {
                fitting.push((slot, token));
            }
        }
        let there = || if seen.is_empty() { "no token at all".to_owned() } else { seen.join(", ") };
        match (fitting.pop(), fitting.is_empty()) {
            (Some(found), true) => Ok(found),
            (Some(_), false) => Err(fail(
                ErrorKind::Invalid,
                format!("the URI fits several tokens of {}: {}; add token= or serial=", self.name, there()),
            )),
            (None, _) => Err(fail(
                ErrorKind::NotFound,
                format!("{} has no such token: it has {}; put it in, or correct the URI", self.name, there()),
            )),
        }
    }

    fn told<T>(&self, result: Result<T, CkError>, what: &str) -> Result<T, Error> {
        result.map_err(|why| {
            fail(
                ErrorKind::EngineFailed,
                format!("PKCS#11 module {} failed to {what}: {}; check the token", self.name, one_line(&why)),
            )
        })
    }
}

fn one_line(why: &CkError) -> String {
    why.to_string().split_whitespace().collect::<Vec<_>>().join(" ").replace("; ", ", ")
}

/// Whether a session may change what is on the token.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Reads,
    MayMakeKeys,
}

/// A session with a token, logged in.
struct Use<'a> {
    module: &'a Module,
    session: Session,
}

impl<'a> Use<'a> {
    fn start(
        module: &'a Module,
        slot: Slot,
        token: &TokenInfo,
        pin: Option<&[u8]>,
        access: Access,
    ) -> Result<Self, Error> {
        let session = match access {
            Access::MayMakeKeys if !token.write_protected() => module.context.open_rw_session(slot),
            _ => module.context.open_ro_session(slot),
        };
        let session = module.told(session, "begin a session")?;
        if token.login_required() {
            let name = token.label();
            if token.user_pin_locked() {
                return Err(locked(name));
            }
            let pin = pin.filter(|pin| !pin.is_empty());
            let done = match pin {
                Some(pin) => session.login_with_raw(UserType::User, &RawAuthPin::new(Box::new(pin.to_vec()))),
                // A keypad of its own.
                None if token.protected_authentication_path() => session.login(UserType::User, None),
                None => {
                    return Err(fail(
                        ErrorKind::Permission,
                        format!("token {name:?} takes a PIN, and none was given"),
                    ));
                }
            };
            match done {
                Ok(()) | Err(CkError::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {}
                Err(CkError::Pkcs11(
                    RvError::PinIncorrect | RvError::PinLenRange | RvError::PinInvalid,
                    _,
                )) => {
                    return Err(wrong_pin(name, module.context.get_token_info(slot).ok().as_ref()));
                }
                Err(CkError::Pkcs11(RvError::PinLocked, _)) => return Err(locked(name)),
                Err(CkError::Pkcs11(RvError::PinExpired, _)) => {
                    let why = format!(
                        "the PIN of token {name:?} has expired; set a new one with the token's own tool"
                    );
                    return Err(fail(ErrorKind::Permission, why));
                }
                Err(CkError::Pkcs11(RvError::UserPinNotInitialized, _)) => {
                    let why = format!("token {name:?} has no PIN yet; set one: pkcs11-tool --init-pin");
                    return Err(fail(ErrorKind::Permission, why));
                }
                Err(why) => return Err(module.told::<()>(Err(why), "log in").expect_err("an error")),
            }
        }
        Ok(Self { module, session })
    }

    fn call<T>(&self, what: &str, f: impl FnOnce(&Session) -> Result<T, CkError>) -> Result<T, Error> {
        self.module.told(f(&self.session), what)
    }

    /// The key of this class that the URI names, if there is one.
    fn find_key(&self, spec: &Pkcs11Spec, class: ObjectClass) -> Result<Option<ObjectHandle>, Error> {
        let mut template = vec![Attribute::Class(class)];
        if class == ObjectClass::SECRET_KEY {
            template.push(Attribute::KeyType(KeyType::AES));
        } else {
            template.push(Attribute::KeyType(KeyType::RSA));
        }
        template.extend(spec.object.as_ref().map(|label| Attribute::Label(label.as_bytes().to_vec())));
        template.extend(spec.id.as_ref().map(|id| Attribute::Id(id.clone())));
        let found = self.call("look for the key", |session| session.find_objects(&template))?;
        match found[..] {
            [] => Ok(None),
            [key] => Ok(Some(key)),
            _ => Err(fail(
                ErrorKind::Invalid,
                format!("the URI fits {} keys of the token; add object= or id=", found.len()),
            )),
        }
    }

    fn key(&self, spec: &Pkcs11Spec, token: &TokenInfo, class: ObjectClass) -> Result<ObjectHandle, Error> {
        self.find_key(spec, class)?.ok_or_else(|| {
            let label = spec.object.as_ref().map(|label| format!(" {label:?}")).unwrap_or_default();
            let id = spec.id.as_ref().map(|id| format!(" with id {}", hex(id))).unwrap_or_default();
            fail(
                ErrorKind::NotFound,
                format!(
                    "token {:?} (serial {}) has no key{label}{id}; put in the token that wrapped it, or correct the URI",
                    token.label(),
                    token.serial_number()
                ),
            )
        })
    }

    /// A new AES-256 key, which nobody ever sees.
    fn make_key(&self, spec: &Pkcs11Spec, token: &TokenInfo) -> Result<(), Error> {
        if token.write_protected() {
            let why = format!(
                "token {:?} has no such key, and is write-protected; name a key that it has",
                token.label()
            );
            return Err(fail(ErrorKind::NotFound, why));
        }
        let mut template = vec![
            Attribute::Token(true),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::Encrypt(true),
            Attribute::Decrypt(true),
            Attribute::ValueLen(32.into()),
        ];
        template.extend(spec.object.as_ref().map(|label| Attribute::Label(label.as_bytes().to_vec())));
        template.extend(spec.id.as_ref().map(|id| Attribute::Id(id.clone())));
        self.session.generate_key(&Mechanism::AesKeyGen, &template).map(drop).map_err(|why| {
            fail(
                ErrorKind::Unsupported,
                format!(
                    "token {:?} has no such key, and makes none of AES-256: {}; make an RSA key with the token's own tool \
                     and name that",
                    token.label(),
                    one_line(&why)
                ),
            )
        })
    }

    /// Label and identifier of a key.
    fn names(&self, key: ObjectHandle) -> Result<(String, Vec<u8>), Error> {
        let wanted = [AttributeType::Label, AttributeType::Id];
        let attributes =
            self.call("say how the key is called", |session| session.get_attributes(key, &wanted))?;
        let mut names = (String::new(), Vec::new());
        for attribute in attributes {
            match attribute {
                Attribute::Label(label) => names.0 = String::from_utf8_lossy(&label).into_owned(),
                Attribute::Id(id) => names.1 = id,
                _ => {}
            }
        }
        Ok(names)
    }

    fn open(&self, spec: &Pkcs11Spec, token: &TokenInfo, kept: &Kept) -> Result<Secret, Error> {
        let Kept { way, iv, sealed, .. } = kept;
        let session = &self.session;
        let opened = match way {
            Way::AesGcm => {
                let key = self.key(spec, token, ObjectClass::SECRET_KEY)?;
                with_gcm(&mut iv.clone(), |gcm| session.decrypt(gcm, key, sealed))
            }
            Way::RsaOaep => {
                let key = self.key(spec, token, ObjectClass::PRIVATE_KEY)?;
                session.decrypt(&oaep(), key, sealed)
            }
        };
        let opened = opened.map(Zeroizing::new).map_err(|why| match why {
            // What modules say of a tag that is wrong, or of padding: they differ.
            CkError::Pkcs11(
                RvError::EncryptedDataInvalid
                | RvError::EncryptedDataLenRange
                | RvError::DataInvalid
                | RvError::GeneralError
                | RvError::FunctionFailed,
                _,
            ) => fail(
                ErrorKind::KeyRejected,
                format!(
                    "the key on token {:?} does not open it: it was wrapped by another key of that name, on token {:?} \
                     (serial {}), or is damaged; put in that token",
                    token.label(),
                    kept.token_label,
                    kept.token_serial
                ),
            ),
            why => self.module.told::<()>(Err(why), "open it").expect_err("an error"),
        })?;
        secret_from(&opened).ok_or_else(|| {
            fail(ErrorKind::KeyRejected, "opens to something that is no root; restore it from a copy")
        })
    }
}

/// As much as the token tells about the tries that are left (PKCS#11 3.1, 3.2: `CKF_USER_PIN_*`).
fn wrong_pin(token: &str, info: Option<&TokenInfo>) -> Error {
    let left = match info {
        Some(info) if info.user_pin_locked() => return locked(token),
        Some(info) if info.user_pin_final_try() => "one more wrong one, and the token locks itself",
        Some(info) if info.user_pin_count_low() => {
            "the token counts wrong ones, and does not say how many tries are left"
        }
        _ => "the token does not say how many tries are left",
    };
    fail(ErrorKind::Permission, format!("wrong PIN for token {token:?}: {left}; give the right one"))
}

fn locked(token: &str) -> Error {
    fail(
        ErrorKind::Permission,
        format!(
            "the PIN of token {token:?} was wrong too often, and is locked; its security officer can set a new one"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kept() -> impl Strategy<Value = Kept> {
        let bytes = || prop::collection::vec(any::<u8>(), 0..PART_BYTES_MAX);
        (any::<bool>(), any::<[u8; IV_BYTES]>(), bytes(), "\\PC{0,20}", bytes()).prop_map(
            |(aes, iv, sealed, label, key_id)| Kept {
                way: if aes { Way::AesGcm } else { Way::RsaOaep },
                iv,
                sealed,
                token_label: label.clone(),
                token_serial: label.clone(),
                key_label: label,
                key_id,
            },
        )
    }

    proptest! {
        #[test]
        fn what_was_wrapped_survives_the_container(kept in kept()) {
            prop_assert_eq!(Kept::parse(&kept.to_bytes()), Some(kept));
        }

        #[test]
        fn cut_and_longer_bodies_are_refused(kept in kept()) {
            let bytes = kept.to_bytes();
            for len in 0..bytes.len() {
                prop_assert_eq!(Kept::parse(&bytes[..len]), None);
            }
            prop_assert_eq!(Kept::parse(&[&bytes[..], &[0]].concat()), None);
        }

        #[test]
        fn any_body_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Kept::parse(&bytes);
            let _ = describe(&bytes);
        }
    }

    #[test]
    fn a_missing_module_is_told_with_its_name() {
        let spec = "pkcs11:object=k?module-path=/nowhere/m.so&file=r".parse().unwrap();
        let inlinecrypt_engine::RootSpec::Pkcs11(spec) = spec else { panic!("a token") };
        let error = open(&spec, None, &[]).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::KeyRejected, "the container is looked at first");
        let secret = Box::new(Zeroizing::new([0; 32]));
        let error = wrap(&spec, None, &secret).map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(
            error.to_string().contains("/nowhere/m.so") && error.to_string().contains("module-path"),
            "{error}"
        );
    }
}
