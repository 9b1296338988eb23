//! Linear layers on a GPU: bases widened into a scratch matrix, products by cuBLASLt.
//!
//! Adapters whose A lie side by side in the flat buffer (q, k and v of a layer) are one matrix A [ΣR, K]: one product gives the h
//! of all, one the gradient dA of all. Where the output is the wider side, y = [x | h] [W | s B]ᵀ is
//! one product over K + ΣR columns, for which x is copied beside h; elsewhere y += h Bᵀ reads and writes y once more. Likewise dx = [dy | t] [W ; A] for the narrowest part, else dx += t A.
//! On Hopper, x Aᵀ and tᵀ x are kernels of our own (`hopper`).

mod call;
mod hopper;

use call::{Call, columns, rows, transposed};

use super::{OP, Part, PartGrads, Saved};
use crate::{
    DType, Result, Tensor, TensorMut,
    cuda::{Arg, CudaDevice, Gemm, Grid, Matrix, suffix},
    ops::{
        dequantize::cuda::{matrix, product_of_few, widened},
        typed::scratch,
    },
};

pub(super) fn forward(device: CudaDevice, x: &Tensor, parts: &[Part]) -> Result<(Vec<Tensor>, Saved)> {
    let call = Call::new(device, x, parts)?;
    let outputs: usize = parts.iter().map(Part::outputs).sum();
    let together = call.inputs <= outputs && parts.iter().all(|part| call.rides(part));
    let h = match call.ranks {
        0 => None,
        ranks => Some(Tensor::empty(x.arena(), x.dtype(), [call.tokens, ranks])?),
    };
    let beside = match &h {
        Some(h) if together => Some(call.beside(h)?),
        Some(h) => {
            call.adapter_inputs(rows(h)?)?;
            None
        }
        None => None,
    };
    let mut ys = Vec::with_capacity(parts.len());
    for (i, part) in parts.iter().enumerate() {
        let mut y = Tensor::empty(x.arena(), x.dtype(), [call.tokens, part.outputs()])?;
        if let Some(beside) = &beside {
            call.product_beside(beside, i, &y)?;
        } else {
            call.base_product(part, &mut y)?;
            if let (Some(h), Some(adapter), Some((_, b))) = (&h, &part.adapter, &call.pairs[i]) {
                let sizes = [call.tokens, part.outputs(), b.shape().last()];
                let h = columns(rows(h)?, call.offsets[i], x.dtype());
                call.gemm(sizes, h, transposed(rows(b)?), rows(&y)?, adapter.scale, true)?;
            }
        }
        ys.push(y);
    }
    Ok((ys, Saved(h.into_iter().map(Some).collect())))
}

/// h alone.
pub(super) fn forward_unread(device: CudaDevice, x: &Tensor, parts: &[Part]) -> Result<Saved> {
    let call = Call::new(device, x, parts)?;
    if call.ranks == 0 {
        return Ok(Saved(Vec::new()));
    }
    let h = Tensor::empty(x.arena(), x.dtype(), [call.tokens, call.ranks])?;
    call.adapter_inputs(rows(&h)?)?;
    Ok(Saved(vec![Some(h)]))
}

pub(super) fn backward(
    device: CudaDevice,
    dys: &[Tensor],
    x: Tensor,
    saved: &Saved,
    parts: &[Part],
    mut grads: Vec<PartGrads<'_>>,
    want_dx: bool,
) -> Result<Option<Tensor>> {
    let call = Call::new(device, &x, parts)?;
    let h = saved.0.first().and_then(Option::as_ref);
    let t = match call.ranks {
        0 => None,
        ranks => Some(Tensor::empty(x.arena(), x.dtype(), [call.tokens, ranks])?),
    };
    for (i, (part, dy)) in parts.iter().zip(dys).enumerate() {
        if let Some(dweight) = &mut grads[i].weight {
            call.add_gradient([part.outputs(), call.inputs], rows(dy)?, rows(&x)?, dweight.address()?, 1.0)?;
        }
        if let Some(dbias) = &mut grads[i].bias {
            bias_gradient(device, dbias, dy)?;
        }
        if let (Some(t), Some(h)) = (&t, h) {
            call.adapter_gradients(i, dy, h, t, grads[i].adapter.as_mut().map(|(_, db)| db))?;
        }
    }
    if let Some(t) = &t {
        call.add_a_gradients(rows(t)?, &mut grads)?;
    }
    if !want_dx {
        return Ok(None);
    }
    let call = call.without_input();
    drop(x);
    call.input_gradient(dys, t.as_ref()).map(Some)
}

