//! Frozen weights that are widened beside the product before theirs, by threads of it that had nothing to do.
//!
//! A pass over a model asks for the same weights in the same order each time. While a [`LookAhead`] lives, its arena notes what was asked
//! for after what; a product that can ([`beside`]) gets the weight that is foreseen as a job, with a matrix of its own. Who asks for that
//! weight next gets the matrix, with what was more than the product could do ([`matrix`]); when another is asked for, or memory is short, it
//! is let go of. So no result depends on what was foreseen, and a weight whose memory is gone, as one is that waits on the host, is
//! foreseen by nobody. What was widened stays in memory as long as that is free ([`mod@warm`]).

mod request;
mod successors;
mod warm;

use std::{cell::Cell, fmt};

pub(crate) use request::{Request, WeakRequest};
use successors::Successors;
pub(crate) use warm::{Captured, Found, Warm};

use crate::{
    Arena, BlockWeight, Error, Owner, Result, Tensor,
    cuda::{self, CudaDevice, DeviceHeap, Gemm, Widen},
    ops::dequantize::cuda::block_weights,
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
    /// Over so many `tokens`, with the weights in an arena; ends the one before.
    pub fn new(arena: &Arena, tokens: usize) -> Self {
        let mut ahead = arena.ahead();
        ahead.let_go();
        if !ahead.forbidden {
            ahead.requests.begin();
            arena.warm().begin(tokens);
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
        self.0.warm().end();
    }
}

/// Weights for a product to widen, and the matrix for them.
struct Job {
    weights: Vec<BlockWeight>,
    request: WeakRequest,
    out: Tensor,
    widen: Widen,
    /// Rows of the weights that it widens.
    rows: usize,
}

impl Job {
    /// At most about as many `elements`.
    fn new(device: CudaDevice, arena: &Arena, request: &WeakRequest, elements: usize) -> Option<Self> {
        let (weights, [more_rows, more_cols]) = (request.weights()?, request.more());
        let (widen, rows) = Widen::new(device, &weights, more_cols, elements).ok().filter(|(_, rows)| *rows > 0)?;
        let all: usize = weights.iter().map(|weight| weight.shape.dims()[0]).sum();
        // Without memory for it the weight waits for its own product.
        let out = memory(arena, request, [all + more_rows, weights[0].shape.last() + more_cols], true).ok()?;
        Some(Self { weights, request: request.clone(), out, widen, rows })
    }

    fn ahead(&mut self) -> Result<cuda::WidenBeside> {
        Ok(cuda::WidenBeside { out: self.out.address_mut()?, widen: self.widen })
    }

    /// The matrix, with the rows that the product leaves.
    fn finish(mut self, device: CudaDevice) -> Result<Tensor> {
        let (ld, place) = (self.out.shape().last(), self.out.address_mut()?);
        block_weights(device, &self.weights, self.request.dtype(), place, ld, self.rows)?;
        Ok(self.out)
    }
}

/// Memory for a matrix that is widened, for the request that is on or, `foreseen`, for the next.
fn memory(arena: &Arena, request: &WeakRequest, sizes: [usize; 2], foreseen: bool) -> Result<Tensor> {
    let _scope = arena.scope(Owner::Scratch);
    Tensor::placed(arena, request.dtype(), sizes, |warm, heap, bytes| warm.place(heap, &request.identity, bytes, foreseen))
}

/// Memory that holds the matrix that is asked for, if there is some.
fn warm(arena: &Arena, request: &WeakRequest, sizes: [usize; 2]) -> Result<Option<Tensor>> {
    if !arena.warm().has(request) {
        return Ok(None);
    }
    let (_scope, found) = (arena.scope(Owner::Scratch), Cell::new(false));
    let take = |warm: &mut Warm, heap: &DeviceHeap, _| warm.take(heap, request).inspect(|_| found.set(true));
    let out = Tensor::placed(arena, request.dtype(), sizes, take)?;
    Ok(found.get().then_some(out))
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
    let warm = arena.warm();
    // What is asked for twice is still held.
    if warm.has(&request) || warm.is_last(&request) {
        return None;
    }
    drop(warm);
    Job::new(device, arena, &request, (2.0 * m as f64 * n as f64 * k as f64 * BESIDE) as usize)
}

/// The matrix that is asked for: as it lies in free memory, as a product has begun it, or in memory that `widen` writes. It is noted for the
/// next pass, and found in its memory as long as that is free.
pub(crate) fn matrix(
    device: CudaDevice,
    arena: &Arena,
    request: &Request<'_>,
    widen: impl FnOnce(&mut Tensor) -> Result<()>,
) -> Result<Tensor> {
    let afresh = || {
        let _scope = arena.scope(Owner::Scratch);
        Tensor::empty(arena, request.dtype, request.sizes())
    };
    let mut ahead = arena.ahead();
    if !ahead.requests.has_begun() {
        drop(ahead);
        return filled(afresh()?, widen);
    }
    let (identity, weak) = (request.identity()?, request.weak(arena));
    ahead.requests.note(&identity, weak.clone());
    let begun = ahead.begun.take();
    drop(ahead);
    arena.warm().note(&identity);
    let Some(weak) = weak else { return filled(afresh()?, widen) };
    let mut out = match begun.filter(|job| job.request.identity == identity && request.are(&job.weights)) {
        Some(job) => job.finish(device)?,
        None => match warm(arena, &weak, request.sizes())? {
            Some(out) => out,
            None => filled(memory(arena, &weak, request.sizes(), false)?, widen)?,
        },
    };
    out.remember(weak);
    Ok(out)
}

fn filled(mut out: Tensor, fill: impl FnOnce(&mut Tensor) -> Result<()>) -> Result<Tensor> {
    fill(&mut out)?;
    Ok(out)
}

/// Widens weights to where a captured step expects to find them.
pub(crate) fn restore(device: CudaDevice, found: &Found, address: u64) -> Result<()> {
    let request = &found.holds;
    let Some(weights) = request.weights() else {
        return Err(Error::Cuda { call: "cuGraphLaunch", reason: "a weight of the graph is gone".into() });
    };
    let ld = weights[0].shape.last() + request.more()[1];
    block_weights(device, &weights, request.dtype(), address, ld, 0)
}

#[cfg(test)]
mod tests;
