//! The secret, sealed by a TPM 2.0: an object that only this TPM can open, below its storage root key.
//!
//! ```text
//!   owner's seed --CreatePrimary--> storage root key (P-256) --Create--> sealed object: secret, policy, PIN
//!                                          |                                 |
//!                                     its name                        private and public part
//!                                          `---------- container ------------'     + values of the registers
//! ```
//!
//! - The policy is: these registers have these values (if any were asked for), and whoever opens it knows the PIN (the
//!   empty one, if none was chosen). Wrong PINs count towards the TPM's lock-out; without a PIN there is nothing to guess.
//! - The secret travels encrypted between us and the TPM, in sessions salted for its storage root key. When a root is
//!   opened, that key is compared with the one that sealed: another TPM, or somebody between, is noticed. When it is
//!   made, the TPM that is there is believed.
//! - Nothing stays in the TPM: all handles are flushed.
//!
//! ```text
//!   offset  bytes   the container's body; numbers are little-endian
//!        0      4   bit i: register i
//!        4      2   their bank, as TPM_ALG_ID; 0 without registers
//!        6     34   name of the storage root key
//!       40      n   the registers' values, in ascending order
//!               2   length, then so many bytes: TPM2B_PRIVATE's content
//!               2   length, then so many bytes: TPM2B_PUBLIC's content
//! ```
//!
//! Start reading at [`open`].

mod session;
mod transport;
mod wire;

use crate::{fail, secret_from};
use inlinecrypt_core::error::{Error, ErrorKind};
use inlinecrypt_engine::root::{PcrBank, Pcrs, Secret, Tcti, Tpm2Spec};
use session::{Salt, Session, hmac_sha256, sha256};
use std::thread;
use std::time::Duration;
use transport::{HEADER_BYTES, Transport};
use wire::{
    CONTINUE_SESSION, FIXED_PARENT, FIXED_TPM, NO_DA, Reader, SESSION_DECRYPT, SESSION_ENCRYPT, TPM_ALG_AES,
    TPM_ALG_CFB, TPM_ALG_KEYEDHASH, TPM_ALG_NULL, TPM_ALG_SHA256, TPM_ALG_SHA384, TPM_CAP_TPM_PROPERTIES,
    TPM_CC_CREATE, TPM_CC_CREATE_PRIMARY, TPM_CC_FLUSH_CONTEXT, TPM_CC_GET_CAPABILITY, TPM_CC_LOAD,
    TPM_CC_PCR_READ, TPM_CC_POLICY_AUTH_VALUE, TPM_CC_POLICY_PCR, TPM_CC_START_AUTH_SESSION, TPM_CC_UNSEAL,
    TPM_PT_LOCKOUT_COUNTER, TPM_PT_LOCKOUT_INTERVAL, TPM_PT_MAX_AUTH_FAIL, TPM_RH_NULL, TPM_RH_OWNER,
    TPM_RS_PW, TPM_SE_HMAC, TPM_SE_POLICY, TPM_ST_NO_SESSIONS, TPM_ST_SESSIONS, Writer,
};
use zeroize::Zeroizing;

const NAME_BYTES: usize = 34;

/// Seals `secret` as `spec` says. Returns the container's body.
pub(crate) fn wrap(spec: &Tpm2Spec, pin: Option<&[u8]>, secret: &Secret) -> Result<Vec<u8>, Error> {
    let auth = auth_value(spec.pin, pin)?;
    let mut tpm = Tpm::open(&spec.tcti)?;
    let srk = tpm.storage_root_key()?;
    let values = match spec.pcrs {
        Some(pcrs) => tpm.read(pcrs)?,
        None => Vec::new(),
    };
    let (private, public) = tpm.seal(&srk, &policy(spec.pcrs, &values), &auth, secret)?;
    Ok(Sealed { pcrs: spec.pcrs, srk_name: srk.name, values, private, public }.to_bytes())
}

