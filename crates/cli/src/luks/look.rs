//! What a container says about its data.

use super::failure;
use super::file::HeaderFile;
use super::token::WrappedKey;
use super::unlock::WhichKey;
use crate::files::shell_word;
use crate::keyfile::KeySource;
use crate::plan::{LayoutPlan, Settings};
use crate::report::{Code, Failure, note};
use inlinecrypt_core::config::{DataUnitSize, Mode};
use inlinecrypt_core::volume::IvLayout;
use inlinecrypt_luks::luks2::{CopyState, Metadata, Segment};
use inlinecrypt_luks::{Kind, detect, encryption, luks1, luks2};
use std::path::{Path, PathBuf};

/// A container, as its header describes it.
#[derive(Clone, Debug)]
pub(crate) struct Luks {
    /// Where the header is: with the data, or detached.
    pub(crate) header: PathBuf,
    /// 1 or 2.
    pub(crate) version: u8,
    pub(crate) layout: LayoutPlan,
    /// The wrapped key in it, if there is one.
    pub(crate) wrapped: Option<WrappedKey>,
    /// Which key is that of the data, or the old one.
    pub(crate) which: WhichKey,
    /// What it is being re-encrypted to, if it is.
    pub(crate) next: Option<LuksNext>,
    /// Whether all of it is re-encrypted, and its header does not say so yet: cryptsetup was killed among its last steps, in which
    /// the old key goes first.
    pub(crate) is_unsettled: bool,
}

/// What a container is being re-encrypted to.
#[derive(Clone, Debug)]
pub(crate) struct LuksNext {
    pub(crate) layout: LayoutPlan,
    pub(crate) which: WhichKey,
    /// Bytes under the new key; `None` if all are.
    pub(crate) done_bytes: Option<u64>,
    /// Length of the zone behind these that was being written, in bytes.
    pub(crate) hot_bytes: Option<u64>,
}

impl LuksNext {
    /// How far it is, of data of so many bytes.
    pub(crate) fn done_of(&self, size_bytes: u64) -> u64 {
        self.done_bytes.unwrap_or(size_bytes)
    }
}

/// Whether `path` is a container, or was one whose second header is whole, whatever else is wrong with it.
pub(crate) fn is_container(path: &Path) -> bool {
    let Ok(mut file) = HeaderFile::read_only(path) else { return false };
    match detect(&mut file) {
        Ok(Some(Kind::Luks1 | Kind::Luks2)) => true,
        Ok(Some(Kind::Luks2SecondOnly)) => luks2::Header::read(&mut file).is_ok(),
        Ok(None) | Err(_) => false,
    }
}

impl Luks {
    /// A file that is too short for the data in it: what a container has lost is not made anew.
    pub(crate) fn cut_short(&self, failure: Failure) -> Failure {
        match failure.code {
            Code::File => failure.advise(format!(
                "By its header {}, the data of this container begins at byte {}, so something is missing: bring the whole \
                 container back from a copy.",
                self.header.display(),
                self.layout.offset
            )),
            _ => failure,
        }
    }

    /// Looks at the container `volume`, whose header may be in another file. `None` if it is none.
    ///
    /// Without `surely`, what has lost its first header is not taken for one: then it may be anything. Unless `is_described`, it is
    /// refused if its second header is whole.
    pub(crate) fn look(
        volume: &Path,
        detached: Option<&Path>,
        surely: bool,
        is_described: bool,
    ) -> Result<Option<Self>, Failure> {
        let path = detached.unwrap_or(volume);
        let mut file = match HeaderFile::read_only(path) {
            Ok(file) => file,
            // Whatever keeps it from being read, those who open it tell it better.
            Err(_) if detached.is_none() => return Ok(None),
            Err(failure) => return Err(failure),
        };
        let name = path.display();
        let kind = detect(&mut file).map_err(|error| failure(name.to_string(), &error))?;
        match kind {
            None if detached.is_some() => Err(Failure::new(
                Code::File,
                format!("{name} is no LUKS header"),
                "Name the file that was given to cryptsetup luksFormat with --header.",
            )),
            None => Ok(None),
            Some(Kind::Luks2SecondOnly) if detached.is_none() && !surely => {
                match luks2::Header::read(&mut file) {
                    // Nothing has been written over it: more likely the first one was lost than all of it given up.
                    Ok(header) if !is_described => Err(Failure::new(
                        Code::Refused,
                        format!(
                            "{name}: its first LUKS2 header is gone and the second is whole, so what is said of its key would \
                             destroy a container"
                        ),
                        format!(
                            "Mend it (inlinecrypt luks repair {}) and serve it without a key; if it is none any more, \
                             overwrite 4096 bytes from byte {} on.",
                            shell_word(path),
                            header.size
                        ),
                    )),
                    _ => Ok(None),
                }
            }
            Some(Kind::Luks1) => {
                let header = luks1::Header::read(&mut file).map_err(|error| failure(&name, &error))?;
                {
                    let luks = Self::of_luks1(path, &header).map_err(|error| failure(&name, &error))?;
                    luks.check_place(detached, header.end())?;
                    Ok(Some(luks))
                }
            }
            Some(Kind::Luks2 | Kind::Luks2SecondOnly) => {
                let header = luks2::Header::read(&mut file).map_err(|error| failure(&name, &error))?;
                let luks = Self::of_luks2(path, &header)?;
                let end = 2 * header.size + header.metadata.keyslots_bytes();
                luks.check_place(detached, end)?;
                for (copy, state) in ["first", "second"].iter().zip(&header.copies) {
                    match state {
                        CopyState::Good => {}
                        CopyState::Older => note(format_args!(
                            "{name}: the {copy} copy of its header is an older one; inlinecrypt luks repair makes both the same"
                        )),
                        CopyState::Bad(why) => note(format_args!(
                            "{name}: the {copy} copy of its header is damaged ({why}); inlinecrypt luks repair makes it anew"
                        )),
                    }
                }
                Ok(Some(luks))
            }
        }
    }

