//! What a host leaves in a lane of shared memory for its engine process. An even first byte: the lane's bytes as they are. An odd
//! one: pieces of 6 bytes each that lie in the data or nearly so, since those are where something could go wrong.
#![no_main]

use inlinecrypt_engine::isolated::fuzzing::{FLOOR, Process, lane_order, program_order};
use libfuzzer_sys::fuzz_target;
use std::cell::RefCell;

thread_local! {
    static PROCESS: RefCell<Process> = RefCell::new(Process::new(None));
}

fuzz_target!(|data: &[u8]| {
    let [first, second, rest @ ..] = data else { return };
    let order = if first % 2 == 0 {
        rest.to_vec()
    } else if *second == 0xff {
        let number = |at: usize| rest.get(at).map_or(0, |byte| u32::from(*byte));
        program_order(rest.first().map_or(0, |byte| byte & 1), number(1), number(2))
    } else {
        let pieces: Vec<_> = rest
            .chunks_exact(6)
            .map(|piece| {
                let number = |at: usize| u64::from(u16::from_le_bytes([piece[at], piece[at + 1]]));
                (FLOOR as u64 + number(0) * 2 - 64, number(2), number(4))
            })
            .collect();
        let count = u32::try_from(pieces.len()).unwrap_or(u32::MAX);
        // A lane has room for so many; more can only be claimed.
        let room = pieces.len().min(64);
        lane_order(
            second & 3,
            second & 4 != 0,
            second & 8 != 0,
            u32::from(second >> 4),
            count,
            &pieces[..room],
        )
    };
    PROCESS.with_borrow_mut(|process| process.lane(&order));
});