/// Opens what [`wrap`] made.
///
/// # Errors
///
/// Told apart as well as the TPM lets us: no TPM, another one, moved registers (which), a wrong PIN (how many tries are
/// left), a TPM that is locked.
pub(crate) fn open(spec: &Tpm2Spec, pin: Option<&[u8]>, body: &[u8]) -> Result<Secret, Error> {
    let sealed = Sealed::parse(body)
        .ok_or_else(|| fail(ErrorKind::KeyRejected, "is no sealed root; restore it from a copy"))?;
    if let (Some(asked), pcrs) = (spec.pcrs, sealed.pcrs)
        && pcrs != Some(asked)
    {
        let is = pcrs.map_or("to no registers".to_owned(), |pcrs| format!("to {pcrs}"));
        return Err(fail(
            ErrorKind::Invalid,
            format!(
                "is sealed {is}, not to {asked}; say what it is, or seal it anew: inlinecrypt root rewrap"
            ),
        ));
    }
    let auth = auth_value(pin.is_some(), pin)?;
    let mut tpm = Tpm::open(&spec.tcti)?;
    let srk = tpm.storage_root_key()?;
    if srk.name != sealed.srk_name {
        return Err(fail(ErrorKind::KeyRejected, FOREIGN));
    }
    if let Some(pcrs) = sealed.pcrs {
        let now = tpm.read(pcrs)?;
        if let Some(moved) = moved(pcrs, &sealed.values, &now) {
            return Err(fail(ErrorKind::KeyRejected, moved));
        }
    }
    tpm.unseal(&srk, &sealed, &auth)
}

const FOREIGN: &str = "was sealed by another TPM, or this one was cleared since; open it there, or open another copy of \
                       this root and seal that one here: inlinecrypt root rewrap";

/// Which registers have changed, and what to do.
fn moved(pcrs: Pcrs, sealed: &[Vec<u8>], now: &[Vec<u8>]) -> Option<String> {
    let hex = |bytes: &[u8]| bytes.iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>();
    let changes: Vec<String> = pcrs
        .numbers()
        .zip(sealed.iter().zip(now))
        .filter(|(_, (sealed, now))| sealed != now)
        .map(|(number, (sealed, now))| {
            format!(
                "register {number} of {} was {}..., and is {}...",
                pcrs.bank.name(),
                hex(sealed),
                hex(now)
            )
        })
        .collect();
    (!changes.is_empty()).then(|| {
        format!(
            "does not open: {}; start the machine as it was, or open another copy of this root and seal that one anew: \
             inlinecrypt root rewrap",
            changes.join(", ")
        )
    })
}

/// What people are told about a sealed root.
pub(crate) fn describe(body: &[u8]) -> Vec<(&'static str, String)> {
    let Some(sealed) = Sealed::parse(body) else { return vec![("sealed", "unreadable".to_owned())] };
    let hex: String = sealed.srk_name[2..].iter().map(|byte| format!("{byte:02x}")).collect();
    let mut facts = vec![("storage root key", hex)];
    if let Some(pcrs) = sealed.pcrs {
        facts.push(("registers", pcrs.to_string()));
    }
    facts
}

/// What a TPM compares: a hash of the PIN, as it takes 32 bytes at the most. Without a PIN it is empty.
fn auth_value(has_pin: bool, pin: Option<&[u8]>) -> Result<Zeroizing<Vec<u8>>, Error> {
    match pin {
        Some([]) => {
            Err(fail(ErrorKind::Permission, "takes a PIN, and the one given is empty; give the right one"))
        }
        Some(pin) => {
            let mut auth = Zeroizing::new(sha256(&[b"inlinecrypt v1 PIN of a sealed root\0", pin]).to_vec());
            // The TPM leaves out zeroes at the end, and its HMACs do.
            while auth.last() == Some(&0) {
                auth.pop();
            }
            Ok(auth)
        }
        None if has_pin => Err(fail(ErrorKind::Permission, "takes a PIN, and none was given")),
        None => Ok(Zeroizing::new(Vec::new())),
    }
}

