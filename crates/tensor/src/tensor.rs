//! Contiguous memory with a shape and an element type.

use std::{marker::PhantomData, panic::Location, sync::Arc};

use crate::{
    Arena, DType, Device, Element, Error, Float, Result, Shape, TensorMut,
    ahead::WeakRequest,
    arena::{Block, Find},
    cuda::{Arg, Grid, suffix},
    dtype::with_float,
    view_mut::MemoryMut,
};

/// A contiguous view of memory with a shape and an element type.
///
/// On a GPU there may be room behind each row of the first size, for an op that reads the tensor beside values of its own
/// (`room`), or the rows of other tensors, for an op that reads them as one matrix (`side_by_side`); what does not know of it
/// refuses such a tensor.
///
/// Cloning and [`Tensor::reshape`] share the memory; writing needs the only handle ([`Error::Shared`] otherwise), so what an
/// op saved for its backward cannot change under it.
#[derive(Clone, Debug)]
pub struct Tensor {
    block: Arc<Block>,
    dtype: DType,
    shape: Shape,
    /// In elements.
    offset: usize,
    /// Elements between one row of the first size and the next.
    gap: usize,
    /// Those of them right behind the row that are this tensor's to fill.
    room: usize,
}

impl Tensor {
    /// Memory with unspecified content.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    #[track_caller]
    pub fn empty(arena: &Arena, dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let block = Arc::new(arena.take(shape.numel() * dtype.size(), Location::caller())?);
        Ok(Self { block, dtype, shape, offset: 0, gap: 0, room: 0 })
    }

    /// The same on a GPU, where `find` says, if it does.
    #[track_caller]
    pub(crate) fn placed(arena: &Arena, dtype: DType, shape: impl Into<Shape>, find: impl Find) -> Result<Self> {
        let shape = shape.into();
        let block = Arc::new(arena.take_placed(shape.numel() * dtype.size(), Location::caller(), find)?);
        Ok(Self { block, dtype, shape, offset: 0, gap: 0, room: 0 })
    }

    /// Whoever asks for these weights finds them in its memory when nobody holds it any more; the only handle remembers.
    pub(crate) fn remember(&mut self, holds: WeakRequest) {
        if let Some(block) = Arc::get_mut(&mut self.block) {
            block.remember(holds);
        }
    }

    /// Zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    #[track_caller]
    pub fn zeros(arena: &Arena, dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let mut tensor = Self::empty(arena, dtype, shape)?;
        tensor.set_zero()?;
        Ok(tensor)
    }

