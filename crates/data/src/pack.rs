//! Grouping examples into micro-batches.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How examples become micro-batches. Every example is in exactly one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Packer {
    /// This many documents a micro-batch, in the sampler's order; the last one may have fewer.
    Documents {
        /// Documents a micro-batch (`per_device_train_batch_size`).
        batch_size: usize,
    },
    /// As many documents as fit into a budget of tokens, by best-fit-decreasing: longest first, each into the fullest
    /// pack that still has room (TRL's strategy `bfd`; at most 11/9 of the fewest possible packs, plus one).
    BestFitDecreasing {
        /// Tokens a micro-batch may have.
        budget: usize,
    },
}

impl Packer {
    /// Groups the examples whose order and lengths are given: each micro-batch is a list of indices into `lengths`.
    ///
    /// The number of micro-batches depends on the lengths alone, not on the order: an epoch of a shuffled run has as
    /// many steps as any other.
    ///
    /// # Errors
    /// A batch size or budget of 0, and examples longer than the budget.
    pub fn pack(&self, order: &[usize], lengths: &[usize]) -> Result<Vec<Vec<usize>>> {
        match *self {
            Self::Documents { batch_size: 0 } => Err(Error::ZeroSize { option: "batch_size" }),
            Self::Documents { batch_size } => Ok(order.chunks(batch_size).map(<[usize]>::to_vec).collect()),
            Self::BestFitDecreasing { budget: 0 } => Err(Error::ZeroSize { option: "budget" }),
            Self::BestFitDecreasing { budget } => best_fit_decreasing(order, lengths, budget),
        }
    }
}

fn best_fit_decreasing(order: &[usize], lengths: &[usize], budget: usize) -> Result<Vec<Vec<usize>>> {
    let mut too_long = order.iter().copied().filter(|&i| lengths[i] > budget);
    if let Some(example) = too_long.next() {
        return Err(Error::OverBudget { budget, example, found: lengths[example], count: 1 + too_long.count() });
    }
    let mut longest_first = order.to_vec();
    // Stable: examples of one length keep the sampler's order, so packs differ from epoch to epoch.
    longest_first.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));
    let mut packs: Vec<Vec<usize>> = Vec::new();
    // (room left, pack): the first entry from (length, 0) on is the tightest fit, the oldest pack among equals.
    let mut open: BTreeSet<(usize, usize)> = BTreeSet::new();
    for example in longest_first {
        let length = lengths[example];
        let fit = open.range((length, 0)..).next().copied();
        let (room, pack) = fit.unwrap_or((budget, packs.len()));
        open.remove(&(room, pack));
        if pack == packs.len() {
            packs.push(Vec::new());
        }
        packs[pack].push(example);
        if room > length {
            open.insert((room - length, pack));
        }
    }
    Ok(packs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn best_fit_takes_the_tightest_room() {
        let lengths = [5, 4, 3, 2, 1];
        let packs = Packer::BestFitDecreasing { budget: 7 }.pack(&[0, 1, 2, 3, 4], &lengths).unwrap();
        assert_eq!(packs, [vec![0, 3], vec![1, 2], vec![4]]);
    }

    #[test]
    fn documents_keep_the_order_and_the_last_batch_is_the_rest() {
        let packs = Packer::Documents { batch_size: 2 }.pack(&[2, 0, 1], &[1, 1, 1]).unwrap();
        assert_eq!(packs, [vec![2, 0], vec![1]]);
    }

    #[test]
    fn an_example_over_the_budget_is_named() {
        let error = Packer::BestFitDecreasing { budget: 4 }.pack(&[0, 1, 2], &[4, 9, 5]).unwrap_err();
        assert_eq!(error.to_string(), "pack examples: expected lengths up to 4, found 9 at example 1 (2 in all)");
        assert!(matches!(Packer::Documents { batch_size: 0 }.pack(&[], &[]), Err(Error::ZeroSize { .. })));
        assert!(matches!(Packer::BestFitDecreasing { budget: 0 }.pack(&[], &[]), Err(Error::ZeroSize { .. })));
    }

    proptest! {
        #[test]
        fn every_example_is_packed_once_within_the_budget(
            lengths in prop::collection::vec(1_usize..=64, 0..200), budget in 64_usize..200, seed: u64,
        ) {
            let order = crate::Sampler { seed, shuffle: true }.order(0, lengths.len());
            let packs = Packer::BestFitDecreasing { budget }.pack(&order, &lengths).unwrap();
            let mut seen: Vec<usize> = packs.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            let totals: Vec<usize> = packs.iter().map(|p| p.iter().map(|&i| lengths[i]).sum()).collect();
            prop_assert!(totals.iter().all(|&t| t > 0 && t <= budget));
            // Best fit never leaves two packs that would go into one.
            if let [a, b, ..] = { let mut t = totals.clone(); t.sort_unstable(); t }.as_slice() {
                prop_assert!(a + b > budget);
            }
            let total: usize = lengths.iter().sum();
            // No pack but one is less than half full, so there are fewer than twice the fewest possible, plus one.
            prop_assert!(packs.len() <= 2 * total.div_ceil(budget) + 1);
        }

        #[test]
        fn the_number_of_packs_does_not_depend_on_the_order(
            lengths in prop::collection::vec(1_usize..=32, 1..100), budget in 32_usize..80, a: u64, b: u64,
        ) {
            let count = |seed| {
                let order = crate::Sampler { seed, shuffle: true }.order(0, lengths.len());
                Packer::BestFitDecreasing { budget }.pack(&order, &lengths).unwrap().len()
            };
            prop_assert_eq!(count(a), count(b));
        }
    }
}
