//! What the machine's kernel and block devices can do of inline encryption: read from files, and put into words.
//!
//! Devices: `/sys/block/DISK/queue/crypto` (Linux `Documentation/ABI/stable/sysfs-block`; `block/blk-crypto-sysfs.c`).
//! The kernel: its configuration, `/sys/module`, `/sys/fs`, `/proc/mounts`. What cannot be known is said to be unknown, and
//! what is there and makes no sense is shown as it is.

use crate::files::{self, Secrecy};
use crate::report::{Code, Failure};
use flate2::read::GzDecoder;
use inlinecrypt_core::caps::DUN_BYTES_MAX;
use inlinecrypt_core::config::Mode;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// Longest file of sysfs that is looked at, in bytes: a page is the most it gives.
const ATTRIBUTE_BYTES_MAX: usize = 4096;

/// Data unit numbers have no more bits anywhere (`BLK_CRYPTO_MAX_IV_SIZE`).
const DUN_BITS_MAX: u32 = 8 * DUN_BYTES_MAX as u32;

/// Longest kernel configuration, in bytes. Real ones have a third of a megabyte.
const CONFIG_BYTES_MAX: usize = 8 << 20;

/// Where things are looked for.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    pub(crate) sysfs: PathBuf,
    /// `None`: the tree is another machine's, of which nothing else is known.
    pub(crate) proc: Option<PathBuf>,
    /// Kernel configurations, the first of which is taken that is there.
    pub(crate) configs: Vec<PathBuf>,
}

/// All that was found out.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) version: u32,
    pub(crate) sysfs: String,
    pub(crate) kernel: Kernel,
    pub(crate) devices: Vec<Device>,
}

/// What the kernel has.
#[derive(Debug, Serialize)]
pub(crate) struct Kernel {
    pub(crate) release: Option<String>,
    /// Which configuration was read.
    pub(crate) config: Option<String>,
    pub(crate) features: Vec<Feature>,
    /// Filesystems that are mounted with `inlinecrypt`; `null` if not to be seen.
    pub(crate) mounted_with_inlinecrypt: Option<Vec<String>>,
    /// `qcom_ice.use_wrapped_keys`: which keys Qualcomm's engine was told to take when the system started.
    pub(crate) qcom_ice_use_wrapped_keys: Option<bool>,
}

/// A part of the kernel.
#[derive(Debug, Serialize)]
pub(crate) struct Feature {
    pub(crate) name: &'static str,
    pub(crate) state: State,
    /// From what that is known, or why not.
    pub(crate) because: String,
    /// What it is for.
    pub(crate) purpose: &'static str,
}

/// Whether it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    Yes,
    /// As a module that is not loaded.
    Module,
    No,
    Unknown,
}

/// A block device.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Device {
    pub(crate) name: String,
    /// Whether it does inline encryption.
    pub(crate) inline_encryption: bool,
    pub(crate) raw_keys: Option<bool>,
    pub(crate) hw_wrapped_keys: Option<bool>,
    pub(crate) max_dun_bits: Option<u32>,
    pub(crate) num_keyslots: Option<u32>,
    /// Data unit sizes of each mode, as a mask whose bits are the sizes.
    pub(crate) modes: BTreeMap<String, u32>,
    /// Files whose content makes no sense.
    pub(crate) strange: Vec<String>,
    /// What all that means.
    pub(crate) meaning: Vec<String>,
}

/// Looks at everything.
///
/// # Errors
///
/// If there is no sysfs.
pub(crate) fn look(places: &Places) -> Result<Report, Failure> {
    let block = places.sysfs.join("block");
    let entries = fs::read_dir(&block).map_err(|error| {
        Failure::of_io(
            format!("cannot look at block devices in {}", block.display()),
            &error,
            "Name a sysfs with --sysfs DIR; that of a running system is /sys.",
        )
    })?;
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort_by_key(|name| natural(name));
    let mut devices: Vec<Device> = names.into_iter().map(|name| read_device(&block, name)).collect();
    let kernel = read_kernel(places, &devices);
    for device in &mut devices {
        device.meaning = device.in_words(&kernel);
    }
    Ok(Report { version: 1, sysfs: places.sysfs.display().to_string(), kernel, devices })
}