    /// Sets all elements to zero.
    ///
    /// # Errors
    /// [`Error::Shared`] when another handle lives.
    pub fn set_zero(&mut self) -> Result<()> {
        match self.device() {
            Device::Cpu => self.bytes_mut("set_zero")?.fill(0),
            Device::Cuda(device) => device.fill(self.address_mut()?, 0, self.bytes())?,
        }
        Ok(())
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the lengths differ, [`Error::OutOfMemory`].
    #[track_caller]
    pub fn from_slice<E: Element>(arena: &Arena, values: &[E], shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if shape.numel() != values.len() {
            return Err(Error::Shape { op: "from_slice", operand: "values", expected: shape, found: [values.len()].into() });
        }
        let mut tensor = Self::empty(arena, E::DTYPE, shape)?;
        tensor.write(values)?;
        Ok(tensor)
    }

    /// Copies `values` from the host over the elements.
    ///
    /// # Errors
    /// [`Error::Shape`] when the lengths differ, [`Error::DType`], [`Error::Shared`] when another handle lives.
    pub fn write<E: Element>(&mut self, values: &[E]) -> Result<()> {
        self.expect_dtype("write", E::DTYPE)?;
        if values.len() != self.numel() {
            return Err(Error::Shape { op: "write", operand: "values", expected: self.shape, found: [values.len()].into() });
        }
        match self.device() {
            Device::Cpu => self.as_mut_slice::<E>()?.copy_from_slice(values),
            Device::Cuda(device) => device.upload(self.address_mut()?, bytemuck::cast_slice(values))?,
        }
        Ok(())
    }

    /// `pattern` again and again: large made-up tensors without as much memory on the host.
    ///
    /// # Errors
    /// [`Error::Argument`] for an empty pattern, [`Error::OutOfMemory`].
    #[track_caller]
    pub fn tiled<E: Element>(arena: &Arena, pattern: &[E], shape: impl Into<Shape>) -> Result<Self> {
        if pattern.is_empty() {
            return Err(Error::Argument { op: "tiled", argument: "pattern", expected: "at least one element", found: 0 });
        }
        let mut tensor = Self::empty(arena, E::DTYPE, shape)?;
        for chunk in tensor.view_mut()?.chunks(pattern.len()) {
            chunk.write(pattern)?;
        }
        Ok(tensor)
    }

    /// The elements, copied to the host.
    ///
    /// # Errors
    /// [`Error::DType`] when `E` is not the tensor's element type.
    pub fn to_vec<E: Element>(&self) -> Result<Vec<E>> {
        match self.device() {
            Device::Cpu => Ok(self.as_slice::<E>()?.to_vec()),
            Device::Cuda(device) => {
                self.expect_dtype("to_vec", E::DTYPE)?;
                let mut values = vec![E::zeroed(); self.numel()];
                device.download(bytemuck::cast_slice_mut(&mut values), self.dense()?.address()?)?;
                Ok(values)
            }
        }
    }

    /// A copy on the device of `arena`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    #[track_caller]
    pub fn to_arena(&self, arena: &Arena) -> Result<Self> {
        let mut out = Self::empty(arena, self.dtype, self.shape)?;
        match (self.device(), arena.device()) {
            (Device::Cpu, Device::Cpu) => out.bytes_mut("to_arena")?.copy_from_slice(self.host_bytes("to_arena")?),
            (Device::Cpu, Device::Cuda(device)) => device.upload(out.address_mut()?, self.host_bytes("to_arena")?)?,
            (Device::Cuda(device), Device::Cpu) => device.download(out.bytes_mut("to_arena")?, self.dense()?.address()?)?,
            (Device::Cuda(_), Device::Cuda(device)) => device.copy(out.address_mut()?, self.dense()?.address()?, self.bytes())?,
        }
        Ok(out)
    }

    /// The sizes.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The sizes as a slice.
    #[must_use]
    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    /// Number of elements.
    #[must_use]
    pub fn numel(&self) -> usize {
        self.shape.numel()
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device the memory is on.
    #[must_use]
    pub fn device(&self) -> Device {
        self.arena().device()
    }

    /// The arena the memory came from: outputs of an op are taken from the arena of its first operand.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        self.block.arena()
    }

    /// The same memory under other sizes: with gaps between the rows, under sizes with as many rows.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of elements differs.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if shape.numel() != self.numel() || (self.gap > 0 && shape.dims().first() != self.dims().first()) {
            return Err(Error::Shape { op: "reshape", operand: "self", expected: shape, found: self.shape });
        }
        Ok(Self { shape, ..self.clone() })
    }

    /// `shape` of elements from `offset` on, sharing the memory.
    ///
    /// # Errors
    /// [`Error::Shape`] when they reach beyond the end.
    pub fn view(&self, offset: usize, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if offset + shape.numel() > self.numel() || self.gap > 0 {
            return Err(Error::Shape { op: "view", operand: "self", expected: shape, found: self.shape });
        }
        Ok(Self { shape, offset: self.offset + offset, ..self.clone() })
    }

    /// Rows `start .. start + rows` of the first size, sharing the memory.
    ///
    /// # Errors
    /// [`Error::Shape`] when they reach beyond the end.
    pub fn rows(&self, start: usize, rows: usize) -> Result<Self> {
        let row: usize = self.dims()[1..].iter().product();
        let mut dims = self.shape;
        dims.set_first(rows);
        if start + rows > self.dims()[0] {
            return Err(Error::Shape { op: "view", operand: "self", expected: dims, found: self.shape });
        }
        Ok(Self { shape: dims, offset: self.offset + start * (row + self.gap), ..self.clone() })
    }

    /// Whether the other tensor is the same elements in the same memory, in any shape.
    #[must_use]
    pub fn is_same_memory(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.block, &other.block) && self.byte_range() == other.byte_range()
    }

    /// Whether this is the only handle to the memory, so that an op may write its result over it.
    #[must_use]
    pub fn is_unique(&self) -> bool {
        Arc::strong_count(&self.block) == 1
    }

    /// The elements, on the CPU.
    ///
    /// # Errors
    /// [`Error::DType`] when `E` is not the tensor's element type.
    pub fn as_slice<E: Element>(&self) -> Result<&[E]> {
        self.expect_dtype("as_slice", E::DTYPE)?;
        Ok(bytemuck::cast_slice(self.host_bytes("as_slice")?))
    }

    /// The elements for writing, on the CPU.
    ///
    /// # Errors
    /// [`Error::DType`] when `E` is not the element type, [`Error::Shared`] when another handle lives.
    pub fn as_mut_slice<E: Element>(&mut self) -> Result<&mut [E]> {
        self.expect_dtype("as_mut_slice", E::DTYPE)?;
        Ok(bytemuck::cast_slice_mut(self.bytes_mut("as_mut_slice")?))
    }

    /// A view for writing.
    ///
    /// # Errors
    /// [`Error::Shared`] when another handle lives.
    pub fn view_mut(&mut self) -> Result<TensorMut<'_>> {
        let (dtype, shape, device) = (self.dtype, self.shape, self.device());
        let memory = match device {
            Device::Cpu => MemoryMut::Host(self.bytes_mut("view_mut")?),
            Device::Cuda(_) => MemoryMut::Device(self.address_mut()?, PhantomData),
        };
        Ok(TensorMut::new(memory, dtype, shape, device))
    }

    /// Views of disjoint parts (offset in elements and shape, each) for writing at the same time, in the order given.
    ///
    /// # Errors
    /// [`Error::Shared`] when another handle lives, [`Error::Shape`] when parts overlap or reach beyond the end.
    pub fn views_mut(&mut self, parts: &[(usize, Shape)]) -> Result<Vec<TensorMut<'_>>> {
        let (dtype, shape, device) = (self.dtype, self.shape, self.device());
        let size = dtype.size();
        let mut order: Vec<usize> = (0..parts.len()).collect();
        order.sort_by_key(|&i| parts[i].0);
        let mut rest = match device {
            Device::Cpu => MemoryMut::Host(self.bytes_mut("views_mut")?),
            Device::Cuda(_) => MemoryMut::Device(self.address_mut()?, PhantomData),
        };
        let mut at = 0;
        let mut views = Vec::with_capacity(parts.len());
        for i in order {
            let (offset, part) = parts[i];
            let end = offset + part.numel();
            if offset < at || end > shape.numel() {
                return Err(Error::Shape { op: "views_mut", operand: "parts", expected: shape, found: [end].into() });
            }
            let (memory, tail) = rest.split((offset - at) * size, (end - offset) * size);
            views.push((i, TensorMut::new(memory, dtype, part, device)));
            (rest, at) = (tail, end);
        }
        views.sort_by_key(|(i, _)| *i);
        Ok(views.into_iter().map(|(_, view)| view).collect())
    }

    /// The elements widened or converted to f32, copied to the host; none from a dry device, which holds none.
    ///
    /// # Errors
    /// [`Error::DType`] for integer tensors.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        if matches!(self.device(), Device::Cuda(device) if device.is_dry()) {
            return Ok(Vec::new());
        }
        if self.device() != Device::Cpu {
            return with_float!(self.dtype, "to_f32_vec", "self", E => {
                Ok(self.to_vec::<E>()?.into_iter().map(Float::to_f32).collect())
            });
        }
        with_float!(self.dtype, "to_f32_vec", "self", E => Ok(self.as_slice::<E>()?.iter().map(|&x| Float::to_f32(x)).collect()))
    }

    /// A copy in another floating-point type (rounded to nearest even).
    ///
    /// # Errors
    /// [`Error::DType`] for integer types, [`Error::OutOfMemory`].
    #[track_caller]
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype {
            return Ok(self.clone());
        }
        let mut out = Self::empty(self.arena(), dtype, self.shape)?;
        self.convert_into(&mut out)?;
        Ok(out)
    }

    /// Writes the elements over `out`, in its type (rounded to nearest even).
    ///
    /// # Errors
    /// [`Error::Shape`] when the shapes differ, [`Error::DType`] for integer types, [`Error::Shared`].
    pub fn convert_into(&self, out: &mut Self) -> Result<()> {
        const OP: &str = "convert_into";
        out.expect_shape(OP, "out", self.shape)?;
        let dtype = out.dtype;
        if let Device::Cuda(device) = self.device() {
            if dtype == self.dtype {
                return device.copy(out.address_mut()?, self.address()?, self.bytes());
            }
            let name = format!("cast_{}_{}", suffix(OP, self.dtype)?, suffix(OP, dtype)?);
            let (y, x) = (Arg::write(out)?, Arg::read(self)?);
            // Two packs of 16 bytes of the narrower type a thread.
            return device.launch(&name, Grid::over(self.numel(), 4096, 256), &[y, x, Arg::U64(self.numel() as u64)]);
        }
        with_float!(self.dtype, OP, "self", E => {
            let source = self.as_slice::<E>()?;
            with_float!(dtype, OP, "out", F => {
                for (y, x) in out.as_mut_slice::<F>()?.iter_mut().zip(source) {
                    *y = F::from_f32(Float::to_f32(*x));
                }
                Ok(())
            })
        })
    }

    /// Copies the rows of `source` over rows `start ..` of the first size.
    ///
    /// # Errors
    /// [`Error::Shape`] when they reach beyond the end, [`Error::DType`], [`Error::Shared`].
    pub fn copy_rows(&mut self, start: usize, source: &Self) -> Result<()> {
        let place = self.rows(start, source.dims()[0])?;
        source.expect_shape("copy_rows", "source", place.shape)?;
        source.expect_dtype("copy_rows", self.dtype)?;
        let size = self.dtype.size();
        let (at, len) = ((place.offset - self.offset) * size, source.numel() * size);
        drop(place);
        match self.device() {
            Device::Cpu => {
                let from = source.host_bytes("copy_rows")?;
                self.bytes_mut("copy_rows")?[at..at + len].copy_from_slice(from);
            }
            Device::Cuda(device) => device.copy(self.address_mut()? + at as u64, source.address()?, len)?,
        }
        Ok(())
    }

    /// Checks a shape on behalf of `op`.
    ///
    /// # Errors
    /// [`Error::Shape`] naming the operand.
    pub fn expect_shape(&self, op: &'static str, operand: &'static str, expected: impl Into<Shape>) -> Result<()> {
        let expected = expected.into();
        if self.shape == expected { Ok(()) } else { Err(Error::Shape { op, operand, expected, found: self.shape }) }
    }

    fn expect_dtype(&self, op: &'static str, expected: DType) -> Result<()> {
        if self.dtype == expected {
            return Ok(());
        }
        Err(Error::DType { op, operand: "self", expected: expected.name(), found: self.dtype })
    }

    /// Bytes of the elements.
    fn bytes(&self) -> usize {
        self.numel() * self.dtype.size()
    }

    fn byte_range(&self) -> std::ops::Range<usize> {
        let size = self.dtype.size();
        self.offset * size..(self.offset + self.numel()) * size
    }

    pub(crate) fn host_bytes(&self, op: &'static str) -> Result<&[u8]> {
        Ok(&self.block.bytes(op)?[self.byte_range()])
    }

    /// Copies host bytes over the elements of a tensor of the CPU.
    pub(crate) fn write_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes_mut("write")?.copy_from_slice(bytes);
        Ok(())
    }

    fn bytes_mut(&mut self, op: &'static str) -> Result<&mut [u8]> {
        let range = self.byte_range();
        let block = Arc::get_mut(&mut self.block).ok_or(Error::Shared { op })?;
        Ok(&mut block.bytes_mut(op)?[range])
    }

    /// The address of the first element on the device.
    pub(crate) fn address(&self) -> Result<u64> {
        if self.gap > 0 {
            return Err(Error::Cuda { call: "address", reason: "expected a tensor without gaps between its rows".into() });
        }
        self.first_address()
    }

    fn first_address(&self) -> Result<u64> {
        let address = self.block.address().ok_or(Error::Cuda { call: "address", reason: "the tensor is on the host".into() })?;
        Ok(address + self.byte_range().start as u64)
    }

    /// The same for writing: the only handle.
    pub(crate) fn address_mut(&mut self) -> Result<u64> {
        if self.is_unique() { self.address() } else { Err(Error::Shared { op: "write" }) }
    }
}

