//! What is explored, and how far.

use super::model::{Ask, Faults, LayerPlan, Plan};
use inlinecrypt_core::config::KeyType::{HardwareWrapped, Raw};
use inlinecrypt_core::keyslot::{Policy, Priority};

/// How far a check goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bounds {
    /// Seconds, without optimisation: part of the ordinary tests.
    Small,
    /// Within a minute: before each commit.
    Usual,
    /// Minutes and gigabytes.
    Large,
}

fn policy(bypass_max: u32, program_retries: u32) -> Policy {
    Policy { bypass_max, program_retries, ..Policy::default() }
}

fn small_plan(name: &'static str, layers: Vec<LayerPlan>) -> Plan {
    Plan {
        name,
        keyslots: 1,
        is_exclusive: false,
        policy: policy(1, 1),
        declares: None,
        starts_set_up: false,
        layers,
        faults: Faults::default(),
    }
}

/// The plans for our own design.
#[must_use]
pub fn ours(bounds: Bounds) -> Vec<Plan> {
    let (small, large) = (bounds == Bounds::Small, bounds == Bounds::Large);
    let requests = |small_count: u8, usual: u8, large_count: u8| match bounds {
        Bounds::Small => small_count,
        Bounds::Usual => usual,
        Bounds::Large => large_count,
    };
    let every_ask = vec![Ask::PLAIN, Ask::PIN, Ask::FALLBACK];
    vec![
        // Who is admitted, in every order, with everything that can be asked for; the engine's mode is undecided.
        Plan {
            is_exclusive: true,
            keyslots: 2,
            declares: Some(HardwareWrapped),
            faults: Faults { switch_failures: 1, restarts: 1, ..Faults::default() },
            ..small_plan(
                "admission",
                vec![
                    LayerPlan {
                        asks: every_ask.clone(),
                        admissions: requests(1, 2, 2),
                        ..LayerPlan::new(1, Raw, u8::from(!small))
                    },
                    LayerPlan {
                        asks: vec![Ask::PLAIN, Ask::PIN],
                        admissions: requests(1, 1, 2),
                        ..LayerPlan::new(2, HardwareWrapped, 1)
                    },
                    LayerPlan {
                        asks: vec![Ask::PLAIN, Ask::PIN],
                        ..LayerPlan::new(if large { 3 } else { 2 }, HardwareWrapped, u8::from(large))
                    },
                ],
            )
        },
        // Everything that goes wrong with an engine, while two types of key compete for it.
        Plan {
            is_exclusive: true,
            faults: Faults {
                program_failures: requests(1, 1, 2),
                rejections: u8::from(!small),
                switch_failures: 1,
                evict_failures: u8::from(!small),
                losses: 1,
                resets: u8::from(!small),
                restarts: 1,
            },
            ..small_plan(
                "faults",
                vec![
                    LayerPlan { evictions: u8::from(!small), ..LayerPlan::new(1, Raw, 1) },
                    LayerPlan::new(2, Raw, requests(0, 1, 1)),
                    LayerPlan::new(3, HardwareWrapped, requests(1, 0, 0)),
                ],
            )
        },
        // More keys than keyslots, several requests each: order, bypass, sharing.
        Plan {
            starts_set_up: true,
            policy: policy(requests(1, 2, 2).into(), 0),
            ..small_plan(
                "contention",
                vec![
                    LayerPlan { in_flight: 2, ..LayerPlan::new(1, Raw, requests(3, 5, 6)) },
                    LayerPlan { in_flight: requests(1, 2, 2), ..LayerPlan::new(2, Raw, requests(1, 3, 4)) },
                    LayerPlan::new(3, HardwareWrapped, requests(1, 2, 2)),
                ],
            )
        },
        // Two keyslots that are lost and reset while requests hold them.
        Plan {
            starts_set_up: true,
            keyslots: 2,
            faults: Faults {
                resets: 1,
                losses: u8::from(!small),
                program_failures: u8::from(large),
                ..Faults::default()
            },
            ..small_plan(
                "resets",
                [
                    LayerPlan { in_flight: 2, ..LayerPlan::new(1, Raw, 2) },
                    LayerPlan::new(2, HardwareWrapped, requests(0, 1, 1)),
                    LayerPlan::new(3, Raw, 1),
                ]
                .into_iter()
                .take(if large { 3 } else { 2 })
                .collect(),
            )
        },
        // The same on one keyslot, twice, with a program that fails.
        Plan {
            starts_set_up: true,
            faults: Faults {
                resets: requests(1, 2, 2),
                losses: 1,
                program_failures: requests(0, 1, 2),
                evict_failures: u8::from(!small),
                ..Faults::default()
            },
            ..small_plan(
                "resets on one keyslot",
                vec![
                    LayerPlan { in_flight: requests(1, 1, 2), ..LayerPlan::new(1, Raw, requests(1, 1, 2)) },
                    LayerPlan::new(2, HardwareWrapped, 1),
                ],
            )
        },
        // Pins and priorities among three keys, one key shared by two volumes.
        Plan {
            keyslots: 2,
            faults: Faults { losses: u8::from(large), evict_failures: u8::from(!small), ..Faults::default() },
            ..small_plan(
                "hints",
                vec![
                    LayerPlan { asks: vec![Ask::PIN], ..LayerPlan::new(1, Raw, 1) },
                    LayerPlan {
                        asks: vec![Ask::PIN, Ask::PLAIN],
                        ..LayerPlan::new(2, Raw, requests(1, 1, 2))
                    },
                    LayerPlan {
                        priority: Priority::High,
                        evictions: u8::from(!small),
                        ..LayerPlan::new(3, HardwareWrapped, requests(1, 2, 2))
                    },
                    LayerPlan::new(2, Raw, u8::from(!small)),
                ],
            )
        },
    ]
}

/// Two volumes with keys of either type on an engine that serves one: for the designs that do not reserve.
#[must_use]
pub fn two_types() -> Plan {
    Plan {
        is_exclusive: true,
        keyslots: 2,
        ..small_plan("two types", vec![LayerPlan::new(1, Raw, 1), LayerPlan::new(2, HardwareWrapped, 1)])
    }
}

/// Two volumes on one keyslot, and one program that fails: for upstream's keyslots.
#[must_use]
pub fn one_failed_program() -> Plan {
    Plan {
        faults: Faults { program_failures: 1, ..Faults::default() },
        ..small_plan("one failed program", vec![LayerPlan::new(1, Raw, 2), LayerPlan::new(2, Raw, 1)])
    }
}
