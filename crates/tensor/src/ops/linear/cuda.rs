//! Linear layers on a GPU: bases widened into a scratch matrix, products by a kernel of our own on Hopper or by cuBLASLt.
//!
//! Adapters whose A lie side by side in the flat buffer (q, k and v of a layer) are one matrix A [ΣR, K]: one product gives the h
//! of all, one the gradient dA of all. Where the output is the wider side, y = [x | h] [W | s B]ᵀ is
//! one product over K + ΣR columns, for which h is written behind x where there is room and x is
//! copied where not; elsewhere (short streams, odd ranks, dense bases) the two are summed in f32 and rounded once. Likewise
//! dx = [dy | t] [W ; A] for the narrowest part, else dx += t A; where the dy of all parts lie side by side (q, k and v behind
//! attention, gate and up behind the gated unit), dx = [dy dy' … | t] [W ; W' ; … ; A], one product for all.
//! The gated unit behind gate and up, and its gradients, may be done in the ends of products (`gated`).
//! On Hopper, x Aᵀ and tᵀ x are kernels of our own (`hopper`), and t and dB of all parts one (`adapters`).

mod adapters;
mod behind;
mod call;
mod few;
mod gated;
mod hopper;
mod weights;

use std::ops::Range;

pub(super) use behind::{behind_gate, behind_norm};
use call::{Call, columns, rows, transposed};
pub(super) use gated::{backward_gated, forward_gated, serves_gated_gradients};

use super::{OP, Part, PartGrads, Saved};
use crate::{
    DType, Result, Shape, Tensor, TensorMut, ahead,
    cuda::{Arg, CudaDevice, Gemm, Grid, Matrix, suffix},
    ops::{dequantize::cuda::product_of_few, typed::scratch},
};

pub(super) fn forward(device: CudaDevice, x: &Tensor, parts: &[Part], room: usize) -> Result<(Vec<Tensor>, Saved)> {
    let call = Call::new(device, x, parts)?;
    let outputs: usize = parts.iter().map(Part::outputs).sum();
    let rides = parts.iter().all(|part| call.rides(part));
    let h = call.narrow()?;
    let beside = match &h {
        Some(h) if rides && (x.room() >= call.ranks || call.inputs <= outputs) => Some(call.beside(h)?),
        Some(h) => {
            call.adapter_inputs(rows(h)?, None)?;
            None
        }
        None => None,
    };
    let ys = products(&call, h.as_ref(), beside.as_ref(), room)?;
    Ok((ys, Saved(h.into_iter().map(Some).collect())))
}

/// y of each part, from `h`, which lies `beside` a copy of x or in its room too where it rides.
fn products(call: &Call<'_, '_>, h: Option<&Tensor>, beside: Option<&Tensor>, room: usize) -> Result<Vec<Tensor>> {
    if let Some(ys) = few::products(call, h)? {
        return Ok(ys);
    }
    let mut ys = call.outputs(room)?;
    match beside {
        Some(beside) if call.is_one_product(&ys) => {
            let weight = call.weights_beside(0..ys.len())?;
            call.product_beside(rows(beside)?, rows(&weight)?, 0..ys.len(), &ys[0])?;
        }
        Some(beside) => {
            for parts in call.widened_together() {
                call.products_beside(rows(beside)?, parts, &ys)?;
            }
        }
        None => {
            for (i, y) in ys.iter_mut().enumerate() {
                call.product_and_adapter(i, h, y)?;
            }
        }
    }
    Ok(ys)
}

/// h alone.
pub(super) fn forward_unread(device: CudaDevice, x: &Tensor, parts: &[Part]) -> Result<Saved> {
    let call = Call::new(device, x, parts)?;
    let h = call.narrow()?;
    if let Some(h) = &h {
        call.adapter_inputs(rows(h)?, None)?;
    }
    Ok(Saved(h.into_iter().map(Some).collect()))
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
    for ((part, dy), grads) in parts.iter().zip(dys).zip(&mut grads) {
        if let Some(dweight) = &mut grads.weight {
            call.add_gradient([part.outputs(), call.inputs], rows(dy)?, rows(&x)?, dweight.address()?, 1.0)?;
        }
    }
    let pending = call.output_gradients(dys, saved, &mut grads, want_dx)?;
    if let Some(t) = pending.t()? {
        call.add_a_gradients(t, &mut grads)?;
    }
    if !want_dx {
        return Ok(None);
    }
    let call = call.without_input();
    drop(x);
    call.input_gradient(dys, pending.t()?).map(Some)
}

