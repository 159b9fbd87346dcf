//! The key requests of a block device (Linux `include/uapi/linux/blk-crypto.h`).
//!
//! What goes to the kernel and what comes back stand in one structure with pointers in it; here it is filled in, and what
//! the kernel says is checked against the room that it had.

use inlinecrypt_core::key::WRAPPED_KEY_BYTES_MAX;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, opcode};
use std::os::fd::BorrowedFd;
use zeroize::{Zeroize as _, Zeroizing};

/// `struct blk_crypto_import_key_arg`
#[repr(C)]
#[derive(Default)]
struct ImportKeyArg {
    raw_key_ptr: u64,
    raw_key_size: u64,
    lt_key_ptr: u64,
    /// In: the room; out: the length.
    lt_key_size: u64,
    reserved: [u64; 4],
}

/// `struct blk_crypto_generate_key_arg`
#[repr(C)]
#[derive(Default)]
struct GenerateKeyArg {
    lt_key_ptr: u64,
    /// In: the room; out: the length.
    lt_key_size: u64,
    reserved: [u64; 4],
}

/// `struct blk_crypto_prepare_key_arg`
#[repr(C)]
#[derive(Default)]
struct PrepareKeyArg {
    lt_key_ptr: u64,
    lt_key_size: u64,
    eph_key_ptr: u64,
    /// In: the room; out: the length.
    eph_key_size: u64,
    reserved: [u64; 4],
}

const BLKCRYPTOIMPORTKEY: Opcode = opcode::read_write::<ImportKeyArg>(0x12, 137);
const BLKCRYPTOGENERATEKEY: Opcode = opcode::read_write::<GenerateKeyArg>(0x12, 138);
const BLKCRYPTOPREPAREKEY: Opcode = opcode::read_write::<PrepareKeyArg>(0x12, 139);

/// A blob as a device gives it.
type Blob = Zeroizing<Vec<u8>>;

/// Lets a device wrap `raw`.
pub(crate) fn import(device: BorrowedFd<'_>, raw: &[u8]) -> Result<Blob, Errno> {
    import_by(raw, |arg| {
        // SAFETY: the opcode is that of this structure, which the kernel reads and writes.
        let request = unsafe { Updater::<BLKCRYPTOIMPORTKEY, ImportKeyArg>::new(arg) };
        // SAFETY:
        // - `device` stays open during the call; on what does not know the number, the kernel refuses it;
        // - the pointers in it are those of `raw`, which is only read, and of a room of as many bytes as it says, which
        //   outlive the call: see `import_by`.
        unsafe { rustix::ioctl::ioctl(device, request) }
    })
}

fn import_by(raw: &[u8], call: impl FnOnce(&mut ImportKeyArg) -> Result<(), Errno>) -> Result<Blob, Errno> {
    into_room(|room| {
        let mut arg = ImportKeyArg {
            raw_key_ptr: raw.as_ptr().expose_provenance() as u64,
            raw_key_size: raw.len() as u64,
            lt_key_ptr: room.as_mut_ptr().expose_provenance() as u64,
            lt_key_size: room.len() as u64,
            reserved: [0; 4],
        };
        call(&mut arg).map(|()| arg.lt_key_size)
    })
}

/// Lets a device make a key.
pub(crate) fn generate(device: BorrowedFd<'_>) -> Result<Blob, Errno> {
    generate_by(|arg| {
        // SAFETY: as for `import`.
        let request = unsafe { Updater::<BLKCRYPTOGENERATEKEY, GenerateKeyArg>::new(arg) };
        // SAFETY: as for `import`; there is one pointer, that of the room.
        unsafe { rustix::ioctl::ioctl(device, request) }
    })
}

fn generate_by(call: impl FnOnce(&mut GenerateKeyArg) -> Result<(), Errno>) -> Result<Blob, Errno> {
    into_room(|room| {
        let mut arg = GenerateKeyArg {
            lt_key_ptr: room.as_mut_ptr().expose_provenance() as u64,
            lt_key_size: room.len() as u64,
            reserved: [0; 4],
        };
        call(&mut arg).map(|()| arg.lt_key_size)
    })
}

/// Lets a device turn a stored key into one for this boot.
pub(crate) fn prepare(device: BorrowedFd<'_>, long_term: &[u8]) -> Result<Blob, Errno> {
    prepare_by(long_term, |arg| {
        // SAFETY: as for `import`.
        let request = unsafe { Updater::<BLKCRYPTOPREPAREKEY, PrepareKeyArg>::new(arg) };
        // SAFETY: as for `import`; `long_term` is only read.
        unsafe { rustix::ioctl::ioctl(device, request) }
    })
}

