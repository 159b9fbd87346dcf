//! What the keyslot table may choose: who goes first, who has to leave, how often to try again. Safety does not depend on it;
//! fairness and throughput do.

/// The choices of a [`KeyslotTable`](super::KeyslotTable).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Policy {
    /// Who is served next.
    pub order: Order,
    /// How many requests that came later may be granted before a waiting one, quanta not counted.
    ///
    /// A request for a key that is in a keyslot anyway may share it while others wait, since that costs nobody a
    /// program. But each such grant keeps a keyslot busy, so without a bound a popular key would keep others waiting
    /// for ever. When the waiter at the head has been passed this often, newcomers queue behind it.
    pub bypass_max: u32,
    /// How often a failed program is tried again before the key's requests fail.
    pub program_retries: u32,
    /// Most of a keyslot's time that programming may take while more keys are busy than there are keyslots, in percent: 1 to
    /// 100. What it buys is measured in docs/keyslots.md.
    ///
    /// A key that took `p` to program keeps its keyslot for the quantum `p * (100 - share) / share`, as long as it has
    /// requests. 100 means no quantum: swap as soon as somebody waits.
    pub program_share_percent: u8,
    /// Programs shorter than this, in nanoseconds, are not worth waiting for a key's next request.
    ///
    /// A keyslot that becomes idle within its quantum is kept for as long as a program takes, since the key's next request
    /// is often on its way, and giving the keyslot away costs just that much. But a wait must be ended by a timer, which
    /// is no use below what a timer costs.
    pub anticipation_min_ns: u64,
}

/// Who is served next when keyslots are scarce.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// High priorities first, then in order of arrival; nobody is passed more than `bypass_max` times.
    Fair,
    /// What Linux does, for comparison: every waiter races for each freed keyslot, a key that is in one may be shared
    /// for ever, and there is no quantum. Waits have no bound.
    Upstream,
}

/// How urgent the requests of a key are. A hint that was admitted with the key: it orders, it reserves nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Priority {
    /// Waits behind others, and is displaced first.
    Low,
    /// Neither.
    #[default]
    Normal,
    /// Goes before others, and is displaced last.
    High,
}

impl Policy {
    /// Linux's behaviour, for comparison.
    pub const UPSTREAM: Self = Self {
        order: Order::Upstream,
        bypass_max: u32::MAX,
        program_retries: 0,
        program_share_percent: 100,
        anticipation_min_ns: u64::MAX,
    };

    /// How long a key that took `program_ns` to program keeps its keyslot, in nanoseconds.
    #[must_use]
    pub fn quantum_ns(&self, program_ns: u64) -> u64 {
        let share = u64::from(self.program_share_percent.clamp(1, 100));
        program_ns.saturating_mul(100 - share) / share
    }
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            order: Order::Fair,
            // Some queue depths' worth: long enough to share a program among a burst, short enough not to be noticed.
            bypass_max: 64,
            // Once: what fails twice in a row is not a passing fault.
            program_retries: 1,
            program_share_percent: 10,
            // What waking a sleeping thread costs across CPUs: docs/performance.md.
            anticipation_min_ns: 20_000,
        }
    }
}
