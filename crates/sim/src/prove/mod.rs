//! The explicit-state model check: every history of the framework's own state machines, up to stated bounds.
//!
//! ```text
//!   plans.rs    how many layers, keys, keyslots, requests; what may go wrong, how often
//!   model.rs    the world around the tables, and the promises
//!   design.rs   AdmissionTable and KeyslotTable, called as they are; and three other designs, to see the checker find
//!   story.rs    a counterexample in plain words
//! ```
//!
//! A history ends by itself: each layer sets up its key, writes, evicts and fails a bounded number of times, and every other
//! step brings one of these nearer its end. So the graph of states has no cycle, every path that cannot go on has been
//! seen, and "whoever waits is answered in the end" is the same as "nobody ever waits while nothing is under way", which
//! is checked in every state.
//!
//! Start reading at [`model`].

pub mod design;
pub mod model;
pub mod plans;
pub mod story;

use design::{AdvertiseBoth, CheckOnly, Gate, OurGate, OurSlots, Slots, UpstreamSlots};
use model::{Broken, EngineMode, Phase, Plan, Seat, State, Step, Work, World};
use plans::Bounds;
use stateright::{Checker, HasDiscoveries, Model, Property};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

macro_rules! never {
    ($name:literal, $broken:pat) => {
        Property::always($name, |_: &Self, state: &State<G, S>| !matches!(state.broken, Some($broken)))
    };
}

macro_rules! seen {
    ($name:literal, $state:ident => $is:expr) => {
        Property::sometimes($name, |_: &Self, $state: &State<G, S>| $is)
    };
}

impl<G: Gate, S: Slots> Model for World<G, S> {
    type State = State<G, S>;
    type Action = Step;

    fn init_states(&self) -> Vec<Self::State> {
        vec![self.start()]
    }

    fn actions(&self, state: &Self::State, steps: &mut Vec<Step>) {
        self.steps(state, steps);
    }

    fn next_state(&self, state: &Self::State, step: Step) -> Option<Self::State> {
        Some(self.after(state, step))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            never!("an admitted key is never refused for its type", Broken::LostWrite(_)),
            never!("a granted keyslot holds no other key", Broken::WrongKey(_)),
            never!("a granted keyslot holds the asked key", Broken::EmptyKeyslot(_)),
            never!("what is served never shrinks for who holds an admission", Broken::Shrunk),
            never!("a refusal has a cause and names it", Broken::BadRefusal),
            never!("an admission can be kept", Broken::BadAdmission),
            never!("what is reserved is what is held", Broken::Reserved),
            never!("nobody waits for more others than documented", Broken::TooLate),
            never!("everybody is answered once", Broken::Answered),
            never!("only a failed program fails a request, after its retries", Broken::FailedEarly),
            never!("keyslots in use and pins are left alone, one thing at a time", Broken::Touched),
            never!("an eviction's answer is true", Broken::Evicted),
            never!("nobody waits while nothing is under way", Broken::Stuck),
        ];
        let plan = &self.plan;
        if !G::PROMISES || !S::PROMISES {
            return properties;
        }
        // What must be reached, or the check would be empty.
        let faults = &plan.faults;
        properties.push(seen!("a write is under way", state => granted(state).next().is_some()));
        properties
            .push(seen!("a key leaves", state => state.layers.iter().any(|l| l.phase == Phase::Leaving)));
        let mut if_possible = |possible: bool, property| {
            if possible {
                properties.push(property);
            }
        };
        if_possible(
            plan.is_exclusive,
            seen!("the engine is committed", state => {
                matches!(state.engine.mode, EngineMode::One(_))
            }),
        );
        if_possible(
            faults.switch_failures > 0,
            seen!("the engine is poisoned", state => {
                state.engine.mode == EngineMode::Poisoned
            }),
        );
        if_possible(
            faults.switch_failures > 0 && faults.restarts > 0,
            seen!("an engine whose switch failed serves after a restart", state => {
                state.has_failed_to_switch() && matches!(state.engine.mode, EngineMode::One(_))
            }),
        );
        if_possible(
            faults.switch_failures > 0 && faults.restarts > 0,
            seen!("an admitted key outlives a restart whose switch fails", state => {
                state.has_failed_to_switch()
                    && matches!(state.gate.mode(), Some(inlinecrypt_core::admission::Mode::Poisoned(_)))
                    && state.layers.iter().any(|l| matches!(l.phase, Phase::Admitted(_)))
            }),
        );
        if_possible(
            faults.losses + faults.resets > 0,
            seen!("a request finds its keyslot empty", state => {
                state.layers.iter().flat_map(|l| &l.seats).any(|seat| matches!(seat, Seat::FoundEmpty(_)))
            }),
        );
        if_possible(
            faults.program_failures > 0 && plan.policy.program_retries > 0,
            seen!("a program is tried again", s => {
                matches!(s.engine.work, Some(Work::Program { attempt: 2, .. }))
            }),
        );
        if_possible(
            faults.resets > 0,
            seen!("a keyslot in use gets its key back", state => {
                matches!(state.engine.work, Some(Work::Program { by: None, slot, .. })
                    if granted(state).any(|granted| granted == slot))
            }),
        );
        let asks = |ask: fn(&model::Ask) -> bool| plan.layers.iter().any(|layer| layer.asks.iter().any(ask));
        if_possible(
            asks(|ask| ask.fallback) && plan.is_exclusive,
            seen!("software serves a raw key", state => {
                state.layers.iter().any(|l| l.phase == Phase::InSoftware)
            }),
        );
        if_possible(
            asks(|ask| ask.hold == inlinecrypt_core::admission::Hold::Pin),
            seen!("a key is pinned", state => {
                state.gate.reserved().is_some_and(|(_, pinned)| pinned > 0)
            }),
        );
        properties
    }
}

