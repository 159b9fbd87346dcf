//! Exports: the front doors by which clients reach a [`Disk`].
//!
//! An export knows nothing of keys and engines. It parses what clients say, bounds it, hands whole pieces to the disk,
//! and turns the disk's errors into its protocol's numbers. What clients send never reaches an assertion.
//!
//! A new export is a folder beside [`nbd`], with its parsing in a `wire.rs` of its own.

mod counters;
pub mod nbd;
pub mod ram;

pub use counters::{Counters, CountersSnapshot, Kind, KindSnapshot};

use inlinecrypt_core::disk::Disk;
use inlinecrypt_core::error::{Error, ErrorKind, Op};
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

/// What is to be exported, and under which name.
#[derive(Clone)]
pub struct ExportSpec {
    /// The name that clients ask for. May be empty.
    pub name: String,
    /// A text for people who list the exports. May be empty.
    pub description: String,
    /// What clients get.
    pub disk: Arc<dyn Disk>,
}

impl fmt::Debug for ExportSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExportSpec")
            .field("name", &self.name)
            .field("description", &self.description)
            .field("disk", &self.disk)
            .finish()
    }
}

/// A disk with its name and counters.
#[derive(Debug)]
pub struct Export {
    pub(crate) spec: ExportSpec,
    pub(crate) counters: Counters,
}

impl Export {
    /// An export that nobody has used yet.
    #[must_use]
    pub fn new(spec: ExportSpec) -> Self {
        Self { spec, counters: Counters::default() }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Its description.
    #[must_use]
    pub fn description(&self) -> &str {
        &self.spec.description
    }

    /// Its disk.
    #[must_use]
    pub fn disk(&self) -> &dyn Disk {
        &*self.spec.disk
    }

    /// Its counters.
    #[must_use]
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

/// Longest name or description of an export, in bytes: what the NBD protocol allows for any string.
const NAME_BYTES_MAX: usize = 4096;

/// The exports of a server by name. Clients see additions and removals with their next question.
#[derive(Debug, Default)]
pub struct Exports {
    /// In the order in which they were added. Held only while looking.
    list: RwLock<Vec<Arc<Export>>>,
}

impl Exports {
    /// Adds an export.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Invalid`] if the name is taken, or name or description are something that no client could ask for
    /// or show: over 4096 bytes, or with NUL.
    pub fn add(&self, spec: ExportSpec) -> Result<Arc<Export>, Error> {
        let refuse = |why: String| Err(Error::new(ErrorKind::Invalid, Op::Open).detail(why));
        for (what, text) in [("name", &spec.name), ("description", &spec.description)] {
            if text.len() > NAME_BYTES_MAX || text.contains('\0') {
                return refuse(format!(
                    "export {what} is longer than {NAME_BYTES_MAX} bytes or contains NUL"
                ));
            }
        }
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        if list.iter().any(|export| export.name() == spec.name) {
            return refuse(format!("there is an export {:?} already", spec.name));
        }
        let export = Arc::new(Export::new(spec));
        list.push(export.clone());
        Ok(export)
    }

    /// Takes an export out. Clients that use it already go on.
    pub fn remove(&self, name: &str) -> Option<Arc<Export>> {
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        let index = list.iter().position(|export| export.name() == name)?;
        Some(list.remove(index))
    }

    /// The export of that name. The empty name stands for the only export, if none is called so.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<Arc<Export>> {
        let list = self.list.read().unwrap_or_else(PoisonError::into_inner);
        let named = list.iter().find(|export| export.name() == name);
        match (named, &list[..]) {
            (Some(export), _) => Some(export.clone()),
            (None, [only]) if name.is_empty() => Some(only.clone()),
            (None, _) => None,
        }
    }

    /// All exports, in the order in which they were added.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Export>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
