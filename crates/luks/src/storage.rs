//! Where a header lies.

use std::io;

/// A file or disk with a header on it.
///
/// # What the callers promise
///
/// Nothing: also offsets behind the end are asked for.
///
/// # What an implementation owes
///
/// - What was written before a `flush` that returned is on the disk, whatever happens afterwards. Of what was written since,
///   any part may be there, sector by sector.
/// - Reading or writing behind the end is an error. Nothing grows.
pub trait Storage {
    /// Its length in bytes.
    fn len_bytes(&self) -> u64;

    /// Fills `data` from `offset` on.
    ///
    /// # Errors
    ///
    /// The system's.
    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes all of `data` at `offset`.
    ///
    /// # Errors
    ///
    /// The system's.
    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()>;

    /// Makes what was written stable.
    ///
    /// # Errors
    ///
    /// The system's.
    fn flush(&mut self) -> io::Result<()>;
}

impl<S: Storage + ?Sized> Storage for Box<S> {
    fn len_bytes(&self) -> u64 {
        (**self).len_bytes()
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        (**self).read(offset, data)
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        (**self).write(offset, data)
    }

    fn flush(&mut self) -> io::Result<()> {
        (**self).flush()
    }
}

/// Memory, for what is made before it is written, and for tests.
impl Storage for Vec<u8> {
    fn len_bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let range = range_in(self.len(), offset, data.len())?;
        data.copy_from_slice(&self[range]);
        Ok(())
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let range = range_in(self.len(), offset, data.len())?;
        self[range].copy_from_slice(data);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn range_in(len: usize, offset: u64, wanted: usize) -> io::Result<std::ops::Range<usize>> {
    let start = usize::try_from(offset).ok();
    let range = start.and_then(|start| Some(start..start.checked_add(wanted)?));
    range.filter(|range| range.end <= len).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}