/// t of all parts, as it lies: columns of a tensor from the given one on; nothing without adapters.
#[derive(Debug)]
struct Pending(Option<(Tensor, usize)>);

impl Pending {
    fn t(&self) -> Result<Option<Matrix>> {
        let Some((held, first)) = &self.0 else { return Ok(None) };
        Ok(Some(columns(rows(held)?, *first, held.dtype())))
    }
}

/// Partial sums that a pass over dy leaves: of t one for each block of columns, of dB one for each share of the rows.
struct OnePass {
    wide: usize,
    shares: usize,
    grid: Grid,
}

impl Call<'_, '_> {
    /// dbias and dB of each part, and t, which lies behind the rows of the dy that it rides with, where there is room.
    fn output_gradients(&self, dys: &[Tensor], saved: &Saved, grads: &mut [PartGrads<'_>], want_dx: bool) -> Result<Pending> {
        let h = saved.0.first().and_then(Option::as_ref);
        let last = self.riders(dys).map(|riders| riders.end - 1);
        let behind = last.filter(|&i| want_dx && dys[i].room() >= self.ranks);
        let pending = Pending(match behind {
            Some(i) => Some((dys[i].clone(), self.parts[i].outputs())),
            None => self.narrow()?.map(|t| (t, 0)),
        });
        for (dy, grads) in dys.iter().zip(&mut *grads) {
            if let Some(dbias) = &mut grads.bias {
                bias_gradient(self.device, dbias, dy)?;
            }
        }
        if let (Some(t), Some(h)) = (pending.t()?, h) {
            let done = adapters::one_pass(self, dys, [rows(h)?, t], grads)?;
            for (i, dy) in dys.iter().enumerate().filter(|(i, _)| !done[*i]) {
                self.adapter_gradients(i, dy, h, t, grads[i].adapter.as_mut().map(|(_, db)| db))?;
            }
        }
        Ok(pending)
    }

    /// Memory for y of each part, `room` behind its rows; those of a gated unit side by side, since their gradients will be.
    fn outputs(&self, room: usize) -> Result<Vec<Tensor>> {
        let shape = |part: &Part| Shape::from([self.tokens, part.outputs()]);
        match self.parts {
            [gate, up] if room > 0 => Ok(Tensor::side_by_side(&self.arena, self.dtype, [shape(gate), shape(up)], room)?.into()),
            parts => parts.iter().map(|part| Tensor::with_room(&self.arena, self.dtype, shape(part), room)).collect(),
        }
    }

    /// y = x Wᵀ + bias + s h Bᵀ of one part, rounded once. cuBLASLt rounds a product to 16 bits before it adds it to what is there:
    /// what a young adapter adds, below half of the last place of x Wᵀ, would be lost, and the adapter would not learn.
    fn product_and_adapter(&self, i: usize, h: Option<&Tensor>, y: &mut Tensor) -> Result<()> {
        let part = &self.parts[i];
        let Some(h) = h.filter(|_| self.pairs[i].is_some()) else { return self.base_product(i, y) };
        if self.dtype == DType::F32 {
            self.base_product(i, y)?;
            return self.add_adapter(i, h, y);
        }
        let sum = scratch(&self.arena, DType::F32, [self.tokens, part.outputs()])?;
        let weight = self.widened(i..i + 1)?;
        self.biased_product(part.bias.as_ref(), part.outputs(), &sum, [rows(self.x()?)?, rows(&weight)?], self.inputs)?;
        drop(weight);
        self.add_adapter(i, h, &sum)?;
        if y.is_dense() {
            return sum.convert_into(y);
        }
        let rounded = sum.to_dtype(self.dtype)?;
        self.copy(rows(y)?, rows(&rounded)?, part.outputs())
    }

    /// y += s h Bᵀ of one part.
    fn add_adapter(&self, i: usize, h: &Tensor, y: &Tensor) -> Result<()> {
        let (Some(adapter), Some((_, b))) = (&self.parts[i].adapter, &self.pairs[i]) else { return Ok(()) };
        let (k, result) = (b.shape().last(), rows(y)?);
        self.device.gemm(&Gemm {
            m: self.tokens,
            n: self.parts[i].outputs(),
            k,
            a: columns(rows(h)?, self.offsets[i], self.dtype),
            b: transposed(rows(b)?),
            c: result.address,
            ldc: result.ld,
            alpha: adapter.scale,
            accumulate: true,
            bias: None,
            input: self.dtype,
            output: y.dtype(),
        })
    }

    /// y = x Wᵀ + bias.
    fn base_product(&self, i: usize, y: &mut Tensor) -> Result<()> {
        let part = &self.parts[i];
        let bias = part.bias.as_ref().map(|bias| bias.to_dtype(self.dtype)).transpose()?;
        if product_of_few(self.device, self.x()?, &part.weight, bias.as_ref(), y)? {
            return Ok(());
        }
        let weight = self.widened(i..i + 1)?;
        self.biased_product(part.bias.as_ref(), part.outputs(), y, [rows(self.x()?)?, rows(&weight)?], self.inputs)
    }

    /// y = a bᵀ + bias of n columns, over k of a and b, in the type of y.
    fn biased_product(&self, bias: Option<&Tensor>, n: usize, y: &Tensor, [a, b]: [Matrix; 2], k: usize) -> Result<()> {
        let bias = bias.map(|bias| bias.to_dtype(y.dtype())).transpose()?;
        let result = rows(y)?;
        let gemm = Gemm {
            m: self.tokens,
            n,
            k,
            a,
            b: transposed(b),
            c: result.address,
            ldc: result.ld,
            alpha: 1.0,
            accumulate: false,
            bias: bias.as_ref().map(Tensor::address).transpose()?,
            input: self.dtype,
            output: y.dtype(),
        };
        ahead::gemm(self.device, &self.arena, &gemm)
    }

    /// [x | h] [T, K + ΣR] with h = x Aᵀ, which is also left in `h`: x itself where it has room behind its rows, else a copy.
    fn beside(&self, h: &Tensor) -> Result<Tensor> {
        let x = self.x()?;
        if x.room() >= self.ranks {
            self.adapter_inputs(rows(h)?, Some(columns(rows(x)?, self.inputs, self.dtype)))?;
            return Ok(x.clone());
        }
        let beside = scratch(&self.arena, self.dtype, [self.tokens, self.inputs + self.ranks])?;
        self.copy(rows(&beside)?, rows(x)?, self.inputs)?;
        self.adapter_inputs(rows(h)?, Some(columns(rows(&beside)?, self.inputs, self.dtype)))?;
        Ok(beside)
    }

    /// Whether one product pays for the y of all: where they lie side by side, and the widened bases together take no more memory
    /// than they.
    fn is_one_product(&self, ys: &[Tensor]) -> bool {
        side_by_side(ys) && self.tokens >= self.inputs && self.parts.iter().all(|part| part.bias.is_none())
    }

    /// y = [x | h] [W | 0 s B 0]ᵀ + bias of each part, from one matrix of their weights.
    fn products_beside(&self, beside: Matrix, parts: Range<usize>, ys: &[Tensor]) -> Result<()> {
        let weight = self.weights_beside(parts.clone())?;
        let (mut at, ld) = (rows(&weight)?, weight.shape().last());
        for i in parts {
            self.product_beside(beside, at, i..i + 1, &ys[i])?;
            at = columns(at, self.parts[i].outputs() * ld, self.dtype);
        }
        Ok(())
    }

    /// y = [x | h] [W | 0 s B 0]ᵀ + bias of a part, or of several without bias whose y lie side by side from `y` on.
    fn product_beside(&self, beside: Matrix, weight: Matrix, parts: Range<usize>, y: &Tensor) -> Result<()> {
        let bias = self.parts[parts.start].bias.as_ref();
        let outputs = self.parts[parts].iter().map(Part::outputs).sum();
        self.biased_product(bias, outputs, y, [beside, weight], self.inputs + self.ranks)
    }

    /// h = dropout(x) Aᵀ of all parts, side by side, and the same `beside` x where it rides.
    fn adapter_inputs(&self, h: Matrix, beside: Option<Matrix>) -> Result<()> {
        if let Some(a) = self.all_a()? {
            if hopper::adapter_inputs(self, a, h, beside)? {
                return Ok(());
            }
            self.gemm([self.tokens, self.ranks, self.inputs], rows(self.x()?)?, transposed(a), h, 1.0, false)?;
            return beside.map_or(Ok(()), |beside| self.copy(beside, h, self.ranks));
        }
        for ((part, pair), offset) in self.parts.iter().zip(&self.pairs).zip(&self.offsets) {
            let (Some(adapter), Some((a, _))) = (&part.adapter, pair) else { continue };
            let dropped = self.dropped(adapter)?;
            let x = rows(dropped.as_ref().unwrap_or(self.x()?))?;
            let sizes = [self.tokens, a.dims()[0], self.inputs];
            self.gemm(sizes, x, transposed(rows(a)?), columns(h, *offset, self.dtype), 1.0, false)?;
        }
        beside.map_or(Ok(()), |beside| self.copy(beside, h, self.ranks))
    }

    /// t = s dy B of one part, and dB += s dyᵀ h.
    fn adapter_gradients(&self, i: usize, dy: &Tensor, h: &Tensor, t: Matrix, db: Option<&mut TensorMut<'_>>) -> Result<()> {
        let (Some(adapter), Some((_, b))) = (&self.parts[i].adapter, &self.pairs[i]) else { return Ok(()) };
        let (outputs, rank) = (b.dims()[0], b.shape().last());
        let (h, t) = (columns(rows(h)?, self.offsets[i], self.dtype), columns(t, self.offsets[i], self.dtype));
        match db {
            Some(db) if rank <= 16 && self.worth_one_pass(outputs) => self.one_pass(dy, b, [h, t], adapter.scale, db),
            db => {
                self.gemm([self.tokens, rank, outputs], rows(dy)?, rows(b)?, t, adapter.scale, false)?;
                db.map_or(Ok(()), |db| self.add_gradient([outputs, rank], rows(dy)?, h, db.address()?, adapter.scale))
            }
        }
    }

    /// Whether one pass over dy, with its partial sums, takes less time than two products.
    fn worth_one_pass(&self, outputs: usize) -> bool {
        self.dtype != DType::F32 && outputs >= 4096 && self.tokens >= 1024
    }

    /// t and dB from one reading of dy, in shares of the rows that are added up in order.
    fn one_pass(&self, dy: &Tensor, b: &Tensor, [h, t]: [Matrix; 2], scale: f32, db: &mut TensorMut<'_>) -> Result<()> {
        let (outputs, rank) = (b.dims()[0], b.shape().last());
        let left = rows(dy)?;
        let OnePass { wide, shares, grid } = self.plan_of_one_pass(outputs, rank);
        let deep = rank.div_ceil(16);
        let sums = 16 * deep * (wide * self.tokens + shares * outputs);
        let mut partials = scratch(dy.arena(), DType::F32, [sums])?;
        let suffix = suffix(OP, self.dtype)?;
        let sizes = [Arg::size(self.tokens), Arg::size(outputs), Arg::size(rank)];
        let inputs = [Arg::Pointer(left.address), Arg::read(b)?, Arg::Pointer(h.address)];
        let pitches = [Arg::size(left.ld), Arg::size(h.ld)];
        let args = [&[Arg::write(&mut partials)?][..], &inputs, &sizes, &pitches].concat();
        self.device.launch(&format!("lora_t_db_{suffix}"), grid, &args)?;
        let outputs_of = [Arg::Pointer(t.address), Arg::write_view(db)?, Arg::read(&partials)?, Arg::F32(scale)];
        let args = [&outputs_of[..], &sizes, &[Arg::size(t.ld), Arg::size(wide), Arg::size(shares)]].concat();
        let grid = Grid::over((self.tokens + outputs) * deep, 16, 256);
        self.device.launch(&format!("lora_t_db_sum_{suffix}"), grid, &args)
    }

    /// As `lora.cu` says.
    fn plan_of_one_pass(&self, outputs: usize, rank: usize) -> OnePass {
        let (wide, deep) = (outputs.div_ceil(512), rank.div_ceil(16));
        let most = (2 * self.device.info().multiprocessors / (wide * deep)).max(1);
        let shares = most.min(self.tokens.div_ceil(16));
        OnePass { wide, shares, grid: Grid { shared: 58_880, ..Grid::new(shares * wide * deep, 128) } }
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

    /// The parts beside whose dy the t of all ride: all, where one product of them pays; else one with room behind its rows, else
    /// the narrowest if it is narrow enough.
    fn riders(&self, dys: &[Tensor]) -> Option<Range<usize>> {
        let rides = |i: &usize| self.stacked && self.rides(&self.parts[*i]);
        let roomy = |i: &usize| dys[*i].room() >= self.ranks;
        let behind = dys.last().is_some_and(|last| last.room() >= self.ranks);
        // The widened bases together take no more memory than the dy then.
        if side_by_side(dys) && self.tokens >= self.inputs && (0..dys.len()).all(|i| rides(&i)) && behind {
            return Some(0..dys.len());
        }
        let narrowest = (0..dys.len()).min_by_key(|&i| self.parts[i].outputs()).filter(rides);
        let one = (0..dys.len()).filter(rides).find(roomy);
        one.or_else(|| narrowest.filter(|&i| self.parts[i].outputs() <= self.inputs)).map(|i| i..i + 1)
    }

    /// dx = Σ dy W + dropout'(t A).
    fn input_gradient(&self, dys: &[Tensor], t: Option<Matrix>) -> Result<Tensor> {
        let dx = Tensor::empty(&self.arena, self.dtype, self.shape)?;
        let riders = self.riders(dys).filter(|_| t.is_some());
        if let (Some(t), Some(riders)) = (t, riders.clone()) {
            self.gradient_beside(riders, dys, t, &dx)?;
        }
        let others = riders.clone().unwrap_or(0..0);
        for (i, (part, dy)) in self.parts.iter().zip(dys).enumerate().filter(|(i, _)| !others.contains(i)) {
            let weight = self.widened(i..i + 1)?;
            let sizes = [self.tokens, self.inputs, part.outputs()];
            self.gemm(sizes, rows(dy)?, rows(&weight)?, rows(&dx)?, 1.0, i > 0 || riders.is_some())?;
        }
        match t {
            Some(t) if riders.is_none() => self.add_adapters(t, dx),
            _ => Ok(dx),
        }
    }

    /// dx = [dy … | t] [W ; … ; A] with the dy and W of the `riders`, and the t and A of all.
    fn gradient_beside(&self, riders: Range<usize>, dys: &[Tensor], t: Matrix, dx: &Tensor) -> Result<()> {
        let Some(([beside, weight], width)) = self.gradients_beside(riders, dys, t)? else { return Ok(()) };
        self.gemm([self.tokens, self.inputs, width], rows(&beside)?, rows(&weight)?, rows(dx)?, 1.0, false)
    }

    /// [dy … | t] and [W ; … ; A], and how many columns of the one and rows of the other there are: t behind the rows already, or both
    /// copied.
    fn gradients_beside(&self, riders: Range<usize>, dys: &[Tensor], t: Matrix) -> Result<Option<([Tensor; 2], usize)>> {
        let (parts, dys, Some(a)) = (&self.parts[riders.clone()], &dys[riders.clone()], self.all_a()?) else { return Ok(None) };
        let outputs: usize = parts.iter().map(Part::outputs).sum();
        let beside = match dys {
            [dy] if dy.room() < self.ranks => self.copied_beside(dy, t)?,
            _ => dys[0].clone(),
        };
        let weight = self.widened(riders)?;
        // Launched early, as what is before and after it.
        let below = columns(rows(&weight)?, outputs * weight.shape().last(), self.dtype);
        self.copy_rows([self.ranks, self.inputs], below, a)?;
        Ok(Some(([beside, weight], outputs + self.ranks)))
    }

    /// [dy | t] [T, N + ΣR].
    fn copied_beside(&self, dy: &Tensor, t: Matrix) -> Result<Tensor> {
        let outputs = dy.shape().last();
        let beside = scratch(dy.arena(), self.dtype, [self.tokens, outputs + self.ranks])?;
        self.copy(rows(&beside)?, rows(dy)?, outputs)?;
        self.copy(columns(rows(&beside)?, outputs, self.dtype), t, self.ranks)?;
        Ok(beside)
    }

    /// dx += dropout'(t A).
    fn add_adapters(&self, t: Matrix, mut dx: Tensor) -> Result<Tensor> {
        if let Some(a) = self.all_a()? {
            self.gemm([self.tokens, self.inputs, self.ranks], t, a, rows(&dx)?, 1.0, true)?;
            return Ok(dx);
        }
        for ((part, pair), offset) in self.parts.iter().zip(&self.pairs).zip(&self.offsets) {
            let (Some(adapter), Some((a, _))) = (&part.adapter, pair) else { continue };
            let (sizes, t) = ([self.tokens, self.inputs, a.dims()[0]], columns(t, *offset, self.dtype));
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

/// Whether the rows of all tensors are rows of one matrix.
fn side_by_side(tensors: &[Tensor]) -> bool {
    tensors.windows(2).all(|pair| pair[1].continues(&pair[0]))
}

/// dbias += Σ over rows of dy, in two passes where there are many rows.
fn bias_gradient(device: CudaDevice, dbias: &mut TensorMut<'_>, dy: &Tensor) -> Result<()> {
    let dy = &dy.dense()?;
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
