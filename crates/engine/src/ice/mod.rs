//! The ICE engine: Qualcomm's inline crypto engine with its hardware key manager (HWKM) and its secure world, modelled
//! as far as software can tell.
//!
//! ```text
//!   dyn Engine   program, evict, commit, ladder          crypt
//!                    |                                     |
//!   driver.rs    what Linux's driver does                  |
//!                 |          |                             |
//!            registers    secure world calls               |
//!                 |          |                             |
//!                 |       scm.rs     service ES            |
//!                 |          |                             |
//!                 |       hwkm.rs    slots, policies, wrapping; kdf_context.rs: derivation
//!                 |          |                             |
//!                 |          | key registers               |
//!                 v          v                             v
//!   device.rs    CRYPTOCFG per keyslot  ------------>  AES-256-XTS
//! ```
//!
//! - A variant is hardware with its firmware: see [`IceVariant`]. `hwkm-v1` and `hwkm-v2` take raw or wrapped keys and are
//!   told which once ([`Exclusive`]); until then they advertise both and program nothing. The key ladder belongs to the
//!   secure world and works before that, too.
//! - The root stands for the chip: its key is what stored blobs are bound to. Without one, the chip has no key of its own, the
//!   secure world lacks the calls for wrapped keys, and every variant takes raw keys only.
//! - What a self test finds is known before anything is advertised: without the storage engine's there is no engine, without
//!   the key manager's no wrapped keys.
//! - Reset and suspend empty all keyslots; the key manager is initialised again. Prepared keys stay good: they belong to the
//!   secure world's boot, which is the start of this engine.
//! - [`Faults`] make it as bad as hardware can be.
//!
//! Start reading at `device.rs`, then `driver.rs`, `scm.rs` and `hwkm.rs`. Blobs are described in [`blob`].

pub mod blob;
mod device;
mod driver;
mod faults;
mod hwkm;
mod kdf_context;
mod regs;
mod scm;
mod spec;

pub use faults::{Chance, Faults};
pub use spec::{IceSpec, IceVariant};

use crate::Root;
use crate::blob::Form;
use crate::verify::Opener;
use blob::Refused;
use device::{Controller, CryptFault, bist_polls};
use driver::{Driver, DriverError, Errno};
use faults::Dice;
use inlinecrypt_cipher::{Dun, Mode};
use inlinecrypt_core::caps::{Capabilities, KeyTypes, UnitMask, Unsupported};
use inlinecrypt_core::config::KeyType;
use inlinecrypt_core::engine::{
    Direction, Engine, Exclusive, KeyLadder, KeyRef, Lifecycle, Piece, SlotHold, SlotIndex,
};
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use inlinecrypt_core::key::{EphemeralWrappedKey, Key, KeyForm, LongTermWrappedKey, RawKey, SoftwareSecret};
use inlinecrypt_core::memory::{HeapSource, Memory, MemorySource};
use regs::CryptoCfg;
use scm::SecureWorld;
use std::borrow::Cow;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use zeroize::Zeroizing;

/// Generation of the hardware key manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HwkmVersion {
    /// Blobs of 68 bytes; the secure world counts keyslots.
    V1,
    /// Blobs of 100 bytes; the secure world counts two slots for each keyslot.
    V2,
}

/// The engine.
pub struct IceEngine {
    spec: IceSpec,
    capabilities: Capabilities,
    /// It serves one key type, and is told which.
    is_exclusive: bool,
    controller: Controller,
    /// Programs, evictions, key ladder, and what happens from outside: one after the other. Requests never take it.
    control: Mutex<Control>,
    /// Taken after `control`, and for a moment only.
    status: Mutex<Status>,
    dice: Arc<Dice>,
}

struct Control {
    driver: Driver,
    secure: SecureWorld,
}

