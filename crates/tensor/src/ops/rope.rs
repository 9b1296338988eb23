//! Rotary position embedding in the half-split layout (`rotate_half` of the reference stack; Su et al. 2021).
//!
//! Of each head the first 2h of D dimensions are rotated in pairs (i, h + i) by the angle θ = position · inv_freq\[i\]:
//! y\[i\] = x\[i\] cos θ − x\[h + i\] sin θ, y\[h + i\] = x\[h + i\] cos θ + x\[i\] sin θ; the other dimensions stay.
//! cos and sin carry the attention factor (YaRN), so the rotated part is scaled by it.
//!
//! Backward: the transpose, a rotation by −θ. Saved for backward: positions and table only.
//!
//! Shapes: x, y [T, H, D], positions U32 `[T]`, table F32 [P, h].

use super::typed;
use crate::{Arena, DType, Device, Error, Owner, Result, Tensor, dtype::with_float};

const OP: &str = "rope";

/// cos and sin of the angles of P positions, times the attention factor.
#[derive(Clone, Debug)]
pub struct RopeTable {
    /// F32 [P, h].
    pub cos: Tensor,
    /// F32 [P, h].
    pub sin: Tensor,
}

impl RopeTable {
    /// A table of `positions` rows. The angle position · inv_freq is rounded to f32, as the reference stack's.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn new(arena: &Arena, inv_freq: &[f32], attention_factor: f32, positions: usize) -> Result<Self> {
        let shape = [positions, inv_freq.len()];
        let _scope = arena.scope(Owner::Other);
        if matches!(arena.device(), Device::Cuda(device) if device.is_dry()) {
            let [cos, sin] = [Tensor::empty(arena, DType::F32, shape)?, Tensor::empty(arena, DType::F32, shape)?];
            return Ok(Self { cos, sin });
        }
        let angles = (0..positions).flat_map(|position| inv_freq.iter().map(move |f| position as f32 * f));
        let (sin, cos): (Vec<f32>, Vec<f32>) = angles
            .map(|angle| {
                let (sin, cos) = f64::from(angle).sin_cos();
                (sin as f32 * attention_factor, cos as f32 * attention_factor)
            })
            .unzip();
        Ok(Self { cos: Tensor::from_slice(arena, &cos, shape)?, sin: Tensor::from_slice(arena, &sin, shape)? })
    }

    /// P: positions from 0 to P − 1 can be embedded.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.cos.dims().first().copied().unwrap_or(0)
    }
}

/// y, written over `x` if that is its only handle.
///
/// # Errors
/// [`Error::Argument`] for a position beyond the table or a head smaller than what is rotated, [`Error::Shape`] and
/// [`Error::DType`] when the operands do not fit, [`Error::OutOfMemory`].
pub fn forward(x: Tensor, positions: &Tensor, table: &RopeTable) -> Result<Tensor> {
    rotate("x", x, positions, table, 1.0)
}

/// dx of [`forward`], written over `dy` if that is its only handle.
///
/// # Errors
/// As [`forward`].
pub fn backward(dy: Tensor, positions: &Tensor, table: &RopeTable) -> Result<Tensor> {
    rotate("dy", dy, positions, table, -1.0)
}

fn rotate(name: &'static str, x: Tensor, positions: &Tensor, table: &RopeTable, direction: f32) -> Result<Tensor> {
    check(name, &x, positions, table)?;
    let (heads, size) = (x.dims()[1], x.dims()[2]);
    let mut y = typed::writable(OP, name, x)?;
    match y.device() {
        Device::Cpu => with_float!(y.dtype(), OP, name, E => {
            let rotation = cpu::Rotation {
                positions: positions.as_slice()?,
                cos: table.cos.as_slice()?,
                sin: table.sin.as_slice()?,
                half: table.cos.shape().last(),
                direction,
            };
            cpu::rotate::<E>(y.as_mut_slice()?, heads * size, size, rotation);
            Ok(())
        })?,
        Device::Cuda(device) => cuda::rotate(device, &mut y, positions, table, direction < 0.0)?,
    }
    Ok(y)
}

