//! What the keyslot table may choose: who goes first, how often to try again. The place for quantum, priorities and pins.

/// The choices of a [`KeyslotTable`](super::KeyslotTable). Safety does not depend on them; fairness does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Policy {
    /// How many requests that came later may be granted before a waiting one.
    ///
    /// A request for a key that is in a keyslot anyway may share it while others wait, since that costs nobody a
    /// program. But each such grant keeps a keyslot busy, so without a bound a popular key would keep others waiting
    /// for ever. When the waiter at the head has been passed this often, newcomers queue behind it.
    pub bypass_max: u32,
    /// How often a failed program is tried again before the key's requests fail.
    pub program_retries: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            // Some queue depths' worth: long enough to share a program among a burst, short enough not to be noticed.
            bypass_max: 64,
            // Once: what fails twice in a row is not a passing fault.
            program_retries: 1,
        }
    }
}
