//! Which kernels there are, and which modules of theirs depend on which.

use crate::rig::{run, skip};
use inlinecrypt_testkit::require_tool;
use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where kernels are: folders with the content of kernel packages, each in a folder of its own or not.
const FOLDERS: &str = "INLINECRYPT_KERNELS";

/// A kernel as distributions pack it.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// Such as `6.1.0-50-cloud-amd64`.
    pub(crate) release: String,
    pub(crate) image: PathBuf,
    pub(crate) config: PathBuf,
    modules: BTreeMap<String, PathBuf>,
}

impl Kernel {
    /// Those to be tried, the newest first; without `CI=true` only that. Empty, and said, if there is none.
    pub(crate) fn all() -> Vec<Self> {
        let mut kernels = Self::found();
        if kernels.is_empty() {
            skip(&format!("no kernel to boot: .ci/kernels fetches some, or name a folder in {FOLDERS}"));
        }
        let long = env::var_os("CI").is_some_and(|value| value == "true");
        kernels.truncate(if long { kernels.len() } else { 1 });
        kernels
    }

    /// All that are here, the newest first.
    fn found() -> Vec<Self> {
        let ours = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/kernels");
        let folders = match env::var_os(FOLDERS) {
            Some(folders) => env::split_paths(&folders).collect(),
            None => vec![ours, PathBuf::from("/")],
        };
        let mut kernels: Vec<Self> = Vec::new();
        for folder in folders {
            let below = fs::read_dir(&folder).into_iter().flatten().flatten().map(|entry| entry.path());
            for root in [folder.clone()].into_iter().chain(below) {
                for kernel in Self::below(&root) {
                    if kernels.iter().all(|known| known.release != kernel.release) {
                        kernels.push(kernel);
                    }
                }
            }
        }
        kernels.sort_by_key(|kernel| std::cmp::Reverse(kernel.version()));
        kernels
    }

    /// Those that are installed below a root.
    fn below(root: &Path) -> Vec<Self> {
        let mut kernels = Vec::new();
        for modules in ["lib/modules", "usr/lib/modules"].map(|place| root.join(place)) {
            for folder in fs::read_dir(modules).into_iter().flatten().flatten().map(|entry| entry.path()) {
                let release = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
                let boot = root.join("boot");
                // Some systems let only root read it.
                let is_file = |path: &PathBuf| fs::File::open(path).is_ok();
                let image = [folder.join("vmlinuz"), boot.join(format!("vmlinuz-{release}"))]
                    .into_iter()
                    .find(is_file);
                let config =
                    [folder.join("config"), boot.join(format!("config-{release}"))].into_iter().find(is_file);
                let (Some(image), Some(config)) = (image, config) else { continue };
                let mut found = BTreeMap::new();
                modules_below(&folder.join("kernel"), &mut found);
                kernels.push(Self { release, image, config, modules: found });
            }
        }
        kernels
    }

    /// To order them by.
    fn version(&self) -> Vec<u32> {
        let numbers = self.release.split(|c: char| !c.is_ascii_digit());
        numbers.map_while(|number| number.parse().ok()).take(3).collect()
    }

    /// Whether its configuration has this set.
    pub(crate) fn has(&self, option: &str) -> bool {
        let config = fs::read_to_string(&self.config).unwrap();
        config.lines().any(|line| line == format!("{option}=y") || line == format!("{option}=m"))
    }

    /// Modules of these names and those that they need, in an order in which they can be loaded, as names and contents. What is
    /// no module is part of the kernel, or not there at all: nobody can tell, and whoever needs it will notice.
    pub(crate) fn modules(&self, names: &[&str]) -> Vec<(String, Vec<u8>)> {
        let mut order = Vec::new();
        let mut done = BTreeSet::new();
        for name in names {
            self.take(&normal(name), &mut done, &mut order);
        }
        order
    }

    fn take(&self, name: &str, done: &mut BTreeSet<String>, order: &mut Vec<(String, Vec<u8>)>) {
        let Some(path) = self.modules.get(name) else { return };
        if !done.insert(name.to_owned()) {
            return;
        }
        let content = read(path);
        for needed in needs(&content) {
            self.take(&needed, done, order);
        }
        order.push((name.to_owned(), content));
    }
}

/// What is needed to boot one.
pub(crate) fn can_boot() -> bool {
    let tools = ["qemu-system-x86_64", "setpriv", "busybox", "xz", "ldd", "strip"];
    let has_tools = tools.iter().all(|tool| require_tool(tool).is_some());
    if !has_tools {
        return false;
    }
    if !cfg!(target_arch = "x86_64") {
        eprintln!("SKIPPED: the kernels are for x86-64");
        return false;
    }
    // It has to work without anybody's libraries.
    let is_static =
        !run(Command::new("sh").args(["-c", "ldd $(command -v busybox) 2>&1 || true"])).contains("=>");
    if !is_static {
        skip("this busybox is not linked statically: Debian's package is busybox-static");
    }
    is_static
}

/// As the kernel writes names of modules.
fn normal(name: &str) -> String {
    name.replace('-', "_")
}

fn modules_below(folder: &Path, found: &mut BTreeMap<String, PathBuf>) {
    for path in fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            modules_below(&path, found);
            continue;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let suffix = [".ko", ".ko.xz", ".ko.zst"].into_iter().find(|suffix| name.ends_with(suffix));
        if let Some(suffix) = suffix {
            found.insert(normal(name.strip_suffix(suffix).expect("it ends with it")), path);
        }
    }
}

/// A module without its compression.
fn read(path: &Path) -> Vec<u8> {
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("xz") => {
            let output = Command::new("xz").arg("-dc").arg(path).output().unwrap();
            assert!(output.status.success(), "{}", path.display());
            output.stdout
        }
        Some("zst") => {
            let mut module = Vec::new();
            let file = File::open(path).unwrap();
            ruzstd::decoding::StreamingDecoder::new(file).unwrap().read_to_end(&mut module).unwrap();
            module
        }
        _ => fs::read(path).unwrap(),
    }
}

/// The modules that a module says it needs, in its section `.modinfo`: strings `depends=A,B` and `softdep=pre: A B`.
fn needs(module: &[u8]) -> Vec<String> {
    let strings = module.split(|&byte| byte == 0).filter_map(|text| std::str::from_utf8(text).ok());
    let mut needs = Vec::new();
    for text in strings {
        if let Some(list) = text.strip_prefix("depends=") {
            needs.extend(list.split(',').map(normal));
        } else if let Some(list) = text.strip_prefix("softdep=pre: ") {
            needs.extend(list.split(' ').take_while(|word| *word != "post:").map(normal));
        }
    }
    needs
}
