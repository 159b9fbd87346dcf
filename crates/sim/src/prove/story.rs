//! A counterexample as people tell it: numbered lines in plain words.

use super::design::{Gate, Slots};
use super::model::{Broken, EngineMode, Phase, Seat, State, Step, Work, World};
use inlinecrypt_core::config::KeyType;
use inlinecrypt_core::key::KeyId;
use inlinecrypt_core::keyslot::table::Programmed;

/// A path through a model, told.
#[must_use]
pub fn tell<G: Gate, S: Slots>(world: &World<G, S>, path: &[(State<G, S>, Option<Step>)]) -> String {
    let mut lines = Vec::new();
    for pair in path.windows(2) {
        let [(before, Some(step)), (after, _)] = pair else { continue };
        lines.push(Teller { world, before, after }.line(*step));
    }
    if let Some((last, _)) = path.last() {
        lines.extend(last.broken.map(|broken| Teller { world, before: last, after: last }.moral(broken)));
    }
    lines.iter().zip(1..).map(|(line, number)| format!("{number}. {line}\n")).collect()
}

struct Teller<'a, G, S> {
    world: &'a World<G, S>,
    before: &'a State<G, S>,
    after: &'a State<G, S>,
}

impl<G: Gate, S: Slots> Teller<'_, G, S> {
    fn layer(index: u8) -> String {
        if index == super::model::DECLARED { "the owner".into() } else { format!("volume {}", letter(index)) }
    }

    fn key(&self, key: KeyId) -> String {
        let type_name = match self.world.key_type(key) {
            KeyType::Raw => "raw",
            KeyType::HardwareWrapped => "wrapped",
        };
        format!("{type_name} key {}", key.number())
    }

    /// What the keyslots did at once besides.
    fn and_then(&self, line: String) -> String {
        let mut line = line;
        for (index, (before, after)) in (0u8..).zip(self.before.layers.iter().zip(&self.after.layers)) {
            for (old, new) in before.seats.iter().zip(&after.seats) {
                match (old, new) {
                    (Seat::Free | Seat::Waiting, Seat::Granted(grant)) => {
                        line += &format!("; {} is granted keyslot {}", Self::layer(index), grant.slot);
                    }
                    (Seat::Waiting, Seat::Free) => {
                        line += &format!("; the write of {} fails", Self::layer(index));
                    }
                    _ => {}
                }
            }
        }
        match (self.before.engine.work, self.after.engine.work) {
            (before, Some(Work::Program { slot, key, .. })) if before != self.after.engine.work => {
                let displaced = self.before.engine.slots[slot as usize].filter(|held| *held != key);
                let over = displaced.map_or(String::new(), |held| format!(", over {}", self.key(held)));
                line + &format!("; the engine begins to program {} into keyslot {slot}{over}", self.key(key))
            }
            (before, Some(Work::Evict { slot, key })) if before != self.after.engine.work => {
                line + &format!("; the engine begins to evict {} from keyslot {slot}", self.key(key))
            }
            _ => line,
        }
    }

    fn line(&self, step: Step) -> String {
        let line = match step {
            Step::SetUp(index, _) => {
                let key = self.key(self.world.key(index));
                let answer = match self.after.layers[usize::from(index)].phase {
                    Phase::Asked(_) => "waits for the answer",
                    Phase::Untold(_) | Phase::Admitted(_) => G::ADMITS,
                    Phase::InSoftware => "is served by software",
                    Phase::Outside | Phase::Leaving => "is refused",
                };
                format!("{} sets up {key} and {answer}", Self::layer(index))
            }
            Step::Declare => "the owner declares the key type".into(),
            Step::Switched(true) => "the engine has switched".into(),
            Step::Switched(false) => "the engine fails to switch".into(),
            Step::TellPin(index) => {
                format!("the keyslots hear that the key of {} is pinned", Self::layer(index))
            }
            Step::Write(index) => {
                format!("{} writes back: it asks for its key's keyslot", Self::layer(index))
            }
            Step::Use(index, seat) => match self.after.layers[usize::from(index)].seats[usize::from(seat)] {
                Seat::FoundEmpty(grant) => {
                    format!("{} finds keyslot {} empty", Self::layer(index), grant.slot)
                }
                _ => format!("{} has written and gives the keyslot back", Self::layer(index)),
            },
            Step::Report(index, _) => {
                format!("{} reports the empty keyslot and asks again", Self::layer(index))
            }
            Step::Leave(index) => format!("{} closes", Self::layer(index)),
            Step::Evict(index) => format!("{} evicts its key by hand", Self::layer(index)),
            Step::Programmed(outcome, _) => return self.programmed(outcome),
            Step::Evicted(ok) => format!("the engine {}", if ok { "has evicted" } else { "fails to evict" }),
            Step::Reset => "the engine is reset: its keyslots are empty".into(),
            Step::HearReset => "the host hears of the reset".into(),
            Step::Restart => "the engine dies".into(),
            Step::Restarted => "the next engine is up, and the wrapped keys are prepared again".into(),
            Step::Lose(slot) => format!("the engine loses keyslot {slot}"),
        };
        self.and_then(line)
    }

    fn programmed(&self, outcome: Programmed) -> String {
        let Some(Work::Program { slot, key, .. }) = self.before.engine.work else { return String::new() };
        let key = self.key(key);
        let decided = match (self.before.engine.mode, self.after.engine.mode) {
            (EngineMode::Undecided, EngineMode::One(KeyType::Raw)) => {
                ", and from now on serves raw keys only"
            }
            (EngineMode::Undecided, EngineMode::One(_)) => ", and from now on serves wrapped keys only",
            _ => "",
        };
        if let Some(Broken::LostWrite(_)) = self.after.broken {
            return format!("the engine refuses {key}: it is not of the type that it serves");
        }
        self.and_then(match outcome {
            Programmed::Done => format!("{key} is in keyslot {slot}: the engine has programmed it{decided}"),
            Programmed::Failed => format!("the engine fails to program {key}; keyslot {slot} is empty now"),
            Programmed::Rejected => format!("the engine rejects {key}; keyslot {slot} is empty now"),
        })
    }

    fn moral(&self, broken: Broken) -> String {
        match broken {
            Broken::LostWrite(key) => {
                let layers =
                    (0u8..).zip(&self.world.plan.layers).filter(|(_, plan)| plan.key == key.number());
                let names: Vec<_> = layers.map(|(index, _)| Self::layer(index)).collect();
                format!(
                    "LOST WRITE: what {} accepted and was admitted to write cannot be written",
                    names.join(", ")
                )
            }
            Broken::WrongKey(slot) => {
                format!("WRONG KEY: the request was granted keyslot {slot}, which holds another key")
            }
            Broken::EmptyKeyslot(slot) => {
                format!("STALE MAPPING: the request was granted keyslot {slot}, which does not hold its key")
            }
            Broken::Shrunk => "SHRUNK: the engine cannot serve a key that is admitted".into(),
            Broken::BadRefusal => "BAD REFUSAL: refused without cause, or naming another".into(),
            Broken::BadAdmission => "BAD ADMISSION: what was promised cannot be kept".into(),
            Broken::Reserved => "RESERVED: what is reserved is not what is held".into(),
            Broken::TooLate => "TOO LATE: more others were granted first than is documented".into(),
            Broken::Answered => "ANSWERED: somebody got an answer who waits for none".into(),
            Broken::FailedEarly => {
                "FAILED EARLY: the request failed without the engine's failing its key".into()
            }
            Broken::Touched => "TOUCHED: the engine is told to touch what it must leave alone".into(),
            Broken::Evicted => "EVICTED: the eviction's answer is not true".into(),
            Broken::Stuck => "STUCK: somebody waits and nothing is under way".into(),
        }
    }
}

fn letter(index: u8) -> char {
    char::from(b'A' + index)
}
