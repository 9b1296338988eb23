//! Linear layers on a GPU: bases widened into a scratch matrix, products by cuBLASLt.
//!
//! Adapters whose matrices lie side by side in the flat buffer (q, k and v of a layer) are one matrix A [ΣR, K]: one product
//! gives the h of all, one the gradient dA of all.

use super::{Adapter, Dropout, OP, Part, PartGrads, Saved};
use crate::{
    DType, Result, Tensor, TensorMut, Weight,
    cuda::{Arg, CudaDevice, Gemm, Grid, Matrix, suffix},
    ops::dequantize,
};

/// Rows of a tensor as an operand.
fn rows(x: &Tensor) -> Result<Matrix> {
    Ok(Matrix { address: x.address()?, ld: x.shape().last(), transposed: false })
}

fn transposed(matrix: Matrix) -> Matrix {
    Matrix { transposed: true, ..matrix }
}

/// Columns `first ..` of a matrix of `size`-byte elements.
fn columns(matrix: Matrix, first: usize, dtype: DType) -> Matrix {
    Matrix { address: matrix.address + (first * dtype.size()) as u64, ..matrix }
}

/// The layers of one call, and what their products share.
struct Call<'a> {
    device: CudaDevice,
    x: &'a Tensor,
    parts: &'a [Part],
    dtype: DType,
    tokens: usize,
    inputs: usize,
}

/// The adapters' matrices in the type of the activations.
struct Adapters {
    /// A and B of each part that has an adapter.
    pairs: Vec<Option<(Tensor, Tensor)>>,
    /// Whether the A lie one after another, without dropout: then the first one's address is that of all.
    stacked: bool,
    /// First column of each part in h and t.
    offsets: Vec<usize>,
    /// ΣR.
    ranks: usize,
}

impl<'a> Call<'a> {
    fn new(device: CudaDevice, x: &'a Tensor, parts: &'a [Part]) -> Self {
        Self { device, x, parts, dtype: x.dtype(), tokens: x.shape().rows(), inputs: x.shape().last() }
    }

    fn adapters(&self) -> Result<Adapters> {
        let mut adapters = Adapters { pairs: Vec::new(), stacked: true, offsets: Vec::new(), ranks: 0 };
        let mut next = None;
        for part in self.parts {
            adapters.offsets.push(adapters.ranks);
            let Some(adapter) = &part.adapter else {
                adapters.pairs.push(None);
                continue;
            };
            let (a, b) = (adapter.a.to_dtype(self.dtype)?, adapter.b.to_dtype(self.dtype)?);
            let address = a.address()?;
            // Copies made here may come to lie side by side by chance; results must not depend on that.
            let in_place = adapter.a.dtype() == self.dtype;
            adapters.stacked &= in_place && adapter.dropout.is_none() && next.is_none_or(|next| next == address);
            next = Some(address + (a.numel() * self.dtype.size()) as u64);
            adapters.ranks += a.dims()[0];
            adapters.pairs.push(Some((a, b)));
        }
        Ok(adapters)
    }

    /// A product into `c`, in the activations' type.
    fn gemm(&self, [m, n, k]: [usize; 3], a: Matrix, b: Matrix, c: Matrix, alpha: f32, accumulate: bool) -> Result<()> {
        let (input, output) = (self.dtype, self.dtype);
        self.device.gemm(&Gemm { m, n, k, a, b, c: c.address, ldc: c.ld, alpha, accumulate, bias: None, input, output })
    }

    /// c += alpha aᵀ b over the tokens, in f32.
    fn add_gradient(&self, [m, n]: [usize; 2], a: Matrix, b: Matrix, c: u64, alpha: f32) -> Result<()> {
        let (k, accumulate, bias) = (self.tokens, true, None);
        let (input, output) = (self.dtype, DType::F32);
        self.device.gemm(&Gemm { m, n, k, a: transposed(a), b, c, ldc: n, alpha, accumulate, bias, input, output })
    }

    /// x with the dropout of `adapter`.
    fn dropped(&self, adapter: &Adapter) -> Result<Option<Tensor>> {
        let Some(dropout) = adapter.dropout else { return Ok(None) };
        let mut out = Tensor::empty(self.x.arena(), self.dtype, self.x.shape())?;
        let name = format!("dropout_{}", suffix(OP, self.dtype)?);
        let args = [Arg::write(&mut out)?, Arg::read(self.x)?];
        self.mask(&name, args, self.x.numel(), dropout)?;
        Ok(Some(out))
    }

    fn mask(&self, name: &str, tensors: [Arg; 2], n: usize, dropout: Dropout) -> Result<()> {
        let (root, path, depth) = dropout.rng.parts();
        let key = Arg::Pointer(self.device.dropout_root(root)?);
        let rest = [key, Arg::U64(path), Arg::U32(depth), Arg::F32(dropout.p), Arg::U64(n as u64)];
        let each = 512 * 16 / self.dtype.size();
        self.device.launch(name, Grid::over(n, each, 256), &[&tensors[..], &rest].concat())
    }
}

