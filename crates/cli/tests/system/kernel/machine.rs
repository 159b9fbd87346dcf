//! A machine that boots a kernel, runs a few steps, and is gone.
//!
//! Its first filesystem is made here: busybox, our program, other programs with their libraries, the kernel's modules, and the steps as
//! scripts. Disks are images on the host. Results come back over the second serial port, the console over the first.

use super::archive::Archive;
use super::kernels::Kernel;
use crate::rig::{Place, run};
use inlinecrypt_testkit::{ServerProcess, require_tool};
use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// How long a machine may take. Whole runs take a small part of it, without hardware that helps, too.
const TIME_MAX: Duration = Duration::from_secs(600);
/// How long a step may take, in seconds.
const STEP_SECONDS_MAX: u32 = 300;

/// In MiB. Whatever is unpacked first is in it, too.
const MEMORY_MIB: u32 = 1024;

/// How many lines of the console are shown of a machine that failed.
const CONSOLE_LINES: usize = 120;

/// What every machine needs, where it is not part of the kernel.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "ext4"];

/// A step that ends with this code cannot be tried with this kernel, which no package would change.
const NOT_HERE: i32 = 77;

/// A machine that is still to be booted.
pub(crate) struct Machine<'a> {
    place: &'a Place,
    kernel: &'a Kernel,
    archive: Archive,
    modules: Vec<&'static str>,
    disks: Vec<String>,
    steps: Vec<String>,
}

impl<'a> Machine<'a> {
    pub(crate) fn new(place: &'a Place, kernel: &'a Kernel) -> Self {
        let mut machine = Self {
            place,
            kernel,
            archive: Archive::default(),
            modules: MODULES.to_vec(),
            disks: Vec::new(),
            steps: Vec::new(),
        };
        for folder in ["dev", "proc", "sys", "tmp", "run", "root", "work", "mnt", "etc"] {
            machine.archive.directory(Path::new(folder));
        }
        let busybox = require_tool("busybox").expect("looked for before");
        machine.archive.file(Path::new("/bin/busybox"), 0o755, &fs::read(busybox).unwrap());
        machine.archive.file(Path::new("/init"), 0o755, include_bytes!("init.sh"));
        machine.file("/limit", STEP_SECONDS_MAX.to_string().as_bytes());
        machine.file(&format!("/boot/config-{}", kernel.release), &fs::read(&kernel.config).unwrap());
        machine
    }

    /// Loads these modules and what they need, where they are modules.
    pub(crate) fn modules(&mut self, names: &[&'static str]) {
        self.modules.extend(names);
    }

    /// Puts our program into it.
    pub(crate) fn our_program(&mut self) {
        // Without what debuggers want: it is read into memory twice.
        let stripped = self.place.path("stripped");
        run(Command::new("strip").arg("-o").arg(&stripped).arg(env!("CARGO_BIN_EXE_inlinecrypt")));
        self.program_at(&stripped, Path::new("/prog/inlinecrypt"));
    }

    /// Puts programs of the host's into it, with their libraries. `false`, and said, if one is missing.
    pub(crate) fn programs(&mut self, names: &[&str]) -> bool {
        names.iter().all(|name| {
            let path = require_tool(name);
            if let Some(path) = &path {
                self.program_at(path, &Path::new("/prog").join(name));
            }
            path.is_some()
        })
    }

    /// Puts a program or library to a place, and its libraries where it looks for them.
    pub(crate) fn program_at(&mut self, from: &Path, to: &Path) {
        self.archive.file(to, 0o755, &fs::read(from).unwrap());
        let output = Command::new("ldd").arg(from).output().unwrap();
        let libraries = String::from_utf8_lossy(&output.stdout).into_owned();
        for path in libraries.split_ascii_whitespace().filter(|word| word.starts_with('/')) {
            self.archive.file(Path::new(path), 0o755, &fs::read(path).unwrap());
        }
    }

    /// Puts a file into it.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.archive.file(Path::new(path), 0o600, content);
    }

