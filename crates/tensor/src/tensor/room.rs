//! Gaps between the rows of a tensor on a GPU: room for what an op writes beside it, and the rows of others.

use std::{panic::Location, sync::Arc};

use super::Tensor;
use crate::{
    Arena, DType, Device, Error, Result, Shape,
    arena::Block,
    cuda::{Arg, Grid, suffix},
};

impl Tensor {
    /// Memory with unspecified content, on a GPU with room for `room` elements behind each row of the first size; on the CPU there
    /// is none.
    #[track_caller]
    pub(crate) fn with_room(arena: &Arena, dtype: DType, shape: impl Into<Shape>, room: usize) -> Result<Self> {
        let shape = shape.into();
        let room = if arena.device() == Device::Cpu { 0 } else { room };
        let elements = shape.numel() + room * shape.dims().first().copied().unwrap_or(0);
        let block = Arc::new(arena.take(elements * dtype.size(), Location::caller())?);
        Ok(Self { block, dtype, shape, offset: 0, gap: room, room })
    }

    /// Memory with unspecified content for tensors of as many rows: on a GPU each row of the first, then that of the second and so on,
    /// with room for `room` elements behind that of the last. Each is written as if it had its memory alone.
    #[track_caller]
    pub(crate) fn side_by_side<const N: usize>(
        arena: &Arena,
        dtype: DType,
        shapes: [Shape; N],
        room: usize,
    ) -> Result<[Self; N]> {
        let cols = shapes.map(|shape| shape.dims().iter().skip(1).product::<usize>());
        let (rows, pitch) = (shapes.first().map_or(0, |shape| shape.dims()[0]), cols.iter().sum::<usize>() + room);
        // On the CPU nothing reads them as one.
        let whole = match arena.device() {
            Device::Cpu => None,
            Device::Cuda(_) => Some(Arc::new(arena.take(rows * pitch * dtype.size(), Location::caller())?)),
        };
        let mut tensors = Vec::with_capacity(N);
        let mut offset = 0;
        for (i, (shape, cols)) in shapes.into_iter().zip(cols).enumerate() {
            tensors.push(match &whole {
                None => Self::empty(arena, dtype, shape)?,
                Some(whole) => {
                    let (block, room) = (Arc::new(Block::share(whole)), if i + 1 == N { room } else { 0 });
                    Self { block, dtype, shape, offset, gap: pitch - cols, room }
                }
            });
            offset += cols;
        }
        let mut tensors = tensors.into_iter();
        // invariant: one tensor a shape
        Ok(std::array::from_fn(|_| tensors.next().expect("one tensor a shape")))
    }

    /// Whether both were made side by side, and each row of this tensor lies right behind that of `before`.
    pub(crate) fn continues(&self, before: &Self) -> bool {
        let cols = before.numel() / before.dims().first().copied().unwrap_or(1).max(1);
        self.block.shares_with(&before.block) && self.dtype == before.dtype && self.offset == before.offset + cols
    }

    /// Whether a row of the first size begins where the one before it ends.
    pub(crate) fn is_dense(&self) -> bool {
        self.gap == 0
    }

    /// Elements behind each row of the first size that an op may write beside it: 0 but for what an op on a GPU made for layers
    /// with adapters.
    #[must_use]
    pub fn room(&self) -> usize {
        self.room
    }

    /// Bytes from the first element to the end of the last row's room, of a tensor without rows of others between its own.
    pub(crate) fn span(&self) -> usize {
        self.bytes() + self.room * self.dims().first().copied().unwrap_or(0) * self.dtype.size()
    }

    /// The address of the first element, and elements from one row of the first size to the next, the gap included.
    pub(crate) fn rows_address(&self) -> Result<(u64, usize)> {
        let row: usize = self.dims().iter().skip(1).product();
        Ok((self.first_address()?, row + self.gap))
    }

    /// The same for writing: the only handle.
    pub(crate) fn rows_address_mut(&mut self) -> Result<(u64, usize)> {
        if self.is_unique() { self.rows_address() } else { Err(Error::Shared { op: "write" }) }
    }

    /// Refuses a tensor with rows of others between its own.
    pub(crate) fn expect_alone(&self, op: &'static str) -> Result<()> {
        if self.gap == self.room { Ok(()) } else { Err(Error::Shared { op }) }
    }

    /// A tensor without gaps between its rows: itself, or a copy.
    pub(crate) fn dense(&self) -> Result<Self> {
        let Device::Cuda(device) = self.device() else { return Ok(self.clone()) };
        if self.is_dense() {
            return Ok(self.clone());
        }
        let out = Self::empty(self.arena(), self.dtype, self.shape)?;
        let ((to, cols), (from, pitch)) = (out.rows_address()?, self.rows_address()?);
        let rows = self.dims()[0];
        let args = [to, from].map(Arg::Pointer).into_iter().chain([rows, cols, cols, pitch].map(Arg::size));
        let name = format!("copy_strided_{}", suffix("dense", self.dtype)?);
        device.launch(&name, Grid::over(self.numel(), 512 * 16 / self.dtype.size(), 256), &args.collect::<Vec<_>>())?;
        Ok(out)
    }
}