/// Part 3, 23.7 and 23.18: the digest that a policy session has after its commands.
fn policy(pcrs: Option<Pcrs>, values: &[Vec<u8>]) -> [u8; 32] {
    let mut digest = [0; 32];
    if let Some(pcrs) = pcrs {
        let values: Vec<&[u8]> = values.iter().map(Vec::as_slice).collect();
        let selection = wire::pcr_selection(bank_id(pcrs.bank), pcrs.mask);
        digest = sha256(&[&digest, &TPM_CC_POLICY_PCR.to_be_bytes(), &selection.0, &sha256(&values)]);
    }
    sha256(&[&digest, &TPM_CC_POLICY_AUTH_VALUE.to_be_bytes()])
}

fn bank_id(bank: PcrBank) -> u16 {
    match bank {
        PcrBank::Sha256 => TPM_ALG_SHA256,
        PcrBank::Sha384 => TPM_ALG_SHA384,
    }
}

/// What stands in a container.
#[derive(Debug, PartialEq, Eq)]
struct Sealed {
    pcrs: Option<Pcrs>,
    srk_name: [u8; NAME_BYTES],
    values: Vec<Vec<u8>>,
    private: Vec<u8>,
    public: Vec<u8>,
}

impl Sealed {
    fn to_bytes(&self) -> Vec<u8> {
        let Self { pcrs, srk_name, values, private, public } = self;
        let mut bytes = Vec::new();
        bytes.extend(pcrs.map_or(0, |pcrs| pcrs.mask).to_le_bytes());
        bytes.extend(pcrs.map_or(0, |pcrs| bank_id(pcrs.bank)).to_le_bytes());
        bytes.extend(srk_name);
        bytes.extend(values.concat());
        for part in [private, public] {
            bytes.extend(u16::try_from(part.len()).expect("it came with such a length").to_le_bytes());
            bytes.extend(part);
        }
        bytes
    }

    fn parse(body: &[u8]) -> Option<Self> {
        let mut reader = Reader(body);
        let mask = reader.u32()?.swap_bytes();
        let pcrs = match (mask, reader.u16()?.swap_bytes()) {
            (0, 0) => None,
            (0, _) => return None,
            (1..0x100_0000, TPM_ALG_SHA256) => Some(Pcrs { bank: PcrBank::Sha256, mask }),
            (1..0x100_0000, TPM_ALG_SHA384) => Some(Pcrs { bank: PcrBank::Sha384, mask }),
            _ => return None,
        };
        let srk_name = reader.bytes(NAME_BYTES)?.try_into().ok()?;
        let values = pcrs.map_or(Some(Vec::new()), |pcrs| {
            pcrs.numbers().map(|_| reader.bytes(pcrs.bank.digest_bytes()).map(<[u8]>::to_vec)).collect()
        })?;
        let mut part = || {
            let len = usize::from(reader.u16()?.swap_bytes());
            reader.bytes(len).map(<[u8]>::to_vec)
        };
        let (private, public) = (part()?, part()?);
        reader.0.is_empty().then_some(Self { pcrs, srk_name, values, private, public })
    }
}

/// The storage root key, loaded.
struct Srk {
    handle: u32,
    name: [u8; NAME_BYTES],
    point: ([u8; 32], [u8; 32]),
}

/// A TPM, and what we left in it.
struct Tpm {
    transport: Transport,
    /// Objects and sessions to be flushed.
    loaded: Vec<u32>,
}

/// An answer without its header: the handle, if it has one, then parameters and sessions.
struct Reply(Zeroizing<Vec<u8>>);

impl Tpm {
    fn open(tcti: &Tcti) -> Result<Self, Error> {
        Ok(Self { transport: Transport::open(tcti)?, loaded: Vec::new() })
    }