struct Status {
    committed: Option<KeyType>,
    state: State,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum State {
    Running,
    Suspended,
    /// Until it is started again.
    Poisoned(String),
}

impl IceEngine {
    /// Starts the engine: probes the hardware, then decides what to advertise.
    ///
    /// # Errors
    ///
    /// [`EngineFailed`](ErrorKind::EngineFailed) if a fuse is blown, the self test does not end, or the system gives no
    /// randomness.
    pub fn new(spec: IceSpec, root: Option<&Root>) -> Result<Self, Error> {
        let failed = |why: DriverError| Error::new(ErrorKind::EngineFailed, Op::Open).because(why);
        let dice = Arc::new(Dice::new(spec.faults, spec.seed));
        let controller = Controller::new(&spec, dice.clone());
        let secure = SecureWorld::boot(&spec, root, dice.clone())?;
        let mut driver = Driver::probe(&controller, &secure).map_err(failed)?;
        let probed = driver.probed();
        let key_types = if probed.wrapped_keys { KeyTypes::BOTH } else { KeyTypes::RAW };
        let takes_both = secure.takes_both();
        driver.decide(probed.wrapped_keys && takes_both);
        driver.enable(&controller).map_err(failed)?;
        let mut units = [UnitMask::NONE; Mode::ALL.len()];
        units[Mode::Aes256Xts.index()] = UnitMask::from_bits(u32::from(probed.unit_mask) * 512);
        debug_assert_eq!(units[Mode::Aes256Xts.index()], spec.units());
        let dun_bytes_max = controller.dun_bytes();
        Ok(Self {
            spec,
            capabilities: Capabilities { units, dun_bytes_max, key_types, keyslots: probed.keyslots },
            is_exclusive: probed.wrapped_keys && !takes_both,
            controller,
            control: Mutex::new(Control { driver, secure }),
            status: Mutex::new(Status { committed: None, state: State::Running }),
            dice,
        })
    }

