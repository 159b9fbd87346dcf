//! LUKS2 containers: the header says how far it is, in cryptsetup's own way, and nothing else is written.
//!
//! The header is written by two: a helper process that has the passphrase writes down that it begins, and what the zones need is
//! written here, for which no key is needed. In the last change of the header the old key and its LUKS keyslot are gone.

use super::begin::{Backings, Old, Terms};
use super::{Job, NextPlan, Record, Wish, changed};
use crate::files::Medium;
use crate::host;
use crate::keyfile::{KeySource, LoadedKey};
use crate::luks::file::HeaderFile;
use crate::luks::keep;
use crate::luks::ledger::{LuksLedger, OnBacking};
use crate::luks::look::Luks;
use crate::luks::unlock::{LuksKey, NewLayout, Passphrase, WhichKey};
use crate::plan::{LayoutPlan, VolumePlan};
use crate::report::{Code, Failure};
use inlinecrypt_core::backing::Backing;
use inlinecrypt_core::disk::CHUNK_BYTES;
use inlinecrypt_core::error::Error;
use inlinecrypt_core::key::{KeyId, RawKey};
use inlinecrypt_core::profile::CryptoProfile;
use inlinecrypt_core::reencrypt::check_layouts;
use inlinecrypt_core::volume::{IvLayout, Layout, Volume};
use inlinecrypt_luks::Storage;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use zeroize::Zeroizing;

/// Largest sector of LUKS2, in bytes.
const SECTOR_BYTES_MAX: u32 = 4096;
/// What a disk writes whole or not at all, in bytes: only blocks of that are told apart by checksums.
const ATOMIC_BYTES: u32 = 512;

/// What is known of a container whose data is served.
#[derive(Clone, Debug)]
pub(crate) struct LuksTerms {
    version: u8,
    header: PathBuf,
    is_detached: bool,
    /// Its key, if that is had by a passphrase, and not also by a wrapped key in the header, which would be the old one's.
    key: Option<LuksKey>,
}

impl LuksTerms {
    /// Of a volume whose passphrase was asked for. Unless `keeps_passphrase`, one that was typed is forgotten.
    pub(crate) fn of(plan: &VolumePlan, keeps_passphrase: bool) -> Option<Self> {
        let Luks { header, version, wrapped, .. } = plan.luks.as_ref()?;
        let key = plan.key.luks_key().filter(|_| wrapped.is_none()).cloned();
        let key = key.map(|key| if keeps_passphrase { key } else { key.without_what_was_given() });
        let is_detached = *header != plan.path;
        Some(Self { version: *version, header: header.clone(), is_detached, key })
    }

    /// The LUKS keyslots whose passphrases have to be asked for, to keep them: those that its passphrase does not open.
    ///
    /// # Blocking
    ///
    /// As long as the key derivations of all take, where there are several.
    pub(crate) fn missing(&self) -> Result<Vec<u32>, Failure> {
        match &self.key {
            Some(key) if key.is_there() && keep::count(&self.header) > 1 => key.missing(),
            _ => Ok(Vec::new()),
        }
    }
}

/// What a container becomes, if its header says so. Its passphrase is that of the old key.
pub(super) fn next_plan(volume: &Path, luks: &Luks, label: &str) -> Result<Option<NextPlan>, Failure> {
    let Some(next) = &luks.next else { return Ok(None) };
    if luks.wrapped.is_some() {
        return Err(Failure::new(
            Code::Wrong,
            format!(
                "{label} is half re-encrypted, and has a wrapped key in a token, which is that of one half at most"
            ),
            "Let cryptsetup finish it: cryptsetup reencrypt --resume-only",
        ));
    }
    let label = format!("{label} (re-encrypted)");
    let medium = Medium::look(volume).map_err(|failure| failure.within(&label))?;
    let size_bytes = host::layout(&luks.layout, medium.len_bytes, &label)?.size_bytes();
    Ok(Some(NextPlan {
        record: Record::Header { header: luks.header.clone(), is_detached: luks.header != volume },
        key: KeySource::luks(LuksKey {
            header: luks.header.clone(),
            passphrase: Passphrase::NotAsked(None),
            which: next.which.clone(),
        }),
        key_id: None,
        layout: next.layout,
        engine: 0,
        done_bytes: next.done_of(size_bytes),
        size_bytes,
        label,
    }))
}

/// Completes the last steps of a re-encryption in the header, if they were not: the header forgets the old key. To be called by who has
/// locked the container.
pub(crate) fn settle(
    luks: &Luks,
    volume: &Path,
    whole: Arc<dyn Backing>,
    label: &str,
) -> Result<(), Failure> {
    if luks.is_unsettled {
        let size_bytes = whole.facts().len_bytes.saturating_sub(luks.layout.offset);
        let storage = storage(&luks.header, luks.header != volume, whole)?;
        LuksLedger::open(storage, size_bytes, CHUNK_BYTES as u64, label)?;
    }
    Ok(())
}

/// Where the header is.
pub(super) fn storage(
    header: &Path,
    is_detached: bool,
    whole: Arc<dyn Backing>,
) -> Result<Box<dyn Storage + Send>, Failure> {
    Ok(match is_detached {
        true => Box::new(HeaderFile::locked(header)?),
        false => Box::new(OnBacking(whole)),
    })
}