    fn storage_root_key(&mut self) -> Result<Srk, Error> {
        let parameters = Writer::new()
            // No PIN, no data of ours; no data to be certified; no registers.
            .sized(&Writer::new().sized(&[]).sized(&[]).0)
            .sized(&wire::srk_template().0)
            .sized(&[])
            .u32(0);
        let command = Writer::new().u32(TPM_RH_OWNER).u32(9).bytes(&PASSWORD_EMPTY).bytes(&parameters.0);
        let reply = self.run(TPM_CC_CREATE_PRIMARY, TPM_ST_SESSIONS, &command, |code| match kind_of(code) {
            TPM_RC_AUTH_FAIL | TPM_RC_BAD_AUTH => Some(fail(
                ErrorKind::Permission,
                "the TPM's owner has a password, and sealing is done without; clear it: tpm2_changeauth -c owner",
            )),
            TPM_RC_HIERARCHY => Some(fail(
                ErrorKind::EngineFailed,
                "the TPM's owner hierarchy is switched off; switch it on in the firmware",
            )),
            _ => None,
        })?;
        let mut reader = Reader(&reply.0);
        let srk = (|| {
            let handle = reader.u32()?;
            let _len = reader.u32()?;
            let public = reader.sized()?;
            let mut name = [0; NAME_BYTES];
            name[..2].copy_from_slice(&TPM_ALG_SHA256.to_be_bytes());
            name[2..].copy_from_slice(&sha256(&[public]));
            Some(Srk { handle, name, point: wire::srk_point(public)? })
        })()
        .ok_or_else(strange)?;
        self.loaded.push(srk.handle);
        Ok(srk)
    }

    /// The values of registers.
    fn read(&mut self, pcrs: Pcrs) -> Result<Vec<Vec<u8>>, Error> {
        pcrs.numbers()
            .map(|number| {
                let command = wire::pcr_selection(bank_id(pcrs.bank), 1 << number);
                let reply = self.run(TPM_CC_PCR_READ, TPM_ST_NO_SESSIONS, &command, |_| None)?;
                let mut reader = Reader(&reply.0);
                let value = (|| {
                    let _update_counter = reader.u32()?;
                    for _ in 0..reader.u32()? {
                        let (_bank, len) = (reader.u16()?, reader.u8()?);
                        reader.bytes(usize::from(len))?;
                    }
                    (reader.u32()? == 1).then(|| reader.sized())?
                })();
                value.filter(|value| value.len() == pcrs.bank.digest_bytes()).map(<[u8]>::to_vec).ok_or_else(|| {
                    let why = format!(
                        "this TPM has no register {number} of {}; name a bank that it has: tpm2_getcap pcrs",
                        pcrs.bank.name()
                    );
                    fail(ErrorKind::Unsupported, why)
                })
            })
            .collect()
    }

    fn start_session(&mut self, srk: &Srk, kind: u8) -> Result<Session, Error> {
        let salt = Salt::new(&srk.point).map_err(|_unspecified| no_crypto())?;
        let nonce = session::nonce().map_err(|_unspecified| no_crypto())?;
        let command = Writer::new()
            .u32(srk.handle)
            .u32(TPM_RH_NULL)
            .sized(&nonce)
            .sized(&Writer::new().sized(&salt.x).sized(&salt.y).0)
            .u8(kind)
            .u16(TPM_ALG_AES)
            .u16(128)
            .u16(TPM_ALG_CFB)
            .u16(TPM_ALG_SHA256);
        let reply = self.run(TPM_CC_START_AUTH_SESSION, TPM_ST_NO_SESSIONS, &command, |_| None)?;
        let mut reader = Reader(&reply.0);
        let (handle, nonce_tpm) =
            reader.u32().and_then(|handle| Some((handle, reader.sized()?))).ok_or_else(strange)?;
        self.loaded.push(handle);
        Ok(Session::new(handle, &salt, nonce_tpm, nonce))
    }

