//! Frozen weights that are widened beside the product before theirs, by threads of it that had nothing to do.
//!
//! A pass over a model asks for the same weights in the same order each time. While a [`LookAhead`] lives, its arena notes what was asked
//! for after what; a product that can ([`beside`]) gets the weight that is foreseen as a job, with a matrix of its own. Who asks for that
//! weight next gets the matrix, with what was more than the product could do ([`take`]); when another is asked for, or memory is short, it
//! is let go of. So no result depends on what was foreseen, and a weight whose memory is gone, as one is that waits on the host, is
//! foreseen by nobody.

mod request;
mod successors;

use std::fmt;

pub(crate) use request::Request;
use request::WeakRequest;
use successors::Successors;

use crate::{
    Arena, BlockWeight, DType, Owner, Result, Tensor,
    cuda::{self, CudaDevice, Gemm, Widen},
    ops::dequantize::cuda::block_weight,
};

/// Elements that are widened beside a floating-point operation of a product, at most: of Llama-3-8B o with gate and up has the most,
/// 4.3e-4, and on an H200 takes less time with all of them than with a part and a launch for the rest.
const BESIDE: f64 = 5e-4;

/// What an arena knows of the pass that runs.
#[derive(Default)]
pub(crate) struct Ahead {
    requests: Successors<WeakRequest>,
    /// What a product has begun.
    begun: Option<Job>,
    forbidden: bool,
}

impl fmt::Debug for Ahead {
    // Not what it holds, which names the arena.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ahead").field("begun", &self.begun.is_some()).finish_non_exhaustive()
    }
}

impl Ahead {
    /// Lets go of the matrix that a product has begun; false without one.
    pub(crate) fn let_go(&mut self) -> bool {
        self.begun.take().is_some()
    }
}

/// A pass over a model, as those before it and after it: while it lives, products on a GPU widen the weights of those that follow them.
#[derive(Debug)]
#[must_use = "it ends when it drops"]
pub struct LookAhead(Arena);

impl LookAhead {
    /// Of the weights in an arena; ends the one before.
    pub fn new(arena: &Arena) -> Self {
        let mut ahead = arena.ahead();
        ahead.let_go();
        if !ahead.forbidden {
            ahead.requests.begin();
        }
        drop(ahead);
        Self(arena.clone())
    }

    /// Nothing is widened ahead in an arena from here on: for what a pass cannot do without.
    pub fn forbid(arena: &Arena) {
        arena.ahead().forbidden = true;
    }
}

impl Drop for LookAhead {
    fn drop(&mut self) {
        let mut ahead = self.0.ahead();
        ahead.let_go();
        ahead.requests.end();
    }
}

/// Weights for a product to widen, and the matrix for them.
pub(crate) struct Job {
    weights: Vec<BlockWeight>,
    dtype: DType,
    more: [usize; 2],
    out: Tensor,
    widen: Widen,
    /// Rows of the weights that it widens.
    rows: usize,
}

impl Job {
    /// At most about as many `elements`.
    fn new(device: CudaDevice, arena: &Arena, request: &WeakRequest, elements: usize) -> Option<Self> {
        let (weights, dtype, more) = (request.weights()?, request.dtype, request.more);
        let (widen, rows) = Widen::new(device, &weights, more[1], elements).ok().filter(|(_, rows)| *rows > 0)?;
        let _scope = arena.scope(Owner::Scratch);
        let all: usize = weights.iter().map(|weight| weight.shape.dims()[0]).sum();
        // Without memory for it the weight waits for its own product.
        let out = Tensor::empty(arena, dtype, [all + more[0], weights[0].shape.last() + more[1]]).ok()?;
        Some(Self { weights, dtype, more, out, widen, rows })
    }

    fn ahead(&mut self) -> Result<cuda::WidenBeside> {
        Ok(cuda::WidenBeside { out: self.out.address_mut()?, widen: self.widen })
    }

    fn is(&self, request: &Request<'_>) -> bool {
        (self.dtype, self.more) == (request.dtype, request.more) && request.are(&self.weights)
    }

    /// The matrix, with the rows that the product leaves.
    fn finish(mut self, device: CudaDevice) -> Result<Tensor> {
        let (ld, mut place, mut done) = (self.out.shape().last(), self.out.address_mut()?, self.rows);
        for weight in &self.weights {
            let rows = weight.shape.dims()[0];
            let first = done.min(rows);
            block_weight(device, weight, self.dtype, place, ld, first)?;
            done -= first;
            place += (rows * ld * self.dtype.size()) as u64;
        }
        Ok(self.out)
    }
}

/// A product, by a kernel that widens the weight that is foreseen beside it where it can.
pub(crate) fn gemm(device: CudaDevice, arena: &Arena, gemm: &Gemm) -> Result<()> {
    if device.serves_gemm(gemm) {
        return beside(device, arena, [gemm.m, gemm.n, gemm.k], |ahead| device.product(gemm, ahead));
    }
    device.gemm(gemm)
}

/// A product of sizes [m, n, k] by a kernel that can widen a weight beside it: the one that is foreseen, where there is one, and rows
/// enough for its memory not to matter.
pub(crate) fn beside(
    device: CudaDevice,
    arena: &Arena,
    sizes: [usize; 3],
    product: impl FnOnce(&cuda::WidenBeside) -> Result<()>,
) -> Result<()> {
    let Some(mut job) = job(device, arena, sizes) else { return product(&cuda::WidenBeside::default()) };
    product(&job.ahead()?)?;
    arena.ahead().begun = Some(job);
    Ok(())
}

fn job(device: CudaDevice, arena: &Arena, [m, n, k]: [usize; 3]) -> Option<Job> {
    if m < n.min(k) {
        return None;
    }
    let ahead = arena.ahead();
    // One at a time.
    let request = ahead.requests.foreseen().filter(|_| ahead.begun.is_none())?.clone();
    // Taking memory may need the lock.
    drop(ahead);
    Job::new(device, arena, &request, (2.0 * m as f64 * n as f64 * k as f64 * BESIDE) as usize)
}

/// The matrix that is asked for, if a product has begun it; else the request is noted for the next pass.
pub(crate) fn take(device: CudaDevice, arena: &Arena, request: &Request<'_>) -> Result<Option<Tensor>> {
    let mut ahead = arena.ahead();
    if !ahead.requests.has_begun() {
        return Ok(None);
    }
    ahead.requests.note(&request.identity()?, request.weak(arena));
    let begun = ahead.begun.take();
    drop(ahead);
    begun.filter(|job| job.is(request)).map(|job| job.finish(device)).transpose()
}

#[cfg(test)]
mod tests;