    /// The keyslot is lost this moment, as hardware loses it: requests that hold it find no key. For tests and
    /// simulations; the fault `lose-slot` does it by chance.
    ///
    /// # Errors
    ///
    /// [`Invalid`](ErrorKind::Invalid) if there is no such keyslot.
    pub fn lose_slot(&self, slot: SlotIndex) -> Result<(), Error> {
        self.check_slot(slot, Op::Crypt)?;
        self.controller.wipe(slot.0);
        Ok(())
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        // Nothing panics half way through a change.
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_slot(&self, slot: SlotIndex, op: Op) -> Result<(), Error> {
        if slot.0 < self.controller.keyslots() {
            return Ok(());
        }
        Err(invalid(op, format!("there is no keyslot {slot}: the engine has {}", self.controller.keyslots())))
    }

    fn check_running(&self, op: Op) -> Result<(), Error> {
        let engine_failed = |why: String| Err(Error::new(ErrorKind::EngineFailed, op).detail(why));
        match &self.status().state {
            State::Running => Ok(()),
            State::Suspended => engine_failed("the engine is suspended".into()),
            State::Poisoned(why) => engine_failed(why.clone()),
        }
    }

    /// The key ladder is the secure world's: a poisoned storage engine does not stop it.
    fn check_awake(&self, op: Op) -> Result<(), Error> {
        let is_suspended = self.status().state == State::Suspended;
        if is_suspended { self.check_running(op) } else { Ok(()) }
    }

    fn poison(&self, op: Op, why: String) -> Error {
        let error = Error::new(ErrorKind::EngineFailed, op).detail(why.clone());
        self.status().state = State::Poisoned(why);
        error
    }

    /// Whether the engine takes this key at all: its capabilities, and what it was told.
    fn check_key(&self, key: &Key) -> Result<(), Error> {
        let unsupported = |why: Unsupported| Error::new(ErrorKind::Unsupported, Op::Program).because(why);
        self.capabilities.check(key.config()).map_err(unsupported)?;
        if !self.is_exclusive {
            return Ok(());
        }
        let asked = key.config().key_type();
        match self.status().committed {
            Some(committed) if committed == asked => Ok(()),
            Some(committed) => Err(Error::new(ErrorKind::Unsupported, Op::Program).detail(format!(
                "the engine was told to serve {committed} keys, this is a {asked} key; restart it to change that"
            ))),
            None => Err(Error::new(ErrorKind::EngineFailed, Op::Program)
                .detail("the engine has not been told yet which type of key it serves")),
        }
    }

    /// The error of a program, evict or step of the ladder that the driver reports.
    fn failed(op: Op, why: DriverError) -> Error {
        let kind = match why.errno {
            Errno::Ebadmsg => ErrorKind::KeyRejected,
            Errno::Eopnotsupp => ErrorKind::Unsupported,
            Errno::Einval | Errno::Eio | Errno::Enodev | Errno::Etimedout => ErrorKind::EngineFailed,
        };
        Error::new(kind, op).because(why)
    }

    /// Likewise, with what is public in the blob that was given.
    fn blob_failed(&self, op: Op, secure: &SecureWorld, form: Form, blob: &[u8], why: DriverError) -> Error {
        match (why.errno, self.spec.variant.hwkm(), secure.wrapping_key_id(form)) {
            (Errno::Ebadmsg, Some(version), Some(here)) => {
                let refused = Refused::explain(version, form, here, blob);
                Error::new(ErrorKind::KeyRejected, op).because(refused)
            }
            _ => Self::failed(op, why),
        }
    }

    /// Power on, and the driver once more.
    fn start_again(&self, control: &mut Control, what: &str) -> Result<(), Error> {
        self.controller.power_on(bist_polls(self.dice.faults.resume_fail));
        control.secure.slave_lost();
        control.driver.suspend();
        control.driver.enable(&self.controller).map_err(|why| {
            self.controller.power_off();
            self.poison(Op::Program, format!("the engine did not come back from {what}: {why}; restart it"))
        })
    }

    fn transform(
        &self,
        slot: SlotIndex,
        direction: Direction,
        first: Dun,
        data: &mut [u8],
    ) -> Result<(), Error> {
        let len = data.len();
        self.controller.crypt(slot.0, direction, first, data).map_err(|fault| match fault {
            CryptFault::NoSuchSlot => invalid(Op::Crypt, format!("there is no keyslot {slot}")),
            // Only now does it matter why: a healthy request asks nobody.
            CryptFault::Off => self.check_running(Op::Crypt).err().unwrap_or_else(|| {
                Error::new(ErrorKind::NoKey, Op::Crypt).detail(format!("keyslot {slot} is off"))
            }),
            CryptFault::BadConfig(cfg) => Error::new(ErrorKind::EngineFailed, Op::Crypt)
                .detail(format!("keyslot {slot} has a configuration without meaning: {cfg:?}")),
            CryptFault::Misaligned { unit_bytes } => Error::new(ErrorKind::Misaligned, Op::Crypt)
                .detail(format!("{len} bytes are not a whole number of data units of {unit_bytes} bytes")),
            CryptFault::DunTooLong => invalid(
                Op::Crypt,
                format!(
                    "a data unit number does not fit the {} bytes that the engine has",
                    self.spec.dun_bytes
                ),
            ),
        })
    }
}

impl fmt::Debug for IceEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Status { committed, state } = &*self.status();
        let spec = self.spec.to_string();
        f.debug_struct("IceEngine")
            .field("spec", &spec)
            .field("committed", committed)
            .field("state", state)
            .finish_non_exhaustive()
    }
}

