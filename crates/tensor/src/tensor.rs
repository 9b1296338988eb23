//! Contiguous memory with a shape and an element type.

use std::sync::Arc;

use crate::{Arena, DType, Device, Element, Error, Float, Result, Shape, TensorMut, arena::Block, dtype::with_float};

/// A contiguous view of memory with a shape and an element type.
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
}

impl Tensor {
    /// Memory with unspecified content.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn empty(arena: &Arena, dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        let block = Arc::new(arena.take(shape.numel() * dtype.size())?);
        Ok(Self { block, dtype, shape, offset: 0 })
    }

    /// Zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn zeros(arena: &Arena, dtype: DType, shape: impl Into<Shape>) -> Result<Self> {
        let mut tensor = Self::empty(arena, dtype, shape)?;
        tensor.bytes_mut("zeros")?.fill(0);
        Ok(tensor)
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the lengths differ, [`Error::OutOfMemory`].
    pub fn from_slice<E: Element>(arena: &Arena, values: &[E], shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if shape.numel() != values.len() {
            return Err(Error::Shape { op: "from_slice", operand: "values", expected: shape, found: [values.len()].into() });
        }
        let mut tensor = Self::empty(arena, E::DTYPE, shape)?;
        tensor.as_mut_slice::<E>()?.copy_from_slice(values);
        Ok(tensor)
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

    /// The same memory under other sizes.
    ///
    /// # Errors
    /// [`Error::Shape`] when the number of elements differs.
    pub fn reshape(&self, shape: impl Into<Shape>) -> Result<Self> {
        self.view(0, shape).and_then(|view| {
            if view.numel() == self.numel() {
                Ok(view)
            } else {
                Err(Error::Shape { op: "reshape", operand: "self", expected: view.shape, found: self.shape })
            }
        })
    }

    /// `shape` of elements from `offset` on, sharing the memory.
    ///
    /// # Errors
    /// [`Error::Shape`] when they reach beyond the end.
    pub fn view(&self, offset: usize, shape: impl Into<Shape>) -> Result<Self> {
        let shape = shape.into();
        if offset + shape.numel() > self.numel() {
            return Err(Error::Shape { op: "view", operand: "self", expected: shape, found: self.shape });
        }
        Ok(Self { block: Arc::clone(&self.block), dtype: self.dtype, shape, offset: self.offset + offset })
    }

    /// Rows `start .. start + rows` of the first size, sharing the memory.
    ///
    /// # Errors
    /// [`Error::Shape`] when they reach beyond the end.
    pub fn rows(&self, start: usize, rows: usize) -> Result<Self> {
        let row: usize = self.dims()[1..].iter().product();
        let mut dims = self.shape;
        dims.set_first(rows);
        self.view(start * row, dims)
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
        let size = self.dtype.size();
        Ok(bytemuck::cast_slice(&self.block.bytes()[self.offset * size..(self.offset + self.numel()) * size]))
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
        Ok(TensorMut::new(self.bytes_mut("view_mut")?, dtype, shape, device))
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
        let mut rest = self.bytes_mut("views_mut")?;
        let mut at = 0;
        let mut views = Vec::with_capacity(parts.len());
        for i in order {
            let (offset, part) = parts[i];
            let end = offset + part.numel();
            if offset < at || end > shape.numel() {
                return Err(Error::Shape { op: "views_mut", operand: "parts", expected: shape, found: [end].into() });
            }
            let (_, tail) = rest.split_at_mut((offset - at) * size);
            let (bytes, tail) = tail.split_at_mut((end - offset) * size);
            views.push((i, TensorMut::new(bytes, dtype, part, device)));
            (rest, at) = (tail, end);
        }
        views.sort_by_key(|(i, _)| *i);
        Ok(views.into_iter().map(|(_, view)| view).collect())
    }

    /// The elements widened or converted to f32, copied to the host.
    ///
    /// # Errors
    /// [`Error::DType`] for integer tensors.
    pub fn to_f32_vec(&self) -> Result<Vec<f32>> {
        with_float!(self.dtype, "to_f32_vec", "self", E => Ok(self.as_slice::<E>()?.iter().map(|&x| Float::to_f32(x)).collect()))
    }

    /// A copy in another floating-point type (rounded to nearest even).
    ///
    /// # Errors
    /// [`Error::DType`] for integer types, [`Error::OutOfMemory`].
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        if dtype == self.dtype {
            return Ok(self.clone());
        }
        let mut out = Self::empty(self.arena(), dtype, self.shape)?;
        with_float!(self.dtype, "to_dtype", "self", E => {
            let source = self.as_slice::<E>()?;
            with_float!(dtype, "to_dtype", "dtype", F => {
                for (y, x) in out.as_mut_slice::<F>()?.iter_mut().zip(source) {
                    *y = F::from_f32(Float::to_f32(*x));
                }
                Ok(())
            })
        })?;
        Ok(out)
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
        let from = &source.block.bytes()[source.offset * size..][..len];
        self.bytes_mut("copy_rows")?[at..at + len].copy_from_slice(from);
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

    fn bytes_mut(&mut self, op: &'static str) -> Result<&mut [u8]> {
        let size = self.dtype.size();
        let range = self.offset * size..(self.offset + self.numel()) * size;
        let block = Arc::get_mut(&mut self.block).ok_or(Error::Shared { op })?;
        Ok(&mut block.bytes_mut()[range])
    }
}

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
