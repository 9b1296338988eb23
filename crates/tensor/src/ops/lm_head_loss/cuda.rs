//! The head and its loss on a GPU: chunks of rows whose logits, in the activations' type, become their own gradient.

use super::{Config, OP, Output};
use crate::{
    Arena, DType, Result, Tensor, TensorMut,
    cuda::{Arg, CudaDevice, Gemm, Grid, Matrix, suffix},
    ops::few,
    shape::size_class,
};

/// Rows are padded to a multiple of this, in 16 classes an octave, so that streams whose trained rows are nearly as many run the same
/// kernels.
const PAD: usize = 64;
/// Bytes that the logits of a chunk may take: more where the activations themselves are larger.
const MOST_BYTES: usize = 192 << 20;

/// The trained rows as the kernels read them.
#[derive(Clone, Debug)]
pub(super) struct Labels {
    /// U32 `[n]`: positions, n a multiple of [`PAD`].
    rows: Tensor,
    /// I32 `[n]`: labels, [`super::IGNORE`] for padding.
    targets: Tensor,
    /// F32 `[1]`.
    scale: Tensor,
    /// F32 `[2]`, whose first is S: gradients are those of S times the loss.
    pub(super) loss_scale: Option<Tensor>,
    /// Whether the rows are the positions 0, 1, ... themselves: nothing to gather.
    all: bool,
}

impl Labels {
    pub(super) fn new(arena: &Arena, trained: &[super::Trained], tokens: usize, scale: f32) -> Result<Self> {
        // Gathering costs two passes over the rows; leaving out fewer than an eighth of them gains less.
        let all = trained.len() * 8 >= tokens * 7;
        let (rows, targets) = if all {
            let mut targets = vec![super::IGNORE; tokens];
            for &(row, label) in trained {
                targets[row] = label as i32;
            }
            ((0..tokens as u32).collect(), targets)
        } else {
            let mut rows: Vec<u32> = trained.iter().map(|(row, _)| *row as u32).collect();
            let mut targets: Vec<i32> = trained.iter().map(|(_, label)| *label as i32).collect();
            rows.resize(size_class(rows.len().div_ceil(PAD), 16) * PAD, 0);
            targets.resize(rows.len(), super::IGNORE);
            (rows, targets)
        };
        Ok(Self {
            rows: Tensor::from_slice(arena, &rows, [rows.len()])?,
            targets: Tensor::from_slice(arena, &targets, [targets.len()])?,
            scale: Tensor::from_slice(arena, &[scale], [1])?,
            loss_scale: None,
            all,
        })
    }
}

impl Labels {
    /// What kernels and their sizes depend on: the number of rows, and whether they are gathered.
    pub(super) fn layout(&self) -> (usize, bool) {
        (self.rows.numel(), self.all)
    }

    /// What the gradient is multiplied by, F32 `[1]`.
    fn gradient_scale(&self, device: CudaDevice) -> Result<Tensor> {
        let Some(loss_scale) = &self.loss_scale else { return Ok(self.scale.clone()) };
        let mut product = Tensor::empty(self.scale.arena(), DType::F32, [1])?;
        let args = [Arg::write(&mut product)?, Arg::read(loss_scale)?, Arg::U32(1), Arg::read(&self.scale)?, Arg::U32(0)];
        device.launch("sum_f32", Grid::new(1, 1024), &args)?;
        Ok(product)
    }

    pub(super) fn update(&mut self, other: &Self) -> Result<()> {
        other.rows.convert_into(&mut self.rows)?;
        other.targets.convert_into(&mut self.targets)?;
        other.scale.convert_into(&mut self.scale)
    }
}

/// Rows of a chunk, of so many that are trained, for `elements` of h.
pub(super) fn chunk_rows(trained: usize, elements: usize, vocab: usize, dtype: DType) -> usize {
    let row = vocab * dtype.size();
    let budget = MOST_BYTES.max(4 * elements * dtype.size());
    let most = (budget / row.max(1)).clamp(1, 8192);
    // Even shares, in whole tiles of the products.
    trained.div_ceil(trained.div_ceil(most).max(1)).next_multiple_of(128).min(trained).max(1)
}

