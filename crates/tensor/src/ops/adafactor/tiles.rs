//! How a GPU's work is cut: matrices into tiles, tiles into a list of items in three phases, ordered so that a matrix is read again while
//! it is in the cache (`kernels/src/adafactor.cu`).

use std::ops::Range;

use super::Matrix;

/// Elements of a tile, of which a thread of 256 has four columns of 16 rows.
const TILE: usize = 16_384;
/// Columns of a tile at least and at most; at most where a matrix has as many rows as then fit.
const WIDTHS: (usize, usize, usize) = (4, 1024, 256);
/// Elements of the matrices that go through a phase together: 4 MiB of gradients, of which the phases of five such are in flight.
const GROUP: usize = 1 << 20;
/// Groups between a phase and the next: the tiles of a matrix are done when it comes to its turn again.
const LAG: usize = 2;
/// Bits of an item's word that number the matrix; those above are the phase.
const PHASE_AT: u32 = 30;

/// The tiles of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tiles {
    width: usize,
    height: usize,
    across: usize,
    down: usize,
}

impl Tiles {
    fn of(matrix: &Matrix) -> Self {
        let (least, most, most_of_many) = WIDTHS;
        let most = if matrix.rows >= TILE / most_of_many { most_of_many } else { most };
        let width = matrix.cols.next_power_of_two().clamp(least, most);
        let height = TILE / width;
        Self { width, height, across: matrix.cols.div_ceil(width), down: matrix.rows.div_ceil(height) }
    }

    fn count(self) -> usize {
        self.across * self.down
    }
}

/// The table of the matrices, 12 words each as the kernel's `Matrix`, and the elements of its scratch.
pub(super) fn words(all: &[Matrix]) -> (Vec<u32>, usize) {
    let mut words = Vec::with_capacity(12 * all.len());
    let [mut start, mut row_at, mut col_at] = [0; 3];
    // Two factors of each come first.
    let mut scratch = 2 * all.len();
    let mut take = |count: usize| {
        scratch += count;
        scratch - count
    };
    for matrix in all {
        let tiles = Tiles::of(matrix);
        let rows_at = take(if tiles.across > 1 { tiles.across * matrix.rows } else { 0 });
        let cols_at = take(if tiles.down > 1 { tiles.down * matrix.cols } else { 0 });
        let tiles_at = take(tiles.count());
        let sizes = [start, matrix.rows, matrix.cols, row_at, col_at, matrix.decayed.into()];
        let cut = [tiles.width.ilog2() as usize, tiles.across, tiles.count(), rows_at, cols_at, tiles_at];
        words.extend(sizes.into_iter().chain(cut).map(|n| n as u32));
        start += matrix.rows * matrix.cols;
        row_at += matrix.rows;
        col_at += matrix.cols;
    }
    (words, scratch)
}

/// The items in the order in which they are taken: matrix and phase, tile. Each phase of a matrix comes after the whole phase before.
pub(super) fn items(all: &[Matrix]) -> Vec<u32> {
    let groups = groups(all);
    let mut items = Vec::new();
    for round in 0..groups.len() + 2 * LAG {
        for phase in 0..3 {
            let group = round.checked_sub(LAG * phase as usize).and_then(|group| groups.get(group));
            for matrix in group.cloned().unwrap_or_default() {
                let tiles = Tiles::of(&all[matrix]).count() as u32;
                items.extend((0..tiles).flat_map(|tile| [matrix as u32 | phase << PHASE_AT, tile]));
            }
        }
    }
    items
}

/// Consecutive matrices of about [`GROUP`] elements.
fn groups(all: &[Matrix]) -> Vec<Range<usize>> {
    let (mut groups, mut first, mut held) = (Vec::new(), 0, 0);
    for (i, matrix) in all.iter().enumerate() {
        held += matrix.rows * matrix.cols;
        if held >= GROUP || i + 1 == all.len() {
            groups.push(first..i + 1);
            (first, held) = (i + 1, 0);
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrices() -> Vec<Matrix> {
        let sizes =
            [(7, 33), (1, 5), (20, 1), (1, 5000), (64, 4096), (14_336, 64), (300, 1000), (3, 2000), (70, 257), (1024, 2048)];
        sizes.map(|(rows, cols)| Matrix { rows, cols, decayed: true }).to_vec()
    }

    #[test]
    fn tiles_cover_a_matrix_and_no_row_or_column_of_them_is_empty() {
        for matrix in matrices() {
            let tiles = Tiles::of(&matrix);
            assert_eq!((tiles.width * tiles.height, tiles.width.is_power_of_two()), (TILE, true));
            assert!(tiles.width * tiles.across >= matrix.cols && tiles.width * (tiles.across - 1) < matrix.cols, "{tiles:?}");
            assert!(tiles.height * tiles.down >= matrix.rows && tiles.height * (tiles.down - 1) < matrix.rows, "{tiles:?}");
        }
    }

    #[test]
    fn each_item_comes_once_and_after_all_that_it_waits_for() {
        let all = matrices();
        let items = items(&all);
        let mut done = vec![[0; 3]; all.len()];
        for item in items.chunks_exact(2) {
            let (matrix, phase) = ((item[0] & ((1 << PHASE_AT) - 1)) as usize, (item[0] >> PHASE_AT) as usize);
            let tiles = Tiles::of(&all[matrix]).count();
            assert!(phase == 0 || done[matrix][phase - 1] == tiles, "{item:?}");
            assert_eq!(item[1] as usize, done[matrix][phase]);
            done[matrix][phase] += 1;
        }
        assert!(all.iter().zip(done).all(|(matrix, done)| done == [Tiles::of(matrix).count(); 3]));
    }

    #[test]
    fn parts_of_the_scratch_do_not_overlap() {
        let all = matrices();
        let (words, len) = words(&all);
        let mut taken = vec![false; len];
        taken[..2 * all.len()].fill(true);
        for (matrix, words) in all.iter().zip(words.chunks_exact(12)) {
            let tiles = Tiles::of(matrix);
            let rows = if tiles.across > 1 { tiles.across * matrix.rows } else { 0 };
            let cols = if tiles.down > 1 { tiles.down * matrix.cols } else { 0 };
            for (at, count) in [(words[9], rows), (words[10], cols), (words[11], tiles.count())] {
                let part = &mut taken[at as usize..at as usize + count];
                assert!(part.iter().all(|taken| !taken));
                part.fill(true);
            }
        }
        assert!(taken.iter().all(|taken| *taken));
    }
}