/// Where distributions put it.
pub(crate) fn configs_of_this_machine() -> Vec<PathBuf> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut configs = vec![PathBuf::from("/proc/config.gz")];
    configs.extend(
        [
            format!("/boot/config-{release}"),
            format!("/lib/modules/{release}/config"),
            format!("/usr/lib/modules/{release}/config"),
        ]
        .map(PathBuf::from),
    );
    configs
}

/// What the hardware of a block device of this machine does with keys, in words; `None` if it cannot be found.
pub(crate) fn about(device: &Path) -> Option<String> {
    let number = rustix::fs::stat(device).ok()?.st_rdev;
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let place = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    // A partition has its disk's hardware.
    let disk = if place.join("partition").exists() { place.parent()? } else { &place };
    let found = read_device(disk.parent()?, disk.file_name()?.to_string_lossy().into_owned());
    let places = Places {
        sysfs: PathBuf::from("/sys"),
        proc: Some(PathBuf::from("/proc")),
        configs: configs_of_this_machine(),
    };
    let kernel = read_kernel(&places, std::slice::from_ref(&found));
    found.in_words(&kernel).into_iter().next()
}

/// Refuses a file that is no kernel configuration.
pub(crate) fn check_config(path: &Path) -> Result<(), Failure> {
    files::read(path, "kernel configuration", Secrecy::Public, CONFIG_BYTES_MAX)?;
    match Config::read(std::slice::from_ref(&path.to_owned())) {
        Some(_) => Ok(()),
        None => Err(Failure::new(
            Code::File,
            format!("{} is no kernel configuration: there is no line CONFIG_...= in it", path.display()),
            "Name one, such as /boot/config-$(uname -r) or a copy of /proc/config.gz.",
        )),
    }
}

/// So that sda10 comes behind sda9.
fn natural(name: &str) -> (String, u64) {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (stem.to_owned(), name[stem.len()..].parse().unwrap_or(0))
}

/// The text of a file without its line feed; `None` if there is none.
fn attribute(path: &Path) -> Option<String> {
    let bytes = files::read(path, "attribute", Secrecy::Public, ATTRIBUTE_BYTES_MAX).ok()?;
    Some(String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_owned())
}

fn read_device(block: &Path, name: String) -> Device {
    let crypto = block.join(&name).join("queue/crypto");
    if !crypto.is_dir() {
        return Device { name, ..Device::default() };
    }
    let mut strange = Vec::new();
    // The file is there if the key type is, and says "supported".
    let mut is_supported = |file: &str| match attribute(&crypto.join(file)).as_deref() {
        None => false,
        Some("supported") => true,
        Some(other) => {
            strange.push(format!("{file}: {other:?}"));
            false
        }
    };
    let (raw_keys, hw_wrapped_keys) = (is_supported("raw_keys"), is_supported("hw_wrapped_keys"));
    // Kernels older than the key types have neither file, and raw keys.
    let knows_types = raw_keys || hw_wrapped_keys;
    let mut number = |file: &str| {
        let text = attribute(&crypto.join(file))?;
        let found = text.parse().ok();
        if found.is_none() {
            strange.push(format!("{file}: {text:?}"));
        }
        found
    };
    let (max_dun_bits, num_keyslots) = (number("max_dun_bits"), number("num_keyslots"));
    let mut modes = BTreeMap::new();
    for entry in fs::read_dir(crypto.join("modes")).into_iter().flatten().flatten() {
        let mode = entry.file_name().to_string_lossy().into_owned();
        let text = attribute(&entry.path()).unwrap_or_default();
        match text.strip_prefix("0x").and_then(|digits| u32::from_str_radix(digits, 16).ok()) {
            Some(mask) => drop(modes.insert(mode, mask)),
            None => strange.push(format!("modes/{mode}: {text:?}")),
        }
    }
    Device {
        name,
        inline_encryption: true,
        raw_keys: knows_types.then_some(raw_keys),
        hw_wrapped_keys: knows_types.then_some(hw_wrapped_keys),
        max_dun_bits,
        num_keyslots,
        modes,
        strange,
        meaning: Vec::new(),
    }
}

