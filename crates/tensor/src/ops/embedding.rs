//! Rows of a table by token id: y\[t\] = scale · table\[tokens\[t\]\].
//!
//! Backward: dtable\[v\] += scale · Σ over t with tokens\[t\] = v of dy\[t\], in the order of t. Saved for backward: tokens.
//!
//! Shapes: table [V, C], tokens U32 `[T]`, y and dy [T, C].

use super::typed;
use crate::{DType, Device, Error, Result, Tensor, TensorMut, dtype::with_float};

const OP: &str = "embedding";

/// y in `dtype`; `scale` is 1, or Gemma's √C.
///
/// # Errors
/// [`Error::TokenOutOfRange`], [`Error::Argument`] when `table` is not a matrix, [`Error::DType`], [`Error::OutOfMemory`].
pub fn forward(table: &Tensor, tokens: &Tensor, scale: f32, dtype: DType) -> Result<Tensor> {
    let &[vocab_size, channels] = table.dims() else {
        return Err(Error::Argument { op: OP, argument: "rank", expected: "2, for [V, C]", found: table.dims().len() });
    };
    check_tokens(tokens, vocab_size)?;
    let mut y = Tensor::empty(table.arena(), dtype, [tokens.numel(), channels])?;
    match table.device() {
        Device::Cpu => with_float!(table.dtype(), OP, "table", S => with_float!(dtype, OP, "dtype", E => {
            cpu::forward::<S, E>(table.as_slice()?, tokens.as_slice()?, scale, channels, y.as_mut_slice()?);
            Ok(())
        }))?,
        Device::Cuda(device) => cuda::forward(device, table, tokens, scale, &mut y)?,
    }
    Ok(y)
}

/// Adds to `dtable` (F32 [V, C]), the same bits for any number of threads.
///
/// # Errors
/// [`Error::TokenOutOfRange`], [`Error::Shape`], [`Error::DType`].
pub fn backward(dy: &Tensor, tokens: &Tensor, scale: f32, mut dtable: TensorMut<'_>) -> Result<()> {
    let channels = dy.shape().last();
    let vocab_size = dtable.shape().dims().first().copied().unwrap_or(0);
    dtable.expect_shape(OP, "dtable", [vocab_size, channels])?;
    check_tokens(tokens, vocab_size)?;
    dy.expect_shape(OP, "dy", [tokens.numel(), channels])?;
    match dy.device() {
        Device::Cpu => with_float!(dy.dtype(), OP, "dy", E => {
            let dtable = typed::slice_mut(OP, "dtable", &mut dtable)?;
            cpu::backward::<E>(dy.as_slice()?, tokens.as_slice()?, scale, channels, dtable);
            Ok(())
        }),
        Device::Cuda(device) => cuda::backward(device, dy, tokens, scale, &mut dtable),
    }
}

/// Checks the ids where they can be read without waiting: a GPU's are checked where they are made.
fn check_tokens(tokens: &Tensor, vocab_size: usize) -> Result<()> {
    typed::expect_dtype(OP, "tokens", tokens, DType::U32)?;
    tokens.expect_shape(OP, "tokens", [tokens.numel()])?;
    if tokens.device() != Device::Cpu {
        return Ok(());
    }
    let ids = tokens.as_slice::<u32>()?;
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        Some(position) => Err(Error::TokenOutOfRange { op: OP, position, id: i64::from(ids[position]), vocab_size }),
        None => Ok(()),
    }
}

mod cpu {
    use rayon::prelude::*;

    use crate::{Float, ops::simd::multiversion};

    pub(super) fn forward<S: Float, E: Float>(table: &[S], ids: &[u32], scale: f32, channels: usize, y: &mut [E]) {
        y.par_chunks_exact_mut(channels.max(1)).zip(ids).for_each(|(y, &id)| {
            let start = id as usize * channels;
            scaled_row(&table[start..start + channels], scale, y);
        });
    }

    multiversion! {
        fn scaled_row<S: Float, E: Float>(row: &[S], scale: f32, y: &mut [E]) {
            for (y, x) in y.iter_mut().zip(row) {
                *y = E::from_f32(x.to_f32() * scale);
            }
        }
    }

    /// Parallel over the rows of the table that occur: each is summed by one task, in the order of its positions.
    pub(super) fn backward<E: Float>(dy: &[E], ids: &[u32], scale: f32, channels: usize, dtable: &mut [f32]) {
        let mut order: Vec<u32> = (0..ids.len() as u32).collect();
        order.sort_unstable_by_key(|&t| (ids[t as usize], t));
        let mut rows = Vec::new();
        let (mut rest, mut first) = (dtable, 0);
        for group in order.chunk_by(|&a, &b| ids[a as usize] == ids[b as usize]) {
            let id = ids[group[0] as usize] as usize;
            let (row, after) = std::mem::take(&mut rest)[(id - first) * channels..].split_at_mut(channels);
            rows.push((row, group));
            (rest, first) = (after, id + 1);
        }
        rows.into_par_iter().for_each(|(row, group)| {
            for &t in group {
                let start = t as usize * channels;
                add_scaled(&dy[start..start + channels], scale, row);
            }
        });
    }