    /// Makes the sealed object: its private and its public part.
    fn seal(
        &mut self,
        srk: &Srk,
        policy: &[u8; 32],
        auth: &[u8],
        secret: &Secret,
    ) -> Result<(Vec<u8>, Vec<u8>), Error> {
        let mut session = self.start_session(srk, TPM_SE_HMAC)?;
        // Guessing a PIN is to be punished; without one, there is nothing to guess.
        let attributes = FIXED_TPM | FIXED_PARENT | if auth.is_empty() { NO_DA } else { 0 };
        let public = Writer::new()
            .u16(TPM_ALG_KEYEDHASH)
            .u16(TPM_ALG_SHA256)
            .u32(attributes)
            .sized(policy)
            .u16(TPM_ALG_NULL)
            .sized(&[]);
        let mut sensitive = Writer::new().sized(auth).sized(&secret[..]);
        session.turn().map_err(|_unspecified| no_crypto())?;
        session.encrypt(&[], &mut sensitive.0).map_err(|_unspecified| no_crypto())?;
        let parameters = Writer::new().sized(&sensitive.0).sized(&public.0).sized(&[]).u32(0);
        let reply = self.run_in_session(
            TPM_CC_CREATE,
            (srk.handle, &srk.name),
            &mut session,
            CONTINUE_SESSION | SESSION_DECRYPT,
            &[],
            &parameters,
            |_| None,
        )?;
        let mut reader = Reader(&reply);
        let parts = reader.sized().and_then(|private| Some((private.to_vec(), reader.sized()?.to_vec())));
        parts.ok_or_else(strange)
    }

    fn unseal(&mut self, srk: &Srk, sealed: &Sealed, auth: &[u8]) -> Result<Secret, Error> {
        let command = Writer::new()
            .u32(srk.handle)
            .u32(9)
            .bytes(&PASSWORD_EMPTY)
            .sized(&sealed.private)
            .sized(&sealed.public);
        let reply = self.run(TPM_CC_LOAD, TPM_ST_SESSIONS, &command, |code| match kind_of(code) {
            TPM_RC_INTEGRITY => Some(fail(ErrorKind::KeyRejected, FOREIGN)),
            _ => None,
        })?;
        let handle = Reader(&reply.0).u32().ok_or_else(strange)?;
        self.loaded.push(handle);
        let mut name = TPM_ALG_SHA256.to_be_bytes().to_vec();
        name.extend(sha256(&[&sealed.public]));

        let mut session = self.start_session(srk, TPM_SE_POLICY)?;
        if let Some(pcrs) = sealed.pcrs {
            let command = Writer::new()
                .u32(session.handle)
                .sized(&[])
                .bytes(&wire::pcr_selection(bank_id(pcrs.bank), pcrs.mask).0);
            self.run(TPM_CC_POLICY_PCR, TPM_ST_NO_SESSIONS, &command, |_| None)?;
        }
        let command = Writer::new().u32(session.handle);
        self.run(TPM_CC_POLICY_AUTH_VALUE, TPM_ST_NO_SESSIONS, &command, |_| None)?;

        session.turn().map_err(|_unspecified| no_crypto())?;
        let attributes = CONTINUE_SESSION | SESSION_ENCRYPT;
        let none = Writer::new();
        let mut failure = None;
        let reply = self.run_in_session(
            TPM_CC_UNSEAL,
            (handle, &name),
            &mut session,
            attributes,
            auth,
            &none,
            |code| {
                failure = Some(code);
                None
            },
        );
        let mut reply = match (reply, failure) {
            (Ok(reply), _) => reply,
            (Err(error), Some(code)) => return Err(self.why_not_unsealed(code, auth, error)),
            (Err(error), None) => return Err(error),
        };
        let secret = reply.get_mut(2..34).filter(|bytes| bytes.len() == 32).ok_or_else(strange)?;
        session.decrypt(auth, secret).map_err(|_unspecified| no_crypto())?;
        secret_from(secret).ok_or_else(strange)
    }