/// Sizes whose bits are set, as text.
pub(crate) fn sizes(mask: u32) -> String {
    let sizes: Vec<String> =
        (0..32).filter(|bit| mask & (1 << bit) != 0).map(|bit| (1u64 << bit).to_string()).collect();
    sizes.join(", ")
}

impl Device {
    fn in_words(&self, kernel: &Kernel) -> Vec<String> {
        let mut words = Vec::new();
        if !self.inline_encryption {
            let blk_crypto = kernel.state("blk-crypto");
            words.push(match (blk_crypto, kernel.state("blk-crypto-fallback")) {
                (State::No, _) => {
                    "no inline encryption; and blk-crypto, which would show it, is not in this kernel".to_owned()
                }
                (_, State::Yes) => {
                    "no inline encryption: raw keys go through blk-crypto's fallback, wrapped keys cannot be used"
                        .to_owned()
                }
                (_, State::No) => "no inline encryption, and the kernel has no fallback".to_owned(),
                _ => "no inline encryption".to_owned(),
            });
            return words;
        }
        words.push(self.keys_in_words(kernel));
        words.extend(self.num_keyslots.map(|count| match count {
            0 => "no keyslots: the key comes with every request".to_owned(),
            1 => "one keyslot: keys take turns, request by request".to_owned(),
            _ => format!("{count} keys at once; with more in use, requests wait for a keyslot"),
        }));
        if let Some(bits) = self.max_dun_bits {
            words.push(self.dun_in_words(bits));
        }
        if self.modes.is_empty() {
            words.push("no mode is offered: nothing can be encrypted here".to_owned());
        }
        let unknown: Vec<&str> = self
            .modes
            .keys()
            .map(String::as_str)
            .filter(|name| Mode::from_name(name).is_none_or(|mode| mode.info().linux_number.is_none()))
            .collect();
        if !unknown.is_empty() {
            words.push(format!("modes that are not known here: {}", unknown.join(", ")));
        }
        words.extend(self.layers_in_words(kernel));
        words
    }

    fn keys_in_words(&self, kernel: &Kernel) -> String {
        let ice = kernel.qcom_ice_use_wrapped_keys;
        match (self.raw_keys, self.hw_wrapped_keys) {
            (None, _) | (_, None) => {
                "raw keys: the kernel says no key types, so it is older than wrapped keys".to_owned()
            }
            (Some(true), Some(true)) => "raw keys and wrapped keys, side by side".to_owned(),
            (Some(false), Some(true)) => match ice {
                Some(true) => "wrapped keys only: raw keys cannot be used until reboot without \
                               qcom_ice.use_wrapped_keys=1"
                    .to_owned(),
                _ => "wrapped keys only: raw keys cannot be used, and what decides that does so once, when the system \
                      starts"
                    .to_owned(),
            },
            (Some(true), Some(false)) => match ice {
                Some(false) => "raw keys only: wrapped keys cannot be used until reboot with \
                                qcom_ice.use_wrapped_keys=1, and then only if the hardware and its firmware have them; \
                                raw keys are gone then"
                    .to_owned(),
                Some(true) => "raw keys only, although qcom_ice.use_wrapped_keys=1: the hardware or its firmware has no \
                               wrapped keys"
                    .to_owned(),
                None => "raw keys only".to_owned(),
            },
            (Some(false), Some(false)) => "no keys at all: nothing can be encrypted here".to_owned(),
        }
    }

