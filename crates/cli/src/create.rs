//! New volumes: key, description and image.
//!
//! The image comes last and each file appears whole or not at all. So a crash leaves nothing that could be taken for a
//! volume, and the next attempt uses the key and the description that are there already, if they fit. Nothing that
//! exists is ever overwritten.

use crate::ask::Asker;
use crate::cli::FallbackArg;
use crate::files::{self, Staged, shell_word};
use crate::host::{self, HostEngine};
use crate::identifier::Identifier;
use crate::keyfile::{KeySource, LoadedKey, Wanted};
use crate::places::{beside, directory_of};
use crate::plan::{Description, EnginePlan, LayoutPlan, Settings, SlotsPlan};
use crate::report::{Code, Failure, Failures, note};
use crate::size::Size;
use inlinecrypt_core::error::Error;
use inlinecrypt_core::volume::{IvLayout, Layout};
use inlinecrypt_engine::Root;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// What the longest of a volume's files has behind the volume's name.
const DESCRIPTION_SUFFIX: &str = ".toml";
/// Longest name of a volume in bytes, so that its description can have one: `NAME_MAX`, less the suffix.
const NAME_BYTES_MAX: usize = 255 - DESCRIPTION_SUFFIX.len();

/// A volume to be made.
#[derive(Debug)]
pub(crate) struct NewVolume<'a> {
    pub(crate) path: &'a Path,
    pub(crate) size: Size,
    /// Layout and key that were asked for.
    pub(crate) settings: Settings,
    pub(crate) fallback: FallbackArg,
    pub(crate) engine: EnginePlan,
    /// Whether the description is to name the engine, because it is not the usual one.
    pub(crate) name_engine: bool,
}

/// What was made.
#[derive(Debug)]
pub(crate) struct Made {
    pub(crate) layout: Layout,
    pub(crate) identifier: Identifier,
    /// The file of a wrapped key beside the volume, if that is where it is.
    pub(crate) key: KeySource,
    pub(crate) description: PathBuf,
}

