//! What a host says to its engine process on the control socket: length and bytes of one message after the other.
#![no_main]

use inlinecrypt_engine::isolated::fuzzing::{Process, answer};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut process = Process::new(None);
    let mut rest = data;
    while let Some((&[low, high], tail)) = rest.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([low, high])).min(tail.len());
        let (message, next) = tail.split_at(len);
        process.control(message);
        let _ = answer(message);
        rest = next;
    }
});
