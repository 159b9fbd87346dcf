//! `probe`: what the machine's kernel and block devices can do of inline encryption.

use crate::cli::Probe;
use crate::probe::{self, Kernel, Places, Report, State};
use crate::report::{Failure, print, print_json, printable};
use std::fmt::Write as _;
use std::path::PathBuf;

pub(super) fn run(args: &Probe) -> Result<(), Failure> {
    let Probe { sysfs, proc, kernel_config, json } = args;
    let is_ours = sysfs.is_none();
    let proc = proc.clone().or_else(|| is_ours.then(|| PathBuf::from("/proc")));
    let configs = match kernel_config {
        Some(path) => vec![path.clone()],
        None if is_ours => probe::configs_of_this_machine(),
        None => proc.iter().map(|proc| proc.join("config.gz")).collect(),
    };
    let sysfs = sysfs.clone().unwrap_or_else(|| PathBuf::from("/sys"));
    if let Some(path) = kernel_config {
        // What is named has to be one; where nothing is, none need be there.
        probe::check_config(path)?;
    }
    let report = probe::look(&Places { sysfs, proc, configs })?;
    if *json {
        return print_json(&report);
    }
    print(&describe(&report))
}

fn describe(report: &Report) -> String {
    let Report { version: _, sysfs, kernel, devices } = report;
    let mut text = describe_kernel(kernel);
    let (able, unable): (Vec<_>, Vec<_>) = devices.iter().partition(|device| device.inline_encryption);
    let _ = writeln!(text, "\ndevices in {}", printable(sysfs));
    if devices.is_empty() {
        let _ = writeln!(text, "  none");
    }
    for device in able {
        let _ = writeln!(text, "  {}", printable(&device.name));
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "    {name:<18} {}", printable(&value));
        };
        row("key types", {
            match (device.raw_keys, device.hw_wrapped_keys) {
                (Some(true), Some(true)) => "raw, hardware-wrapped".to_owned(),
                (Some(true), _) => "raw".to_owned(),
                (_, Some(true)) => "hardware-wrapped".to_owned(),
                (None, _) | (_, None) => "not told".to_owned(),
                (Some(false), Some(false)) => "none".to_owned(),
            }
        });
        let unknown = || "not told".to_owned();
        row("keyslots", device.num_keyslots.map_or_else(unknown, |count| count.to_string()));
        row("DUN bits", device.max_dun_bits.map_or_else(unknown, |bits| bits.to_string()));
        for (mode, mask) in &device.modes {
            row(mode, format!("{mask:#x}: {}", probe::sizes(*mask)));
        }
        for strange in &device.strange {
            row("makes no sense", strange.clone());
        }
        for meaning in &device.meaning {
            let _ = writeln!(text, "    - {}", printable(meaning));
        }
    }
    // All the others, in as many lines as there are things to say of them.
    let mut said: Vec<(&[String], Vec<&str>)> = Vec::new();
    for device in unable {
        match said.iter_mut().find(|(meaning, _)| *meaning == device.meaning) {
            Some((_, names)) => names.push(&device.name),
            None => said.push((&device.meaning, vec![&device.name])),
        }
    }
    for (meaning, names) in said {
        let _ = writeln!(text, "  {}", printable(&names.join(", ")));
        for meaning in meaning {
            let _ = writeln!(text, "    - {meaning}");
        }
    }
    text
}

fn describe_kernel(kernel: &Kernel) -> String {
    let Kernel { release, config, features, mounted_with_inlinecrypt, qcom_ice_use_wrapped_keys } = kernel;
    let unknown = "unknown";
    let mut text = format!(
        "kernel           {}\nconfiguration    {}\n",
        printable(release.as_deref().unwrap_or(unknown)),
        printable(config.as_deref().unwrap_or("none that can be read")),
    );
    for feature in features {
        let state = match feature.state {
            State::Yes => "yes",
            State::Module => "module",
            State::No => "no",
            State::Unknown => unknown,
        };
        let _ = writeln!(
            text,
            "  {:<20} {state:<8} {}; {}",
            feature.name,
            feature.purpose,
            printable(&feature.because)
        );
    }
    if let Some(wrapped) = qcom_ice_use_wrapped_keys {
        let _ = writeln!(text, "  qcom_ice.use_wrapped_keys={}", if *wrapped { "Y" } else { "N" });
    }
    match mounted_with_inlinecrypt.as_deref() {
        None | Some([]) => {}
        Some(mounts) => {
            let _ = writeln!(text, "mounted with inlinecrypt: {}", printable(&mounts.join(", ")));
        }
    }
    text
}