pub(super) fn forward(device: CudaDevice, x: &Tensor, parts: &[Part]) -> Result<(Vec<Tensor>, Saved)> {
    let call = Call::new(device, x, parts);
    let adapters = call.adapters()?;
    let h = match adapters.ranks {
        0 => None,
        ranks => Some(Tensor::empty(x.arena(), x.dtype(), [call.tokens, ranks])?),
    };
    if let Some(h) = &h {
        call.adapter_inputs(&adapters, rows(h)?)?;
    }
    let mut ys = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let y = Tensor::empty(x.arena(), x.dtype(), [call.tokens, part.outputs()])?;
        let bias = part.bias.as_ref().map(|bias| bias.to_dtype(x.dtype())).transpose()?;
        let weight = Widened::new(device, &part.weight, x.dtype(), x)?;
        device.gemm(&Gemm {
            m: call.tokens,
            n: part.outputs(),
            k: call.inputs,
            a: rows(x)?,
            b: transposed(weight.matrix()?),
            c: y.address()?,
            ldc: part.outputs(),
            alpha: 1.0,
            accumulate: false,
            bias: bias.as_ref().map(Tensor::address).transpose()?,
            input: x.dtype(),
            output: x.dtype(),
        })?;
        if let (Some(h), Some(adapter), Some((_, b))) = (&h, &part.adapter, &adapters.pairs[i]) {
            let sizes = [call.tokens, part.outputs(), b.shape().last()];
            let h = columns(rows(h)?, adapters.offsets[i], x.dtype());
            call.gemm(sizes, h, transposed(rows(b)?), rows(&y)?, adapter.scale, true)?;
        }
        ys.push(y);
    }
    Ok((ys, Saved(h.into_iter().map(Some).collect())))
}

pub(super) fn backward(
    device: CudaDevice,
    dys: &[Tensor],
    x: &Tensor,
    saved: &Saved,
    parts: &[Part],
    mut grads: Vec<PartGrads<'_>>,
    want_dx: bool,
) -> Result<Option<Tensor>> {
    let call = Call::new(device, x, parts);
    let adapters = call.adapters()?;
    let h = saved.0.first().and_then(Option::as_ref);
    let t = match adapters.ranks {
        0 => None,
        ranks => Some(Tensor::empty(x.arena(), x.dtype(), [call.tokens, ranks])?),
    };
    for (i, (part, dy)) in parts.iter().zip(dys).enumerate() {
        if let Some(dweight) = &mut grads[i].weight {
            call.add_gradient([part.outputs(), call.inputs], rows(dy)?, rows(x)?, dweight.address()?, 1.0)?;
        }
        if let Some(dbias) = &mut grads[i].bias {
            bias_gradient(device, dbias, dy)?;
        }
        let (Some(t), Some(adapter), Some((_, b))) = (&t, &part.adapter, &adapters.pairs[i]) else { continue };
        let rank = b.shape().last();
        let t = columns(rows(t)?, adapters.offsets[i], x.dtype());
        call.gemm([call.tokens, rank, part.outputs()], rows(dy)?, rows(b)?, t, adapter.scale, false)?;
        if let (Some((_, db)), Some(h)) = (&mut grads[i].adapter, h) {
            let h = columns(rows(h)?, adapters.offsets[i], x.dtype());
            call.add_gradient([part.outputs(), rank], rows(dy)?, h, db.address()?, adapter.scale)?;
        }
    }
    if let Some(t) = &t {
        call.add_a_gradients(&adapters, rows(t)?, &mut grads)?;
    }
    if !want_dx {
        return Ok(None);
    }
    call.input_gradient(dys, &adapters, t.as_ref()).map(Some)
}