pub(super) fn check(name: &'static str, x: &Tensor, positions: &Tensor, table: &RopeTable) -> Result<()> {
    let &[tokens, _, size] = x.dims() else {
        return Err(Error::Argument { op: OP, argument: "rank", expected: "3, for [T, H, D]", found: x.dims().len() });
    };
    positions.expect_shape(OP, "positions", [tokens])?;
    table.sin.expect_shape(OP, "sin", table.cos.shape())?;
    typed::expect_dtype(OP, "cos", &table.cos, DType::F32)?;
    typed::expect_dtype(OP, "sin", &table.sin, DType::F32)?;
    if size < 2 * table.cos.shape().last() {
        return Err(Error::Argument {
            op: OP,
            argument: name,
            expected: "heads of at least twice the table's width",
            found: size,
        });
    }
    typed::expect_dtype(OP, "positions", positions, DType::U32)?;
    // On a GPU they are checked where they are made: reading them here would wait for the device.
    if positions.device() != Device::Cpu {
        return Ok(());
    }
    let last = typed::slice::<u32>(OP, "positions", positions)?.iter().copied().max().unwrap_or(0) as usize;
    if tokens > 0 && last >= table.positions() {
        return Err(Error::Argument {
            op: OP,
            argument: "positions",
            expected: "below the table's number of positions",
            found: last,
        });
    }
    Ok(())
}

mod cpu {
    use rayon::prelude::*;

    use crate::{Float, ops::simd::multiversion};

    /// Elements that are worth a task of their own.
    const TASK: usize = 16_384;

    #[derive(Clone, Copy)]
    pub(super) struct Rotation<'a> {
        pub(super) positions: &'a [u32],
        pub(super) cos: &'a [f32],
        pub(super) sin: &'a [f32],
        pub(super) half: usize,
        pub(super) direction: f32,
    }

    /// Rotates the heads of `size` in tokens of `token` elements.
    pub(super) fn rotate<E: Float>(x: &mut [E], token: usize, size: usize, rotation: Rotation<'_>) {
        let tokens = TASK.div_ceil(token.max(1));
        x.par_chunks_mut((tokens * token).max(1))
            .zip(rotation.positions.par_chunks(tokens))
            .for_each(|(x, positions)| rotate_tokens(x, token, size, Rotation { positions, ..rotation }));
    }

    #[inline(always)]
    fn rotate_pairs<E: Float>(first: &mut [E], second: &mut [E], cos: &[f32], sin: &[f32], direction: f32) {
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            let (x, y, sin) = (a.to_f32(), b.to_f32(), direction * sin);
            *a = E::from_f32(x * cos - y * sin);
            *b = E::from_f32(y * cos + x * sin);
        }
    }

    multiversion! {
        fn rotate_tokens<E: Float>(x: &mut [E], token: usize, size: usize, rotation: Rotation<'_>) {
            let half = rotation.half;
            for (x, &position) in x.chunks_exact_mut(token).zip(rotation.positions) {
                let start = position as usize * half;
                let (cos, sin) = (&rotation.cos[start..start + half], &rotation.sin[start..start + half]);
                for head in x.chunks_exact_mut(size) {
                    let (first, rest) = head.split_at_mut(half);
                    rotate_pairs(first, &mut rest[..half], cos, sin, rotation.direction);
                }
            }
        }
    }
}

mod cuda {
    use super::{OP, RopeTable};
    use crate::{
        Result, Tensor,
        cuda::{Arg, CudaDevice, Grid, suffix},
    };

    pub(super) fn rotate(
        device: CudaDevice,
        y: &mut Tensor,
        positions: &Tensor,
        table: &RopeTable,
        backward: bool,
    ) -> Result<()> {
        let (tokens, heads, size, half) = (y.dims()[0], y.dims()[1], y.dims()[2], table.cos.shape().last());
        let pack = 16 / y.dtype().size();
        let lanes = if half.is_multiple_of(pack) && size.is_multiple_of(pack) { half / pack } else { half }.clamp(1, 64);
        let threads = [lanes as u32, (64 / lanes).min(heads.div_ceil(2)).max(1) as u32];
        let (address, ld) = y.rows_address_mut()?;
        let args = [
            Arg::Pointer(address),
            Arg::read(positions)?,
            Arg::read(&table.cos)?,
            Arg::read(&table.sin)?,
            Arg::size(tokens),
            Arg::size(heads),
            Arg::size(size),
            Arg::size(half),
            Arg::size(ld),
            Arg::U32(backward.into()),
        ];
        let grid = Grid { blocks: [tokens as u32, 1, 1], threads, shared: 0 };
        device.launch(&format!("rope_{}", suffix(OP, y.dtype())?), grid, &args)
    }
}

#[cfg(test)]
mod tests {
    use nibble_testkit::{UNIT_F32, assert_within, central_difference, reference, relative_error, sizes, weighted_sum};
    use proptest::prelude::*;

