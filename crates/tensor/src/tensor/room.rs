//! Room behind the rows of a tensor on a GPU, for what an op writes beside it.

use std::{panic::Location, sync::Arc};

use super::Tensor;
use crate::{
    Arena, DType, Device, Error, Result, Shape,
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
        Ok(Self { block, dtype, shape, offset: 0, room })
    }

    /// Elements behind each row of the first size that are not the tensor's: 0 but for what an op on a GPU made for layers with
    /// adapters.
    #[must_use]
    pub fn room(&self) -> usize {
        self.room
    }

    /// Bytes from the first element to the end of the last row's room.
    pub(crate) fn span(&self) -> usize {
        self.bytes() + self.room * self.dims().first().copied().unwrap_or(0) * self.dtype.size()
    }

    /// The address of the first element, and elements from one row of the first size to the next, room included.
    pub(crate) fn rows_address(&self) -> Result<(u64, usize)> {
        let row: usize = self.dims().iter().skip(1).product();
        Ok((self.first_address()?, row + self.room))
    }

    /// The same for writing: the only handle.
    pub(crate) fn rows_address_mut(&mut self) -> Result<(u64, usize)> {
        if self.is_unique() { self.rows_address() } else { Err(Error::Shared { op: "write" }) }
    }

    /// A tensor without room behind its rows: itself, or a copy.
    pub(crate) fn dense(&self) -> Result<Self> {
        let Device::Cuda(device) = self.device() else { return Ok(self.clone()) };
        if self.room == 0 {
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
