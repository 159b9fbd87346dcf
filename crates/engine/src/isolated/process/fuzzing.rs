//! What a host can say to an engine process, said by a machine: for fuzz targets and property tests alone.

use super::{Control, Hosted, HostedEngine, attend, write};
use crate::isolated::proto::{self, Answer, MESSAGE_BYTES_MAX, Order, Secret, WireForm, WireKey, WireStep};
use crate::isolated::ring::{Deed, Head, LANE_BYTES, Lane, PIECES_MAX, WirePiece};
use crate::sys::Region;
use crate::{EngineSpec, Root, SoftwareSpec};
use inlinecrypt_cipher::{Dun, Mode, UnitCipher};
use inlinecrypt_core::config::{DataUnitSize, Hardware};
use inlinecrypt_core::engine::SlotIndex;
use inlinecrypt_core::key::{Key, KeyForm, RawKey};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

/// Bytes of a data unit here.
pub const UNIT_BYTES: usize = 512;
/// How much data there is, behind two lanes, in bytes.
pub const DATA_BYTES: usize = 64 << 10;
/// Where it begins in the shared memory.
pub const FLOOR: usize = 2 * LANE_BYTES;

/// Keys of keyslot 0 and 1 of the first engine, and the one that the second engine, which has no keyslots, remembers as 0.
const KEYS: usize = 3;

/// An engine process with two engines, three keys, and shared memory.
#[derive(Debug)]
pub struct Process {
    control: Control,
    region: Region,
    ciphers: [Box<dyn UnitCipher>; KEYS],
    /// Which of them is in each keyslot of the main engine.
    slots: [Option<usize>; 3],
    data: Vec<u8>,
}

/// The handle of a key that the main engine of a [`Process`] remembers.
pub const KNOWN_HANDLE: u32 = 7;

/// A piece of an order: offset in the shared memory, length in bytes, DUN.
pub type RawPiece = (u64, u64, u64);

impl Process {
    /// With engines that serve raw keys, and keys wrapped under `root`, if there is one.
    ///
    /// # Panics
    ///
    /// If the system gives no memory or randomness.
    #[must_use]
    pub fn new(root: Option<&Root>) -> Self {
        let unit = DataUnitSize::from_bytes(512).expect("a size");
        let raw = |number: u8| [[number; 32], [number ^ 0x5a; 32]].concat();
        let key = |number: u8| {
            let form = KeyForm::Raw(RawKey::new(&raw(number)));
            Key::new(Mode::Aes256Xts, unit, 8, form, Hardware::Allowed).expect("a good key")
        };
        let open = |keyslots| {
            let spec = EngineSpec::Software(SoftwareSpec { keyslots, ..SoftwareSpec::default() });
            HostedEngine::new(crate::open(&spec, root).expect("it starts"))
        };
        let (first, second) = (open(3), open(0));
        for slot in 0..2u8 {
            let key = key(slot);
            first.engine.program(SlotIndex(slot.into()), &key).expect("a free keyslot");
            first.units[usize::from(slot)].store(512, Ordering::Release);
            write(&first.keys).insert(slot.into(), key);
        }
        write(&first.remembered).insert(KNOWN_HANDLE, key(1));
        write(&second.remembered).insert(0, key(2));
        let hosted = Arc::new(OnceLock::from(Hosted { engines: vec![first, second] }));
        let control = Control { hosted, deposits: HashMap::new(), last_ticket: 0, last_handle: KNOWN_HANDLE };
        let region = Region::create(FLOOR + DATA_BYTES).expect("shared memory");
        let cipher = |number| Mode::Aes256Xts.info().expand(&raw(number)).expect("a good key");
        let data = (0..DATA_BYTES).map(|at| (at ^ (at >> 8)).to_le_bytes()[0]).collect();
        Self { control, region, ciphers: [0, 1, 2].map(cipher), slots: [Some(0), Some(1), None], data }
    }