    fn dun_in_words(&self, bits: u32) -> String {
        let unit = self.modes.values().map(|mask| mask & 0x1fe00).fold(0, |all, mask| all | mask);
        if !(1..=DUN_BITS_MAX).contains(&bits) {
            return format!(
                "data unit numbers of {bits} bits cannot be: kernels have 1 to {DUN_BITS_MAX}; nothing follows from it"
            );
        }
        let reach = |unit_log2: u32| {
            let log2 = bits + unit_log2;
            if log2 >= 64 { None } else { Some(crate::size::Size(1 << log2)) }
        };
        let mut text = format!("data unit numbers of {bits} bits");
        let policies = match bits {
            0..32 => "fscrypt can only use short files",
            32..64 => "of fscrypt's policies for wrapped keys, IV_INO_LBLK_32 fits; IV_INO_LBLK_64 does not",
            64..192 => {
                "fscrypt's IV_INO_LBLK_64 and IV_INO_LBLK_32 fit; DIRECT_KEY, which wants 192, does not"
            }
            _ => "every fscrypt policy fits",
        };
        if let Some(reach) = (unit != 0).then(|| unit.trailing_zeros()).and_then(reach) {
            text.push_str(&format!(
                ": a key reaches {reach} with data units of {} bytes",
                1u64 << unit.trailing_zeros()
            ));
        }
        format!("{text}; {policies}")
    }

    /// Whether what lies above finds what it asks for.
    fn layers_in_words(&self, kernel: &Kernel) -> Vec<String> {
        let mut words = Vec::new();
        let xts = self.modes.get(Mode::Aes256Xts.info().name).copied().unwrap_or(0);
        let large = xts & 4096 != 0;
        if xts == 0 {
            words.push("no AES-256-XTS: dm-inlinecrypt and wrapped fscrypt keys are not for it".to_owned());
        } else if !large {
            words.push(
                "AES-256-XTS, but not with data units of 4096 bytes, which filesystems use by default"
                    .to_owned(),
            );
        }
        if xts != 0 && kernel.state("dm-inlinecrypt") == State::No {
            words.push(
                "volumes cannot use it through dm-inlinecrypt, which this kernel does not have".to_owned(),
            );
        }
        words
    }
}

impl Kernel {
    /// The state of a feature.
    pub(crate) fn state(&self, name: &str) -> State {
        self.features
            .iter()
            .find(|feature| feature.name == name)
            .map_or(State::Unknown, |feature| feature.state)
    }
}

/// A kernel configuration: what each option that it mentions is set to.
struct Config {
    place: String,
    options: HashMap<String, String>,
}

impl Config {
    fn read(places: &[PathBuf]) -> Option<Self> {
        places.iter().find_map(|path| {
            let bytes = files::read(path, "configuration", Secrecy::Public, CONFIG_BYTES_MAX).ok()?;
            let mut text = Vec::new();
            if bytes.starts_with(&[0x1f, 0x8b]) {
                GzDecoder::new(&bytes[..]).take(CONFIG_BYTES_MAX as u64).read_to_end(&mut text).ok()?;
            } else {
                text.extend_from_slice(&bytes);
            }
            let text = String::from_utf8_lossy(&text);
            let options: HashMap<String, String> = text.lines().filter_map(Self::option).collect();
            // Something else of that name.
            (!options.is_empty()).then(|| Self { place: path.display().to_string(), options })
        })
    }

    fn option(line: &str) -> Option<(String, String)> {
        if let Some(name) = line.strip_prefix("# CONFIG_").and_then(|line| line.strip_suffix(" is not set")) {
            return Some((name.to_owned(), "n".to_owned()));
        }
        let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
        Some((name.to_owned(), value.to_owned()))
    }

    /// What an option is set to. What a whole configuration does not mention, the kernel does not have.
    fn get(&self, option: &str) -> &str {
        self.options.get(option).map_or("n", String::as_str)
    }

    fn mentions(&self, option: &str) -> bool {
        self.options.contains_key(option)
    }
}

/// Name, option, module, purpose.
const FEATURES: [(&str, &str, Option<&str>, &str); 9] = [
    ("blk-crypto", "BLK_INLINE_ENCRYPTION", None, "the framework"),
    ("blk-crypto-fallback", "BLK_INLINE_ENCRYPTION_FALLBACK", None, "raw keys where hardware cannot"),
    ("fscrypt", "FS_ENCRYPTION", Some("fscrypto"), "encrypted directories"),
    (
        "fscrypt-inline",
        "FS_ENCRYPTION_INLINE_CRYPT",
        None,
        "their contents through blk-crypto: mount -o inlinecrypt",
    ),
    ("dm-crypt", "DM_CRYPT", Some("dm_crypt"), "encrypted volumes, always by the CPU"),
    ("dm-inlinecrypt", "DM_INLINECRYPT", Some("dm_inlinecrypt"), "encrypted volumes through blk-crypto"),
    ("ufs-crypto", "SCSI_UFS_CRYPTO", None, "hardware in UFS controllers"),
    ("mmc-crypto", "MMC_CRYPTO", None, "hardware in eMMC controllers"),
    ("qcom-ice", "QCOM_INLINE_CRYPTO", Some("qcom_ice"), "Qualcomm's engine"),
];