impl Engine for IceEngine {
    fn name(&self) -> &str {
        self.spec.variant.full_name()
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn memory(&self) -> &dyn MemorySource {
        &HeapSource
    }

    fn program(&self, slot: SlotIndex, key: &Key) -> Result<(), Error> {
        self.check_slot(slot, Op::Program)?;
        let mut control = self.control();
        self.check_running(Op::Program)?;
        if let Err(why) = self.check_key(key) {
            self.controller.writel(CryptoCfg::OFF.to_register(), regs::cryptocfg(slot.0));
            return Err(why);
        }
        let mut time = self.spec.program_latency;
        if self.dice.strikes(self.dice.faults.slow) {
            time += self.dice.faults.slow_time;
        }
        let wait = || {
            if !time.is_zero() {
                std::thread::sleep(time);
            }
        };
        let Control { driver, secure } = &mut *control;
        driver.program(&self.controller, secure, slot.0, key, wait).map_err(|why| match key.form() {
            KeyForm::Wrapped(blob) => {
                self.blob_failed(Op::Program, secure, Form::Ephemeral, blob.as_bytes(), why)
            }
            KeyForm::Raw(_) | KeyForm::Deposited(_) => Self::failed(Op::Program, why),
        })
    }

    fn evict(&self, slot: Option<SlotIndex>, _key: &Key) -> Result<(), Error> {
        let slot = slot.ok_or_else(|| invalid(Op::Evict, "which keyslot? The engine has some"))?;
        self.check_slot(slot, Op::Evict)?;
        let mut control = self.control();
        let state = self.status().state.clone();
        match state {
            State::Suspended => return self.check_running(Op::Evict),
            // Nothing was programmed since, and nothing will be.
            State::Poisoned(_) => {
                self.controller.wipe(slot.0);
                return Ok(());
            }
            State::Running => {}
        }
        let Control { driver, secure } = &mut *control;
        driver.evict(&self.controller, secure, slot.0).map_err(|why| Self::failed(Op::Evict, why))
    }

    fn crypt(
        &self,
        key: KeyRef<'_>,
        direction: Direction,
        memory: &mut dyn Memory,
        pieces: &mut [Piece],
    ) -> Result<(), Error> {
        let KeyRef::Slot(slot) = key else {
            return Err(invalid(Op::Crypt, "the engine has keyslots, it takes no key with a request"));
        };
        self.check_slot(slot, Op::Crypt)?;
        for piece in pieces {
            let data = memory.bytes_mut().get_mut(piece.range.clone()).ok_or_else(|| {
                invalid(Op::Crypt, format!("bytes {:?} are not in the memory given", piece.range))
            })?;
            self.transform(slot, direction, piece.first, data)?;
            piece.finish();
        }
        Ok(())
    }

    fn key_ladder(&self) -> Option<&dyn KeyLadder> {
        self.capabilities.key_types.contains(KeyType::HardwareWrapped).then_some(self as _)
    }

    /// The engine sits on the way to the disk.
    fn slot_hold(&self) -> SlotHold {
        SlotHold::WholeRequest
    }

    fn exclusive(&self) -> Option<&dyn Exclusive> {
        self.is_exclusive.then_some(self as _)
    }

    fn stopped(&self) -> Option<String> {
        match &self.status().state {
            State::Poisoned(why) => Some(why.clone()),
            State::Running | State::Suspended => None,
        }
    }

    fn lifecycle(&self) -> Option<&dyn Lifecycle> {
        Some(self)
    }
}

impl Exclusive for IceEngine {
    fn committed(&self) -> Option<KeyType> {
        self.status().committed
    }

