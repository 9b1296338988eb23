//! What a launch makes of a product's result: all, or most of it by clusters of eight blocks beside another launch that makes the rest.
//!
//! Clusters of eight read half as much from the second-level cache as clusters of two, and find room on most multiprocessors, not on
//! all: where a group of them is no multiple of eight, clusters of two fit beside.

/// A cluster's blocks (`Two` and `Eight` of `common/product.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cluster {
    Two,
    Eight,
}

/// Columns and tokens of a block's tile.
const BLOCK: [usize; 2] = [128, 256];
/// Roles of launches that share a result; that of one alone is 0.
const LEADS: u32 = 1;
const FOLLOWS: u32 = 2;
/// The most that sharing a result may take longer, were no power saved: a thirty-second.
const LONGER: usize = 32;

impl Cluster {
    /// Blocks along columns and along tokens.
    pub(super) const fn shape(self) -> [usize; 2] {
        match self {
            Self::Two => [2, 1],
            Self::Eight => [4, 2],
        }
    }

    pub(super) const fn blocks(self) -> usize {
        self.shape()[0] * self.shape()[1]
    }

    /// Tokens and columns of a tile.
    pub(super) const fn tile(self) -> [usize; 2] {
        [self.shape()[1] * BLOCK[1], self.shape()[0] * BLOCK[0]]
    }

    /// Rows that a block brings at once of x.
    pub(super) const fn x_rows(self) -> u32 {
        (BLOCK[1] / self.shape()[0]) as u32
    }

    /// Rows that a block brings at once of w as it lies [n, k].
    pub(super) const fn w_rows(self) -> u32 {
        (BLOCK[0] / self.shape()[1]) as u32
    }

    /// Tiles of a result [m, n].
    pub(super) fn tiles(self, [m, n]: [usize; 2]) -> usize {
        m.div_ceil(self.tile()[0]) * n.div_ceil(self.tile()[1])
    }
}

/// `Share` of `common/product.cuh`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Share {
    meeting: u64,
    m: u32,
    m_end: u32,
    n: u32,
    n_end: u32,
    role: u32,
}

/// Clusters that a device runs at once.
#[derive(Clone, Copy, Debug)]
pub(super) struct Crew {
    /// Of two blocks, alone.
    pub(super) twos: usize,
    /// Of eight, and of two beside those.
    pub(super) eights: usize,
    pub(super) beside: usize,
}

impl Share {
    /// All of a result [m, n].
    pub(super) fn all([m, n]: [usize; 2]) -> Self {
        Self { m_end: m as u32, n_end: n as u32, ..Self::default() }
    }

    /// What clusters of eight make of a result [m, n], and what clusters of two beside them; nothing where that takes longer.
    pub(super) fn out([m, n]: [usize; 2], crew: Crew) -> Option<[Self; 2]> {
        let rounds = |cluster: Cluster, result, count: usize| cluster.tiles(result).div_ceil(count.max(1));
        let [tokens, columns] = Cluster::Eight.tile();
        let by_tokens = (tokens..m).step_by(tokens).map(|m_first| ([m_first, n], [m - m_first, n]));
        let by_columns = (columns..n).step_by(columns).map(|n_first| ([m, n_first], [m, n - n_first]));
        let longest = |&(first, rest): &([usize; 2], [usize; 2])| {
            let longest = rounds(Cluster::Eight, first, crew.eights).max(rounds(Cluster::Two, rest, crew.beside));
            // Of two that take as long, the one that leaves less.
            (longest, rest[0] * rest[1])
        };
        let best = by_tokens.chain(by_columns).filter(|_| crew.eights > 0 && crew.beside > 0).min_by_key(longest)?;
        let alone = rounds(Cluster::Two, [m, n], crew.twos);
        if longest(&best).0 * LONGER > alone * (LONGER + 1) {
            return None;
        }
        let ([m_first, n_first], all) = (best.0, Self::all([m, n]));
        let first = Self { role: LEADS, ..Self::all([m_first, n_first]) };
        let rest = Self { role: FOLLOWS, ..all };
        Some([first, if m_first < m { Self { m: first.m_end, ..rest } } else { Self { n: first.n_end, ..rest } }])
    }

    /// Of a launch that meets another by two words that kernels find zero and leave zero.
    pub(super) const fn meeting_at(self, meeting: u64) -> Self {
        Self { meeting, ..self }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const H200: Crew = Crew { twos: 66, eights: 15, beside: 6 };

    fn sizes(share: &Share) -> [usize; 2] {
        [share.m_end - share.m, share.n_end - share.n].map(|size| size as usize)
    }

    proptest! {
        #[test]
        fn two_shares_are_the_whole_and_begin_with_tiles(
            m in 1..20_000usize, n in 1..40_000usize, eights in 0..17usize, beside in 0..9usize,
        ) {
            let crew = Crew { twos: 4 * eights + beside + 1, eights, beside };
            let Some([first, rest]) = Share::out([m, n], crew) else { return Ok(()) };
            prop_assert_eq!((first.m, first.n, first.role, rest.role), (0, 0, LEADS, FOLLOWS));
            let [a, b] = [sizes(&first), sizes(&rest)];
            prop_assert_eq!(a[0] * a[1] + b[0] * b[1], m * n);
            prop_assert_eq!([rest.m_end, rest.n_end], [m as u32, n as u32]);
            // One of the two sizes is whole, and the other goes on where the first ends, at a tile's end.
            prop_assert!((rest.m == 0 && rest.n == first.n_end) || (rest.n == 0 && rest.m == first.m_end));
            prop_assert!(rest.m % 512 == 0 && rest.n % 512 == 0);
        }

        #[test]
        fn none_takes_longer(m in 1..20_000usize, n in 1..40_000usize) {
            let Some([first, rest]) = Share::out([m, n], H200) else { return Ok(()) };
            let alone = Cluster::Two.tiles([m, n]).div_ceil(H200.twos);
            let eights = Cluster::Eight.tiles(sizes(&first)).div_ceil(H200.eights);
            let twos = Cluster::Two.tiles(sizes(&rest)).div_ceil(H200.beside);
            prop_assert!(32 * eights.max(twos) <= 33 * alone);
        }
    }

    #[test]
    fn large_products_are_shared_and_small_ones_are_not() {
        // Those of a step of Llama-3-8B, and of the tests on a GPU.
        let step = [[8192, 4096], [8192, 28_672], [8192, 14_336], [8192, 1024], [1024, 128_256]];
        let tests = [[2816, 1536], [3066, 2568], [2800, 2704], [2800, 1352]];
        for large in step.into_iter().chain(tests) {
            assert!(Share::out(large, H200).is_some(), "{large:?}");
        }
        assert_eq!(Share::out([1024, 4096], H200), None);
        assert_eq!(Share::out([8192, 4096], Crew { eights: 0, ..H200 }), None);
    }
}