    fn why_not_unsealed(&mut self, code: u32, auth: &[u8], error: Error) -> Error {
        match (code, kind_of(code)) {
            (TPM_RC_LOCKOUT, _) => self.locked(),
            (_, TPM_RC_AUTH_FAIL | TPM_RC_BAD_AUTH) if auth.is_empty() => {
                fail(ErrorKind::KeyRejected, "does not open without a PIN; restore it from a copy")
            }
            (_, TPM_RC_AUTH_FAIL | TPM_RC_BAD_AUTH) => {
                let left = (|| {
                    let used = self.property(TPM_PT_LOCKOUT_COUNTER)?;
                    Some(self.property(TPM_PT_MAX_AUTH_FAIL)?.saturating_sub(used))
                })();
                match left {
                    Some(0) => self.locked(),
                    Some(left) => fail(
                        ErrorKind::Permission,
                        format!(
                            "wrong PIN ({left} tries left, then the TPM locks itself); give the right one"
                        ),
                    ),
                    None => fail(
                        ErrorKind::Permission,
                        "wrong PIN (after too many the TPM locks itself); give the right one",
                    ),
                }
            }
            (_, TPM_RC_POLICY_FAIL) => fail(
                ErrorKind::KeyRejected,
                "does not open: the registers changed while it was opened, or it is damaged; try again",
            ),
            _ => error,
        }
    }

    fn locked(&mut self) -> Error {
        let interval = self.property(TPM_PT_LOCKOUT_INTERVAL);
        let wait = interval.map_or(String::new(), |seconds| format!(" {seconds} seconds for one more try,"));
        fail(
            ErrorKind::Permission,
            format!(
                "the TPM has locked itself, after too many wrong PINs; wait{wait} or reset it: tpm2_dictionarylockout \
                 --clear-lockout"
            ),
        )
    }

    fn property(&mut self, property: u32) -> Option<u32> {
        let command = Writer::new().u32(TPM_CAP_TPM_PROPERTIES).u32(property).u32(1);
        let reply = self.run(TPM_CC_GET_CAPABILITY, TPM_ST_NO_SESSIONS, &command, |_| None).ok()?;
        let mut reader = Reader(&reply.0);
        let (_more, _capability, count) = (reader.u8()?, reader.u32()?, reader.u32()?);
        (count == 1 && reader.u32()? == property).then(|| reader.u32())?
    }

    /// Runs a command with one handle, authorized by a session. Returns the answer's parameters.
    #[expect(clippy::too_many_arguments, reason = "they are the command's own parts")]
    fn run_in_session(
        &mut self,
        code: u32,
        (handle, name): (u32, &[u8]),
        session: &mut Session,
        attributes: u8,
        auth: &[u8],
        parameters: &Writer,
        explain: impl FnMut(u32) -> Option<Error>,
    ) -> Result<Zeroizing<Vec<u8>>, Error> {
        let cp_hash = sha256(&[&code.to_be_bytes(), name, &parameters.0]);
        let hmac = session.command_hmac(auth, &cp_hash, attributes);
        let area =
            Writer::new().u32(session.handle).sized(session.nonce_caller()).u8(attributes).sized(&hmac);
        let len = u32::try_from(area.0.len()).expect("shorter than a command");
        let command = Writer::new().u32(handle).u32(len).bytes(&area.0).bytes(&parameters.0);
        let reply = self.run(code, TPM_ST_SESSIONS, &command, explain)?;

        let mut reader = Reader(&reply.0);
        let (parameters, nonce_tpm, attributes, hmac) = (|| {
            let len = usize::try_from(reader.u32()?).ok()?;
            Some((reader.bytes(len)?, reader.sized()?, reader.u8()?, reader.sized()?))
        })()
        .ok_or_else(strange)?;
        session.turned(nonce_tpm);
        let rp_hash = sha256(&[&0_u32.to_be_bytes(), &code.to_be_bytes(), parameters]);
        let expected = session.answer_hmac(auth, &rp_hash, attributes);
        // Compared by their HMACs under a key of the session, which is as good as in constant time.
        if hmac_sha256(&expected, &[hmac]) != hmac_sha256(&expected, &[&expected]) {
            return Err(fail(
                ErrorKind::KeyRejected,
                "the TPM's answer is not its own: something between us and it changed it; look for what that is",
            ));
        }
        Ok(Zeroizing::new(parameters.to_vec()))
    }

