//! `key generate | import | prepare --device`: the same steps by the hardware of a block device.

use super::key::write;
use crate::probe;
use crate::report::{Failure, note};
use inlinecrypt_core::error::{Error, ErrorKind};
use inlinecrypt_core::key::{LongTermWrappedKey, RawKey};
use inlinecrypt_engine::inspect;
use inlinecrypt_io::blk_crypto::KeyDevice;
use std::path::Path;

pub(super) fn generate(path: &Path, out: Option<&Path>) -> Result<(), Failure> {
    let device = open(path)?;
    let blob = device.generate().map_err(|error| failed("make a key", path, &error))?;
    finish(&device, path, &blob, out)
}

pub(super) fn import(path: &Path, bytes: &[u8], out: Option<&Path>) -> Result<(), Failure> {
    refuse_ours(bytes, path)?;
    let device = open(path)?;
    let blob = device.import(&RawKey::new(bytes)).map_err(|error| {
        let failure = failed("import", path, &error);
        if error.kind() == ErrorKind::Invalid && bytes.ends_with(b"\n") {
            return failure.advise("It ends in a line feed, which is not part of a key: write it without.");
        }
        failure
    })?;
    finish(&device, path, &blob, out)
}

pub(super) fn prepare(path: &Path, bytes: &[u8], out: Option<&Path>) -> Result<(), Failure> {
    refuse_ours(bytes, path)?;
    let device = open(path)?;
    let blob =
        device.prepare(&LongTermWrappedKey::new(bytes)).map_err(|error| failed("prepare", path, &error))?;
    write(blob.as_bytes(), out)?;
    note(format_args!("this key is of use to {} until the machine starts again", path.display()));
    Ok(())
}

fn open(path: &Path) -> Result<KeyDevice, Failure> {
    KeyDevice::open(path).map_err(|error| Failure::of_file(path.display(), &error))
}

/// Blobs of our engines say what they are; hardware knows nothing of them.
fn refuse_ours(bytes: &[u8], path: &Path) -> Result<(), Failure> {
    use crate::report::Code;
    match inspect(bytes) {
        Ok(header) => Err(Failure::new(
            Code::Refused,
            format!(
                "this is a {} wrapped key of an engine of ours, which {} cannot open",
                header.form,
                path.display()
            ),
            "Leave --device out, or give the key that the device made.",
        )),
        Err(_not_ours) => Ok(()),
    }
}

/// Says also what sysfs knows, where the kernel says no more than that it is not supported.
fn failed(doing: &str, path: &Path, error: &Error) -> Failure {
    let mut failure = Failure::of(format!("{} cannot {doing}", path.display()), error);
    if error.kind() == ErrorKind::Unsupported
        && let Some(meaning) = probe::about(path)
    {
        failure.what = format!("{} ({meaning})", failure.what);
    }
    failure
}

/// Proves that the key opens before anybody relies on it.
fn finish(
    device: &KeyDevice,
    path: &Path,
    blob: &LongTermWrappedKey,
    out: Option<&Path>,
) -> Result<(), Failure> {
    device.prepare(blob).map_err(|error| failed("open the new key", path, &error))?;
    write(blob.as_bytes(), out)?;
    note(format_args!("wrapped by the hardware of {}: nothing else opens it", path.display()));
    Ok(())
}