    /// Gives `bytes` to the control thread as it would receive them. Whether they were an order.
    ///
    /// # Panics
    ///
    /// If the answer cannot be sent: then it is a bug.
    pub fn control(&mut self, bytes: &[u8]) -> bool {
        let Ok(order) = proto::parse::<Order<'_>>(bytes) else { return false };
        let send = |answer: Answer<'_>| {
            let mut room = [0; MESSAGE_BYTES_MAX];
            postcard::to_slice(&answer, &mut room).map(drop).map_err(std::io::Error::other)
        };
        match self.control.apply(order, Vec::new(), &send) {
            Ok(sent) => sent.expect("an answer fits into a message"),
            Err(error) => proto::with_failure(&error, send).expect("so does an error"),
        }
        true
    }

    /// Leaves `order` in the first lane, as a host would that does what it wants, and lets the lane's thread work on it.
    ///
    /// # Panics
    ///
    /// If anything but the named pieces has changed; if those have changed in another way than the named key changes them; or if
    /// the order was done and should not have been, or the other way round.
    pub fn lane(&mut self, order: &[u8]) {
        const TURN_BYTES: usize = 192;
        self.region.copy_in(0, &[0xc3; 2 * LANE_BYTES]);
        self.region.copy_in(FLOOR, &self.data);
        let order = &order[..order.len().min(LANE_BYTES - TURN_BYTES)];
        self.region.copy_in(TURN_BYTES, order);
        let lane = Lane::new(&self.region, 0);
        lane.hand_over(1);
        let mut pieces = Vec::with_capacity(PIECES_MAX);
        let head = lane.next_order(1, &AtomicBool::new(false), &mut pieces).expect("an order");
        let hosted = self.control.hosted.get().expect("started by us");
        attend(&self.region, &lane, FLOOR, Some(hosted), &head, &pieces);
        let is_done = lane.result() == 0;

        if let Deed::Program { slot } = head.deed {
            let place = self.slots.get_mut(slot as usize);
            let is_good = head.engine == 0 && head.key == KNOWN_HANDLE && place.is_some();
            assert_eq!(is_done, is_good, "{head:?}: {}", lane.text());
            if let Some(place) = place.filter(|_| is_good) {
                *place = Some(1);
            }
            pieces.clear();
        }
        let key = match (head.engine, head.is_slot, head.key) {
            (0, true, slot) => self.slots.get(slot as usize).copied().flatten(),
            (1, false, 0) => Some(2),
            _ => None,
        };
        let mut expected = self.data.clone();
        let mut is_good = key.is_some();
        for piece in pieces.iter().take_while(|_| key.is_some()) {
            let range = usize::try_from(piece.offset).ok().zip(usize::try_from(piece.len).ok());
            let range = range
                .and_then(|(at, len)| Some(at.checked_sub(FLOOR)?..at.checked_sub(FLOOR)?.checked_add(len)?));
            let Some(bytes) = range.and_then(|range| expected.get_mut(range)) else {
                is_good = false;
                break;
            };
            if !bytes.len().is_multiple_of(UNIT_BYTES) {
                is_good = false;
                break;
            }
            let cipher = &self.ciphers[key.expect("looked at")];
            match head.deed == Deed::Encrypt {
                true => cipher.encrypt(piece.first, UNIT_BYTES, bytes),
                false => cipher.decrypt(piece.first, UNIT_BYTES, bytes),
            }
        }
        if !matches!(head.deed, Deed::Program { .. }) {
            assert_eq!(is_done, is_good, "{head:?} {pieces:?}: {}", lane.text());
        }
        let mut now = vec![0; DATA_BYTES];
        self.region.copy_out(FLOOR, &mut now);
        assert!(now == expected, "other bytes were changed, or with another key: {head:?} {pieces:?}");
        let mut beside = vec![0; LANE_BYTES];
        self.region.copy_out(LANE_BYTES, &mut beside);
        assert!(beside.iter().all(|byte| *byte == 0xc3), "another lane was written to: {head:?} {pieces:?}");
    }
}

/// An order of a lane, as bytes for [`Process::lane`].
#[must_use]
pub fn lane_order(
    engine: u8,
    is_slot: bool,
    encrypt: bool,
    key: u32,
    count: u32,
    pieces: &[RawPiece],
) -> Vec<u8> {
    let deed = if encrypt { Deed::Encrypt } else { Deed::Decrypt };
    let head = Head { engine, is_slot, deed, key, cpu: 0, pieces: count };
    let pieces: Vec<_> = pieces
        .iter()
        .map(|&(offset, len, first)| WirePiece { offset, len, first: Dun::from_limbs([first, 0, 0, 0]) })
        .collect();
    Lane::bytes_of(head, &pieces)
}

/// The order to program a keyslot with the key of a handle, likewise. Of the main engine [`KNOWN_HANDLE`] is good.
#[must_use]
pub fn program_order(engine: u8, slot: u32, handle: u32) -> Vec<u8> {
    let deed = Deed::Program { slot };
    Lane::bytes_of(Head { engine, is_slot: false, deed, key: handle, cpu: 0, pieces: 0 }, &[])
}

/// Whether `bytes` are an answer; a host reads them so.
#[must_use]
pub fn answer(bytes: &[u8]) -> bool {
    match proto::parse::<Answer<'_>>(bytes) {
        Ok(answer) => {
            // What a host makes of one that it did not ask for.
            let _ = answer.into_error(inlinecrypt_core::error::Op::Open);
            true
        }
        Err(_) => false,
    }
}

/// Good orders, to begin with: one of each kind that needs nothing from outside.
///
/// # Panics
///
/// Never.
#[must_use]
pub fn orders() -> Vec<Vec<u8>> {
    let raw = [[0xa1; 32], [0xb2; 32]].concat();
    let unit = DataUnitSize::from_bytes(4096).expect("a size");
    let known = Key::new(Mode::Aes256Xts, unit, 8, KeyForm::Raw(RawKey::new(&raw)), Hardware::Allowed);
    let known = known.expect("a good key");
    let key = |form| WireKey::new(known.config(), form);
    let orders = [
        Order::Hello {
            version: proto::VERSION,
            lanes: 1,
            shared_bytes: 1 << 20,
            generation: 1,
            require_sandbox: false,
            realtime: false,
        },
        Order::Open { spec: "software:slots=2", fallback: Some("software"), root: None },
        Order::Deposit(Secret(&raw)),
        Order::Program { engine: 0, slot: 1, key: key(WireForm::Raw(Secret(&raw))) },
        Order::Program { engine: 0, slot: 2, key: key(WireForm::Ticket(1)) },
        Order::Program { engine: 0, slot: 2, key: key(WireForm::Wrapped(&raw)) },
        Order::Evict { engine: 0, slot: 2 },
        Order::Remember { engine: 1, key: key(WireForm::Raw(Secret(&raw))) },
        Order::Forget { engine: 1, handle: 0 },
        Order::Import { engine: 0, raw: Secret(&raw[..32]) },
        Order::Generate { engine: 0 },
        Order::Prepare { engine: 0, blob: &raw },
        Order::Check { engine: 0, blob: &raw },
        Order::DeriveSecret { engine: 0, blob: &raw },
        Order::Identify { engine: 0, blob: &raw },
        Order::Commit { engine: 0, wrapped: true },
        Order::Lifecycle { engine: 0, step: WireStep::Reset },
    ];
    let bytes = |order| {
        let mut room = [0; MESSAGE_BYTES_MAX];
        postcard::to_slice(order, &mut room).expect("it fits into a message").to_vec()
    };
    orders.iter().map(bytes).collect()
}
