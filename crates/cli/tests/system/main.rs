//! The command as the world meets it: the real program, real clients, the kernel's own filesystem, and trouble.
//!
//! ```text
//!   clients       qemu-img, nbdcopy, nbdinfo, fio, TLS
//!   filesystem    ext4 over a loop device over nbdfuse over a served volume
//!   dm_crypt      volumes that Linux wrote
//!   luks          containers of cryptsetup, and ours in cryptsetup, qemu and nbdkit
//!   luks_keyslots    the same with several passphrases
//!   luks_places      the same with detached headers, on devices, past the page cache; and live upgrade
//!   luks_reencrypt   another key for them, by us and cryptsetup in turns, and kill -9 during that
//!   fscrypt       files that Linux encrypted, on ext4
//!   many_volumes  more keys than keyslots, all at once
//!   plain         volumes without encryption
//!   dm_tables     volumes given as lines of dm tables, other IV layouts, offsets
//!   kernel        other kernels than this machine's, booted: dm-crypt, LUKS, fscrypt, NBD
//!   kill          kill -9 during writes
//!   engine_service   engine processes for several servers
//!   trouble       full, shortened and read-only disks; signals; rude clients; service managers
//!   isolation     what is in whose memory, which system calls the engine process makes, what of its cage is missing
//!   engine_death  kill -9 of the engine process
//!   realtime      lanes at real-time priority
//!   reencrypt     another key and layout while clients write, and kill -9 during that
//!   upgrade       a new server takes over from the one that serves
//!   others_bugs   what went wrong elsewhere
//!     rig         places, servers, what was logged
//!     load        random requests, and whether the answers are right
//! ```
//!
//! A test whose program or privilege is missing says `SKIPPED`; with `INLINECRYPT_REQUIRE_TOOLS=1` it fails. Timings never
//! decide: what is waited for has a minute, and is done in a fraction of it.

mod clients;
mod dm_crypt;
mod dm_tables;
mod engine_death;
mod engine_service;
mod filesystem;
mod fscrypt;
mod isolation;
mod kernel;
mod kill;
mod lend;
mod load;
mod luks;
mod luks_keyslots;
mod luks_places;
mod luks_reencrypt;
mod many_volumes;
mod others_bugs;
mod plain;
mod realtime;
mod reencrypt;
mod rig;
mod roots;
mod trouble;
mod upgrade;