impl NewVolume<'_> {
    pub(crate) fn make(&self, asker: &mut Asker) -> Result<Made, Failures> {
        let Self { path, settings, fallback, engine, .. } = self;
        let label = path.display().to_string();
        self.check_names()?;
        let layout = self.layout(&label)?;

        let sibling = beside(path, ".key");
        let source = settings.key.clone().unwrap_or_else(|| KeySource::wrapped(sibling.clone()));
        let generate = settings.key.is_none() && !files::exists(&sibling);
        if settings.key.is_none() && !generate {
            note(format_args!("{} exists already and is used", sibling.display()));
        }
        let wants_root = source.wanted == Wanted::Wrapped;
        let no_root = |error: Error| Failure::of_file("cannot open the root", &error);
        if wants_root && !files::exists(engine.root.path()) {
            // Made here, where files can be made; opened where the engine runs.
            drop(Root::open_or_create(&engine.root, asker.of(engine)).map_err(no_root)?);
        }
        let engine = HostEngine::start_at_home(engine, wants_root, false, asker).map_err(no_root)?;
        let key = if generate {
            LoadedKey::Wrapped(
                engine.profile.generate().map_err(|error| Failure::of("cannot make a key", &error))?,
            )
        } else {
            source.load()?
        };
        // Forced fallback is no property of the volume: that its key can be served at all is what counts here.
        let fallback = if source.wanted == Wanted::Raw { *fallback } else { FallbackArg::Off };
        let identifier = if fallback == FallbackArg::Off {
            // The admission ends here: it is asked for again when the volume is served.
            host::admit_key(&key, &source, &layout, fallback, SlotsPlan::default(), &engine.profile, &label)
                .map_err(|failure| failure.within(&label))?
                .1
        } else {
            key.check_length(layout.mode(), &source)?;
            let form = key.form(&engine.profile, &source)?;
            Identifier::of(&form, &engine.profile).map_err(|error| Failure::of(&source, &error))?
        };

        let description = self.check_description(&layout, identifier)?;
        if let (true, LoadedKey::Wrapped(blob)) = (generate, &key) {
            files::write_new(&sibling, "wrapped key", blob.as_bytes())?;
        }
        let description_path = Description::path_for(path);
        if description == Existing::None {
            let text = self.describe(&layout, identifier, &source);
            files::write_new(&description_path, "description", text.as_bytes())?;
        }
        let staged = Staged::beside(path);
        inlinecrypt_io::backing::create_file(staged.temporary(), self.file_bytes()?)
            .map_err(|error| Failure::of_file(format!("cannot make {label}"), &error))?;
        staged.publish("volume")?;
        Ok(Made { layout, identifier, key: source, description: description_path })
    }

    fn check_names(&self) -> Result<(), Failure> {
        let path = self.path;
        if files::exists(path) {
            return Err(Failure::new(
                Code::Busy,
                format!("{} exists already and was not touched", path.display()),
                format!(
                    "Serve it without --create (inlinecrypt serve {}), or choose another name.",
                    shell_word(path)
                ),
            ));
        }
        if path.file_name().is_none_or(|name| name.to_str().is_none()) {
            return Err(Failure::new(
                Code::Wrong,
                format!(
                    "{} is not a name for a new volume: its description holds it as UTF-8",
                    path.display()
                ),
                "Choose another name.",
            ));
        }
        let bytes = path.file_name().unwrap_or_default().len();
        if bytes > NAME_BYTES_MAX {
            return Err(Failure::new(
                Code::Wrong,
                format!(
                    "the name of the new volume is {bytes} bytes long, and {NAME_BYTES_MAX} is the most: its \
                     description has {DESCRIPTION_SUFFIX} behind it"
                ),
                "Choose a shorter name.",
            ));
        }
        let directory = directory_of(path);
        if !directory.as_os_str().is_empty() && !directory.is_dir() {
            return Err(Failure::new(
                Code::File,
                format!("cannot make {}: {} is not a directory", path.display(), directory.display()),
                format!("Make it first: mkdir -p {}", shell_word(directory)),
            ));
        }
        Ok(())
    }

    fn layout(&self, label: &str) -> Result<Layout, Failure> {
        let plan = self.settings.layout();
        let (size, unit) = (self.size.0, u64::from(plan.data_unit.bytes()));
        if size == 0 || size % unit != 0 {
            let below = size / unit * unit;
            let near = match below {
                0 => format!("The least is {unit} bytes."),
                _ => format!("Near it are {below} and {} bytes.", below.saturating_add(unit)),
            };
            return Err(Failure::new(
                Code::Wrong,
                format!(
                    "cannot make {label}: {size} bytes are not a multiple of the data unit, {unit} bytes"
                ),
                near,
            ));
        }
        host::layout(&plan, self.file_bytes()?, label)
    }

    /// Length of the file: the volume's, and what lies before it.
    fn file_bytes(&self) -> Result<u64, Failure> {
        let offset = self.settings.layout().offset;
        self.size.0.checked_add(offset).ok_or_else(|| {
            Failure::new(
                Code::Wrong,
                format!("{} bytes behind {offset} are more than 2^64", self.size.0),
                "Choose a smaller offset.",
            )
        })
    }

    /// Whether the description that may be there already is the one that would be written.
    fn check_description(&self, layout: &Layout, identifier: Identifier) -> Result<Existing, Failures> {
        let path = Description::path_for(self.path);
        let other = |why: String| {
            Failures::from(Failure::new(
                Code::Busy,
                format!("{} exists already, and describes another volume: {why}", path.display()),
                "It was left alone. Move it away if it is of no use any more, or choose another name.",
            ))
        };
        let found = match Description::find(self.path) {
            Ok(None) => return Ok(Existing::None),
            Ok(Some(found)) => found.settings,
            Err(failures) => {
                let why = failures.into_iter().map(|failure| failure.what).collect::<Vec<_>>().join("; ");
                return Err(other(why));
            }
        };
        let asked = self.settings.layout();
        let is_same = |found: LayoutPlan| {
            (found.mode, found.data_unit, found.iv_offset) == (asked.mode, asked.data_unit, asked.iv_offset)
                && (found.iv, found.offset) == (layout.iv(), asked.offset)
        };
        if !is_same(found.layout()) {
            return Err(other("its layout differs".to_owned()));
        }
        if let Some(size) = found.size.filter(|&size| size != asked.offset + layout.size_bytes()) {
            return Err(other(format!("its size is {}", Size(size))));
        }
        if found.key_id != Some(identifier) {
            return Err(other(format!("its key is not {identifier}")));
        }
        note(format_args!("{} exists already and is used", path.display()));
        Ok(Existing::Same)
    }

    fn describe(&self, layout: &Layout, identifier: Identifier, key: &KeySource) -> String {
        let string = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let directory = directory_of(self.path);
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        let mut text = format!(
            "# How inlinecrypt reads {}. The volume has no header, so nothing else says it: keep this file with it.\n",
            name.escape_default()
        );
        if self.name_engine {
            let EnginePlan { name: _, spec, root, passphrase_file: _, key_type: _, policy: _, .. } =
                &self.engine;
            let here = std::env::current_dir().unwrap_or_default();
            let root = root.clone().relative_to(&here);
            let _ = write!(
                text,
                "[[engine]]\nname = \"default\"\nspec = {}\nroot = {}\n\n",
                string(&spec.to_string()),
                string(&root.to_string())
            );
        }
        let _ = writeln!(text, "[[volume]]\npath = {}", string(&name));
        if let Some(key) = key.described_from(directory).and_then(|key| key.into_string().ok()) {
            let _ = writeln!(text, "key = {}", string(&key));
        }
        let _ = write!(
            text,
            "key_id = \"{identifier}\"\nmode = {}\nsize = {}\ndata_unit = {}\nblock = {}\niv_offset = {}\n",
            string(layout.mode().info().name),
            self.settings.layout().offset + layout.size_bytes(),
            layout.data_unit_size(),
            layout.logical_block_bytes(),
            layout.iv_offset_sectors(),
        );
        if layout.iv() != IvLayout::default() {
            let _ = writeln!(text, "iv = {}", string(layout.iv().name()));
        }
        if self.settings.layout().offset != 0 {
            let _ = writeln!(text, "offset = {}", self.settings.layout().offset);
        }
        text
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Existing {
    None,
    Same,
}
