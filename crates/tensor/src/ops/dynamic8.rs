//! Optimizer states in 8 bits: which blocks of the flat buffer have them, and how a state is held.
//!
//! As in bitsandbytes, each parameter is cut into blocks of 256 elements that begin at its own start; a block's values are
//! `level[code] · absmax`. Parameters below [`MIN_8BIT`] elements keep f32. In memory, each block has 256 places, so that all of
//! them begin at a multiple of 256 bytes; what is beyond a parameter's end stays unused.

use std::{ops::Range, sync::OnceLock};

use nibble_nf4::DynamicMap;

use super::simd::multiversion;
use crate::{Arena, DType, Device, Error, Result, Tensor, TensorMut};

/// Elements of a block.
pub const BLOCK: usize = 256;
/// Parameters with fewer elements keep f32 states.
pub const MIN_8BIT: usize = 4096;

/// A run of neighbouring elements of one parameter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it lies in the flat buffer; it begins at a block's start.
    pub range: Range<usize>,
    /// Whether its elements decay.
    pub decayed: bool,
    /// Whether its states are 8-bit codes.
    pub quantised: bool,
}

/// The blocks of a flat buffer.
#[derive(Debug)]
pub struct Blocks {
    len: usize,
    /// In the order of the buffer.
    pieces: Vec<Piece>,
    quantised: usize,
    exact: usize,
    /// U32 `[2 (quantised + exact)]` on a GPU: first element, and length with bit 31 set where it decays.
    table: Option<Tensor>,
}

/// A state: codes U8 `[256 quantised]` and absmax F32 `[quantised]` of the quantised blocks, F32 `[256 exact]` of the others.
#[derive(Debug)]
pub struct Moment<'a> {
    /// Codes.
    pub codes: TensorMut<'a>,
    /// The largest magnitude of each block.
    pub absmax: TensorMut<'a>,
    /// States of small parameters.
    pub exact: TensorMut<'a>,
}

impl Blocks {
    /// The blocks of `pieces`, which follow each other without a gap.
    ///
    /// # Errors
    /// [`Error::Argument`] for pieces with a gap or beyond 2³² elements, [`Error::OutOfMemory`].
    pub fn new(arena: &Arena, pieces: Vec<Piece>) -> Result<Self> {
        let mut len = 0;
        for piece in &pieces {
            if piece.range.start != len || piece.range.end > u32::MAX as usize {
                let expected = "the end of the piece before, below 2^32";
                return Err(Error::Argument { op: "blocks", argument: "start", expected, found: piece.range.start });
            }
            len = piece.range.end;
        }
        let count = |quantised| pieces.iter().filter(|piece| piece.quantised == quantised).map(Piece::blocks).sum();
        let (quantised, exact) = (count(true), count(false));
        let table = match arena.device() {
            Device::Cpu => None,
            Device::Cuda(_) => {
                let table = table(&pieces);
                Some(Tensor::from_slice(arena, &table, [table.len()])?)
            }
        };
        Ok(Self { len, pieces, quantised, exact, table })
    }

    /// Elements of the flat buffer.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Blocks with codes.
    #[must_use]
    pub fn quantised(&self) -> usize {
        self.quantised
    }

    /// Blocks with f32 states.
    #[must_use]
    pub fn exact(&self) -> usize {
        self.exact
    }

    pub(super) fn table(&self) -> Option<&Tensor> {
        self.table.as_ref()
    }