    /// Runs a command: handles, sessions and parameters stand in `content`.
    fn run(
        &mut self,
        code: u32,
        tag: u16,
        content: &Writer,
        mut explain: impl FnMut(u32) -> Option<Error>,
    ) -> Result<Reply, Error> {
        let len = u32::try_from(HEADER_BYTES + content.0.len()).expect("shorter than a command");
        let command = Writer::new().u16(tag).u32(len).u32(code).bytes(&content.0);
        for _ in 0..TRIES_MAX {
            let answer = self.transport.exchange(&command.0)?;
            let mut reader = Reader(&answer);
            let (_tag, _len) = (reader.u16(), reader.u32());
            match reader.u32().ok_or_else(strange)? {
                0 => return Ok(Reply(Zeroizing::new(reader.0.to_vec()))),
                TPM_RC_YIELDED | TPM_RC_TESTING | TPM_RC_RETRY => thread::sleep(PAUSE),
                TPM_RC_INITIALIZE => {
                    return Err(fail(
                        ErrorKind::EngineFailed,
                        "the TPM was not started; the firmware does that, or for swtpm: --flags startup-clear",
                    ));
                }
                refused => {
                    return Err(explain(refused).unwrap_or_else(|| {
                        let why = format!(
                            "the TPM refuses command {code:#05x} with code {refused:#05x}; to see what that means: \
                             tpm2_rc_decode {refused:#05x}"
                        );
                        fail(ErrorKind::EngineFailed, why)
                    }));
                }
            }
        }
        Err(fail(ErrorKind::Busy, "the TPM is busy with something else; try again later"))
    }
}

impl Drop for Tpm {
    fn drop(&mut self) {
        for handle in std::mem::take(&mut self.loaded) {
            // It may be gone already.
            let _ = self.run(TPM_CC_FLUSH_CONTEXT, TPM_ST_NO_SESSIONS, &Writer::new().u32(handle), |_| None);
        }
    }
}

/// How often, and with which pause, a TPM is asked again that says so: five seconds.
const TRIES_MAX: u32 = 50;
const PAUSE: Duration = Duration::from_millis(100);

/// A password session with the empty password: handle, nonce, attributes, password.
const PASSWORD_EMPTY: [u8; 9] = {
    let [a, b, c, d] = TPM_RS_PW.to_be_bytes();
    [a, b, c, d, 0, 0, 0, 0, 0]
};

// Part 2, 6.6.3: answers of format 0, as they are; of format 1, without the number of the handle, parameter or session.
const TPM_RC_INITIALIZE: u32 = 0x100;
const TPM_RC_YIELDED: u32 = 0x908;
const TPM_RC_TESTING: u32 = 0x90a;
const TPM_RC_LOCKOUT: u32 = 0x921;
const TPM_RC_RETRY: u32 = 0x922;
const TPM_RC_HIERARCHY: u32 = 0x085;
const TPM_RC_AUTH_FAIL: u32 = 0x08e;
const TPM_RC_POLICY_FAIL: u32 = 0x09d;
const TPM_RC_INTEGRITY: u32 = 0x09f;
const TPM_RC_BAD_AUTH: u32 = 0x0a2;

/// What a code of format 1 says, wherever it was; any other code as it is.
fn kind_of(code: u32) -> u32 {
    if code & 0x80 == 0 { code } else { code & 0xbf }
}

fn strange() -> Error {
    fail(ErrorKind::EngineFailed, "the TPM answers what no TPM does; check what is at the other end")
}