impl Call<'_, '_> {
    /// y = x Wᵀ + bias.
    fn base_product(&self, part: &Part, y: &mut Tensor) -> Result<()> {
        let bias = part.bias.as_ref().map(|bias| bias.to_dtype(self.dtype)).transpose()?;
        if product_of_few(self.device, self.x()?, &part.weight, bias.as_ref(), y)? {
            return Ok(());
        }
        let weight = matrix(self.device, &part.weight, self.dtype, &self.arena)?;
        self.biased_product(part, y, rows(self.x()?)?, rows(&weight)?, self.inputs)
    }

    /// y = a bᵀ + bias of the part, over `k` columns.
    fn biased_product(&self, part: &Part, y: &Tensor, a: Matrix, b: Matrix, k: usize) -> Result<()> {
        let bias = part.bias.as_ref().map(|bias| bias.to_dtype(self.dtype)).transpose()?;
        self.device.gemm(&Gemm {
            m: self.tokens,
            n: part.outputs(),
            k,
            a,
            b: transposed(b),
            c: y.address()?,
            ldc: part.outputs(),
            alpha: 1.0,
            accumulate: false,
            bias: bias.as_ref().map(Tensor::address).transpose()?,
            input: self.dtype,
            output: self.dtype,
        })
    }

    /// [x | h] [T, K + ΣR] with h = x Aᵀ, which is also left in `h`.
    fn beside(&self, h: &Tensor) -> Result<Tensor> {
        self.adapter_inputs(rows(h)?)?;
        let beside = scratch(&self.arena, self.dtype, [self.tokens, self.inputs + self.ranks])?;
        self.copy(rows(&beside)?, rows(self.x()?)?, self.inputs)?;
        self.copy(columns(rows(&beside)?, self.inputs, self.dtype), rows(h)?, self.ranks)?;
        Ok(beside)
    }

    /// y = [x | h] [W | 0 s B 0]ᵀ + bias for one part.
    fn product_beside(&self, beside: &Tensor, i: usize, y: &Tensor) -> Result<()> {
        let part = &self.parts[i];
        let weight = widened(self.device, &part.weight, self.dtype, &self.arena, [0, self.ranks])?;
        let (n, width) = (part.outputs(), self.inputs + self.ranks);
        let b = self.pairs[i].as_ref().map(|(_, b)| b);
        let args = [
            Arg::Pointer(columns(rows(&weight)?, self.inputs, self.dtype).address),
            Arg::read_or_none(b)?,
            Arg::F32(part.adapter.as_ref().map_or(0.0, |adapter| adapter.scale)),
            Arg::size(n),
            Arg::size(b.map_or(0, |b| b.shape().last())),
            Arg::size(self.offsets[i]),
            Arg::size(self.ranks),
            Arg::size(width),
        ];
        let grid = Grid::over(n * self.ranks, 256, 256);
        self.device.launch(&format!("place_columns_{}", suffix(OP, self.dtype)?), grid, &args)?;
        self.biased_product(part, y, rows(beside)?, rows(&weight)?, width)
    }

    /// h = dropout(x) Aᵀ of all parts, side by side.
    fn adapter_inputs(&self, h: Matrix) -> Result<()> {
        if let Some(a) = self.all_a()? {
            if hopper::adapter_inputs(self, a, h)? {
                return Ok(());
            }
            return self.gemm([self.tokens, self.ranks, self.inputs], rows(self.x()?)?, transposed(a), h, 1.0, false);
        }
        for ((part, pair), offset) in self.parts.iter().zip(&self.pairs).zip(&self.offsets) {
            let (Some(adapter), Some((a, _))) = (&part.adapter, pair) else { continue };
            let dropped = self.dropped(adapter)?;
            let x = rows(dropped.as_ref().unwrap_or(self.x()?))?;
            let sizes = [self.tokens, a.dims()[0], self.inputs];
            self.gemm(sizes, x, transposed(rows(a)?), columns(h, *offset, self.dtype), 1.0, false)?;
        }
        Ok(())
    }

