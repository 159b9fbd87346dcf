use super::*;

#[test]
fn every_promise_holds_in_small_bounds() {
    for finding in ours(Bounds::Small, 2) {
        assert!(finding.holds(), "{}\n{:?}\n{:#?}", finding.line(), finding.unseen, finding.broken);
    }
}

/// The lines of the one story that a design's check found.
fn story(which: usize) -> (Broken, Vec<String>) {
    let (_, finding) = others().swap_remove(which);
    let [(name, story)] = &finding.broken[..] else { panic!("{:?}", finding.broken) };
    let broken = if name.contains("type") { Broken::LostWrite(key(0)) } else { Broken::EmptyKeyslot(0) };
    (broken, story.lines().map(str::to_owned).collect())
}

fn key(number: u64) -> inlinecrypt_core::key::KeyId {
    inlinecrypt_core::key::KeyId::for_simulation(number)
}

/// Both are admitted, one is programmed and decides, the other's write is lost.
fn tells_of_a_lost_write(lines: &[String], why_admitted: &str) {
    assert_eq!(lines.len(), 7, "the shortest: {lines:#?}");
    let admitted = lines.iter().filter(|line| line.contains(why_admitted));
    assert_eq!(admitted.count(), 2, "{lines:#?}");
    let (decided, refused) = (&lines[4], &lines[5]);
    assert!(decided.contains("from now on serves") && decided.contains("keys only"), "{decided}");
    assert!(refused.contains("the engine refuses"), "{refused}");
    assert!(lines[6].contains("LOST WRITE: what volume A accepted"), "{lines:#?}");
}

#[test]
fn advertising_both_and_deciding_at_the_first_program_loses_a_write() {
    let (broken, lines) = story(0);
    assert!(matches!(broken, Broken::LostWrite(_)));
    tells_of_a_lost_write(&lines, "since the engine advertises both types");
}

#[test]
fn checking_without_reserving_loses_a_write() {
    let (broken, lines) = story(1);
    assert!(matches!(broken, Broken::LostWrite(_)));
    tells_of_a_lost_write(&lines, "since a look at the engine finds nothing against it");
}

#[test]
fn linux_keyslots_grant_a_stale_mapping_after_a_failed_program() {
    let (broken, lines) = story(2);
    assert!(matches!(broken, Broken::EmptyKeyslot(_)));
    let failed =
        lines.iter().position(|line| line.contains("the engine fails to program raw key 2")).unwrap();
    let granted = &lines[failed..];
    assert!(granted[0].contains("keyslot 0 is empty now"), "{lines:#?}");
    assert!(granted.iter().any(|line| line.contains("volume A is granted keyslot 0")), "{lines:#?}");
    assert!(lines[lines.len() - 1].contains("STALE MAPPING"), "{lines:#?}");
}

#[test]
fn our_design_tells_no_story_where_the_others_do() {
    for plan in [plans::two_types(), plans::one_failed_program()] {
        let finding = check::<OurGate, OurSlots>(&plan, 1);
        assert_eq!(finding.broken, []);
    }
}
