//! What the products of one call share: sizes, and the adapters' matrices in the type of the activations.

use super::super::{Adapter, Dropout, MANY_TOKENS, OP, Part};
use crate::{
    Arena, DType, Error, Result, Shape, Tensor, ahead,
    cuda::{Arg, CudaDevice, Gemm, Grid, Matrix, suffix},
    ops::few,
};

/// Rows of a tensor as an operand.
pub(super) fn rows(x: &Tensor) -> Result<Matrix> {
    let (address, pitch) = x.rows_address()?;
    let ld = if x.is_dense() { x.shape().last() } else { pitch };
    Ok(Matrix { address, ld, transposed: false })
}

pub(super) fn transposed(matrix: Matrix) -> Matrix {
    Matrix { transposed: true, ..matrix }
}

/// Columns `first ..` of a matrix.
pub(super) fn columns(matrix: Matrix, first: usize, dtype: DType) -> Matrix {
    Matrix { address: matrix.address + (first * dtype.size()) as u64, ..matrix }
}

/// The layers of one call, and what their products share.
pub(super) struct Call<'x, 'p> {
    pub(super) device: CudaDevice,
    /// The input, until it is let go.
    input: Option<&'x Tensor>,
    pub(super) arena: Arena,
    pub(super) shape: Shape,
    pub(super) parts: &'p [Part],
    pub(super) dtype: DType,
    pub(super) tokens: usize,
    pub(super) inputs: usize,
    /// A and B of each part that has an adapter.
    pub(super) pairs: Vec<Option<(Tensor, Tensor)>>,
    /// First column of each part in h and t.
    pub(super) offsets: Vec<usize>,
    /// ΣR.
    pub(super) ranks: usize,
    /// Whether the A lie one after another, as they are kept, and nothing is dropped: then the first A's address is that of all.
    pub(super) stacked: bool,
}

impl<'x, 'p> Call<'x, 'p> {
    pub(super) fn new(device: CudaDevice, x: &'x Tensor, parts: &'p [Part]) -> Result<Self> {
        Ok(Self { input: Some(x), ..Self::of_shape(device, x.arena(), x.dtype(), x.shape(), parts)? })
    }

    /// Of an input that is not there.
    pub(super) fn of_shape(device: CudaDevice, arena: &Arena, dtype: DType, shape: Shape, parts: &'p [Part]) -> Result<Self> {
        let (tokens, inputs) = (shape.rows(), shape.last());
        let (pairs, offsets, input, arena) = (Vec::new(), Vec::new(), None, arena.clone());
        let mut call =
            Self { device, input, arena, shape, parts, dtype, tokens, inputs, pairs, offsets, ranks: 0, stacked: true };
        let mut next = None;
        for part in parts {
            call.offsets.push(call.ranks);
            let Some(adapter) = &part.adapter else {
                call.pairs.push(None);
                continue;
            };
            let (a, b) = (adapter.a.to_dtype(call.dtype)?, adapter.b.to_dtype(call.dtype)?);
            let address = a.address()?;
            // Copies made here may come to lie side by side by chance; results must not depend on that.
            let in_place = adapter.a.dtype() == call.dtype;
            call.stacked &= in_place && adapter.dropout.is_none() && next.is_none_or(|next| next == address);
            next = Some(address + (a.numel() * call.dtype.size()) as u64);
            call.ranks += a.dims()[0];
            call.pairs.push(Some((a, b)));
        }
        Ok(call)
    }