    /// t = s dy B of one part, and dB += s dyᵀ h.
    fn adapter_gradients(&self, i: usize, dy: &Tensor, h: &Tensor, t: &Tensor, db: Option<&mut TensorMut<'_>>) -> Result<()> {
        let (Some(adapter), Some((_, b))) = (&self.parts[i].adapter, &self.pairs[i]) else { return Ok(()) };
        let (outputs, rank) = (b.dims()[0], b.shape().last());
        let (h, t) = (columns(rows(h)?, self.offsets[i], self.dtype), columns(rows(t)?, self.offsets[i], self.dtype));
        match db {
            Some(db) if self.dtype != DType::F32 && rank <= 16 && outputs >= 4096 && self.tokens >= 1024 => {
                self.one_pass(dy, b, [h, t], adapter.scale, db)
            }
            db => {
                self.gemm([self.tokens, rank, outputs], rows(dy)?, rows(b)?, t, adapter.scale, false)?;
                db.map_or(Ok(()), |db| self.add_gradient([outputs, rank], rows(dy)?, h, db.address()?, adapter.scale))
            }
        }
    }

    /// t and dB from one reading of dy, in shares of the rows that are added up in order.
    fn one_pass(&self, dy: &Tensor, b: &Tensor, [h, t]: [Matrix; 2], scale: f32, db: &mut TensorMut<'_>) -> Result<()> {
        let (outputs, rank) = (b.dims()[0], b.shape().last());
        let (wide, deep) = (outputs.div_ceil(512), rank.div_ceil(16));
        let most = (2 * self.device.info().multiprocessors / (wide * deep)).max(1);
        let shares = most.min(self.tokens.div_ceil(16));
        let sums = 16 * deep * (wide * self.tokens + shares * outputs);
        let mut partials = Tensor::empty(dy.arena(), DType::F32, [sums])?;
        let suffix = suffix(OP, self.dtype)?;
        let sizes = [Arg::size(self.tokens), Arg::size(outputs), Arg::size(rank)];
        let inputs = [Arg::read(dy)?, Arg::read(b)?, Arg::Pointer(h.address)];
        let pitches = [Arg::size(outputs), Arg::size(h.ld)];
        let args = [&[Arg::write(&mut partials)?][..], &inputs, &sizes, &pitches].concat();
        let grid = Grid { shared: 58_880, ..Grid::new(shares * wide * deep, 128) };
        self.device.launch(&format!("lora_t_db_{suffix}"), grid, &args)?;
        let outputs_of = [Arg::Pointer(t.address), Arg::write_view(db)?, Arg::read(&partials)?, Arg::F32(scale)];
        let args = [&outputs_of[..], &sizes, &[Arg::size(t.ld), Arg::size(shares)]].concat();
        let grid = Grid::over((self.tokens + outputs) * deep, 16, 256);
        self.device.launch(&format!("lora_t_db_sum_{suffix}"), grid, &args)
    }