/// The rows of h in chunks, and memory for their logits.
struct Chunks<'a> {
    device: CudaDevice,
    h: &'a Tensor,
    weight: Tensor,
    labels: &'a Labels,
    scale: Tensor,
    softcap: f32,
    rows: usize,
}

impl<'a> Chunks<'a> {
    fn new(device: CudaDevice, h: &'a Tensor, weight: &Tensor, labels: &'a Labels, config: Config) -> Result<Self> {
        let weight = weight.to_dtype(h.dtype())?;
        let rows = chunk_rows(labels.rows.numel(), h.numel(), weight.dims()[0], h.dtype());
        let scale = labels.gradient_scale(device)?;
        Ok(Self { device, h, weight, labels, scale, softcap: config.softcap.unwrap_or(0.0), rows })
    }

    /// (first, rows) of each chunk.
    fn ranges(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let (trained, step) = (self.labels.rows.numel(), self.rows);
        (0..trained).step_by(step).map(move |first| (first, step.min(trained - first)))
    }

    /// The rows of h of a chunk.
    fn inputs(&self, first: usize, rows: usize) -> Result<Tensor> {
        if self.labels.all {
            return self.h.rows(first, rows);
        }
        let cols = self.h.dims()[1];
        let mut gathered = Tensor::empty(self.h.arena(), self.h.dtype(), [rows, cols])?;
        let suffix = suffix(OP, self.h.dtype())?;
        let args = [
            Arg::write(&mut gathered)?,
            Arg::read(self.h)?,
            Arg::read(&self.labels.rows.view(first, [rows])?)?,
            Arg::F32(1.0),
            Arg::size(rows),
            Arg::size(cols),
        ];
        self.device.launch(&format!("embedding_fwd_{suffix}_{suffix}"), Grid::new(rows, 128), &args)?;
        Ok(gathered)
    }

    /// The gradient of a chunk's logits; the rows' losses go to `losses`.
    fn gradient(&self, inputs: &Tensor, first: usize, losses: &mut Tensor, want: bool) -> Result<Tensor> {
        let (rows, vocab) = (inputs.dims()[0], self.weight.dims()[0]);
        let mut logits = Tensor::empty(self.h.arena(), self.h.dtype(), [rows, vocab])?;
        logits_of(self.device, inputs, &self.weight, &mut logits)?;
        let losses = Arg::Pointer(losses.address_mut()? + 4 * first as u64);
        let front =
            [Arg::write(&mut logits)?, losses, Arg::read(&self.labels.targets.view(first, [rows])?)?, Arg::read(&self.scale)?];
        let sizes = [Arg::size(rows), Arg::size(vocab), Arg::U32(want.into())];
        let suffix = suffix(OP, self.h.dtype())?;
        let (kernel, grid) = match self.whole_row() {
            Some(Whole::Clusters { split, shared }) => {
                let grid = Grid { shared, ..Grid::new(split * rows, 256) };
                (format!("cross_entropy_sm90_{suffix}_split{split}"), grid)
            }
            Some(Whole::Block { shared }) => {
                let grid = Grid { shared, ..Grid::new(rows.min(self.device.info().multiprocessors), 1024) };
                (format!("cross_entropy_whole_{suffix}"), grid)
            }
            None => {
                let args = [&front[..], &[Arg::F32(self.softcap)], &sizes].concat();
                self.device.launch(&format!("cross_entropy_{suffix}"), Grid::new(rows, 1024), &args)?;
                return Ok(logits);
            }
        };
        self.device.launch(&kernel, grid, &[&front[..], &sizes].concat())?;
        Ok(logits)
    }

    /// The kernel that holds a row whole; nothing where it does not fit or does not serve.
    fn whole_row(&self) -> Option<Whole> {
        let (capability, vocab) = (self.device.info().capability, self.weight.dims()[0]);
        let serves = self.h.dtype() != DType::F32 && self.softcap == 0.0 && vocab.is_multiple_of(8);
        match (capability.major, capability.minor) {
            (9, 0) if serves => Whole::clusters(vocab),
            (10, 0) if serves => Whole::block(vocab),
            _ => None,
        }
    }
}