fn no_crypto() -> Error {
    fail(
        ErrorKind::EngineFailed,
        "no session with the TPM: its key is no point of the curve, or there is no randomness; try again",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sealed() -> impl Strategy<Value = Sealed> {
        let part = || prop::collection::vec(any::<u8>(), 0..200);
        (prop::option::of(1..1_u32 << 24), any::<bool>(), part(), part()).prop_map(
            |(mask, long, private, public)| {
                let bank = if long { PcrBank::Sha384 } else { PcrBank::Sha256 };
                let pcrs = mask.map(|mask| Pcrs { bank, mask });
                let values = pcrs.map_or(0, |pcrs| pcrs.numbers().count());
                Sealed {
                    pcrs,
                    srk_name: [9; NAME_BYTES],
                    values: vec![vec![7; bank.digest_bytes()]; values],
                    private,
                    public,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn what_was_sealed_survives_the_container(sealed in sealed()) {
            prop_assert_eq!(Sealed::parse(&sealed.to_bytes()), Some(sealed));
        }

        #[test]
        fn cut_and_longer_bodies_are_refused(sealed in sealed(), more in 1..9_usize) {
            let bytes = sealed.to_bytes();
            for len in 0..bytes.len() {
                prop_assert_eq!(Sealed::parse(&bytes[..len]), None);
            }
            prop_assert_eq!(Sealed::parse(&[&bytes[..], &vec![0; more]].concat()), None);
        }

        #[test]
        fn any_body_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Sealed::parse(&bytes);
            let _ = describe(&bytes);
        }
    }

    #[test]
    fn the_most_registers_fit_a_container() {
        let pcrs = Pcrs { bank: PcrBank::Sha384, mask: (1 << 24) - 1 };
        let values = vec![vec![0; 48]; 24];
        // A TPM2B_PRIVATE and a TPM2B_PUBLIC of sealed objects have less than 300 bytes.
        let parts = || vec![0; 300];
        let sealed =
            Sealed { pcrs: Some(pcrs), srk_name: [0; 34], values, private: parts(), public: parts() };
        assert!(sealed.to_bytes().len() <= inlinecrypt_engine::root::BODY_BYTES_MAX);
    }

    #[test]
    fn moved_registers_are_named() {
        let pcrs = Pcrs { bank: PcrBank::Sha256, mask: 0b1001 };
        let was = [vec![1; 32], vec![2; 32]];
        assert_eq!(moved(pcrs, &was, &was), None);
        let text = moved(pcrs, &was, &[vec![1; 32], vec![3; 32]]).unwrap();
        assert!(
            text.contains("register 3 of sha256 was 0202020202020202..., and is 0303030303030303..."),
            "{text}"
        );
        assert!(!text.contains("register 0"), "{text}");
    }

    /// Python's `hashlib` over what part 3 says.
    #[test]
    fn a_policy_is_the_digest_that_the_standard_says() {
        let digest = |pcrs, values: &[Vec<u8>]| {
            policy(pcrs, values).iter().map(|b| format!("{b:02x}")).collect::<String>()
        };
        assert_eq!(digest(None, &[]), "8fcd2169ab92694e0c633f1ab772842b8241bbc20288981fc7ac1eddc1fddb0e");
        let pcrs = Pcrs { bank: PcrBank::Sha256, mask: 1 << 7 };
        assert_eq!(
            digest(Some(pcrs), &[vec![0; 32]]),
            "b8db92fae7c1e0c588e7352d2fc10f27c7b384e32f706a520cb10bf7ffee8970"
        );
    }

    #[test]
    fn codes_say_the_same_wherever_they_were() {
        for code in [0x98e, 0x08e, 0xa8e, 0x1ce] {
            assert_eq!(kind_of(code), TPM_RC_AUTH_FAIL, "{code:#x}");
        }
        assert_eq!(kind_of(TPM_RC_LOCKOUT), TPM_RC_LOCKOUT);
    }
}