    pub(super) fn check(&self, op: &'static str, params: &TensorMut<'_>, grads: &Tensor, moments: &[&Moment<'_>]) -> Result<()> {
        super::typed::expect_dtype(op, "grads", grads, DType::F32)?;
        params.expect_shape(op, "params", [self.len])?;
        grads.expect_shape(op, "grads", [self.len])?;
        for moment in moments {
            moment.codes.expect_shape(op, "codes", [BLOCK * self.quantised])?;
            moment.absmax.expect_shape(op, "absmax", [self.quantised])?;
            moment.exact.expect_shape(op, "exact", [BLOCK * self.exact])?;
        }
        Ok(())
    }
}

impl Piece {
    fn blocks(&self) -> usize {
        self.range.len().div_ceil(BLOCK)
    }
}

/// Two words a block: those with codes first.
fn table(pieces: &[Piece]) -> Vec<u32> {
    let of = |quantised: bool| {
        pieces.iter().filter(move |piece| piece.quantised == quantised).flat_map(|piece| {
            piece.range.clone().step_by(BLOCK).flat_map(|start| {
                let len = BLOCK.min(piece.range.end - start) as u32;
                [start as u32, len | u32::from(piece.decayed) << 31]
            })
        })
    };
    of(true).chain(of(false)).collect()
}

/// Part of a piece, with what belongs to it of `N` states.
pub(super) struct Task<'a, const N: usize> {
    pub(super) p: &'a mut [f32],
    pub(super) g: &'a [f32],
    pub(super) decayed: bool,
    pub(super) states: [Part<'a>; N],
}

/// Part of a state.
pub(super) enum Part<'a> {
    /// Codes of whole blocks, and their scales.
    Coded { codes: &'a mut [u8], absmax: &'a mut [f32] },
    /// One value an element.
    Exact(&'a mut [f32]),
}

/// Elements of a task: whole blocks.
const TASK: usize = 64 * BLOCK;

/// A state as slices.
pub(super) struct Slices<'a> {
    codes: &'a mut [u8],
    absmax: &'a mut [f32],
    exact: &'a mut [f32],
}

impl Moment<'_> {
    pub(super) fn slices(&mut self) -> Result<Slices<'_>> {
        Ok(Slices { codes: self.codes.as_mut_slice()?, absmax: self.absmax.as_mut_slice()?, exact: self.exact.as_mut_slice()? })
    }
}

impl<'a> Slices<'a> {
    /// What belongs to the next `len` elements of a piece.
    fn take(&mut self, quantised: bool, len: usize) -> Part<'a> {
        let blocks = len.div_ceil(BLOCK);
        if quantised {
            Part::Coded {
                codes: self.codes.split_off_mut(..blocks * BLOCK).unwrap_or_default(),
                absmax: self.absmax.split_off_mut(..blocks).unwrap_or_default(),
            }
        } else {
            Part::Exact(&mut self.exact.split_off_mut(..blocks * BLOCK).unwrap_or_default()[..len])
        }
    }
}

impl Blocks {
    /// The buffers cut into tasks that do not touch each other.
    pub(super) fn tasks<'a, const N: usize>(
        &self,
        mut p: &'a mut [f32],
        g: &'a [f32],
        mut states: [Slices<'a>; N],
    ) -> Vec<Task<'a, N>> {
        let mut tasks = Vec::new();
        for piece in &self.pieces {
            for start in piece.range.clone().step_by(TASK) {
                let len = TASK.min(piece.range.end - start);
                let states = states.each_mut().map(|state| state.take(piece.quantised, len));
                tasks.push(Task {
                    p: p.split_off_mut(..len).unwrap_or_default(),
                    g: &g[start..start + len],
                    decayed: piece.decayed,
                    states,
                });
            }
        }
        tasks
    }
}

/// A block of a state.
pub(super) struct Coded<'a> {
    codes: &'a mut [u8],
    absmax: &'a mut f32,
}

/// The blocks of a task's codes and scales.
pub(super) fn coded<'a>(codes: &'a mut [u8], absmax: &'a mut [f32]) -> impl Iterator<Item = Coded<'a>> {
    codes.chunks_mut(BLOCK).zip(absmax).map(|(codes, absmax)| Coded { codes, absmax })
}

impl Coded<'_> {
    /// Its first values.
    pub(super) fn decode(&self, map: DynamicMap, x: &mut [f32]) {
        decode(map.codebook().levels(), self.codes, *self.absmax, x);
    }

    /// Takes the codes and the absmax of `x`. A negative value has the code of a negative level even if its nearest is zero.
    pub(super) fn encode(self, map: DynamicMap, x: &mut [f32]) {
        *self.absmax = normalise(x);
        encode(Search::of(map), x, self.codes);
    }
}

