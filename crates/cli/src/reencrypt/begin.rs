//! From a volume that is open to a job: one that begins, or one that goes on.

use super::luks::LuksTerms;
use super::{Job, Prepared, Present, Record, Wish, ZONE_BYTES, luks, open_state};
use crate::cli::FallbackArg;
use crate::files;
use crate::host::ReadyNext;
use crate::identifier::Identifier;
use crate::luks::ledger::LuksLedger;
use crate::plan::{LayoutPlan, SlotsPlan};
use crate::report::{Code, Failure};
use inlinecrypt_core::backing::{Access, Backing};
use inlinecrypt_core::disk::Disk as _;
use inlinecrypt_core::error::Error;
use inlinecrypt_core::key::KeyId;
use inlinecrypt_core::profile::CryptoProfile;
use inlinecrypt_core::reencrypt::{LiveVolume, clients_can_stay};
use inlinecrypt_core::volume::{Discard, Layout, Volume};
use std::path::Path;
use std::sync::Arc;

/// How a volume was asked to be served, whatever its key.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) label: String,
    pub(crate) access: Access,
    pub(crate) discard: Discard,
    pub(crate) fallback: FallbackArg,
    pub(crate) slots: SlotsPlan,
    /// Whether a config or command line names its key or layout, besides its description.
    pub(crate) is_named_twice: bool,
    /// The container that it is the data of, if it is one.
    pub(crate) luks: Option<LuksTerms>,
}

/// A volume that is to be re-encrypted.
#[derive(Debug)]
pub(crate) enum Old {
    /// It has clients.
    Live(Arc<LiveVolume>),
    /// Nobody uses it.
    Idle(Volume),
}

impl Old {
    pub(super) fn layout(&self) -> Layout {
        match self {
            Self::Live(live) => *live.current().layout(),
            Self::Idle(volume) => *volume.layout(),
        }
    }

    /// Refuses a layout that clients who are connected could not bear.
    pub(super) fn check_clients(&self, layout: &Layout, label: &str) -> Result<(), Failure> {
        let (mode, block) = (layout.mode(), layout.logical_block_bytes());
        let Self::Live(live) = self else { return Ok(()) };
        if clients_can_stay(&live.geometry(), mode, block) {
            return Ok(());
        }
        Err(Failure::new(
            Code::Wrong,
            format!(
                "{label}: clients that are connected may write less than {block} bytes at a time, which {mode} with data \
                 units of {} cannot",
                layout.data_unit_size()
            ),
            "Stop the server, and do it without: inlinecrypt volume reencrypt --offline. It can be served meanwhile, to \
             clients that connect anew.",
        ))
    }

    /// What clients see while it becomes `new`.
    pub(super) fn live(self, new: &Volume) -> Arc<LiveVolume> {
        match self {
            Self::Live(live) => live,
            Self::Idle(volume) => Arc::new(LiveVolume::new(volume).for_clients_of(new)),
        }
    }
}

/// What a volume lies on.
#[derive(Debug)]
pub(crate) struct Backings {
    /// All of the file or disk.
    pub(crate) whole: Arc<dyn Backing>,
    /// The part of it that is the volume's.
    pub(crate) data: Arc<dyn Backing>,
}

/// Begins: admits the key, writes down what is to happen, and rests until told to go on. Also says which key
/// is new, for status displays.
pub(crate) fn begin(
    old: Old,
    path: &Path,
    identifier: Identifier,
    backings: Backings,
    terms: &Terms,
    wish: &Wish,
    profile: &Arc<CryptoProfile>,
) -> Result<(Job, KeyId), Failure> {
    let Terms { label, access, discard, fallback, slots, is_named_twice: _, luks } = terms;
    if *access == Access::ReadOnly {
        return Err(Failure::new(
            Code::Refused,
            format!("{label} is served read-only"),
            "Serve it for writing, or stop the server and do it with --offline.",
        ));
    }
    if let Some(luks) = luks {
        return luks::begin(old, path, backings, terms, luks, wish, profile);
    }
    if !wish.others.is_unsaid() {
        return Err(Failure::new(
            Code::Wrong,
            format!("{label} is no LUKS container, and has no LUKS keyslots"),
            "Leave out --drop-others and the passphrases of others.",
        ));
    }
    let layout = old.layout();
    let present = Present {
        path: path.to_owned(),
        label: label.clone(),
        layout,
        planned: LayoutPlan {
            mode: layout.mode(),
            data_unit: layout.data_unit_size(),
            block: Some(layout.logical_block_bytes()),
            iv_offset: layout.iv_offset_sectors(),
            iv: layout.iv(),
            // Of its part of the backing; it stays where it is.
            offset: 0,
            length: None,
        },
        identifier,
        fallback: *fallback,
        slots: *slots,
    };
    let (prepared, admission) = Prepared::of(&present, wish, profile)?;
    let key = admission.key().id();
    old.check_clients(&prepared.layout, label)?;
    let failed = |error: Error| Failure::of(label, &error);
    // Before anything is written.
    let new = Volume::new(prepared.layout, admission, backings.data, *access, *discard).map_err(failed)?;
    let live = old.live(&new);
    let medium = prepared.write_down(path)?;
    let running = live.begin(new, medium).map_err(failed)?;
    let Prepared { identifier, intent, state, .. } = prepared;
    tracing::info!(volume = %label, key = %identifier, "re-encryption begins");
    let throttle_bytes = intent.throttle_bytes;
    let record = Record::File { state, intent };
    Ok((Job::start(running, path.to_owned(), record, throttle_bytes, identifier)?, key))
}

/// A volume whose re-encryption had begun: whole again, whatever interrupted it, and resting.
pub(crate) fn go_on(
    old: Volume,
    path: &Path,
    backings: Backings,
    terms: &Terms,
    next: ReadyNext,
) -> Result<(Arc<LiveVolume>, Job), Failure> {
    let Terms { label, access, discard, .. } = terms;
    let ReadyNext { plan, layout, admission, identifier } = next;
    if *access == Access::ReadOnly {
        let header = match &plan.record {
            Record::Header { header, is_detached: true } => {
                format!(" --header {}", files::shell_word(header))
            }
            _ => String::new(),
        };
        return Err(Failure::new(
            Code::Refused,
            format!("{label} is half re-encrypted, and read-only it cannot be completed"),
            format!(
                "Complete it first (inlinecrypt volume reencrypt --resume{header} {}), or serve it for writing, which takes no more \
                 than one zone with --pause-reencryption.",
                files::shell_word(path)
            ),
        ));
    }
    let failed = |error: Error| Failure::of(label, &error);
    let new = Volume::new(layout, admission, backings.data, *access, *discard).map_err(failed)?;
    let live = Arc::new(LiveVolume::new(old).for_clients_of(&new));
    let running = match &plan.record {
        Record::File { state, .. } => live.begin(new, open_state(state)?),
        Record::Header { header, is_detached } => {
            let storage = luks::storage(header, *is_detached, backings.whole)?;
            live.begin(new, LuksLedger::open(storage, layout.size_bytes(), ZONE_BYTES, label)?)
        }
    };
    let running = running.map_err(failed)?;
    if let Some(error) = running.unfinished() {
        tracing::warn!(volume = %label, "one part of it is refused until it can be re-encrypted: {}", error.chain());
    }
    let throttle_bytes = plan.record.throttle_bytes();
    let job = Job::start(running, path.to_owned(), plan.record, throttle_bytes, identifier)?;
    Ok((live, job))
}
