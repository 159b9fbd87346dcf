//! An ext4 image that Linux's fscrypt wrote.
//!
//! ```text
//!   oracle      names, contents and places of all its files
//!   corrupt     what verify notices when it was changed
//!     rig       the image, and the plaintext that it was made of
//! ```

mod corrupt;
mod oracle;
mod rig;
