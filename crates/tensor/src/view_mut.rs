//! A borrowed part of a tensor, for writing.

use std::marker::PhantomData;

use crate::{
    DType, Device, Element, Error, Result, Shape,
    cuda::{Arg, Grid, suffix},
};

/// A part of a tensor borrowed for writing: gradients of one parameter inside the flat buffer of all.
#[derive(Debug)]
pub struct TensorMut<'a> {
    memory: MemoryMut<'a>,
    dtype: DType,
    shape: Shape,
    device: Device,
}

/// Where the elements are.
#[derive(Debug)]
pub(crate) enum MemoryMut<'a> {
    Host(&'a mut [u8]),
    /// The address of the first element, borrowed as long as the tensor is.
    Device(u64, PhantomData<&'a mut ()>),
}

impl MemoryMut<'_> {
    /// `len` bytes after the first `skip`, and what follows them.
    pub(crate) fn split(self, skip: usize, len: usize) -> (Self, Self) {
        match self {
            Self::Host(bytes) => {
                let (_, tail) = bytes.split_at_mut(skip);
                let (part, tail) = tail.split_at_mut(len);
                (Self::Host(part), Self::Host(tail))
            }
            Self::Device(address, _) => {
                let at = address + skip as u64;
                (Self::Device(at, PhantomData), Self::Device(at + len as u64, PhantomData))
            }
        }
    }
}

impl<'a> TensorMut<'a> {
    pub(crate) fn new(memory: MemoryMut<'a>, dtype: DType, shape: Shape, device: Device) -> Self {
        Self { memory, dtype, shape, device }
    }

    /// The element type.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The address on the device.
    pub(crate) fn address(&mut self) -> Result<u64> {
        match self.memory {
            MemoryMut::Host(_) => Err(Error::Cuda { call: "address", reason: "the tensor is on the host".into() }),
            MemoryMut::Device(address, _) => Ok(address),
        }
    }

    /// The sizes.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The device the memory is on.
    #[must_use]
    pub fn device(&self) -> Device {
        self.device
    }

    /// The elements, on the CPU.
    ///
    /// # Errors
    /// [`Error::DType`] when `E` is not the element type.
    pub fn as_mut_slice<E: Element>(&mut self) -> Result<&mut [E]> {
        if self.dtype != E::DTYPE {
            return Err(Error::DType { op: "as_mut_slice", operand: "self", expected: E::DTYPE.name(), found: self.dtype });
        }
        match &mut self.memory {
            MemoryMut::Host(bytes) => Ok(bytemuck::cast_slice_mut(bytes)),
            MemoryMut::Device(..) => Err(Error::NotOnHost { op: "as_mut_slice", device: self.device.to_string() }),
        }
    }

    /// Flat views of `len` elements each (the last one of what is left).
    pub(crate) fn chunks(self, len: usize) -> impl Iterator<Item = Self> {
        let (dtype, device, total) = (self.dtype, self.device, self.shape.numel());
        let mut rest = Some(self.memory);
        (0..total).step_by(len).filter_map(move |start| {
            let len = len.min(total - start);
            let (part, tail) = rest.take()?.split(0, len * dtype.size());
            rest = Some(tail);
            Some(Self::new(part, dtype, [len].into(), device))
        })
    }

    /// Copies the first elements of `values` from the host over all of the view.
    pub(crate) fn write<E: Element>(mut self, values: &[E]) -> Result<()> {
        let values = &values[..self.shape.numel()];
        match self.device {
            Device::Cpu => self.as_mut_slice::<E>()?.copy_from_slice(values),
            Device::Cuda(device) => device.upload(self.address()?, bytemuck::cast_slice(values))?,
        }
        Ok(())
    }

    /// The first `len` elements and the others, flat.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are fewer.
    pub fn split(self, len: usize) -> Result<(Self, Self)> {
        let (dtype, device, total) = (self.dtype, self.device, self.shape.numel());
        if len > total {
            return Err(Error::Shape { op: "split", operand: "self", expected: [len].into(), found: self.shape });
        }
        let (first, rest) = self.memory.split(0, len * dtype.size());
        Ok((Self::new(first, dtype, [len].into(), device), Self::new(rest, dtype, [total - len].into(), device)))
    }

    /// Bytes as tensors of these types and lengths, each from a multiple of [`TensorMut::ALIGN`] on.
    ///
    /// # Errors
    /// [`Error::DType`] unless these are bytes, [`Error::Shape`] when there are too few.
    pub fn carve(self, parts: impl IntoIterator<Item = (DType, usize)>) -> Result<Vec<Self>> {
        if self.dtype != DType::U8 {
            return Err(Error::DType { op: "carve", operand: "self", expected: DType::U8.name(), found: self.dtype });
        }
        let device = self.device;
        let (mut rest, mut carved) = (self, Vec::new());
        for (dtype, len) in parts {
            let bytes = len * dtype.size();
            let (part, tail) = rest.split(bytes)?;
            carved.push(Self::new(part.memory, dtype, [len].into(), device));
            let gap = (bytes.next_multiple_of(Self::ALIGN) - bytes).min(tail.shape.numel());
            rest = tail.split(gap)?.1;
        }
        Ok(carved)
    }

    /// What [`TensorMut::carve`] begins tensors at multiples of, in bytes.
    pub const ALIGN: usize = 256;

    /// Writes the elements (F32) over `out`, in its type (rounded to nearest even), on a GPU.
    ///
    /// # Errors
    /// [`Error::Shape`] when the numbers of elements differ, [`Error::DType`] unless `out` is F32 or of 16 bits, [`Error::Argument`] on
    /// the CPU.
    pub fn convert_into(&mut self, mut out: TensorMut<'_>) -> Result<()> {
        const OP: &str = "convert_into";
        let n = self.shape.numel();
        out.expect_shape(OP, "out", [n])?;
        let Device::Cuda(device) = self.device else {
            return Err(Error::Argument { op: OP, argument: "device", expected: "a GPU", found: 0 });
        };
        if self.dtype != DType::F32 {
            return Err(Error::DType { op: OP, operand: "self", expected: DType::F32.name(), found: self.dtype });
        }
        if out.dtype == DType::F32 {
            return device.copy(out.address()?, self.address()?, 4 * n);
        }
        let args = [Arg::write_view(&mut out)?, Arg::Pointer(self.address()?), Arg::U64(n as u64)];
        device.launch(&format!("cast_f32_{}", suffix(OP, out.dtype)?), Grid::over(n, 4096, 256), &args)
    }

    /// The same view for a shorter time, to hand it on and keep it.
    pub fn reborrow(&mut self) -> TensorMut<'_> {
        let memory = match &mut self.memory {
            MemoryMut::Host(bytes) => MemoryMut::Host(bytes),
            MemoryMut::Device(address, _) => MemoryMut::Device(*address, PhantomData),
        };
        TensorMut { memory, dtype: self.dtype, shape: self.shape, device: self.device }
    }

    /// Checks a shape on behalf of `op`.
    ///
    /// # Errors
    /// [`Error::Shape`] naming the operand.
    pub fn expect_shape(&self, op: &'static str, operand: &'static str, expected: impl Into<Shape>) -> Result<()> {
        let expected = expected.into();
        if self.shape == expected { Ok(()) } else { Err(Error::Shape { op, operand, expected, found: self.shape }) }
    }
}
