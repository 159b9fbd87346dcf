//! Keyslots: which key is in which keyslot of an engine, and who waits for one.
//!
//! [`KeyslotTable`] decides, purely; [`Keyslots`] is the thin shell that carries its decisions out with threads and an
//! engine. Fairness is a [`Policy`]. Start reading at [`table`].

mod lru;
mod open;
pub mod policy;
mod shell;
pub mod table;

#[cfg(all(test, loom))]
mod loom_tests;
#[cfg(all(test, not(loom)))]
mod model_tests;
#[cfg(all(test, not(loom)))]
mod quantum_tests;

pub use open::Whereabouts;
pub use policy::{Order, Policy, Priority};
pub use shell::{KeyslotGuard, Keyslots, KeyslotsStatus};
pub use table::{EvictOutcome, KeyslotTable, SlotCounters, SlotStatus};
