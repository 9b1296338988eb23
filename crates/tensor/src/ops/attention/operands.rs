//! Rows of q, k, v and do on their way into products, as words of a [`Form`].
//!
//! A row of D elements takes `form.words(D)` words. *Panels* hold [`LANES`] rows side by side, for sums over D; *columns*
//! hold [`LANES`] elements of each word of rows, for sums over rows.

use half::bf16;

use super::{strip::Lane, tile::Form};
use crate::{
    Float,
    ops::{
        matmul::transpose,
        simd::{LANES, multiversion},
    },
};

/// Rows of `size` elements, `ld` apart, as words.
pub(super) fn load_rows<E: Float>(form: Form, from: &[E], ld: usize, size: usize, to: &mut [f32]) {
    let rows = from.chunks(ld);
    match form {
        Form::Single => rows.zip(to.chunks_exact_mut(size)).for_each(|(from, to)| widen(&from[..size], to)),
        Form::Pair => {
            let to: &mut [bf16] = bytemuck::cast_slice_mut(to);
            for (from, to) in rows.zip(to.chunks_exact_mut(2 * form.words(size))) {
                to[..size].copy_from_slice(bytemuck::cast_slice(&from[..size]));
                to[size..].fill(bf16::ZERO);
            }
        }
    }
}

/// Rows of `size` elements, `ld` apart, as rows of words over rows: pairs of rows interleave, the last with zeros if it is
/// alone.
pub(super) fn load_over_rows<E: Float>(form: Form, from: &[E], ld: usize, size: usize, rows: usize, to: &mut [f32]) {
    match form {
        Form::Single => load_rows(form, from, ld, size, &mut to[..rows * size]),
        Form::Pair => {
            let from: &[bf16] = bytemuck::cast_slice(from);
            for (pair, to) in to.chunks_exact_mut(size).take(form.words(rows)).enumerate() {
                let low = &from[2 * pair * ld..][..size];
                let high = (2 * pair + 1 < rows).then(|| &from[(2 * pair + 1) * ld..][..size]);
                interleave(low, high.unwrap_or_default(), to);
            }
        }
    }
}

/// Loaded rows (a multiple of [`LANES`]) to panels: word w of a row goes to `[row / LANES][w][row % LANES]`.
pub(super) fn rows_to_panels(rows: &[f32], words: usize, panels: &mut [f32]) {
    for (rows, panel) in rows.chunks_exact(LANES * words).zip(panels.chunks_exact_mut(LANES * words)) {
        transpose(rows, words, LANES, words, panel, LANES);
    }
}

/// Loaded rows (a multiple of [`LANES`]) to columns: element d of a row goes to word `[d / LANES][row's word][d % LANES]`.
/// Where `size` is no multiple of [`LANES`], what follows the last element is arbitrary.
pub(super) fn rows_to_columns(form: Form, rows: &[f32], size: usize, columns: &mut [f32]) {
    let (words, elements) = (form.words(size), form.each() * form.words(size));
    let count = rows.len() / words;
    for (column, to) in columns.chunks_exact_mut(form.words(count) * LANES).enumerate() {
        let first = column * LANES;
        match form {
            Form::Single => {
                let width = LANES.min(size - first);
                for (from, to) in rows.chunks_exact(words).zip(to.chunks_exact_mut(LANES)) {
                    to[..width].copy_from_slice(&from[first..][..width]);
                }
            }
            Form::Pair => {
                let width = LANES.min(elements - first);
                let pairs = bytemuck::cast_slice::<f32, bf16>(rows).chunks_exact(2 * elements);
                for (from, to) in pairs.zip(to.chunks_exact_mut(LANES)) {
                    interleave(&from[first..][..width], &from[elements + first..][..width], to);
                }
            }
        }
    }
}

/// One panel of sums (`[d][lane]`) times a factor a lane, to rows of `size` elements, which may be fewer than [`LANES`].
/// `room` is for as many sums.
pub(super) fn panel_to_rows<E: Float>(panel: &[f32], size: usize, factor: &Lane<f32>, rows: &mut [E], room: &mut [f32]) {
    transpose(panel, LANES, size, LANES, room, size);
    for ((row, sums), &factor) in rows.chunks_exact_mut(size).zip(room.chunks_exact(size)).zip(factor) {
        narrow(sums, factor, row);
    }
}

multiversion! {
    fn widen<E: Float>(from: &[E], to: &mut [f32]) {
        for (y, x) in to.iter_mut().zip(from) {
            *y = x.to_f32();
        }
    }
}

multiversion! {
    fn narrow<E: Float>(from: &[f32], factor: f32, to: &mut [E]) {
        for (y, x) in to.iter_mut().zip(from) {
            *y = E::from_f32(x * factor);
        }
    }
}

multiversion! {
    /// Words of (low, high), or of (low, 0) where there is no high.
    fn interleave(low: &[bf16], high: &[bf16], to: &mut [f32]) {
        if high.is_empty() {
            for (y, l) in to.iter_mut().zip(low) {
                *y = f32::from_bits(u32::from(l.to_bits()));
            }
        }
        for ((y, l), h) in to.iter_mut().zip(low).zip(high) {
            *y = f32::from_bits(u32::from(h.to_bits()) << 16 | u32::from(l.to_bits()));
        }
    }
}