mod room;
mod weak;

pub(crate) use weak::WeakTensor;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shared_tensor_cannot_be_written() {
        let arena = Arena::new(Device::Cpu);
        let mut a = Tensor::zeros(&arena, DType::F32, [4]).unwrap();
        let b = a.clone();
        assert!(matches!(a.as_mut_slice::<f32>(), Err(Error::Shared { .. })));
        drop(b);
        a.as_mut_slice::<f32>().unwrap()[0] = 1.0;
    }

    #[test]
    fn rows_share_memory_and_check_the_end() {
        let arena = Arena::new(Device::Cpu);
        let a = Tensor::from_slice(&arena, &[1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0], [3, 2]).unwrap();
        assert_eq!(a.rows(1, 2).unwrap().as_slice::<f32>().unwrap(), &[3.0, 4.0, 5.0, 6.0]);
        assert!(a.rows(2, 2).is_err());
    }

    #[test]
    fn disjoint_parts_are_written_together_and_overlaps_refused() {
        let arena = Arena::new(Device::Cpu);
        let mut a = Tensor::zeros(&arena, DType::F32, [6]).unwrap();
        let mut views = a.views_mut(&[(4, [2].into()), (0, [2, 2].into())]).unwrap();
        views[0].as_mut_slice::<f32>().unwrap().fill(2.0);
        views[1].as_mut_slice::<f32>().unwrap().fill(1.0);
        assert_eq!(a.as_slice::<f32>().unwrap(), &[1.0, 1.0, 1.0, 1.0, 2.0, 2.0]);
        assert!(a.views_mut(&[(0, [3].into()), (2, [3].into())]).is_err());
    }
}