/// Keyslots in use.
fn granted<G, S>(state: &State<G, S>) -> impl Iterator<Item = u32> + '_ {
    state.layers.iter().flat_map(|layer| &layer.seats).filter_map(|seat| match seat {
        Seat::Granted(grant) => Some(grant.slot.0),
        Seat::Free | Seat::Waiting | Seat::FoundEmpty(_) => None,
    })
}

/// What a check of one plan found.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The plan.
    pub plan: Plan,
    /// Different states that were reached.
    pub states: usize,
    /// Steps that were taken.
    pub steps: usize,
    /// The longest history.
    pub depth: usize,
    /// How long it took.
    pub took: Duration,
    /// Promises that broke, with the story.
    pub broken: Vec<(&'static str, String)>,
    /// What should have been reached and was not.
    pub unseen: Vec<&'static str>,
}

impl Finding {
    /// Whether every promise held, and everything was reached.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.broken.is_empty() && self.unseen.is_empty()
    }

    /// The plan and the numbers, in a line.
    #[must_use]
    pub fn line(&self) -> String {
        let Plan { name, keyslots, layers, policy, faults, .. } = &self.plan;
        let requests: u32 = layers.iter().map(|layer| u32::from(layer.requests)).sum();
        let numbers = [
            ("volumes", layers.len().try_into().unwrap_or(u32::MAX)),
            ("keyslots", *keyslots),
            ("requests", requests),
            ("bypass", policy.bypass_max),
            ("retries", policy.program_retries),
            ("failed programs", faults.program_failures.into()),
            ("rejected programs", faults.rejections.into()),
            ("failed switches", faults.switch_failures.into()),
            ("failed evictions", faults.evict_failures.into()),
            ("lost keyslots", faults.losses.into()),
            ("resets", faults.resets.into()),
            ("restarts", faults.restarts.into()),
        ];
        let numbers = numbers.iter().filter(|(_, number)| *number > 0);
        let bounds: Vec<_> = numbers.map(|(what, number)| format!("{what} {number}")).collect();
        format!(
            "{name} ({}): {} states, {} steps, depth {}, {:.1} s",
            bounds.join(", "),
            self.states,
            self.steps,
            self.depth,
            self.took.as_secs_f64()
        )
    }
}