    /// dA += tᵀ dropout(x).
    fn add_a_gradients(&self, t: Matrix, grads: &mut [PartGrads<'_>]) -> Result<()> {
        let mut addresses = Vec::new();
        for (i, grads) in grads.iter_mut().enumerate() {
            if let (Some((da, _)), Some((a, _))) = (&mut grads.adapter, &self.pairs[i]) {
                addresses.push((i, da.address()?, a.dims()[0]));
            }
        }
        let side_by_side = addresses.windows(2).all(|pair| pair[0].1 + (pair[0].2 * self.inputs * 4) as u64 == pair[1].1);
        let all = addresses.iter().map(|(_, _, rank)| rank).sum::<usize>() == self.ranks;
        if let (true, Some((_, da, _))) = (self.stacked && side_by_side && all, addresses.first()) {
            if hopper::add_a_gradient(self, t, *da)? {
                return Ok(());
            }
            return self.add_gradient([self.ranks, self.inputs], t, rows(self.x()?)?, *da, 1.0);
        }
        for (i, da, rank) in addresses {
            let Some(adapter) = &self.parts[i].adapter else { continue };
            let dropped = self.dropped(adapter)?;
            let x = rows(dropped.as_ref().unwrap_or(self.x()?))?;
            self.add_gradient([rank, self.inputs], columns(t, self.offsets[i], self.dtype), x, da, 1.0)?;
        }
        Ok(())
    }

    /// dx = Σ dy W + dropout'(t A).
    fn input_gradient(&self, dys: &[Tensor], t: Option<&Tensor>) -> Result<Tensor> {
        let dx = Tensor::empty(&self.arena, self.dtype, self.shape)?;
        let narrowest = (0..dys.len()).min_by_key(|&i| self.parts[i].outputs()).unwrap_or(0);
        let narrow = self.parts.get(narrowest).filter(|part| self.rides(part) && part.outputs() <= self.inputs);
        let rider = narrow.and(t).map(|_| narrowest);
        for (i, (part, dy)) in self.parts.iter().zip(dys).enumerate() {
            if let (Some(t), true) = (t, rider == Some(i)) {
                self.gradient_beside(part, dy, t, &dx, i > 0)?;
                continue;
            }
            let weight = matrix(self.device, &part.weight, self.dtype, &self.arena)?;
            let sizes = [self.tokens, self.inputs, part.outputs()];
            self.gemm(sizes, rows(dy)?, rows(&weight)?, rows(&dx)?, 1.0, i > 0)?;
        }
        match t {
            Some(t) if rider.is_none() => self.add_adapters(t, dx),
            _ => Ok(dx),
        }
    }

    /// dx (+)= [dy | t] [W ; A] with the t and A of all parts.
    fn gradient_beside(&self, part: &Part, dy: &Tensor, t: &Tensor, dx: &Tensor, accumulate: bool) -> Result<()> {
        let (outputs, Some(a)) = (part.outputs(), self.all_a()?) else { return Ok(()) };
        let width = outputs + self.ranks;
        let beside = scratch(dy.arena(), self.dtype, [self.tokens, width])?;
        self.copy(rows(&beside)?, rows(dy)?, outputs)?;
        self.copy(columns(rows(&beside)?, outputs, self.dtype), rows(t)?, self.ranks)?;
        let weight = widened(self.device, &part.weight, self.dtype, &self.arena, [self.ranks, 0])?;
        let size = self.dtype.size();
        let below = weight.address()? + (outputs * self.inputs * size) as u64;
        self.device.copy(below, a.address, self.ranks * self.inputs * size)?;
        self.gemm([self.tokens, self.inputs, width], rows(&beside)?, rows(&weight)?, rows(dx)?, 1.0, accumulate)
    }

    /// dx += dropout'(t A).
    fn add_adapters(&self, t: &Tensor, mut dx: Tensor) -> Result<Tensor> {
        if let Some(a) = self.all_a()? {
            self.gemm([self.tokens, self.inputs, self.ranks], rows(t)?, a, rows(&dx)?, 1.0, true)?;
            return Ok(dx);
        }
        for ((part, pair), offset) in self.parts.iter().zip(&self.pairs).zip(&self.offsets) {
            let (Some(adapter), Some((a, _))) = (&part.adapter, pair) else { continue };
            let (sizes, t) = ([self.tokens, self.inputs, a.dims()[0]], columns(rows(t)?, *offset, self.dtype));
            let Some(dropout) = adapter.dropout else {
                self.gemm(sizes, t, rows(a)?, rows(&dx)?, 1.0, true)?;
                continue;
            };
            let through = Tensor::empty(&self.arena, self.dtype, self.shape)?;
            self.gemm(sizes, t, rows(a)?, rows(&through)?, 1.0, false)?;
            let name = format!("add_dropped_{}", suffix(OP, self.dtype)?);
            let args = [Arg::write(&mut dx)?, Arg::read(&through)?];
            self.mask(&name, &args, dx.numel(), dropout)?;
        }
        Ok(dx)
    }
}

/// dbias += Σ over rows of dy, in two passes where there are many rows.
fn bias_gradient(device: CudaDevice, dbias: &mut TensorMut<'_>, dy: &Tensor) -> Result<()> {
    let (rows, cols) = (dy.shape().rows(), dy.shape().last());
    let wide = cols.div_ceil(32 * 16 / dy.dtype().size());
    let shares = if rows < 64 { 1 } else { (8 * device.info().multiprocessors).div_ceil(wide).min(64) };
    let mut partials = Tensor::empty(dy.arena(), DType::F32, [shares, cols])?;
    let args = [Arg::write_view(dbias)?, Arg::write(&mut partials)?, Arg::read(dy)?, Arg::size(rows), Arg::size(cols)];
    let grid = Grid { blocks: [wide as u32, shares as u32, 1], threads: [32, 8], shared: 0 };
    device.launch(&format!("bias_grad_{}", suffix(OP, dy.dtype())?), grid, &args)?;
    if shares == 1 {
        return Ok(());
    }
    let args = [Arg::write_view(dbias)?, Arg::read(&partials)?, Arg::size(shares), Arg::size(cols)];
    device.launch("bias_grad_sum", Grid { blocks: [cols.div_ceil(32) as u32, 1, 1], threads: [32, 16], shared: 0 }, &args)
}
