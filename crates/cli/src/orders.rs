//! Whether all volumes of an engine will be admitted, whoever comes first.
//!
//! The first key that an exclusive engine admits decides which type it serves, so what works in one order may not in
//! another. A later key is only ever refused for what the first one decided, or since the pins are used up; so all orders
//! are fine if every two volumes are, in both orders, and all pins together. The admission table itself is asked.

use crate::plan::EnginePlan;
use crate::report::{Code, Failure};
use inlinecrypt_core::admission::{Action, AdmissionTable, Application, Hold, Reason, Refusal, Timestamp};
use inlinecrypt_core::config::KeyType;
use inlinecrypt_core::key::KeyId;

/// A volume, as far as its admission depends on others.
#[derive(Clone, Debug)]
pub(crate) struct Candidate<'p> {
    pub(crate) label: &'p str,
    pub(crate) key_type: KeyType,
    pub(crate) hold: Hold,
    /// Whether software may and can serve its key.
    pub(crate) fallback_ready: bool,
}

impl Candidate<'_> {
    fn application(&self, key: u64) -> Application {
        Application {
            key: KeyId::for_simulation(key),
            key_type: self.key_type,
            hold: self.hold,
            fallback_ready: self.fallback_ready,
            label: self.label.to_owned(),
            now: Timestamp::default(),
        }
    }
}

/// What cannot be served together, on the engine of `plan`, which has so many keyslots and may be exclusive.
pub(crate) fn conflicts(
    plan: &EnginePlan,
    keyslots: u32,
    exclusive: bool,
    volumes: &[Candidate<'_>],
) -> Vec<Failure> {
    let declared = plan.key_type.declared().filter(|_| exclusive);
    let fresh = || {
        let mut table = AdmissionTable::new(keyslots, exclusive);
        if let Some(key_type) = declared {
            table.declare(key_type, Timestamp::default(), &mut Vec::new());
            table.switched(true, &mut Vec::new());
        }
        table
    };
    let name = &plan.name;
    let mut failures = Vec::new();
    let pinned = volumes.iter().filter(|volume| volume.hold == Hold::Pin).count();
    if keyslots > 0 && pinned >= keyslots as usize {
        failures.push(Failure::new(
            Code::Wrong,
            format!("engine {name}: {pinned} volumes want a keyslot pinned, it has {keyslots}, and one must stay free"),
            "Pin fewer keys, or give the engine more keyslots (slots=N).",
        ));
    }
    let unpinned =
        |volume: &Candidate<'_>| Candidate { hold: Hold::Register, ..volume.clone() }.application(0);
    for volume in volumes {
        if let Some(reason) = refused(&mut fresh(), unpinned(volume)) {
            failures.push(Failure::new(
                Code::Wrong,
                format!("{}: {}", volume.label, Refusal::new(name, reason)),
                "Declare the other key type for the engine (key_type), or use another engine for this volume.",
            ));
        }
    }
    if !failures.is_empty() {
        return failures;
    }
    for (i, first) in volumes.iter().enumerate() {
        for second in &volumes[i + 1..] {
            for (first, second) in [(first, second), (second, first)] {
                let mut table = fresh();
                let after = Application { key: KeyId::for_simulation(1), ..unpinned(second) };
                let clash = refused(&mut table, unpinned(first)).or_else(|| refused(&mut table, after));
                if clash.is_none() {
                    continue;
                }
                failures.push(Failure::new(
                    Code::Wrong,
                    format!(
                        "{} and {} cannot be together on engine {name}: it serves raw or hardware-wrapped keys, and \
                         if the first is admitted first, it serves {} keys only, while the second needs {}",
                        first.label, second.label, first.key_type, second.key_type
                    ),
                    "Use an engine for each, or keys of one type; if software may serve the raw key (fallback = \
                     \"allowed\"), declare key_type = \"wrapped\" for the engine.",
                ));
                // One pair shows it; the others would say the same.
                return failures;
            }
        }
    }
    failures
}

/// Why the table refuses, if it does. A switch that it asks for succeeds.
fn refused(table: &mut AdmissionTable, application: Application) -> Option<Reason> {
    let mut actions = Vec::new();
    table.apply(application, &mut actions);
    if actions.iter().any(|action| matches!(action, Action::Commit { .. })) {
        table.switched(true, &mut actions);
    }
    actions.into_iter().find_map(|action| match action {
        Action::Refuse { reason, .. } => Some(reason),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::KeyTypeArg;
    use inlinecrypt_engine::RootSpec;

    fn found(key_type: KeyTypeArg, volumes: &[(KeyType, Hold, bool)]) -> Vec<String> {
        let root = RootSpec::File("root.key".into());
        let spec = "ice:hwkm-v2".parse().unwrap();
        let policy = inlinecrypt_core::keyslot::Policy::default();
        let plan = EnginePlan {
            name: "e".to_owned(),
            spec,
            root,
            wants_root: false,
            passphrase_file: None,
            key_type,
            policy,
            home: None,
            require_sandbox: false,
            realtime: false,
            deaths_max: 3,
        };
        let labels = ["a", "b", "c", "d"];
        let volumes: Vec<_> = volumes
            .iter()
            .zip(labels)
            .map(|(&(key_type, hold, fallback_ready), label)| Candidate {
                label,
                key_type,
                hold,
                fallback_ready,
            })
            .collect();
        conflicts(&plan, 2, true, &volumes).into_iter().map(|failure| failure.what).collect()
    }

    const RAW: (KeyType, Hold, bool) = (KeyType::Raw, Hold::Register, false);
    const RAW_OR_SOFTWARE: (KeyType, Hold, bool) = (KeyType::Raw, Hold::Register, true);
    const WRAPPED: (KeyType, Hold, bool) = (KeyType::HardwareWrapped, Hold::Register, false);

    #[test]
    fn one_type_is_fine_in_every_order() {
        for key_type in [KeyTypeArg::First, KeyTypeArg::Raw] {
            assert!(found(key_type, &[RAW, RAW, RAW]).is_empty());
        }
        assert!(found(KeyTypeArg::Wrapped, &[WRAPPED, RAW_OR_SOFTWARE, WRAPPED]).is_empty());
    }

    #[test]
    fn two_types_are_refused_with_the_pair_even_if_one_order_would_do() {
        for others in [RAW, RAW_OR_SOFTWARE] {
            let found = found(KeyTypeArg::First, &[WRAPPED, WRAPPED, others]);
            assert_eq!(found.len(), 1, "{found:?}");
            assert!(
                found[0].contains("c") && found[0].contains("cannot be together on engine e"),
                "{found:?}"
            );
        }
    }

    #[test]
    fn what_is_declared_refuses_the_other_type_by_itself() {
        let found = found(KeyTypeArg::Wrapped, &[RAW, WRAPPED]);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("a: engine e refuses the key"), "{found:?}");
    }

    #[test]
    fn pins_are_counted_together() {
        let pinned = (KeyType::Raw, Hold::Pin, false);
        assert!(found(KeyTypeArg::First, &[pinned, RAW, RAW]).is_empty());
        assert!(
            found(KeyTypeArg::First, &[pinned, pinned])[0]
                .contains("2 volumes want a keyslot pinned, it has 2")
        );
    }
}