    /// The input.
    pub(super) fn x(&self) -> Result<&'x Tensor> {
        self.input.ok_or(Error::Argument { op: OP, argument: "x", expected: "the input, which was let go", found: 0 })
    }

    /// The same call over `x`, of the shape that it was made for.
    pub(super) fn with_input<'y>(self, x: &'y Tensor) -> Call<'y, 'p> {
        Call { input: Some(x), ..self }
    }

    /// The same call without its input, whose memory may be needed.
    pub(super) fn without_input(self) -> Call<'static, 'p> {
        Call { input: None, ..self }
    }

    /// Memory for the h or t of all parts side by side, [T, ΣR]; nothing without adapters.
    pub(super) fn narrow(&self) -> Result<Option<Tensor>> {
        (self.ranks > 0).then(|| Tensor::empty(&self.arena, self.dtype, [self.tokens, self.ranks])).transpose()
    }

    /// A of all parts.
    pub(super) fn all_a(&self) -> Result<Option<Matrix>> {
        let first = self.pairs.iter().flatten().next().filter(|_| self.stacked);
        first.map(|(a, _)| rows(a)).transpose()
    }

    /// Whether `part`'s adapter may ride in the columns beside its base: [W | s B].
    pub(super) fn rides(&self, part: &Part) -> bool {
        use crate::Weight;
        self.ranks > 0
            && self.dtype != DType::F32
            && self.tokens >= MANY_TOKENS
            && self.ranks.is_multiple_of(8)
            && !matches!(part.weight, Weight::Dense(_))
    }

    /// A product into `c`, in the activations' type.
    pub(super) fn gemm(
        &self,
        [m, n, k]: [usize; 3],
        a: Matrix,
        b: Matrix,
        c: Matrix,
        alpha: f32,
        accumulate: bool,
    ) -> Result<()> {
        let (input, output) = (self.dtype, self.dtype);
        let gemm = Gemm { m, n, k, a, b, c: c.address, ldc: c.ld, alpha, accumulate, bias: None, input, output };
        if few::product(self.device, &gemm)? { Ok(()) } else { ahead::gemm(self.device, &self.arena, &gemm) }
    }

    /// c += alpha aᵀ b over the tokens, in f32.
    pub(super) fn add_gradient(&self, [m, n]: [usize; 2], a: Matrix, b: Matrix, c: u64, alpha: f32) -> Result<()> {
        let (k, accumulate, bias) = (self.tokens, true, None);
        let (input, output) = (self.dtype, DType::F32);
        self.device.gemm(&Gemm { m, n, k, a: transposed(a), b, c, ldc: n, alpha, accumulate, bias, input, output })
    }

    /// A [tokens, cols] matrix copied into rows of another pitch.
    pub(super) fn copy(&self, to: Matrix, from: Matrix, cols: usize) -> Result<()> {
        self.copy_rows([self.tokens, cols], to, from)
    }

    /// A [rows, cols] matrix copied into rows of another pitch.
    pub(super) fn copy_rows(&self, [rows, cols]: [usize; 2], to: Matrix, from: Matrix) -> Result<()> {
        let args = [
            Arg::Pointer(to.address),
            Arg::Pointer(from.address),
            Arg::size(rows),
            Arg::size(cols),
            Arg::size(to.ld),
            Arg::size(from.ld),
        ];
        let each = 512 * 16 / self.dtype.size();
        let name = format!("copy_strided_{}", suffix(OP, self.dtype)?);
        self.device.launch_early(&name, Grid::over(rows * cols, each, 256), &args)
    }

    /// x with the dropout of `adapter`.
    pub(super) fn dropped(&self, adapter: &Adapter) -> Result<Option<Tensor>> {
        let Some(dropout) = adapter.dropout else { return Ok(None) };
        let x = &self.x()?.dense()?;
        let mut out = Tensor::empty(&self.arena, self.dtype, self.shape)?;
        let name = format!("dropout_{}", suffix(OP, self.dtype)?);
        let args = [Arg::write(&mut out)?, Arg::read(x)?];
        self.mask(&name, &args, x.numel(), dropout)?;
        Ok(Some(out))
    }

    pub(super) fn mask(&self, name: &str, tensors: &[Arg; 2], n: usize, dropout: Dropout) -> Result<()> {
        let (root, path, depth) = dropout.rng.parts();
        let key = Arg::Pointer(self.device.dropout_root(root)?);
        let rest = [key, Arg::U64(path), Arg::U32(depth), Arg::F32(dropout.p), Arg::U64(n as u64)];
        // Each block derives the mask's key first: few blocks that take their turns.
        let blocks = n.div_ceil(512 * 16 / self.dtype.size()).min(8 * self.device.info().multiprocessors);
        self.device.launch(name, Grid::new(blocks, 256), &[&tensors[..], &rest].concat())
    }
}