    use super::*;
    use crate::ops::samples::{arena, float, ids, normal, on_cpu, rounding, wide};

    const POSITIONS: usize = 64;

    fn frequencies(half: usize) -> Vec<f32> {
        (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect()
    }

    fn table(half: usize, factor: f32) -> RopeTable {
        RopeTable::new(&arena(), &frequencies(half), factor, POSITIONS).unwrap()
    }

    fn positions(seed: u32, tokens: usize) -> Vec<u32> {
        (0..tokens as u32).map(|t| (t * 29 + seed) % POSITIONS as u32).collect()
    }

    fn expected(x: &[f64], [heads, size, half]: [usize; 3], positions: &[u32]) -> Vec<f64> {
        let frequencies: Vec<f64> = frequencies(half).into_iter().map(f64::from).collect();
        reference::rope(x, heads, size, positions, &frequencies)
    }

    proptest! {
        #[test]
        fn forward_is_the_formula(
            [t, h, half, rest] in sizes([9, 4, 40, 9]), dtype in float(), seed in 0..1000u32, factor in prop_oneof![Just(1.0f32), Just(1.25)],
        ) {
            let size = 2 * half + rest - 1;
            let x = normal(u64::from(seed), dtype, [t, h, size]);
            let (before, at) = (wide(&x), positions(seed, t));
            let y = forward(x, &ids(&at), &table(half, factor)).unwrap();
            let mut want = expected(&before, [h, size, half], &at);
            for (i, y) in want.iter_mut().enumerate() {
                *y *= if i % size < 2 * half { f64::from(factor) } else { 1.0 };
            }
            // The angle is rounded to f32, and the pair is as long as its larger part.
            let pair = |i: usize| {
                let (row, d) = (i / size * size, i % size);
                if d < 2 * half { before[row + d % half].abs() + before[row + half + d % half].abs() } else { 0.0 }
            };
            assert_within("y", &y.to_f32_vec().unwrap(), &want, |i| {
                2.0 * pair(i) * (POSITIONS as f64 + 4.0) * UNIT_F32 + rounding(dtype, want[i])
            });
        }

        #[test]
        fn backward_undoes_forward([t, h, half] in sizes([9, 4, 40]), seed in 0..1000u32) {
            let x = normal(u64::from(seed), DType::F32, [t, h, 2 * half]);
            let (before, at, table) = (wide(&x), ids(&positions(seed, t)), table(half, 1.0));
            let back = backward(forward(x, &at, &table).unwrap(), &at, &table).unwrap();
            assert_within("x", &back.to_f32_vec().unwrap(), &before, |_| 60.0 * UNIT_F32);
        }
    }

    #[test]
    fn backward_is_the_central_difference() {
        let (shape, at) = ([2, 5, 2], [7, 63, 0]);
        let (x, dy) = (normal(1, DType::F32, [3, 2, 5]), normal(2, DType::F32, [3, 2, 5]));
        let weights = wide(&dy);
        let dx = backward(dy, &ids(&at), &table(2, 1.0)).unwrap();
        let numeric = central_difference(|x| weighted_sum(&weights, &expected(x, shape, &at)), &wide(&x));
        assert!(relative_error(&wide(&dx), &numeric) < 1e-5);
    }

    #[test]
    fn position_zero_changes_nothing_and_the_caller_keeps_a_shared_tensor() {
        let x = normal(1, DType::Bf16, [2, 3, 8]);
        let y = forward(x.clone(), &ids(&[0, 5]), &table(4, 1.0)).unwrap();
        assert_eq!(y.to_f32_vec().unwrap()[..24], x.to_f32_vec().unwrap()[..24]);
        assert_ne!(y.to_f32_vec().unwrap()[24..], x.to_f32_vec().unwrap()[24..]);
    }

    #[test]
    fn positions_beyond_the_table_and_small_heads_are_refused() {
        let error = |shape: [usize; 3], at: &[u32]| {
            forward(normal(1, DType::F32, shape), &ids(at), &table(4, 1.0)).unwrap_err().to_string()
        };
        // A GPU's positions are checked where they are made.
        if on_cpu() {
            assert_eq!(error([2, 1, 8], &[0, 64]), "rope: `positions` must be below the table's number of positions, found 64");
        }
        assert_eq!(error([1, 1, 7], &[0]), "rope: `x` must be heads of at least twice the table's width, found 7");
        assert_eq!(error([2, 1, 8], &[0]), "rope: `positions` has the wrong shape: expected (2,), found (1,)");
    }
}