/// Where a row of logits lies whole, and the bytes of shared memory of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whole {
    /// In the blocks of a cluster, as many as `split` (`cross_entropy_sm90.cu`).
    Clusters { split: usize, shared: u32 },
    /// In one block.
    Block { shared: u32 },
}

impl Whole {
    /// The fewest blocks of which three fit on a multiprocessor, so that one of them reads while another writes; else as many as a
    /// cluster has.
    fn clusters(vocab: usize) -> Option<Self> {
        let shared = |split: usize| 256 * vocab.div_ceil(128 * split);
        // With what a block has of its own, and what the device takes.
        let all = |split: usize| shared(split) + 128 * (split + 1) + 1024;
        let most = 228 << 10;
        let split = [1, 2, 4].into_iter().find(|&split| 3 * all(split) <= most).unwrap_or(8);
        (all(split) <= most).then(|| Self::Clusters { split, shared: shared(split) as u32 })
    }

    fn block(vocab: usize) -> Option<Self> {
        let shared = 16_384 * (vocab / 8).saturating_sub(5120).div_ceil(1024);
        // 227 KiB less what the kernel takes of its own.
        (shared <= (226 << 10)).then_some(Self::Block { shared: shared as u32 })
    }
}

/// y = h weightᵀ, in the type of y.
fn logits_of(device: CudaDevice, h: &Tensor, weight: &Tensor, y: &mut Tensor) -> Result<()> {
    let (m, n, k) = (h.dims()[0], weight.dims()[0], weight.dims()[1]);
    let gemm = Gemm {
        m,
        n,
        k,
        a: Matrix { address: h.address()?, ld: k, transposed: false },
        b: Matrix { address: weight.address()?, ld: k, transposed: true },
        c: y.address_mut()?,
        ldc: n,
        alpha: 1.0,
        accumulate: false,
        bias: None,
        input: h.dtype(),
        output: y.dtype(),
    };
    if few::product(device, &gemm)? { Ok(()) } else { device.gemm(&gemm) }
}

pub(super) fn forward(
    device: CudaDevice,
    h: &Tensor,
    weight: &Tensor,
    labels: &super::Labels,
    config: Config,
    want_dh: bool,
) -> Result<Output> {
    let count = labels.count();
    let mut loss = Tensor::zeros(h.arena(), DType::F32, [1])?;
    let Some(labels) = labels.device.as_ref().filter(|labels| labels.rows.numel() > 0) else {
        let dh = want_dh.then(|| Tensor::zeros(h.arena(), h.dtype(), h.shape())).transpose()?;
        return Ok(Output { loss, rows: 0, dh });
    };
    let chunks = Chunks::new(device, h, weight, labels, config)?;
    let mut losses = Tensor::empty(h.arena(), DType::F32, [labels.rows.numel()])?;
    let mut dh = match (want_dh, labels.all) {
        (false, _) => None,
        (true, true) => Some(Tensor::empty(h.arena(), h.dtype(), h.shape())?),
        (true, false) => Some(Tensor::zeros(h.arena(), h.dtype(), h.shape())?),
    };
    for (first, rows) in chunks.ranges() {
        let inputs = chunks.inputs(first, rows)?;
        let gradient = chunks.gradient(&inputs, first, &mut losses, want_dh)?;
        drop(inputs);
        if let Some(dh) = &mut dh {
            input_gradient(&chunks, &gradient, first, dh)?;
        }
    }
    let args = [Arg::write(&mut loss)?, Arg::read(&losses)?, Arg::size(losses.numel()), Arg::read(&labels.scale)?, Arg::U32(0)];
    device.launch("sum_f32", Grid::new(1, 1024), &args)?;
    Ok(Output { loss, rows: count, dh })
}