    /// Puts the files below a folder of the host's into it.
    pub(crate) fn folder(&mut self, from: &Path, to: &Path) {
        self.archive.directory(to);
        for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
            let to = to.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                self.folder(&entry.path(), &to);
            } else {
                self.archive.file(&to, 0o644, &fs::read(entry.path()).unwrap());
            }
        }
    }

    /// Gives it a disk, `/disk/NAME`: an image in the place. `options` are those of qemu's device.
    pub(crate) fn disk(&mut self, name: &str, image: &Path, options: &str) {
        self.add_disk(name, image, "", options);
    }

    /// The same for a disk that writes no more than 6 MB a second, so that what goes on there can be met in its middle.
    pub(crate) fn slow_disk(&mut self, name: &str, image: &Path) {
        self.add_disk(name, image, "throttling.bps-write=6000000", "");
    }

    fn add_disk(&mut self, name: &str, image: &Path, drive: &str, device: &str) {
        assert!(name.len() <= 20, "serial numbers have no more: {name}");
        assert!(!image.to_str().unwrap().contains(','), "a path that qemu takes");
        let number = self.disks.len() / 2;
        // Eight in each place of the bus; the first places are the board's.
        let (slot, function) = (3 + number / 8, number % 8);
        let comma = |options: &str| if options.is_empty() { String::new() } else { format!(",{options}") };
        let (drive, device) = (comma(drive), comma(device));
        self.disks.extend([
            format!("if=none,id=d{number},format=raw,discard=unmap,file={}{drive}", image.display()),
            format!(
                "virtio-blk-pci,drive=d{number},serial={name},addr={slot:x}.{function},multifunction=on{device}"
            ),
        ]);
    }

    /// What is to be done, after the steps before: a script for the shell, in a folder of its own. The first command that fails ends it.
    pub(crate) fn step(&mut self, name: &str, script: &str) {
        self.file(&format!("/steps/{name}"), script.as_bytes());
        self.steps.push(name.to_owned());
    }

    /// Boots it and does all that. Fails if a step failed, with what the console said.
    pub(crate) fn boot(mut self) -> Results {
        let modules = self.kernel.modules(&self.modules);
        let mut list = String::new();
        for (name, content) in modules {
            let path = format!("/modules.d/{name}.ko");
            self.file(&path, &content);
            list += &format!("{path}\n");
        }
        self.file("/modules", list.as_bytes());
        let order: String = self.steps.iter().map(|step| format!("{step}\n")).collect();
        self.file("/order", order.as_bytes());
        let Self { place, kernel, archive, disks, steps, .. } = self;
        let files = ["initramfs", "console", "results", "qemu"].map(|name| place.path(name));
        let [initramfs, console, results, complaints] = &files;
        fs::write(initramfs, archive.finish()).unwrap();

        // Gone with us, whoever kills us.
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        // Emulation is what is everywhere, and always the same.
        let accelerator = env::var("INLINECRYPT_QEMU_ACCEL").unwrap_or_else(|_unset| "tcg".to_owned());
        // One CPU: with two, emulated Linux was seen to die of an instruction that it was changing for the other. And qemu 7.2's
        // emulation of cmpxchg16b spoils the flags.
        let cpu = if accelerator == "tcg" { "max,-cx16" } else { "max" };
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-cpu", cpu]);
        qemu.args(["-accel", &accelerator, "-smp", "1", "-m", &MEMORY_MIB.to_string()]);
        for port in [console, results] {
            qemu.arg("-serial").arg(format!("file:{}", port.display()));
        }
        for (index, disk) in disks.iter().enumerate() {
            qemu.args([if index % 2 == 0 { "-drive" } else { "-device" }, disk]);
        }
        qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(initramfs);
        qemu.args(["-append", "console=ttyS0 panic=-1 loglevel=5 random.trust_cpu=1"]);
        qemu.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(complaints).unwrap());
        let text = |path: &PathBuf| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        let mut run = || ServerProcess::start(&mut qemu).and_then(|mut process| process.wait(TIME_MAX));
        let mut ended = run();
        if text(results).is_empty() && text(console).contains("Kernel panic") {
            eprintln!("{}: died before the first step, and is booted once more", kernel.release);
            ended = run();
        }
        let results = Results::parse(&text(results), &steps);
        let tail = |text: String| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
        };
        assert!(
            ended.as_ref().is_ok_and(|status| status.success()) && results.failed().is_empty(),
            "{}: {ended:?}, not done: {:?}\n{}{}{}",
            kernel.release,
            results.failed(),
            results.failed().into_iter().map(|(name, _)| results.printed(name).1).collect::<String>(),
            text(complaints),
            tail(text(console)),
        );
        for (name, _, _) in results.0.iter().filter(|(_, code, _)| *code == Some(NOT_HERE)) {
            eprintln!("SKIPPED: {name} is nothing for Linux {}", kernel.release);
        }
        for path in &files {
            fs::remove_file(path).unwrap();
        }
        results
    }
}

/// Of each step: its name, the code that it ended with, and what it printed.
pub(crate) struct Results(Vec<(String, Option<i32>, String)>);

impl Results {
    fn parse(text: &str, steps: &[String]) -> Self {
        let mut results: Vec<(String, Option<i32>, String)> =
            steps.iter().map(|step| (step.clone(), None, String::new())).collect();
        let mut current = None;
        for line in text.lines().map(|line| line.trim_end_matches('\r')) {
            if let Some(name) = line.strip_prefix("begin ") {
                current = results.iter_mut().find(|(step, _, _)| step == name);
            } else if let (Some(code), Some(result)) = (line.strip_prefix("end "), &mut current) {
                result.1 = code.parse().ok();
            } else if let (Some(line), Some(result)) = (line.strip_prefix('|'), &mut current) {
                result.2 += &format!("{line}\n");
            }
        }
        Self(results)
    }

    /// The steps that were not done, with their codes; none where the machine ended before.
    fn failed(&self) -> Vec<(&str, Option<i32>)> {
        let is_good = |code| matches!(code, Some(0 | NOT_HERE));
        self.0.iter().filter(|(_, code, _)| !is_good(*code)).map(|(name, code, _)| (&**name, *code)).collect()
    }

    /// What a step printed; `None` if this kernel could not do it.
    pub(crate) fn of(&self, step: &str) -> Option<&str> {
        let (code, out) = self.printed(step);
        (code == Some(0)).then_some(out)
    }

    fn printed(&self, step: &str) -> (Option<i32>, &str) {
        let (_, code, out) = self.0.iter().find(|(name, _, _)| name == step).expect("a step of this machine");
        (*code, out)
    }
}