    /// Refuses data that would lie over the header.
    fn check_place(&self, detached: Option<&Path>, end: u64) -> Result<(), Failure> {
        let begin = self.layout.offset;
        if detached.is_some() || begin >= end {
            return Ok(());
        }
        Err(Failure::new(
            Code::File,
            format!(
                "{}: its data begins at byte {begin}, and its header ends at {end}",
                self.header.display()
            ),
            "If it is a detached header, name the data and give this one with --header; else restore it from a backup.",
        ))
    }

    /// What a description would say of it.
    pub(crate) fn settings(&self) -> Settings {
        let Self { header, layout, wrapped, .. } = self;
        let LayoutPlan { mode, data_unit, block, iv_offset, iv, offset, length } = *layout;
        Settings {
            mode: Some(mode),
            data_unit: Some(data_unit),
            block,
            iv_offset: Some(iv_offset),
            iv: Some(iv),
            offset: Some(offset),
            length,
            key_id: wrapped.as_ref().map(|wrapped| wrapped.key_id),
            key: wrapped.as_ref().map(|wrapped| KeySource::token(header.clone(), wrapped)),
            ..Settings::default()
        }
    }

    fn of_luks1(path: &Path, header: &luks1::Header) -> Result<Self, inlinecrypt_luks::Error> {
        let mode = header.mode()?;
        Ok(Self {
            header: path.to_owned(),
            version: 1,
            layout: LayoutPlan {
                mode,
                data_unit: DataUnitSize::MIN_SERVED,
                block: None,
                iv_offset: 0,
                iv: IvLayout::Sectors,
                offset: header.data_offset,
                length: None,
            },
            wrapped: None,
            which: WhichKey::default(),
            next: None,
            is_unsettled: false,
        })
    }

    fn of_luks2(path: &Path, header: &luks2::Header) -> Result<Self, Failure> {
        let name = path.display();
        let metadata = &header.metadata;
        let failed = |error| failure(&name, &error);
        let wrapped = WrappedKey::find(metadata).map_err(|failure| failure.within(&name))?;
        if let Some(re) = metadata.reencryption().map_err(failed)? {
            let mode = |segment: &Segment, digest| {
                encryption::mode(&segment.encryption, key_bytes(metadata, digest).unwrap_or(0))
                    .map_err(failed)
            };
            let value = |digest| metadata.digests()[&digest].value();
            if re.boundary.is_none() {
                return Ok(Self {
                    header: path.to_owned(),
                    version: 2,
                    layout: layout(&re.next, mode(&re.next, re.next_digest)?),
                    wrapped,
                    which: WhichKey::of_digest(value(re.next_digest)),
                    next: None,
                    is_unsettled: true,
                });
            }
            let layout = layout(&re.previous, mode(&re.previous, re.previous_digest)?);
            return Ok(Self {
                header: path.to_owned(),
                version: 2,
                layout,
                wrapped,
                which: WhichKey::of_digest(value(re.previous_digest)),
                next: Some(LuksNext {
                    layout: self::layout(&re.next, mode(&re.next, re.next_digest)?),
                    which: WhichKey::of_digest(value(re.next_digest)),
                    done_bytes: re.boundary,
                    hot_bytes: re.hot_bytes,
                }),
                is_unsettled: false,
            });
        }
        let (number, segment) = metadata.data().map_err(failed)?;
        let digest = metadata.digest_of(number);
        let key_bytes = digest.and_then(|(digest, _)| key_bytes(metadata, digest));
        let mode = match (&wrapped, key_bytes) {
            (Some(wrapped), _) => {
                encryption::mode(&segment.encryption, wrapped.mode.info().key_bytes).map_err(failed)?
            }
            (None, Some(key_bytes)) => encryption::mode(&segment.encryption, key_bytes).map_err(failed)?,
            (None, None) => {
                return Err(Failure::new(
                    Code::Refused,
                    format!("{name} has no LUKS keyslot, so nothing opens it"),
                    "If it was erased, restore the header from a backup: inlinecrypt luks header-restore",
                ));
            }
        };
        Ok(Self {
            header: path.to_owned(),
            version: 2,
            layout: layout(segment, mode),
            wrapped,
            which: digest.map_or_else(WhichKey::default, |(_, digest)| WhichKey::of_digest(digest.value())),
            next: None,
            is_unsettled: false,
        })
    }
}

/// How long the key of a digest is, which stands with the LUKS keyslots that hold it.
fn key_bytes(metadata: &Metadata, digest: u32) -> Option<usize> {
    let slots = &metadata.digests()[&digest].keyslots;
    slots.iter().find_map(|slot| metadata.keyslots().get(slot)).map(|slot| slot.key_bytes)
}

fn layout(segment: &Segment, mode: Mode) -> LayoutPlan {
    LayoutPlan {
        mode,
        data_unit: DataUnitSize::from_bytes(segment.sector_bytes).unwrap_or(DataUnitSize::MIN_SERVED),
        block: None,
        iv_offset: segment.iv_tweak,
        // LUKS has no flag for iv_large_sectors, so nobody has it.
        iv: IvLayout::Sectors,
        offset: segment.offset,
        length: segment.size,
    }
}