/// dh of a chunk's rows = gradient weight.
fn input_gradient(chunks: &Chunks<'_>, gradient: &Tensor, first: usize, dh: &mut Tensor) -> Result<()> {
    let (rows, vocab) = (gradient.dims()[0], gradient.dims()[1]);
    let (cols, dtype) = (chunks.h.dims()[1], chunks.h.dtype());
    let product = |c: u64| {
        chunks.device.gemm(&Gemm {
            m: rows,
            n: cols,
            k: vocab,
            a: Matrix { address: gradient.address()?, ld: vocab, transposed: false },
            b: Matrix { address: chunks.weight.address()?, ld: cols, transposed: false },
            c,
            ldc: cols,
            alpha: 1.0,
            accumulate: false,
            bias: None,
            input: dtype,
            output: dtype,
        })
    };
    if chunks.labels.all {
        return product(dh.address_mut()? + (first * cols * dtype.size()) as u64);
    }
    let mut d_rows = Tensor::empty(dh.arena(), dtype, [rows, cols])?;
    product(d_rows.address_mut()?)?;
    let args = [
        Arg::write(dh)?,
        Arg::read(&d_rows)?,
        Arg::read(&chunks.labels.rows.view(first, [rows])?)?,
        Arg::read(&chunks.labels.targets.view(first, [rows])?)?,
        Arg::size(cols),
    ];
    chunks.device.launch(&format!("scatter_rows_{}", suffix(OP, dtype)?), Grid::new(rows, 128), &args)
}

pub(super) fn backward_weight(
    device: CudaDevice,
    h: &Tensor,
    weight: &Tensor,
    labels: &super::Labels,
    config: Config,
    dweight: &mut TensorMut<'_>,
) -> Result<()> {
    let Some(labels) = labels.device.as_ref().filter(|labels| labels.rows.numel() > 0) else { return Ok(()) };
    let chunks = Chunks::new(device, h, weight, labels, config)?;
    let mut losses = Tensor::empty(h.arena(), DType::F32, [labels.rows.numel()])?;
    let (vocab, cols) = (weight.dims()[0], weight.dims()[1]);
    for (first, rows) in chunks.ranges() {
        let inputs = chunks.inputs(first, rows)?;
        let gradient = chunks.gradient(&inputs, first, &mut losses, true)?;
        device.gemm(&Gemm {
            m: vocab,
            n: cols,
            k: rows,
            a: Matrix { address: gradient.address()?, ld: vocab, transposed: true },
            b: Matrix { address: inputs.address()?, ld: cols, transposed: false },
            c: dweight.address()?,
            ldc: cols,
            alpha: 1.0,
            accumulate: true,
            bias: None,
            input: h.dtype(),
            output: DType::F32,
        })?;
    }
    Ok(())
}

pub(super) fn logits(device: CudaDevice, h: &Tensor, weight: &Tensor, softcap: Option<f32>) -> Result<Tensor> {
    let weight = weight.to_dtype(h.dtype())?;
    let mut logits = Tensor::empty(h.arena(), DType::F32, [h.dims()[0], weight.dims()[0]])?;
    logits_of(device, h, &weight, &mut logits)?;
    if let Some(cap) = softcap {
        let n = logits.numel();
        let args = [Arg::write(&mut logits)?, Arg::F32(cap), Arg::U64(n as u64)];
        device.launch("softcap_f32", Grid::over(n, 1024, 256), &args)?;
    }
    Ok(logits)
}

#[cfg(test)]
mod tests {
    use super::Whole;

    #[test]
    fn three_blocks_of_the_usual_vocabularies_fit_on_a_multiprocessor() {
        let usual = [(32_000, 1), (49_152, 2), (128_256, 4), (151_936, 4), (152_064, 4), (262_208, 8)];
        for (vocab, expected) in usual {
            let Some(Whole::Clusters { split, shared }) = Whole::clusters(vocab) else { panic!("{vocab} does not fit") };
            assert_eq!(split, expected, "{vocab}");
            assert!(3 * (shared as usize + 128 * (split + 1) + 1024) <= 228 << 10, "{vocab}");
        }
    }

    #[test]
    fn a_cluster_holds_the_row_or_is_not_asked_to() {
        for vocab in (8..1_000_000).step_by(1000) {
            match Whole::clusters(vocab) {
                Some(Whole::Clusters { split, shared }) => {
                    // An even number of packs of 16 bytes for each of eight warps.
                    assert!(shared.is_multiple_of(8 * 32) && split * shared as usize >= 2 * vocab, "{vocab}");
                    assert!(shared as usize + 128 * (split + 1) <= 227 << 10, "{vocab}");
                }
                other => assert!(other.is_none() && 2 * vocab > 8 * (225 << 10), "{vocab}"),
            }
        }
    }
}
