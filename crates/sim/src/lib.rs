//! Proof and rehearsal over the framework's own state machines.
//!
//! ```text
//!   prove    every history up to stated bounds: the model check, and the designs that it finds wanting
//! ```
#![forbid(unsafe_code)]

pub mod prove;
