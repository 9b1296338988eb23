//! Adafactor (Shazeer and Stern 2018) over a flat buffer of matrices, as transformers does it with `relative_step` and
//! `scale_parameter` off.
//!
//! For a matrix of R rows and C columns, with g = grad_scale · grad and β = 1 − t^decay_rate:
//!
//! ```text
//! row_i = β row_i + (1 − β) mean_j (g_ij² + eps)
//! col_j = β col_j + (1 − β) mean_i (g_ij² + eps)
//! u_ij  = g_ij / √(row_i / mean row) / √col_j
//! p     = p · (1 − lr · weight_decay) − lr / max(1, rms(u) / clip_threshold) · u
//! ```
//!
//! A vector is a matrix of one row, whose factor is 1: col is its mean square. Not differentiable: there is no backward.
//!
//! Shapes: params and grads F32 \[len\], row and col F32 \[all rows\], \[all columns\]. Moves 12 bytes an element, and the gradients twice
//! more, which a GPU's cache holds meanwhile.

mod tiles;

use super::{step as steps, typed};
use crate::{Arena, DType, Device, Error, Result, Tensor, TensorMut};

const OP: &str = "adafactor";

/// The constants of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Learning rate.
    pub lr: f64,
    /// Added to squared gradients.
    pub eps: f64,
    /// The root mean square that an update is cut down to.
    pub clip_threshold: f64,
    /// Exponent of the running means' decay, below 0.
    pub decay_rate: f64,
    /// Decay of the parameters, times the learning rate.
    pub weight_decay: f64,
    /// t, from 1.
    pub step: u32,
}

impl Hyper {
    fn beta(&self) -> f64 {
        1.0 - f64::from(self.step).powf(self.decay_rate)
    }

    /// The values that a GPU's kernels read ([`steps`]), with gradients multiplied by `grad_scale`.
    #[must_use]
    pub fn values(&self, grad_scale: f32) -> [f32; steps::LEN] {
        let mut values = steps::start(self.lr, self.weight_decay, grad_scale);
        values[steps::BETA2] = self.beta() as f32;
        values
    }
}

/// A matrix of the flat buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Whether it decays.
    pub decayed: bool,
}

/// The matrices of a flat buffer, which follow each other without a gap.
#[derive(Debug)]
pub struct Matrices {
    all: Vec<Matrix>,
    /// Sums over all: elements, rows, columns.
    len: usize,
    rows: usize,
    cols: usize,
    device: Option<DeviceTables>,
}

/// What a GPU reads and writes beside the buffers: `kernels/src/adafactor.cu`.
#[derive(Debug)]
struct DeviceTables {
    /// U32 `[12 n]`, one entry a matrix.
    matrices: Tensor,
    /// U32 `[2 items]`, in the order of the work.
    items: Tensor,
    /// F32: factors of the matrices, sums of their tiles.
    scratch: Tensor,
    /// U32 `[2 + 4 n]`, zeros between launches.
    sync: Tensor,
}

impl Matrices {
    /// Prepares `all`, which must not be empty matrices.
    ///
    /// # Errors
    /// [`Error::Argument`] beyond 2³² elements, [`Error::OutOfMemory`].
    pub fn new(arena: &Arena, all: Vec<Matrix>) -> Result<Self> {
        let sum = |of: fn(&Matrix) -> usize| all.iter().map(of).sum::<usize>();
        let (len, rows, cols) = (sum(|matrix| matrix.rows * matrix.cols), sum(|matrix| matrix.rows), sum(|matrix| matrix.cols));
        if len > u32::MAX as usize {
            return Err(Error::Argument { op: OP, argument: "len", expected: "below 2^32", found: len });
        }
        let device = match arena.device() {
            Device::Cpu => None,
            Device::Cuda(_) => Some(DeviceTables::new(arena, &all)?),
        };
        Ok(Self { all, len, rows, cols, device })
    }

    fn check(&self, params: &TensorMut<'_>, grads: &Tensor, row: &TensorMut<'_>, col: &TensorMut<'_>) -> Result<()> {
        typed::expect_dtype(OP, "grads", grads, DType::F32)?;
        params.expect_shape(OP, "params", [self.len])?;
        grads.expect_shape(OP, "grads", [self.len])?;
        row.expect_shape(OP, "row", [self.rows])?;
        col.expect_shape(OP, "col", [self.cols])
    }
}

