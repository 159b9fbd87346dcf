use super::*;

#[test]
fn worlds_come_to_a_good_end() {
    let seen = run_all(200).unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(seen.requests, seen.answers, "every request was answered once, or lost with the power");
    let Seen {
        resets,
        restarts,
        failed_restarts,
        cures,
        power_cuts,
        failed_programs,
        losses,
        refusals,
        waits,
        wakes,
        ..
    } = seen;
    for happened in [
        resets,
        restarts,
        failed_restarts,
        cures,
        power_cuts,
        failed_programs,
        losses,
        refusals,
        waits,
        wakes,
    ] {
        assert!(happened > 0, "a simulation in which little happens shows little:\n{seen}");
    }
}

#[test]
fn a_seed_is_a_world() {
    for seed in 0..20 {
        assert_eq!(run(seed, None), run(seed, None));
    }
    assert_ne!(run(1, None), run(2, None));
}

/// The first failure that a mistake leads to.
fn caught(sabotage: Sabotage) -> Failure {
    let found = (0..200).find_map(|seed| run(seed, Some(sabotage)).err());
    let failure = found.unwrap_or_else(|| panic!("{sabotage:?} was not caught in 200 worlds"));
    assert_eq!(run(failure.seed, Some(sabotage)), Err(failure.clone()), "it replays");
    assert!(failure.to_string().contains(&format!("replay {}", failure.seed)));
    failure
}

#[test]
fn every_mistake_that_is_built_in_is_caught() {
    for sabotage in Sabotage::ALL {
        let Failure { what, .. } = caught(sabotage);
        let expected = match sabotage {
            Sabotage::WrongDun => "is wrong",
            // The other keyslot is empty, or holds another's key.
            Sabotage::WrongKeyslot => "",
            Sabotage::Plaintext | Sabotage::IgnoreEmpty => "plaintext reached a disk",
            Sabotage::NoFlush => "after a power cut",
            Sabotage::AnswerTwice => "was answered twice",
        };
        assert!(what.contains(expected), "{sabotage:?}: {what}");
    }
}
