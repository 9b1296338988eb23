//! Root-mean-square normalisation over the last size, alone or after a residual sum.
//!
//! y = x · inv · (offset + w), inv = (mean(x²) + eps)^(−½) of each row (Zhang and Sennrich 2019).
//!
//! Backward, with g = offset + w and k = inv² · mean(dy · g · x): dx = inv · (dy · g − x · k), dw += Σ over rows dy · x · inv.
//!
//! Shapes: x, y, dx [.., C] (the leading sizes are rows: [T, C], or [T, H, D] with w `[D]` for the norm of heads), w `[C]`,
//! inv F32 `[rows]`. Saved for backward: x (after the residual sum) and inv.
//!
//! Rounding in 16-bit types is Llama's where offset = 0 (x · inv is rounded before it is multiplied by w), Gemma's elsewhere (one
//! rounding, at the end).

pub(super) mod cuda;

use super::typed;
use crate::{DType, Device, Result, Shape, Tensor, TensorMut, dtype::with_float};

const OP: &str = "rms_norm";

/// The constants of a norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Config {
    /// Added to the mean square.
    pub eps: f32,
    /// Added to the weight: 1 for Gemma, whose checkpoints hold w − 1, else 0.
    pub offset: f32,
}

/// (y, inv): y in the type of `x`, inv F32 \[rows\].
///
/// # Errors
/// [`crate::Error::Shape`] when `weight` is not \[C\], [`crate::Error::DType`] for integer tensors, [`crate::Error::OutOfMemory`].
pub fn forward(x: &Tensor, weight: &Tensor, config: Config) -> Result<(Tensor, Tensor)> {
    forward_with_room(x, weight, config, 0)
}

/// [`forward`], y with room for `room` elements behind its rows on a GPU; x [T, C] then.
///
/// # Errors
/// As [`forward`].
pub fn forward_with_room(x: &Tensor, weight: &Tensor, config: Config, room: usize) -> Result<(Tensor, Tensor)> {
    weight.expect_shape(OP, "weight", [x.shape().last()])?;
    let weight = typed::widened(OP, "weight", weight)?;
    let mut y = Tensor::with_room(x.arena(), x.dtype(), x.shape(), room)?;
    let mut inv = Tensor::empty(x.arena(), DType::F32, [x.shape().rows()])?;
    match x.device() {
        Device::Cpu => with_float!(x.dtype(), OP, "x", E => {
            cpu::forward::<E>(x.as_slice()?, weight.as_slice()?, config, y.as_mut_slice()?, inv.as_mut_slice()?);
            Ok(())
        })?,
        Device::Cuda(device) => cuda::forward(device, x, &weight, config, &mut y, &mut inv)?,
    }
    Ok((y, inv))
}

/// (r, y, inv) with r = x + a, rounded to their type, and y the norm of r. r is written over `a` if that is its only handle.
///
/// # Errors
/// As [`forward`], and when `a` differs from `x` in shape or type.
pub fn residual_forward(x: &Tensor, a: Tensor, weight: &Tensor, config: Config) -> Result<(Tensor, Tensor, Tensor)> {
    residual_forward_with_room(x, a, weight, config, 0)
}

/// [`residual_forward`], y with room for `room` elements behind its rows on a GPU; x [T, C] then.
///
/// # Errors
/// As [`residual_forward`].
pub fn residual_forward_with_room(
    x: &Tensor,
    a: Tensor,
    weight: &Tensor,
    config: Config,
    room: usize,
) -> Result<(Tensor, Tensor, Tensor)> {
    a.expect_shape(OP, "a", x.shape())?;
    typed::expect_dtype(OP, "a", &a, x.dtype())?;
    weight.expect_shape(OP, "weight", [x.shape().last()])?;
    let weight = typed::widened(OP, "weight", weight)?;
    let mut r = typed::writable(OP, "a", a)?;
    let mut y = Tensor::with_room(x.arena(), x.dtype(), x.shape(), room)?;
    let mut inv = Tensor::empty(x.arena(), DType::F32, [x.shape().rows()])?;
    match x.device() {
        Device::Cpu => with_float!(x.dtype(), OP, "x", E => {
            let (y, inv) = (y.as_mut_slice()?, inv.as_mut_slice()?);
            cpu::residual_forward::<E>(x.as_slice()?, r.as_mut_slice()?, weight.as_slice()?, config, y, inv);
            Ok(())
        })?,
        Device::Cuda(device) => cuda::residual_forward(device, x, &mut r, &weight, config, &mut y, &mut inv)?,
    }
    Ok((r, y, inv))
}