    multiversion! {
        fn add_scaled<E: Float>(x: &[E], scale: f32, sum: &mut [f32]) {
            for (sum, x) in sum.iter_mut().zip(x) {
                *sum += scale * x.to_f32();
            }
        }
    }
}

mod cuda {
    use super::OP;
    use crate::{
        Result, Tensor, TensorMut,
        cuda::{Arg, CudaDevice, Grid, suffix},
    };

    pub(super) fn forward(device: CudaDevice, table: &Tensor, tokens: &Tensor, scale: f32, y: &mut Tensor) -> Result<()> {
        let name = format!("embedding_fwd_{}_{}", suffix(OP, y.dtype())?, suffix(OP, table.dtype())?);
        let (rows, cols) = (y.dims()[0], y.dims()[1]);
        let args = [Arg::write(y)?, Arg::read(table)?, Arg::read(tokens)?, Arg::F32(scale), Arg::size(rows), Arg::size(cols)];
        device.launch(&name, Grid::new(rows, 128), &args)
    }

    pub(super) fn backward(
        device: CudaDevice,
        dy: &Tensor,
        tokens: &Tensor,
        scale: f32,
        dtable: &mut TensorMut<'_>,
    ) -> Result<()> {
        let (rows, cols) = (dy.shape().rows(), dy.shape().last());
        let args = [
            Arg::write_view(dtable)?,
            Arg::read(&dy.dense()?)?,
            Arg::read(tokens)?,
            Arg::F32(scale),
            Arg::size(rows),
            Arg::size(cols),
        ];
        device.launch(&format!("embedding_bwd_{}", suffix(OP, dy.dtype())?), Grid::new(rows, 128), &args)
    }
}

#[cfg(test)]
mod tests {
    use nibble_testkit::{UNIT_F32, assert_within, sizes, widen};
    use proptest::prelude::*;

    use super::*;
    use crate::ops::samples::{float, ids, normal, on_cpu, rounding, wide};

    fn tokens(seed: u64, t: usize, v: usize) -> Vec<u32> {
        (0..t as u64).map(|i| (crate::Rng::new(seed).bits(i) % v as u64) as u32).collect()
    }

    proptest! {
        #[test]
        fn forward_gathers_scaled_rows(
            [v, t, c] in sizes([40, 20, 70]), from in float(), to in float(), scale in prop_oneof![Just(1.0f32), Just(24.0)], seed in 0..1000u64,
        ) {
            let (table, at) = (normal(seed, from, [v, c]), tokens(seed, t, v));
            let y = forward(&table, &ids(&at), scale, to).unwrap();
            prop_assert_eq!((y.dtype(), y.dims()), (to, &[t, c][..]));
            let table = wide(&table);
            let want: Vec<f64> = (0..t * c).map(|i| table[at[i / c] as usize * c + i % c] * f64::from(scale)).collect();
            let exact = from == to && scale == 1.0;
            assert_within("y", &y.to_f32_vec().unwrap(), &want, |i| {
                if exact { 0.0 } else { rounding(to, want[i]) + want[i].abs() * UNIT_F32 }
            });
        }

        #[test]
        fn backward_scatters_and_adds([v, t, c] in sizes([40, 50, 40]), dtype in float(), seed in 0..1000u64) {
            let (dy, at) = (normal(seed, dtype, [t, c]), tokens(seed, t, v));
            let mut dtable = normal(seed + 1, DType::F32, [v, c]);
            let mut want = wide(&dtable);
            let mut size: Vec<f64> = want.iter().map(|x| x.abs()).collect();
            for (i, dy) in widen(&dy.to_f32_vec().unwrap()).into_iter().enumerate() {
                want[at[i / c] as usize * c + i % c] += 3.0 * dy;
                size[at[i / c] as usize * c + i % c] += 3.0 * dy.abs();
            }
            backward(&dy, &ids(&at), 3.0, dtable.view_mut().unwrap()).unwrap();
            assert_within("dtable", &dtable.to_f32_vec().unwrap(), &want, |i| size[i] * (t as f64 + 2.0) * UNIT_F32);
        }
    }

    #[test]
    fn ids_outside_the_vocabulary_are_refused_with_their_place() {
        // A GPU's are checked where they are made.
        if !on_cpu() {
            return;
        }
        let table = normal(1, DType::F32, [4, 2]);
        let error = forward(&table, &ids(&[3, 0, 4]), 1.0, DType::F32).unwrap_err();
        assert!(matches!(error, Error::TokenOutOfRange { position: 2, id: 4, vocab_size: 4, .. }), "{error}");
        let mut dtable = Tensor::zeros(table.arena(), DType::F32, [4, 2]).unwrap();
        assert!(backward(&normal(2, DType::F32, [1, 2]), &ids(&[4]), 1.0, dtable.view_mut().unwrap()).is_err());
        assert!(backward(&normal(2, DType::F32, [1, 3]), &ids(&[0]), 1.0, dtable.view_mut().unwrap()).is_err());
    }
}