/// One step; `row` and `col` (zero before the first) are the running means.
///
/// # Errors
/// [`crate::Error::Shape`] when the shapes do not fit `matrices`, [`crate::Error::DType`] unless all are F32.
pub fn step(
    mut params: TensorMut<'_>,
    grads: &Tensor,
    mut row: TensorMut<'_>,
    mut col: TensorMut<'_>,
    matrices: &Matrices,
    grad_scale: f32,
    hyper: &Hyper,
) -> Result<()> {
    matrices.check(&params, grads, &row, &col)?;
    match grads.device() {
        Device::Cpu => {
            let p = typed::slice_mut(OP, "params", &mut params)?;
            let (row, col) = (typed::slice_mut(OP, "row", &mut row)?, typed::slice_mut(OP, "col", &mut col)?);
            cpu::step(p, grads.as_slice()?, row, col, &matrices.all, grad_scale, hyper);
            Ok(())
        }
        Device::Cuda(_) => {
            let values = Tensor::from_slice(grads.arena(), &hyper.values(grad_scale), [steps::LEN])?;
            captured_step(params, grads, row, col, matrices, &values, hyper)
        }
    }
}

/// One step on a GPU whose learning rate, decay and clipping factor are read from `values` ([`Hyper::values`]) when it runs; see
/// [`super::adamw::captured_step`].
///
/// # Errors
/// As [`step`]; [`Error::Argument`] on the CPU.
pub fn captured_step(
    params: TensorMut<'_>,
    grads: &Tensor,
    row: TensorMut<'_>,
    col: TensorMut<'_>,
    matrices: &Matrices,
    values: &Tensor,
    hyper: &Hyper,
) -> Result<()> {
    matrices.check(&params, grads, &row, &col)?;
    match (grads.device(), &matrices.device) {
        (Device::Cuda(device), Some(tables)) => cuda::step(device, params, grads, [row, col], tables, values, hyper),
        _ => Err(Error::Argument { op: OP, argument: "device", expected: "a GPU", found: 0 }),
    }
}

mod cpu {
    use rayon::prelude::*;

    use super::{Hyper, Matrix};

    pub(super) fn step(
        mut p: &mut [f32],
        mut g: &[f32],
        mut row: &mut [f32],
        mut col: &mut [f32],
        matrices: &[Matrix],
        grad_scale: f32,
        hyper: &Hyper,
    ) {
        let tasks: Vec<_> = matrices
            .iter()
            .map(|matrix| {
                let len = matrix.rows * matrix.cols;
                let p = p.split_off_mut(..len).unwrap_or_default();
                let g = g.split_off(..len).unwrap_or_default();
                let row = row.split_off_mut(..matrix.rows).unwrap_or_default();
                (matrix, p, g, row, col.split_off_mut(..matrix.cols).unwrap_or_default())
            })
            .collect();
        tasks.into_par_iter().for_each(|(matrix, p, g, row, col)| update(matrix, p, g, row, col, grad_scale, hyper));
    }