/// dx of [`forward`]; dw is added to `dweight` (F32 \[C\]), the same bits for any number of threads.
///
/// # Errors
/// [`crate::Error::Shape`] and [`crate::Error::DType`] when the operands do not fit each other, [`crate::Error::OutOfMemory`].
pub fn backward(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    inv_rms: &Tensor,
    config: Config,
    dweight: Option<TensorMut<'_>>,
) -> Result<Tensor> {
    backward_with_room(dy, x, weight, inv_rms, config, dweight, 0)
}

/// [`backward`], dx with room for `room` elements behind its rows on a GPU; x [T, C] then.
///
/// # Errors
/// As [`backward`].
pub fn backward_with_room(
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    inv_rms: &Tensor,
    config: Config,
    dweight: Option<TensorMut<'_>>,
    room: usize,
) -> Result<Tensor> {
    let dx = Tensor::with_room(x.arena(), x.dtype(), x.shape(), room)?;
    backward_into(dx, false, dy, x, weight, inv_rms, config, dweight)
}

/// dr + the norm's gradient: the gradient of `x` and of `a` in [`residual_forward`], written over `dr` if that is its only
/// handle. `dr` is the gradient of r from where else it is used.
///
/// # Errors
/// As [`backward`].
pub fn residual_backward(
    dr: Tensor,
    dy: &Tensor,
    r: &Tensor,
    weight: &Tensor,
    inv_rms: &Tensor,
    config: Config,
    dweight: Option<TensorMut<'_>>,
) -> Result<Tensor> {
    dr.expect_shape(OP, "dr", r.shape())?;
    typed::expect_dtype(OP, "dr", &dr, r.dtype())?;
    let dx = typed::writable(OP, "dr", dr)?;
    backward_into(dx, true, dy, r, weight, inv_rms, config, dweight)
}

fn backward_into(
    mut dx: Tensor,
    add: bool,
    dy: &Tensor,
    x: &Tensor,
    weight: &Tensor,
    inv: &Tensor,
    config: Config,
    mut dweight: Option<TensorMut<'_>>,
) -> Result<Tensor> {
    check_backward(dy, x, weight, inv, dweight.as_ref())?;
    let weight = typed::widened(OP, "weight", weight)?;
    if let Device::Cuda(device) = x.device() {
        cuda::backward(device, &mut dx, add, dy, x, &weight, inv, config, dweight)?;
        return Ok(dx);
    }
    let mut partials = match dweight {
        Some(_) => Some(Tensor::zeros(x.arena(), DType::F32, cpu::partials(x.shape()))?),
        None => None,
    };
    match x.device() {
        Device::Cpu => with_float!(x.dtype(), OP, "x", E => {
            let saved = cpu::Saved { x: x.as_slice::<E>()?, w: weight.as_slice()?, inv: inv.as_slice()?, offset: config.offset };
            let partials: &mut [f32] = partials.as_mut().map_or(Ok(&mut [][..]), Tensor::as_mut_slice)?;
            cpu::backward::<E>(dy.as_slice()?, saved, add, dx.as_mut_slice()?, partials);
            if let Some(dweight) = &mut dweight {
                cpu::add_rows(typed::slice_mut(OP, "dweight", dweight)?, partials);
            }
            Ok(())
        })?,
        Device::Cuda(_) => {}
    }
    Ok(dx)
}

fn check_backward(dy: &Tensor, x: &Tensor, weight: &Tensor, inv: &Tensor, dweight: Option<&TensorMut<'_>>) -> Result<()> {
    let channels: Shape = [x.shape().last()].into();
    dy.expect_shape(OP, "dy", x.shape())?;
    typed::expect_dtype(OP, "dy", dy, x.dtype())?;
    weight.expect_shape(OP, "weight", channels)?;
    inv.expect_shape(OP, "inv_rms", [x.shape().rows()])?;
    typed::expect_dtype(OP, "inv_rms", inv, DType::F32)?;
    dweight.map_or(Ok(()), |dweight| dweight.expect_shape(OP, "dweight", channels))
}