/// Begins: admits a new key, writes down what is to happen, and rests until told to go on.
pub(super) fn begin(
    old: Old,
    path: &Path,
    backings: Backings,
    terms: &Terms,
    luks: &LuksTerms,
    wish: &Wish,
    profile: &Arc<CryptoProfile>,
) -> Result<(Job, KeyId), Failure> {
    let Terms { label, access, discard, fallback, slots, .. } = terms;
    let failed = |error: Error| Failure::of(label, &error);
    let key = check(label, luks, wish)?;
    let present = old.layout();
    let planned = LayoutPlan {
        mode: present.mode(),
        data_unit: present.data_unit_size(),
        block: Some(present.logical_block_bytes()),
        iv_offset: present.iv_offset_sectors(),
        // Whatever the sectors were: where they had 512 bytes, it was the same as any.
        iv: IvLayout::Sectors,
        offset: 0,
        length: None,
    };
    let layout = host::layout(&changed(planned, &wish.layout), present.size_bytes(), label)?;
    check_layouts(&present, &layout).map_err(|error| {
        Failure::of(label, &error).advise("Choose data units of which the data is a multiple.")
    })?;
    check_end(label, &backings, &present, &layout)?;
    let mut bytes = Zeroizing::new(vec![0; layout.mode().info().key_bytes]);
    crate::luks::random(&mut bytes)
        .map_err(|error| Failure::of_io("no random key can be had", &error, "Try again."))?;
    let loaded = LoadedKey::Raw(RawKey::new(&bytes));
    let which = WhichKey::default();
    let source = KeySource::luks(LuksKey { which: which.clone(), ..key.clone() });
    let (admission, identifier) =
        host::admit_key(&loaded, &source, &layout, *fallback, *slots, profile, label)
            .map_err(|failure| failure.within(label))?;
    old.check_clients(&layout, label)?;
    let id = admission.key().id();
    let new = Volume::new(layout, admission, backings.data, *access, *discard).map_err(failed)?;
    let live = old.live(&new);
    let header = storage(&luks.header, luks.is_detached, backings.whole)?;
    let unit = present.data_unit_size().bytes().max(layout.data_unit_size().bytes());
    let becomes = NewLayout {
        mode: layout.mode().info().name.to_owned(),
        sector_bytes: layout.data_unit_size().bytes(),
        checksum_bytes: (unit == ATOMIC_BYTES).then_some(unit),
        zone_bytes_min: CHUNK_BYTES as u64,
    };
    key.begin_reencryption(becomes, &wish.others, &RawKey::new(&bytes), &which)
        .map_err(|failure| failure.within(label))?;
    let ledger = LuksLedger::open(header, layout.size_bytes(), wish.zone_bytes, label)?;
    let running = live.begin(new, ledger).map_err(failed)?;
    tracing::info!(volume = %label, key = %identifier, "re-encryption of a LUKS container begins");
    let record = Record::Header { header: luks.header.clone(), is_detached: luks.is_detached };
    Ok((Job::start(running, path.to_owned(), record, wish.throttle_bytes, identifier)?, id))
}

/// Refuses what is not done with a container; else its key.
fn check<'l>(label: &str, luks: &'l LuksTerms, wish: &Wish) -> Result<&'l LuksKey, Failure> {
    let refused =
        |what: &str, advice: &str| Err(Failure::new(Code::Wrong, format!("{label} {what}"), advice));
    if luks.version == 1 {
        return refused(
            "is a LUKS1 container, whose header has no place for a re-encryption",
            "Make it LUKS2 first (cryptsetup convert --type luks2), or use cryptsetup reencrypt.",
        );
    }
    let Some(key) = &luks.key else {
        return refused(
            "is a LUKS container with a wrapped key: what LUKS2 says of a re-encryption is signed with both volume keys, and nobody \
             has those of wrapped keys",
            "Copy its data to a new key: inlinecrypt luks create --wrapped --size SIZE NEW, serve both, and nbdcopy from the one \
             to the other (docs/luks.md).",
        );
    };
    if wish.key.is_some() {
        return refused(
            "is a LUKS container: its new key is made, and opened by the passphrase that opens it now",
            "Leave --key out.",
        );
    }
    if wish.keep_holes || wish.remove_old_key || wish.engine.is_some() {
        return refused(
            "is a LUKS container, whose header cannot say that holes are kept, or which engine or root its key has",
            "Leave out --keep-holes, --remove-old-key, --new-engine and --new-root. The old key is removed in any case.",
        );
    }
    let layout = &wish.layout;
    if layout.block.is_some() || layout.iv_offset.is_some() || layout.iv.is_some() || layout.offset.is_some()
    {
        return refused(
            "is a LUKS container: only mode and data unit can become others",
            "Leave out --block, --iv-offset, --iv and --offset.",
        );
    }
    if let Some(unit) = layout.data_unit.filter(|unit| unit.bytes() > SECTOR_BYTES_MAX) {
        return refused(
            &format!("is a LUKS container, whose sectors have at most {SECTOR_BYTES_MAX} bytes, not {unit}"),
            "Choose --data-unit 4096 or less.",
        );
    }
    if !key.is_there() {
        return refused(
            "was opened by a passphrase that was typed or came through a descriptor, and is not kept",
            "Serve it with --passphrase-file, or stop the server and ask with --offline.",
        );
    }
    Ok(key)
}

/// Refuses data that ends within a sector: cryptsetup would not take it up.
fn check_end(label: &str, backings: &Backings, old: &Layout, new: &Layout) -> Result<(), Failure> {
    let unit = u64::from(old.data_unit_size().bytes().max(new.data_unit_size().bytes()));
    let behind = backings.data.facts().len_bytes - old.size_bytes();
    if behind == 0 && old.size_bytes().is_multiple_of(unit) {
        return Ok(());
    }
    Err(Failure::new(
        Code::Wrong,
        format!("{label}: its data is not whole sectors of {unit} bytes, or is of a fixed length"),
        "Make the file or disk end with a whole sector; what is of a fixed length, cryptsetup reencrypt may know.",
    ))
}