    /// Sums are in f64: their order does not matter then.
    fn update(matrix: &Matrix, p: &mut [f32], g: &[f32], row: &mut [f32], col: &mut [f32], grad_scale: f32, hyper: &Hyper) {
        let (rows, cols) = (matrix.rows as f64, matrix.cols as f64);
        let (beta, eps) = (hyper.beta() as f32, hyper.eps as f32);
        let square = |g: f32| f64::from((g * grad_scale) * (g * grad_scale) + eps);
        let mix = |mean: &mut f32, sum: f64, n: f64| *mean = beta * *mean + (1.0 - beta) * (sum / n) as f32;
        let mut columns = vec![0.0f64; matrix.cols];
        for (row, g) in row.iter_mut().zip(g.chunks_exact(matrix.cols)) {
            let mut sum = 0.0;
            for (column, &g) in columns.iter_mut().zip(g) {
                sum += square(g);
                *column += square(g);
            }
            mix(row, sum, cols);
        }
        col.iter_mut().zip(columns).for_each(|(col, sum)| mix(col, sum, rows));
        let mean = (row.iter().map(|&row| f64::from(row)).sum::<f64>() / rows) as f32;
        let roots: Vec<f32> = col.iter().map(|col| 1.0 / col.sqrt()).collect();
        // u of a row, by its own factor.
        let scale = |row: f32| grad_scale / (row / mean).sqrt();
        let squares: f64 = row
            .iter()
            .zip(g.chunks_exact(matrix.cols))
            .map(|(&row, g)| {
                let scale = scale(row);
                g.iter().zip(&roots).map(|(g, root)| f64::from(scale * g * root).powi(2)).sum::<f64>()
            })
            .sum();
        let rms = (squares / (rows * cols)).sqrt();
        let size = (hyper.lr / (rms / hyper.clip_threshold).max(1.0)) as f32;
        let keep = if matrix.decayed { (1.0 - hyper.lr * hyper.weight_decay) as f32 } else { 1.0 };
        for ((p, g), &row) in p.chunks_exact_mut(matrix.cols).zip(g.chunks_exact(matrix.cols)).zip(&*row) {
            let scale = size * scale(row);
            for ((p, g), root) in p.iter_mut().zip(g).zip(&roots) {
                *p = *p * keep - scale * g * root;
            }
        }
    }
}

impl DeviceTables {
    fn new(arena: &Arena, all: &[Matrix]) -> Result<Self> {
        let (words, scratch) = tiles::words(all);
        let items = tiles::items(all);
        let device = |words: &[u32]| Tensor::from_slice(arena, words, [words.len()]);
        Ok(Self {
            matrices: device(&words)?,
            items: device(&items)?,
            scratch: Tensor::zeros(arena, DType::F32, [scratch])?,
            sync: Tensor::zeros(arena, DType::U32, [2 + 4 * all.len()])?,
        })
    }
}

mod cuda {
    use super::{DeviceTables, Hyper};
    use crate::{
        Result, Tensor, TensorMut,
        cuda::{Arg, CudaDevice, Grid},
    };

    /// Scratch and counters are the launch's own between its beginning and its end: launches of one stream follow each other.
    pub(super) fn step(
        device: CudaDevice,
        mut params: TensorMut<'_>,
        grads: &Tensor,
        [mut row, mut col]: [TensorMut<'_>; 2],
        tables: &DeviceTables,
        values: &Tensor,
        hyper: &Hyper,
    ) -> Result<()> {
        let DeviceTables { matrices, items, scratch, sync } = tables;
        let count = (sync.numel() - 2) / 4;
        let args = [
            Arg::write_view(&mut params)?,
            Arg::write_view(&mut row)?,
            Arg::write_view(&mut col)?,
            Arg::read(scratch)?,
            Arg::read(sync)?,
            Arg::read(grads)?,
            Arg::read(values)?,
            Arg::read(matrices)?,
            Arg::read(items)?,
            Arg::size(count),
            Arg::F32(hyper.eps as f32),
            Arg::F32(hyper.clip_threshold as f32),
        ];
        device.launch("adafactor_step", Grid::new(items.numel() / 2, 256), &args)
    }
}

#[cfg(test)]
mod tests {
    use nibble_testkit::{UNIT_F32, assert_within};

    use super::*;
    use crate::ops::samples::{normal, wide};

    const HYPER: Hyper = Hyper { lr: 0.1, eps: 1e-30, clip_threshold: 1.0, decay_rate: -0.8, weight_decay: 0.01, step: 1 };

    /// p, row and col of one matrix after a step, in f64.
    fn reference(p: &mut [f64], g: &[f64], row: &mut [f64], col: &mut [f64], h: &Hyper, decayed: bool) {
        let (rows, cols, beta) = (row.len(), col.len(), h.beta());
        let square = |i: usize, j: usize| g[i * cols + j].powi(2) + h.eps;
        for (i, row) in row.iter_mut().enumerate() {
            *row = beta * *row + (1.0 - beta) * (0..cols).map(|j| square(i, j)).sum::<f64>() / cols as f64;
        }
        for (j, col) in col.iter_mut().enumerate() {
            *col = beta * *col + (1.0 - beta) * (0..rows).map(|i| square(i, j)).sum::<f64>() / rows as f64;
        }
        let mean = row.iter().sum::<f64>() / rows as f64;
        let u: Vec<f64> = (0..g.len()).map(|n| g[n] / (row[n / cols] / mean).sqrt() / col[n % cols].sqrt()).collect();
        let rms = (u.iter().map(|u| u * u).sum::<f64>() / g.len() as f64).sqrt();
        for (p, u) in p.iter_mut().zip(u) {
            *p = *p * if decayed { 1.0 - h.lr * h.weight_decay } else { 1.0 } - h.lr / (rms / h.clip_threshold).max(1.0) * u;
        }
    }

