//! From a volume that is open to a job: one that begins, or one that goes on.

use super::{Job, Prepared, Present, Wish, open_state};
use crate::cli::FallbackArg;
use crate::files;
use crate::host::ReadyNext;
use crate::identifier::Identifier;
use crate::plan::{LayoutPlan, SlotsPlan};
use crate::report::{Code, Failure};
use inlinecrypt_core::backing::{Access, Backing};
use inlinecrypt_core::disk::Disk as _;
use inlinecrypt_core::error::Error;
use inlinecrypt_core::key::KeyId;
use inlinecrypt_core::profile::CryptoProfile;
use inlinecrypt_core::reencrypt::{LiveVolume, clients_can_stay};
use inlinecrypt_core::volume::{Discard, Volume};
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
}

/// A volume that is to be re-encrypted.
#[derive(Debug)]
pub(crate) enum Old {
    /// It has clients.
    Live(Arc<LiveVolume>),
    /// Nobody uses it.
    Idle(Volume),
}

/// Begins: admits the key, writes down what is to happen, and rests until told to go on. Also says which key
/// is new, for status displays.
pub(crate) fn begin(
    old: Old,
    path: &Path,
    identifier: Identifier,
    backing: Arc<dyn Backing>,
    terms: &Terms,
    wish: &Wish,
    profile: &Arc<CryptoProfile>,
) -> Result<(Job, KeyId), Failure> {
    let Terms { label, access, discard, fallback, slots, is_named_twice: _ } = terms;
    if *access == Access::ReadOnly {
        return Err(Failure::new(
            Code::Refused,
            format!("{label} is served read-only"),
            "Serve it for writing, or stop the server and do it with --offline.",
        ));
    }
    let layout = match &old {
        Old::Live(live) => *live.current().layout(),
        Old::Idle(volume) => *volume.layout(),
    };
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
    let (mode, block) = (prepared.layout.mode(), prepared.layout.logical_block_bytes());
    if let Old::Live(live) = &old
        && !clients_can_stay(&live.geometry(), mode, block)
    {
        return Err(Failure::new(
            Code::Wrong,
            format!(
                "{label}: clients that are connected may write less than {block} bytes at a time, which {mode} with data \
                 units of {} cannot",
                prepared.layout.data_unit_size()
            ),
            "Stop the server, and do it without: inlinecrypt volume reencrypt --offline. It can be served meanwhile, to \
             clients that connect anew.",
        ));
    }
    let failed = |error: Error| Failure::of(label, &error);
    // Before anything is written.
    let new = Volume::new(prepared.layout, admission, backing, *access, *discard).map_err(failed)?;
    let live = match old {
        Old::Live(live) => live,
        Old::Idle(volume) => Arc::new(LiveVolume::new(volume).for_clients_of(&new)),
    };
    let medium = prepared.write_down(path)?;
    let running = live.begin(new, medium).map_err(failed)?;
    let Prepared { identifier, intent, state, .. } = prepared;
    tracing::info!(volume = %label, key = %identifier, "re-encryption begins");
    Ok((Job::start(running, path.to_owned(), state, intent, identifier)?, key))
}

/// A volume whose re-encryption had begun: whole again, whatever interrupted it, and resting.
pub(crate) fn go_on(
    old: Volume,
    path: &Path,
    backing: Arc<dyn Backing>,
    terms: &Terms,
    next: ReadyNext,
) -> Result<(Arc<LiveVolume>, Job), Failure> {
    let Terms { label, access, discard, .. } = terms;
    let ReadyNext { plan, layout, admission, identifier } = next;
    if *access == Access::ReadOnly {
        return Err(Failure::new(
            Code::Refused,
            format!("{label} is half re-encrypted, and read-only it cannot be completed"),
            format!("Complete it first: inlinecrypt volume reencrypt --resume {}", files::shell_word(path)),
        ));
    }
    let failed = |error: Error| Failure::of(label, &error);
    let new = Volume::new(layout, admission, backing, *access, *discard).map_err(failed)?;
    let state = open_state(&plan.state)?;
    let live = Arc::new(LiveVolume::new(old).for_clients_of(&new));
    let running = live.begin(new, state).map_err(failed)?;
    if let Some(error) = running.unfinished() {
        tracing::warn!(volume = %label, "one part of it is refused until it can be re-encrypted: {}", error.chain());
    }
    let job = Job::start(running, path.to_owned(), plan.state, plan.intent, identifier)?;
    Ok((live, job))
}