impl Call<'_> {
    /// h = dropout(x) Aᵀ of all parts, side by side.
    fn adapter_inputs(&self, adapters: &Adapters, h: Matrix) -> Result<()> {
        let first = adapters.pairs.iter().flatten().next();
        if let (true, Some((a, _))) = (adapters.stacked, first) {
            let sizes = [self.tokens, adapters.ranks, self.inputs];
            return self.gemm(sizes, rows(self.x)?, transposed(rows(a)?), h, 1.0, false);
        }
        for ((part, pair), offset) in self.parts.iter().zip(&adapters.pairs).zip(&adapters.offsets) {
            let (Some(adapter), Some((a, _))) = (&part.adapter, pair) else { continue };
            let dropped = self.dropped(adapter)?;
            let x = rows(dropped.as_ref().unwrap_or(self.x))?;
            let sizes = [self.tokens, a.dims()[0], self.inputs];
            self.gemm(sizes, x, transposed(rows(a)?), columns(h, *offset, self.dtype), 1.0, false)?;
        }
        Ok(())
    }

    /// dA += tᵀ dropout(x).
    fn add_a_gradients(&self, adapters: &Adapters, t: Matrix, grads: &mut [PartGrads<'_>]) -> Result<()> {
        let mut addresses = Vec::new();
        for (i, grads) in grads.iter_mut().enumerate() {
            if let (Some((da, _)), Some((a, _))) = (&mut grads.adapter, &adapters.pairs[i]) {
                addresses.push((i, da.address()?, a.dims()[0]));
            }
        }
        let side_by_side = addresses.windows(2).all(|pair| pair[0].1 + (pair[0].2 * self.inputs * 4) as u64 == pair[1].1);
        let all = addresses.iter().map(|(_, _, rank)| rank).sum::<usize>() == adapters.ranks;
        if let (true, Some((_, da, _))) = (adapters.stacked && side_by_side && all, addresses.first()) {
            return self.add_gradient([adapters.ranks, self.inputs], t, rows(self.x)?, *da, 1.0);
        }
        for (i, da, rank) in addresses {
            let Some(adapter) = &self.parts[i].adapter else { continue };
            let dropped = self.dropped(adapter)?;
            let x = rows(dropped.as_ref().unwrap_or(self.x))?;
            self.add_gradient([rank, self.inputs], columns(t, adapters.offsets[i], self.dtype), x, da, 1.0)?;
        }
        Ok(())
    }

    /// dx = Σ dy W + dropout'(t A).
    fn input_gradient(&self, dys: &[Tensor], adapters: &Adapters, t: Option<&Tensor>) -> Result<Tensor> {
        let mut dx = Tensor::empty(self.x.arena(), self.dtype, self.x.shape())?;
        for (i, (part, dy)) in self.parts.iter().zip(dys).enumerate() {
            let weight = Widened::new(self.device, &part.weight, self.dtype, self.x)?;
            let sizes = [self.tokens, self.inputs, part.outputs()];
            self.gemm(sizes, rows(dy)?, weight.matrix()?, rows(&dx)?, 1.0, i > 0)?;
        }
        let Some(t) = t else { return Ok(dx) };
        let first = adapters.pairs.iter().flatten().next();
        if let (true, Some((a, _))) = (adapters.stacked, first) {
            self.gemm([self.tokens, self.inputs, adapters.ranks], rows(t)?, rows(a)?, rows(&dx)?, 1.0, true)?;
            return Ok(dx);
        }
        for ((part, pair), offset) in self.parts.iter().zip(&adapters.pairs).zip(&adapters.offsets) {
            let (Some(adapter), Some((a, _))) = (&part.adapter, pair) else { continue };
            let (sizes, t) = ([self.tokens, self.inputs, a.dims()[0]], columns(rows(t)?, *offset, self.dtype));
            let Some(dropout) = adapter.dropout else {
                self.gemm(sizes, t, rows(a)?, rows(&dx)?, 1.0, true)?;
                continue;
            };
            let through = Tensor::empty(self.x.arena(), self.dtype, self.x.shape())?;
            self.gemm(sizes, t, rows(a)?, rows(&through)?, 1.0, false)?;
            let name = format!("add_dropped_{}", suffix(OP, self.dtype)?);
            let args = [Arg::write(&mut dx)?, Arg::read(&through)?];
            self.mask(&name, args, dx.numel(), dropout)?;
        }
        Ok(dx)
    }
}

/// A base in the activations' type: its own memory, or a scratch matrix that goes back when this drops.
struct Widened(Tensor);

impl Widened {
    fn new(device: CudaDevice, weight: &Weight, dtype: DType, like: &Tensor) -> Result<Self> {
        Ok(Self(match weight {
            Weight::Dense(dense) => dense.to_dtype(dtype)?,
            _ => dequantize::cuda::matrix(device, weight, dtype, like.arena())?,
        }))
    }

    fn matrix(&self) -> Result<Matrix> {
        rows(&self.0)
    }
}

/// dbias += Σ over rows of dy, in two passes where there are many rows.
fn bias_gradient(device: CudaDevice, dbias: &mut TensorMut<'_>, dy: &Tensor) -> Result<()> {
    let (rows, cols) = (dy.shape().rows(), dy.shape().last());
    let wide = cols.div_ceil(32 * 16 / dy.dtype().size());
    let shares = if rows < 64 { 1 } else { (4 * device.info().multiprocessors).div_ceil(wide).min(64) };
    let mut partials = Tensor::empty(dy.arena(), DType::F32, [shares, cols])?;
    let args =
        [Arg::write_view(dbias)?, Arg::write(&mut partials)?, Arg::read(dy)?, Arg::size(rows), Arg::size(cols)];
    let grid = Grid { blocks: [wide as u32, shares as u32, 1], threads: [32, 8], shared: 0 };
    device.launch(&format!("bias_grad_{}", suffix(OP, dy.dtype())?), grid, &args)?;
    if shares == 1 {
        return Ok(());
    }
    let args = [Arg::write_view(dbias)?, Arg::read(&partials)?, Arg::size(shares), Arg::size(cols)];
    device.launch("bias_grad_sum", Grid { blocks: [cols.div_ceil(32) as u32, 1, 1], threads: [32, 16], shared: 0 }, &args)
}