multiversion! {
    fn decode(levels: &[f32; 256], codes: &[u8], absmax: f32, x: &mut [f32]) {
        for (x, &code) in x.iter_mut().zip(codes) {
            *x = levels[usize::from(code)] * absmax;
        }
    }
}

multiversion! {
    /// Divides by the largest magnitude, as the reference does it, and returns that; zeros stay zeros.
    fn normalise(x: &mut [f32]) -> f32 {
        let absmax = f32::from_bits(x.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0));
        let scale = 1.0 / absmax;
        if absmax > 0.0 && scale.is_finite() {
            for x in x {
                *x *= scale;
            }
        } else if absmax > 0.0 {
            for x in x {
                *x /= absmax;
            }
        }
        absmax
    }
}

multiversion! {
    fn encode(search: &Search, y: &[f32], codes: &mut [u8]) {
        let (shift, first, low_bits) = (search.shift, search.first, (1 << search.shift) - 1);
        for (code, y) in codes.iter_mut().zip(y) {
            #[allow(clippy::manual_clamp)] // what is no number becomes 1, and its key one of the table
            let bits = y.abs().min(1.0).max(LEAST).to_bits();
            let negative = y.to_bits() >> 31;
            let key = (bits >> shift) - first + negative * search.negative;
            let found = (search.entries[key as usize % KEYS] + (bits & low_bits)) >> shift;
            *code = (found ^ (negative * search.flip)) as u8;
        }
    }
}

/// Magnitudes below are nearest to 0.
const LEAST: f32 = f32::from_bits((127 - 23) << 23);
/// Room for the entries of either map: a power of two, for lookups without a check.
const KEYS: usize = 4096;
/// The signed map's code of 0.
const ZERO: u8 = 127;

/// The nearest code with one look into a table, as kernels do it too: `kernels/src/common/dynamic8.cuh` says how.
struct Search {
    /// Bits of a magnitude that are no part of the key.
    shift: u32,
    /// The key of [`LEAST`].
    first: u32,
    /// How much further the keys of negative values are, and what their codes differ in.
    negative: u32,
    flip: u32,
    used: usize,
    entries: [u32; KEYS],
}

impl Search {
    fn of(map: DynamicMap) -> &'static Self {
        static SEARCHES: [OnceLock<Search>; 2] = [const { OnceLock::new() }; 2];
        SEARCHES[usize::from(map == DynamicMap::Signed)].get_or_init(|| Self::new(map))
    }

    fn new(map: DynamicMap) -> Self {
        let book = map.codebook();
        let signed = map == DynamicMap::Signed;
        // Levels of the signed map lie twice as far apart.
        let shift = if signed { 17 } else { 16 };
        let mut found = entries(shift, |y| book.nearest(y));
        let negative = if signed { found.len() as u32 } else { 0 };
        if signed {
            found.extend(entries(shift, |y| 255 - book.nearest(-y).min(ZERO - 1)));
        }
        let mut entries = [0; KEYS];
        entries[..found.len()].copy_from_slice(&found);
        let flip = if signed { 0xff } else { 0 };
        Self { shift, first: LEAST.to_bits() >> shift, negative, flip, used: found.len(), entries }
    }
}

/// A map's tables for the kernels: its levels, then the entries of its search.
pub(super) fn tables(map: DynamicMap) -> Vec<u32> {
    let search = Search::of(map);
    map.codebook().levels().iter().map(|level| level.to_bits()).chain(search.entries[..search.used].iter().copied()).collect()
}