fn prepare_by(
    long_term: &[u8],
    call: impl FnOnce(&mut PrepareKeyArg) -> Result<(), Errno>,
) -> Result<Blob, Errno> {
    into_room(|room| {
        let mut arg = PrepareKeyArg {
            lt_key_ptr: long_term.as_ptr().expose_provenance() as u64,
            lt_key_size: long_term.len() as u64,
            eph_key_ptr: room.as_mut_ptr().expose_provenance() as u64,
            eph_key_size: room.len() as u64,
            reserved: [0; 4],
        };
        call(&mut arg).map(|()| arg.eph_key_size)
    })
}

/// The blob that `call` puts into the room it is given, of which it says how long it is.
fn into_room(call: impl FnOnce(&mut [u8]) -> Result<u64, Errno>) -> Result<Blob, Errno> {
    let mut room = Zeroizing::new([0; WRAPPED_KEY_BYTES_MAX]);
    let len = call(&mut *room)?;
    // A kernel that says more than it had room for has broken its word.
    let blob = usize::try_from(len).ok().and_then(|len| room.get(..len)).filter(|blob| !blob.is_empty());
    let blob = blob.map(|blob| Zeroizing::new(blob.to_vec())).ok_or(Errno::OVERFLOW);
    room.zeroize();
    blob
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_sizes_are_those_of_the_header() {
        assert_eq!((BLKCRYPTOIMPORTKEY, size_of::<ImportKeyArg>()), (0xc040_1289, 64));
        assert_eq!((BLKCRYPTOGENERATEKEY, size_of::<GenerateKeyArg>()), (0xc030_128a, 48));
        assert_eq!((BLKCRYPTOPREPAREKEY, size_of::<PrepareKeyArg>()), (0xc040_128b, 64));
    }

    /// What the kernel finds at the pointer that it is given.
    fn read(pointer: u64, len: u64) -> Vec<u8> {
        let start = std::ptr::with_exposed_provenance::<u8>(pointer.try_into().unwrap());
        // SAFETY: our own functions have just exposed it, with that length, and it lives during the call.
        unsafe { std::slice::from_raw_parts(start, len.try_into().unwrap()) }.to_vec()
    }

    /// Puts a blob where the kernel would.
    fn write(pointer: u64, blob: &[u8]) {
        let start = std::ptr::with_exposed_provenance_mut::<u8>(pointer.try_into().unwrap());
        // SAFETY: as above; the room has 128 bytes, and no blob here is longer.
        unsafe { std::slice::from_raw_parts_mut(start, blob.len()) }.copy_from_slice(blob);
    }

    /// A kernel for the length of a call: looks at what it is given, and answers.
    #[test]
    fn the_kernel_gets_what_it_wants_and_its_answer_is_taken() {
        let raw: Vec<u8> = (0..32).collect();
        let blob = [0xbb; 68];
        let imported = import_by(&raw, |arg| {
            assert_eq!(read(arg.raw_key_ptr, arg.raw_key_size), raw);
            assert_eq!((arg.lt_key_size, arg.reserved), (128, [0; 4]));
            write(arg.lt_key_ptr, &blob);
            arg.lt_key_size = 68;
            Ok(())
        });
        assert_eq!(**imported.unwrap(), blob);
        let generated = generate_by(|arg| {
            assert_eq!((arg.lt_key_size, arg.reserved), (128, [0; 4]));
            write(arg.lt_key_ptr, &[7; 128]);
            Ok(())
        });
        assert_eq!(**generated.unwrap(), [7; 128]);
        let prepared = prepare_by(&blob, |arg| {
            assert_eq!(read(arg.lt_key_ptr, arg.lt_key_size), blob);
            assert_eq!((arg.eph_key_size, arg.reserved), (128, [0; 4]));
            write(arg.eph_key_ptr, &[9; 100]);
            arg.eph_key_size = 100;
            Ok(())
        });
        assert_eq!(**prepared.unwrap(), [9; 100]);
        assert_eq!(generate_by(|_| Err(Errno::OPNOTSUPP)).unwrap_err(), Errno::OPNOTSUPP);
        for lie in [0, 129, u64::MAX] {
            let lied = generate_by(|arg| {
                arg.lt_key_size = lie;
                Ok(())
            });
            assert_eq!(lied.unwrap_err(), Errno::OVERFLOW, "{lie}");
        }
    }
}