/// Explores every history of a plan in one design, until the end or the first broken promise.
///
/// # Blocking
///
/// Until it is done, on so many threads.
#[must_use]
pub fn check<G: Gate, S: Slots>(plan: &Plan, threads: usize) -> Finding {
    check_to_depth::<G, S>(plan, threads, usize::MAX)
}

/// The same for a design that is known to break: a little deeper each time, so that the story is the shortest.
#[must_use]
pub fn check_for_story<G: Gate, S: Slots>(plan: &Plan) -> Finding {
    let mut depth = 1;
    loop {
        let finding = check_to_depth::<G, S>(plan, 1, depth);
        // Nothing deeper is left to see when a bound was not reached.
        if !finding.broken.is_empty() || finding.depth < depth {
            return finding;
        }
        depth += 1;
    }
}

fn check_to_depth<G: Gate, S: Slots>(plan: &Plan, threads: usize, depth: usize) -> Finding {
    let begun = Instant::now();
    let model = World::<G, S>::new(plan.clone());
    let properties = model.properties();
    let builder = model.checker().threads(threads).finish_when(HasDiscoveries::AnyFailures);
    let builder = if depth < usize::MAX { builder.target_max_depth(depth) } else { builder };
    let checker = builder.spawn_bfs().join();
    let discoveries = checker.discoveries();
    let broken = properties
        .iter()
        .filter(|property| property.expectation.discovery_is_failure())
        .filter_map(|property| {
            let path = discoveries.get(property.name)?.clone().into_vec();
            Some((property.name, story::tell(checker.model(), &path)))
        })
        .collect::<Vec<_>>();
    let unseen = properties
        .iter()
        .filter(|property| !property.expectation.discovery_is_failure())
        .filter(|property| broken.is_empty() && !discoveries.contains_key(property.name))
        .map(|property| property.name)
        .collect();
    Finding {
        plan: plan.clone(),
        states: checker.unique_state_count(),
        steps: checker.state_count(),
        depth: checker.max_depth(),
        took: begun.elapsed(),
        broken,
        unseen,
    }
}

/// Our design, in every plan.
pub fn ours(bounds: Bounds, threads: usize) -> impl Iterator<Item = Finding> {
    plans::ours(bounds).into_iter().map(move |plan| check::<OurGate, OurSlots>(&plan, threads))
}

/// The other designs, each with what it is called.
#[must_use]
pub fn others() -> Vec<(&'static str, Finding)> {
    vec![
        (
            "advertise both key types, and decide at the first program",
            check_for_story::<AdvertiseBoth, OurSlots>(&plans::two_types()),
        ),
        (
            "check when a key is set up, without reserving",
            check_for_story::<CheckOnly, OurSlots>(&plans::two_types()),
        ),
        (
            "Linux's keyslots: the mapping changes after the program",
            check_for_story::<OurGate, UpstreamSlots>(&plans::one_failed_program()),
        ),
    ]
}

/// Runs everything and tells what was found.
///
/// # Errors
///
/// The same text, if a promise of ours broke or another design's hole was not found.
pub fn report(bounds: Bounds, threads: usize) -> Result<String, String> {
    let mut text = String::from("Our design, over the code that runs:\n");
    let (mut is_good, mut states, begun) = (true, 0, Instant::now());
    for finding in ours(bounds, threads) {
        eprintln!("{}{}", finding.line(), if finding.holds() { "" } else { " BROKEN" });
        let _ = writeln!(text, "  {}", finding.line());
        for (name, story) in &finding.broken {
            let _ = writeln!(text, "  BROKEN: {name}\n{story}");
        }
        for name in &finding.unseen {
            let _ = writeln!(text, "  NEVER REACHED: {name}");
        }
        is_good &= finding.holds();
        states += finding.states;
    }
    let _ = writeln!(text, "  in all {states} states in {:.1} s\n", begun.elapsed().as_secs_f64());
    for (name, finding) in others() {
        let _ = writeln!(text, "Another design: {name}");
        for (_, story) in &finding.broken {
            let _ = writeln!(text, "{story}");
        }
        is_good &= !finding.broken.is_empty();
    }
    if is_good { Ok(text) } else { Err(text) }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod bent_tests;
