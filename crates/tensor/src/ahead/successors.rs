//! What came next the last time.

use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
};

/// Beginnings that are remembered: some passes over a large model.
const MOST: usize = 1 << 14;

/// A sequence that comes again and again, one value after another: after the same values since its beginning the one is foreseen that
/// came after them the last time.
#[derive(Debug)]
pub(super) struct Successors<T> {
    /// A hash of the values since the beginning; nothing outside a sequence.
    so_far: Option<u64>,
    known: HashMap<u64, T>,
}

impl<T> Default for Successors<T> {
    fn default() -> Self {
        Self { so_far: None, known: HashMap::new() }
    }
}

impl<T> Successors<T> {
    pub(super) fn begin(&mut self) {
        self.so_far = Some(0);
    }

    pub(super) fn end(&mut self) {
        self.so_far = None;
    }

    pub(super) fn has_begun(&self) -> bool {
        self.so_far.is_some()
    }

    /// The next value: what tells it from others, and what to foresee; nothing for what cannot be foreseen.
    pub(super) fn note(&mut self, identity: &impl Hash, value: Option<T>) {
        let Some(so_far) = self.so_far else { return };
        if self.known.len() == MOST {
            self.known.clear();
        }
        match value {
            Some(value) => self.known.insert(so_far, value),
            None => self.known.remove(&so_far),
        };
        let mut hasher = DefaultHasher::new();
        (so_far, identity).hash(&mut hasher);
        self.so_far = Some(hasher.finish());
    }

    /// What is likely to come next.
    pub(super) fn foreseen(&self) -> Option<&T> {
        self.known.get(&self.so_far?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What was foreseen before each value of a sequence.
    fn run(successors: &mut Successors<u32>, sequence: &[u32]) -> Vec<Option<u32>> {
        successors.begin();
        let foreseen = sequence.iter().map(|&value| {
            let foreseen = successors.foreseen().copied();
            successors.note(&value, (value < 100).then_some(value));
            foreseen
        });
        let foreseen = foreseen.collect();
        successors.end();
        foreseen
    }

    proptest! {
        #[test]
        fn a_sequence_is_foreseen_the_second_time(sequence in proptest::collection::vec(0..100u32, 0..50)) {
            let mut successors = Successors::default();
            run(&mut successors, &sequence);
            let expected: Vec<Option<u32>> = sequence.iter().copied().map(Some).collect();
            prop_assert_eq!(run(&mut successors, &sequence), expected);
            prop_assert_eq!(successors.foreseen(), None);
        }
    }

    #[test]
    fn sequences_in_turn_surprise_where_they_part_alone() {
        let mut successors = Successors::default();
        // Forward, then backward; forward, then a block again and its backward.
        let (plain, again) = ([1, 2, 3, 13, 12, 11], [1, 2, 3, 1, 13, 12]);
        for sequence in [plain, again] {
            run(&mut successors, &sequence);
        }
        for sequence in [plain, again, plain] {
            let foreseen = run(&mut successors, &sequence);
            let wrong: Vec<usize> = (0..6).filter(|&i| foreseen[i] != Some(sequence[i])).collect();
            assert_eq!(wrong, [3]);
        }
    }

    #[test]
    fn what_cannot_be_foreseen_is_not_and_what_follows_it_is() {
        let mut successors = Successors::default();
        run(&mut successors, &[1, 100, 2]);
        assert_eq!(run(&mut successors, &[1, 100, 2]), [Some(1), None, Some(2)]);
        successors.note(&1, Some(1));
        assert!(!successors.has_begun() && successors.foreseen().is_none());
    }
}
