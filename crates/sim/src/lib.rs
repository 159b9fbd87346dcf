//! Proof and rehearsal over the framework's own state machines.
//!
//! ```text
//!   prove         every history up to stated bounds: the model check, and the designs that it finds wanting
//!   simulation    long random histories of the whole, with time, engines, disks and faults, each from a seed
//! ```
//!
//! What is shown by which: `docs/proofs.md`. Never depends on `inlinecrypt-io`: the disks here are simulated.
#![forbid(unsafe_code)]

pub mod prove;
pub mod simulation;