fn read_kernel(places: &Places, devices: &[Device]) -> Kernel {
    let config = Config::read(&places.configs);
    let mounts = places.proc.as_ref().and_then(|proc| {
        let bytes = files::read(&proc.join("mounts"), "mounts", Secrecy::Public, CONFIG_BYTES_MAX).ok()?;
        let mounts = String::from_utf8_lossy(&bytes);
        Some(mounts.lines().filter_map(mounted_with_inlinecrypt).collect::<Vec<String>>())
    });
    let ice = attribute(&places.sysfs.join("module/qcom_ice/parameters/use_wrapped_keys"));
    let mut features = Vec::new();
    for (name, option, module, purpose) in FEATURES {
        let is_loaded = module.is_some_and(|module| places.sysfs.join("module").join(module).is_dir());
        let seen = match name {
            "blk-crypto" => devices
                .iter()
                .find(|device| device.inline_encryption)
                .map(|device| format!("{} shows what it can do", device.name)),
            "fscrypt" if places.sysfs.join("fs/ext4/features/encryption").exists() => {
                Some("ext4 has it".to_owned())
            }
            "fscrypt" if places.sysfs.join("fs/f2fs/features/encryption").exists() => {
                Some("f2fs has it".to_owned())
            }
            "fscrypt-inline" => mounts
                .as_ref()
                .and_then(|mounts| mounts.first())
                .map(|mount| format!("{mount} is mounted with inlinecrypt")),
            _ => None,
        };
        let seen = seen.or_else(|| is_loaded.then(|| format!("/sys/module/{}", module.unwrap_or_default())));
        let (state, because) = match (&config, seen) {
            (_, Some(seen)) => (State::Yes, seen),
            (None, None) => (State::Unknown, "there is no kernel configuration to read".to_owned()),
            (Some(config), None) => from_config(config, option),
        };
        features.push(Feature { name, state, because, purpose });
    }
    Kernel {
        release: places.proc.as_ref().and_then(|proc| attribute(&proc.join("sys/kernel/osrelease"))),
        config: config.map(|config| config.place),
        features,
        mounted_with_inlinecrypt: mounts,
        qcom_ice_use_wrapped_keys: match ice.as_deref() {
            Some("Y") => Some(true),
            Some("N") => Some(false),
            _ => None,
        },
    }
}

fn from_config(config: &Config, option: &str) -> (State, String) {
    let via_blk_crypto = option == "FS_ENCRYPTION_INLINE_CRYPT"
        && !config.mentions(option)
        && config.get("FS_ENCRYPTION") == "y"
        && config.get("BLK_INLINE_ENCRYPTION") == "y";
    if via_blk_crypto {
        // The option went when fscrypt took blk-crypto for all contents.
        return (
            State::Yes,
            "CONFIG_FS_ENCRYPTION=y, which needs no option of its own for it any more".to_owned(),
        );
    }
    match config.get(option) {
        "y" => (State::Yes, format!("CONFIG_{option}=y")),
        "m" => (State::Module, format!("CONFIG_{option}=m, and not loaded")),
        _ if config.mentions(option) => (State::No, format!("CONFIG_{option} is not set")),
        _ => (State::No, format!("CONFIG_{option} is not known to this kernel, or lacks what it needs")),
    }
}

/// `DEVICE on PLACE`, if a line of `/proc/mounts` has the option.
fn mounted_with_inlinecrypt(line: &str) -> Option<String> {
    let mut fields = line.split(' ');
    let (device, place, _kind, options) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
    options.split(',').any(|option| option == "inlinecrypt").then(|| format!("{device} on {place}"))
}
