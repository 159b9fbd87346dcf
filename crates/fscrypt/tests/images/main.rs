//! An ext4 image that Linux's fscrypt wrote.
//!
//! ```text
//!   oracle      names, contents and places of all its files
//!   modes       the same tree in other modes and under other keys
//!   corrupt     what verify notices when it was changed
//!   hostile     images that somebody has bent
//!     rig       the image, and the plaintext that it was made of
//!     transcode   another policy for a tree of it
//! ```

mod corrupt;
mod hostile;
mod modes;
mod oracle;
mod rig;
mod transcode;