    /// Within a tile, longer than one in either size, and rows that cannot be read 16 bytes at a time.
    const SIZES: [(usize, usize, bool); 7] =
        [(7, 33, true), (1, 5, false), (20, 1, true), (64, 320, true), (600, 64, true), (3, 1101, false), (70, 257, true)];

    /// p, row and col after four steps, each beside its reference.
    fn four_steps() -> [(Tensor, Vec<f64>); 3] {
        let all = SIZES.map(|(rows, cols, decayed)| Matrix { rows, cols, decayed });
        let sum = |of: fn(&Matrix) -> usize| all.iter().map(of).sum::<usize>();
        let (n, rows, cols) = (sum(|m| m.rows * m.cols), sum(|m| m.rows), sum(|m| m.cols));
        let mut p = normal(1, DType::F32, [n]);
        let matrices = Matrices::new(p.arena(), all.to_vec()).unwrap();
        let zeros = |len: usize| Tensor::zeros(p.arena(), DType::F32, [len]).unwrap();
        let (mut row, mut col) = (zeros(rows), zeros(cols));
        let (mut p64, mut row64, mut col64) = (wide(&p), vec![0.0; rows], vec![0.0; cols]);
        for t in 1..5 {
            let (g, hyper) = (normal(t + 5, DType::F32, [n]), Hyper { step: t as u32, ..HYPER });
            step(p.view_mut().unwrap(), &g, row.view_mut().unwrap(), col.view_mut().unwrap(), &matrices, 0.25, &hyper).unwrap();
            let g64: Vec<f64> = wide(&g).iter().map(|g| g * 0.25).collect();
            let (mut at, mut r, mut c) = (0, 0, 0);
            for Matrix { rows, cols, decayed } in all {
                let here = at..at + rows * cols;
                let (row, col) = (&mut row64[r..r + rows], &mut col64[c..c + cols]);
                reference(&mut p64[here.clone()], &g64[here], row, col, &hyper, decayed);
                (at, r, c) = (at + rows * cols, r + rows, c + cols);
            }
        }
        [(p, p64), (row, row64), (col, col64)]
    }

    #[test]
    fn steps_follow_the_formula_for_matrices_and_vectors() {
        let [(p, p64), (row, row64), (col, col64)] = four_steps();
        assert_within("row", &row.to_f32_vec().unwrap(), &row64, |i| 20.0 * UNIT_F32 * row64[i]);
        assert_within("col", &col.to_f32_vec().unwrap(), &col64, |i| 20.0 * UNIT_F32 * col64[i]);
        // An update is at most a few times the learning rate.
        assert_within("p", &p.to_f32_vec().unwrap(), &p64, |i| UNIT_F32 * (8.0 * p64[i].abs() + 40.0));
    }

    #[test]
    fn steps_are_the_same_bits_again() {
        let bits =
            || four_steps().map(|(found, _)| found.to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>());
        assert_eq!(bits(), bits());
    }

    #[test]
    fn buffers_that_do_not_fit_are_named() {
        let [mut p, g, mut row, mut col] = [6, 6, 3, 2].map(|n| normal(1, DType::F32, [n]));
        let matrices = Matrices::new(p.arena(), vec![Matrix { rows: 2, cols: 3, decayed: true }]).unwrap();
        let states = (row.view_mut().unwrap(), col.view_mut().unwrap());
        let error = step(p.view_mut().unwrap(), &g, states.0, states.1, &matrices, 1.0, &HYPER).unwrap_err();
        assert_eq!(error.to_string(), "adafactor: `row` has the wrong shape: expected (2,), found (3,)");
    }
}