multiversion! {
    /// Rows of [`LANES`] probabilities become words over rows, rounded, from the first row on: half as many.
    pub(super) fn pair_rows(rows: &mut [f32]) {
        let (rows, _) = rows.as_chunks_mut::<LANES>();
        for pair in 0..rows.len().div_ceil(2) {
            let low = rows[2 * pair];
            let high = rows.get(2 * pair + 1).copied().unwrap_or([0.0; LANES]);
            for lane in 0..LANES {
                let [low, high] = [low[lane], high[lane]].map(|x| u32::from(<bf16 as Float>::from_f32(x).to_bits()));
                rows[pair][lane] = f32::from_bits(high << 16 | low);
            }
        }
    }
}

multiversion! {
    /// Rows of [`LANES`] probabilities, rounded, to rows of words over the lanes, `ld` words apart.
    pub(super) fn pair_lanes(rows: &[f32], to: &mut [f32], ld: usize) {
        for (row, to) in rows.as_chunks::<LANES>().0.iter().zip(to.chunks_mut(ld)) {
            let Some(to) = bytemuck::cast_slice_mut::<f32, bf16>(to).first_chunk_mut::<LANES>() else { return };
            for lane in 0..LANES {
                to[lane] = Float::from_f32(row[lane]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(len: usize) -> Vec<bf16> {
        (0..len).map(|i| bf16::from_f32(i as f32 % 256.0)).collect()
    }

    /// Element (row, d) of words over rows.
    fn over_rows(form: Form, words: &[f32], ld: usize, row: usize, d: usize) -> f32 {
        match form {
            Form::Single => words[row * ld + d],
            Form::Pair => bytemuck::cast_slice::<f32, bf16>(words)[2 * (row / 2 * ld + d) + row % 2].to_f32(),
        }
    }

    #[test]
    fn rows_panels_and_columns_hold_the_elements() {
        for form in [Form::Single, Form::Pair] {
            for size in [1, 5, 16, 21, 64] {
                let (rows, ld, w) = (2 * LANES, size + 3, form.words(size));
                let from = numbers(rows * ld);
                let expected = |row: usize, d: usize| from[row * ld + d].to_f32();
                let mut loaded = vec![f32::NAN; rows * w];
                load_rows(form, &from, ld, size, &mut loaded);
                let mut panels = vec![f32::NAN; rows * w];
                rows_to_panels(&loaded, w, &mut panels);
                let mut columns = vec![0.0; form.words(rows) * size.next_multiple_of(LANES)];
                rows_to_columns(form, &loaded, size, &mut columns);
                let odd = rows - 1;
                let mut over = vec![f32::NAN; form.words(odd) * size];
                load_over_rows(form, &from, ld, size, odd, &mut over);
                for row in 0..rows {
                    for d in 0..size {
                        let word = panels[(row / LANES * w + d / form.each()) * LANES + row % LANES];
                        let pair = [word.to_bits() << 16, word.to_bits() & 0xffff_0000].map(f32::from_bits);
                        let found = if form == Form::Single { word } else { pair[d % 2] };
                        assert_eq!(found, expected(row, d), "panel {form:?} {size} {row} {d}");
                        let column = &columns[d / LANES * form.words(rows) * LANES..];
                        assert_eq!(over_rows(form, column, LANES, row, d % LANES), expected(row, d), "{form:?} {size} {row} {d}");
                        if row < odd {
                            assert_eq!(over_rows(form, &over, size, row, d), expected(row, d), "{form:?} {size} {row} {d}");
                        }
                    }
                }
                if form == Form::Pair {
                    assert_eq!(over_rows(form, &over, size, odd, 0), 0.0);
                }
            }
        }
    }

    #[test]
    fn panels_of_sums_become_rows() {
        for size in [1, 5, 16, 21] {
            let panel: Vec<f32> = (0..LANES * size).map(|i| i as f32).collect();
            let (mut rows, mut room) = (vec![0.0f32; 3 * size], vec![0.0; LANES * size]);
            panel_to_rows(&panel, size, &[0.5; LANES], &mut rows, &mut room);
            for (i, x) in rows.iter().enumerate() {
                assert_eq!(*x, 0.5 * panel[i % size * LANES + i / size]);
            }
        }
    }

    #[test]
    fn probabilities_become_pairs() {
        for rows in [1, 2, 5] {
            let p: Vec<f32> = (0..rows * LANES).map(|i| i as f32 / 64.0).collect();
            let mut over = p.clone();
            pair_rows(&mut over);
            let mut lanes = vec![f32::NAN; rows * LANES];
            pair_lanes(&p, &mut lanes, LANES);
            for (i, x) in p.iter().enumerate() {
                let (row, lane) = (i / LANES, i % LANES);
                let x = bf16::from_f32(*x).to_f32();
                assert_eq!(over_rows(Form::Pair, &over, LANES, row, lane), x);
                assert_eq!(bytemuck::cast_slice::<f32, bf16>(&lanes)[row * 2 * LANES + lane].to_f32(), x);
            }
            if rows % 2 == 1 {
                assert_eq!(over_rows(Form::Pair, &over, LANES, rows, 0), 0.0);
            }
        }
    }
}