/// For each key, the leading bits of a magnitude from 2⁻²³ to 1: the code of its smallest magnitude above `shift` bits, and in
/// these the largest number less the low bits of the last magnitude with that code.
fn entries(shift: u32, code: impl Fn(f32) -> u8) -> Vec<u32> {
    let (first, last) = (LEAST.to_bits() >> shift, 1f32.to_bits() >> shift);
    let low_bits = (1u32 << shift) - 1;
    let entry = |key: u32| {
        let lowest = key << shift;
        let lower = code(f32::from_bits(lowest));
        let (mut inside, mut outside) = (0, low_bits + 1);
        // The last key is that of 1 alone.
        while outside - inside > 1 && key < last {
            let middle = u32::midpoint(inside, outside);
            if code(f32::from_bits(lowest + middle)) == lower {
                inside = middle;
            } else {
                outside = middle;
            }
        }
        let threshold = if key == last { low_bits } else { inside };
        u32::from(lower) << shift | (low_bits - threshold)
    };
    (first..=last).map(entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn coded_as(map: DynamicMap, x: &[f32]) -> (Vec<u8>, f32) {
        let (mut codes, mut absmax) = (vec![9; x.len()], 9.0);
        Coded { codes: &mut codes, absmax: &mut absmax }.encode(map, &mut x.to_vec());
        (codes, absmax)
    }

    #[test]
    fn the_search_finds_the_nearest_code_around_every_threshold_and_key() {
        for map in [DynamicMap::Signed, DynamicMap::Unsigned] {
            let book = map.codebook();
            let levels = book.levels();
            let mut points: Vec<f32> =
                levels.windows(2).map(|pair| (pair[0] + pair[1]) * 0.5).chain(levels.iter().copied()).collect();
            points.extend((0..24 << 7).map(|key| f32::from_bits((103 << 23) + (key << 16))).filter(|&y| y <= 1.0));
            for point in points {
                for y in [point.next_down(), point, point.next_up()].into_iter().flat_map(|y| [y, -y]) {
                    if !(-1.0..=1.0).contains(&y) || (map == DynamicMap::Unsigned && y.is_sign_negative()) {
                        continue;
                    }
                    let nearest = book.nearest(y);
                    let want = if y.is_sign_negative() { nearest.min(126) } else { nearest };
                    // With 1 beside it the absmax is 1.
                    assert_eq!(coded_as(map, &[y, 1.0]), (vec![want, 255], 1.0), "{map:?} {y:e}");
                }
            }
        }
    }

    #[test]
    fn a_negative_value_never_becomes_zero_and_a_block_of_zeros_stays_zeros() {
        assert_eq!(coded_as(DynamicMap::Signed, &[-1e-9, 1e-9, -1.0, 1.0]), (vec![126, 127, 0, 255], 1.0));
        for map in [DynamicMap::Signed, DynamicMap::Unsigned] {
            let (mut codes, mut absmax) = coded_as(map, &[0.0; 4]);
            assert_eq!(absmax, 0.0);
            let mut x = [1.0; 4];
            Coded { codes: &mut codes, absmax: &mut absmax }.decode(map, &mut x);
            assert_eq!(x, [0.0; 4]);
        }
        // 1 / absmax is infinite; a half lies nearest to level 183, 0.4973.
        assert_eq!(coded_as(DynamicMap::Unsigned, &[1e-40, 0.0, 5e-41]), (vec![255, 0, 183], 1e-40));
    }

    #[test]
    fn the_table_has_each_element_once() {
        let piece = |range, decayed, quantised| Piece { range, decayed, quantised };
        let pieces = [piece(0..5000, true, true), piece(5000..5300, false, false), piece(5300..9400, false, true)];
        let table = table(&pieces);
        let mut seen = vec![0; 9400];
        for (i, block) in table.as_chunks::<2>().0.iter().enumerate() {
            let (start, len) = (block[0] as usize, block[1] as usize & 0xffff);
            assert!(len <= BLOCK);
            seen[start..start + len].iter_mut().for_each(|n| *n += 1);
            let piece = pieces.iter().find(|piece| piece.range.contains(&start)).unwrap();
            assert_eq!((block[1] >> 31 == 1, i < 20 + 17), (piece.decayed, piece.quantised), "{start}");
        }
        assert!(seen.iter().all(|&n| n == 1));
    }
}