    fn commit(&self, key_type: KeyType) -> Result<(), Error> {
        let mut control = self.control();
        self.check_running(Op::Admit)?;
        match self.committed() {
            Some(committed) if committed == key_type => return Ok(()),
            Some(committed) => {
                return Err(Error::new(ErrorKind::Unsupported, Op::Admit).detail(format!(
                    "the engine was told to serve {committed} keys; restart it to serve {key_type} keys"
                )));
            }
            None => {}
        }
        let poisoned = |why: &dyn fmt::Display| {
            self.poison(
                Op::Admit,
                format!("the switch to {key_type} keys failed: {why}; the engine serves nothing until it is started again"),
            )
        };
        if self.dice.faults.commit_fail {
            return Err(poisoned(&"the hardware did not answer"));
        }
        let wants_hwkm = key_type == KeyType::HardwareWrapped;
        control.driver.decide(wants_hwkm);
        control.driver.enable(&self.controller).map_err(|why| poisoned(&why))?;
        if self.controller.is_in_hwkm_mode() != wants_hwkm {
            return Err(poisoned(&"the mode did not change"));
        }
        self.status().committed = Some(key_type);
        Ok(())
    }
}

impl Lifecycle for IceEngine {
    fn reset(&self) -> Result<(), Error> {
        let mut control = self.control();
        self.check_running(Op::Program)?;
        self.start_again(&mut control, "a reset")
    }

    fn suspend(&self) -> Result<(), Error> {
        let mut control = self.control();
        if self.status().state == State::Suspended {
            return Ok(());
        }
        self.check_running(Op::Program)?;
        self.status().state = State::Suspended;
        self.controller.power_off();
        control.secure.slave_lost();
        control.driver.suspend();
        Ok(())
    }

    fn resume(&self) -> Result<(), Error> {
        let mut control = self.control();
        if self.status().state != State::Suspended {
            return self.check_running(Op::Program);
        }
        self.start_again(&mut control, "suspend")?;
        self.status().state = State::Running;
        Ok(())
    }
}

impl KeyLadder for IceEngine {
    fn import(&self, raw: &RawKey) -> Result<LongTermWrappedKey, Error> {
        self.check_awake(Op::Import)?;
        let Control { driver, secure } = &mut *self.control();
        let bytes = raw.expose();
        let blob = driver.import(&self.controller, secure, bytes).map_err(|why| match why.errno {
            Errno::Einval => invalid(
                Op::Import,
                format!(
                    "the raw key has {} bytes, the engine wraps keys of {}",
                    bytes.len(),
                    hwkm::KEY_BYTES
                ),
            ),
            _ => Self::failed(Op::Import, why),
        })?;
        Ok(LongTermWrappedKey::new(&blob))
    }

    fn generate(&self) -> Result<LongTermWrappedKey, Error> {
        self.check_awake(Op::Generate)?;
        let Control { driver, secure } = &mut *self.control();
        let blob =
            driver.generate(&self.controller, secure).map_err(|why| Self::failed(Op::Generate, why))?;
        Ok(LongTermWrappedKey::new(&blob))
    }

    fn prepare(&self, long_term: &LongTermWrappedKey) -> Result<EphemeralWrappedKey, Error> {
        self.check_awake(Op::Prepare)?;
        let Control { driver, secure } = &mut *self.control();
        let bytes = long_term.as_bytes();
        let blob = driver
            .prepare(&self.controller, secure, bytes)
            .map_err(|why| self.blob_failed(Op::Prepare, secure, Form::LongTerm, bytes, why))?;
        Ok(EphemeralWrappedKey::new(&blob))
    }

    fn derive_software_secret(&self, ephemeral: &EphemeralWrappedKey) -> Result<SoftwareSecret, Error> {
        self.check_awake(Op::DeriveSecret)?;
        let Control { driver, secure } = &mut *self.control();
        let bytes = ephemeral.as_bytes();
        let secret = driver
            .derive_software_secret(&self.controller, secure, bytes)
            .map_err(|why| self.blob_failed(Op::DeriveSecret, secure, Form::Ephemeral, bytes, why))?;
        Ok(SoftwareSecret::new(secret))
    }
}

impl Opener for IceEngine {
    fn inline_key(&self, blob: &EphemeralWrappedKey) -> Option<Zeroizing<Vec<u8>>> {
        self.control().secure.inline_key(blob.as_bytes()).ok()
    }
}

fn invalid(op: Op, why: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::Invalid, op).detail(why)
}

#[cfg(test)]
mod tests;