mod cpu {
    use rayon::prelude::*;

    use super::Config;
    use crate::{Float, Shape, ops::simd::multiversion};

    /// Elements that are worth a task of their own.
    const TASK: usize = 16_384;
    /// The most partial sums of dw.
    const PARTIALS: usize = 64;

    /// Lanes of a row's sums: four vectors of 512 bits, so that their additions overlap.
    const LANES: usize = 64;

    /// What [`backward`] reads beside dy.
    #[derive(Clone, Copy)]
    pub(super) struct Saved<'a, E> {
        pub(super) x: &'a [E],
        pub(super) w: &'a [f32],
        pub(super) inv: &'a [f32],
        pub(super) offset: f32,
    }

    /// Rows of a task: a function of the shape alone, so that the order of sums does not depend on the threads.
    fn task_rows(rows: usize, channels: usize) -> usize {
        TASK.div_ceil(channels.max(1)).max(rows.div_ceil(PARTIALS))
    }

    /// [tasks, C], for the partial sums of dw.
    pub(super) fn partials(x: Shape) -> Shape {
        [x.rows().div_ceil(task_rows(x.rows(), x.last())), x.last()].into()
    }

    pub(super) fn forward<E: Float>(x: &[E], w: &[f32], config: Config, y: &mut [E], inv: &mut [f32]) {
        let rows = task_rows(inv.len(), w.len());
        let size = rows * w.len().max(1);
        (y.par_chunks_mut(size), x.par_chunks(size), inv.par_chunks_mut(rows))
            .into_par_iter()
            .for_each(|(y, x, inv)| forward_rows(x, w, config, y, inv));
    }

    pub(super) fn residual_forward<E: Float>(x: &[E], r: &mut [E], w: &[f32], config: Config, y: &mut [E], inv: &mut [f32]) {
        let rows = task_rows(inv.len(), w.len());
        let size = rows * w.len().max(1);
        (y.par_chunks_mut(size), r.par_chunks_mut(size), x.par_chunks(size), inv.par_chunks_mut(rows))
            .into_par_iter()
            .for_each(|(y, r, x, inv)| residual_rows(x, r, w, config, y, inv));
    }

    multiversion! {
        fn forward_rows<E: Float>(x: &[E], w: &[f32], config: Config, y: &mut [E], inv: &mut [f32]) {
            for ((y, x), inv) in y.chunks_exact_mut(w.len()).zip(x.chunks_exact(w.len())).zip(inv) {
                *inv = norm_row(x, w, config, y);
            }
        }
    }

    multiversion! {
        fn residual_rows<E: Float>(x: &[E], r: &mut [E], w: &[f32], config: Config, y: &mut [E], inv: &mut [f32]) {
            let rows = y.chunks_exact_mut(w.len()).zip(r.chunks_exact_mut(w.len())).zip(x.chunks_exact(w.len()));
            for (((y, r), x), inv) in rows.zip(inv) {
                for (r, x) in r.iter_mut().zip(x) {
                    *r = E::from_f32(x.to_f32() + r.to_f32());
                }
                *inv = norm_row(r, w, config, y);
            }
        }
    }

    #[inline(always)]
    fn norm_row<E: Float>(x: &[E], w: &[f32], config: Config, y: &mut [E]) -> f32 {
        let inv = 1.0 / (sum_of_squares(x) / x.len() as f32 + config.eps).sqrt();
        if config.offset == 0.0 {
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = E::from_f32(E::from_f32(x.to_f32() * inv).to_f32() * w);
            }
        } else {
            for ((y, x), w) in y.iter_mut().zip(x).zip(w) {
                *y = E::from_f32(x.to_f32() * inv * (config.offset + w));
            }
        }
        inv
    }

    /// Σ x².
    #[inline(always)]
    fn sum_of_squares<E: Float>(x: &[E]) -> f32 {
        let mut lanes = [0.0; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            add_squares(&mut lanes, chunk);
        }
        add_squares(&mut lanes, rest);
        fold(lanes)
    }

    #[inline(always)]
    fn add_squares<E: Float>(lanes: &mut [f32; LANES], x: &[E]) {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane += x.to_f32() * x.to_f32();
        }
    }

    /// Σ dy · (offset + w) · x.
    #[inline(always)]
    fn dot<E: Float>(dy: &[E], x: &[E], w: &[f32], offset: f32) -> f32 {
        let mut lanes = [0.0; LANES];
        let ((dys, dy), (xs, x), (ws, w)) = (dy.as_chunks::<LANES>(), x.as_chunks::<LANES>(), w.as_chunks::<LANES>());
        for ((dy, x), w) in dys.iter().zip(xs).zip(ws) {
            add_products(&mut lanes, dy, x, w, offset);
        }
        add_products(&mut lanes, dy, x, w, offset);
        fold(lanes)
    }

    #[inline(always)]
    fn add_products<E: Float>(lanes: &mut [f32; LANES], dy: &[E], x: &[E], w: &[f32], offset: f32) {
        for (((lane, dy), x), w) in lanes.iter_mut().zip(dy).zip(x).zip(w) {
            *lane += dy.to_f32() * (offset + w) * x.to_f32();
        }
    }

    /// The sum of the lanes, by halves.
    #[inline(always)]
    fn fold(mut lanes: [f32; LANES]) -> f32 {
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                lanes[lane] += lanes[lane + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    /// dx (`+=` if `add`), and in `partials` [tasks, C], unless empty, the sums of dw over the rows of each task.
    pub(super) fn backward<E: Float>(dy: &[E], saved: Saved<'_, E>, add: bool, dx: &mut [E], partials: &mut [f32]) {
        let channels = saved.w.len().max(1);
        let rows = task_rows(saved.inv.len(), saved.w.len());
        let size = rows * channels;
        let tasks = (dx.par_chunks_mut(size), dy.par_chunks(size), saved.x.par_chunks(size), saved.inv.par_chunks(rows));
        if partials.is_empty() {
            tasks.into_par_iter().for_each(|(dx, dy, x, inv)| backward_rows(dy, Saved { x, inv, ..saved }, add, dx, &mut []));
        } else {
            tasks
                .into_par_iter()
                .zip(partials.par_chunks_mut(channels))
                .for_each(|((dx, dy, x, inv), dw)| backward_rows(dy, Saved { x, inv, ..saved }, add, dx, dw));
        }
    }

    multiversion! {
        fn backward_rows<E: Float>(dy: &[E], saved: Saved<'_, E>, add: bool, dx: &mut [E], dw: &mut [f32]) {
            let (n, offset) = (saved.w.len(), saved.offset);
            let rows = dx.chunks_exact_mut(n).zip(dy.chunks_exact(n)).zip(saved.x.chunks_exact(n)).zip(saved.inv);
            for (((dx, dy), x), &inv) in rows {
                let w = &saved.w[..x.len()];
                let k = inv * inv * (dot(dy, x, w, offset) / x.len() as f32);
                let rows = dx.iter_mut().zip(dy).zip(x).zip(w);
                if add {
                    for (((dx, dy), x), w) in rows {
                        *dx = E::from_f32(dx.to_f32() + inv * (dy.to_f32() * (offset + w) - x.to_f32() * k));
                    }
                } else {
                    for (((dx, dy), x), w) in rows {
                        *dx = E::from_f32(inv * (dy.to_f32() * (offset + w) - x.to_f32() * k));
                    }
                }
                for ((dw, dy), x) in dw.iter_mut().zip(dy).zip(x) {
                    *dw += dy.to_f32() * (x.to_f32() * inv);
                }
            }
        }
    }

    /// sum += each row of `rows`, in their order.
    pub(super) fn add_rows(sum: &mut [f32], rows: &[f32]) {
        for row in rows.chunks_exact(sum.len().max(1)) {
            for (sum, x) in sum.iter_mut().zip(row) {
                *sum += x;
            }
        }
    }
}

#[cfg(test)]
mod tests;
