//! A list of keyslots in order of last use, linked through a table of its own: no allocation, no search.

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Links {
    prev: u32,
    next: u32,
    listed: bool,
}

/// Keyslots `0..count`, each in the list at most once; the front is the one that was used longest ago.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct LruList {
    links: Vec<Links>,
    front: u32,
    back: u32,
}

impl LruList {
    /// No keyslot is listed at first.
    pub(super) fn new(count: u32) -> Self {
        let unlisted = Links { prev: NONE, next: NONE, listed: false };
        Self { links: vec![unlisted; count as usize], front: NONE, back: NONE }
    }

    pub(super) fn front(&self) -> Option<u32> {
        (self.front != NONE).then_some(self.front)
    }

    /// Lists `slot` as the one used last.
    pub(super) fn push_back(&mut self, slot: u32) {
        assert!(!self.links[slot as usize].listed, "keyslot {slot} is listed already");
        self.links[slot as usize] = Links { prev: self.back, next: NONE, listed: true };
        match self.back {
            NONE => self.front = slot,
            back => self.links[back as usize].next = slot,
        }
        self.back = slot;
    }

    /// Takes `slot` out of the list, if it is in.
    pub(super) fn remove(&mut self, slot: u32) {
        let Links { prev, next, listed } = self.links[slot as usize];
        if !listed {
            return;
        }
        match prev {
            NONE => self.front = next,
            prev => self.links[prev as usize].next = next,
        }
        match next {
            NONE => self.back = prev,
            next => self.links[next as usize].prev = prev,
        }
        self.links[slot as usize] = Links { prev: NONE, next: NONE, listed: false };
    }

    /// From the one used longest ago to the one used last.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(self.front(), |&slot| {
            let next = self.links[slot as usize].next;
            (next != NONE).then_some(next)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn equals_a_queue(ops in proptest::collection::vec((0u32..8, any::<bool>()), 0..200)) {
            let (mut list, mut oracle) = (LruList::new(8), VecDeque::new());
            for (slot, push) in ops {
                oracle.retain(|&other| other != slot);
                list.remove(slot);
                if push {
                    list.push_back(slot);
                    oracle.push_back(slot);
                }
                prop_assert_eq!(list.iter().collect::<VecDeque<_>>(), oracle.clone());
                prop_assert_eq!(list.front(), oracle.front().copied());
            }
        }
    }
}
