//! Frozen weights widened to the type of the activations, for products that read them as plain matrices.
//!
//! w_i = code\[c_i\] · absmax\[i / block\], rounded to the type; on the CPU the products decode weights themselves.

use crate::{DType, Device, Result, Tensor, Weight};

/// The weight as a matrix [N, K] of `dtype`.
///
/// # Errors
/// [`crate::Error::DType`] for integer types, [`crate::Error::OutOfMemory`].
pub fn forward(weight: &Weight, dtype: DType) -> Result<Tensor> {
    let (device, arena) = weight.place();
    match device {
        Device::Cpu => Tensor::from_slice(arena, &weight.to_f32_vec()?, weight.shape())?.to_dtype(dtype),
        Device::Cuda(device) => cuda::afresh(device, weight, dtype, arena),
    }
}

pub(crate) mod cuda {
    use nibble_nf4 as nf4;

    use crate::{
        Absmax, Arena, BlockWeight, DType, Error, Int8Weight, Result, Tensor, Weight, ahead,
        cuda::{Arg, CudaDevice, Grid, suffix},
    };

    const OP: &str = "dequantize";

    /// Rows of x that [`product_of_few`] takes.
    const FEW: usize = 8;

    /// The weight as a matrix [N, K] of `dtype`, in scratch memory (a dense one of that type: itself).
    pub(crate) fn matrix(device: CudaDevice, weight: &Weight, dtype: DType, arena: &Arena) -> Result<Tensor> {
        match weight {
            Weight::Dense(dense) => dense.to_dtype(dtype),
            _ => widened(device, &[weight], dtype, arena, [0, 0]),
        }
    }

    /// Weights [N, K] of a 4-bit or 8-bit format one below the other, in the corner of a scratch matrix with more rows and columns,
    /// whose content is left to the caller.
    pub(crate) fn widened(
        device: CudaDevice,
        weights: &[&Weight],
        dtype: DType,
        arena: &Arena,
        more: [usize; 2],
    ) -> Result<Tensor> {
        let request = ahead::Request { weights, dtype, more };
        ahead::matrix(device, arena, &request, |out| widen(device, weights, dtype, out))
    }

    /// The weight as a matrix of the caller's own, which may write to it.
    pub(super) fn afresh(device: CudaDevice, weight: &Weight, dtype: DType, arena: &Arena) -> Result<Tensor> {
        if let Weight::Dense(dense) = weight {
            return dense.to_dtype(dtype);
        }
        let mut out = Tensor::empty(arena, dtype, weight.shape())?;
        widen(device, &[weight], dtype, &mut out)?;
        Ok(out)
    }

    /// Weights one below the other, into the corner of `out`.
    fn widen(device: CudaDevice, weights: &[&Weight], dtype: DType, out: &mut Tensor) -> Result<()> {
        let (ld, mut place) = (out.shape().last(), out.address_mut()?);
        for weight in weights {
            match weight {
                Weight::Nf4(blocks) | Weight::Fp4(blocks) => block_weight(device, blocks, dtype, place, ld, 0)?,
                Weight::Int8(int8) => int8_weight(device, int8, dtype, place, ld)?,
                Weight::Dense(dense) => {
                    let expected = "4-bit or 8-bit blocks";
                    return Err(Error::DType { op: OP, operand: "weight", expected, found: dense.dtype() });
                }
            }
            place += (weight.shape().dims()[0] * ld * dtype.size()) as u64;
        }
        Ok(())
    }

    /// Weights one below the other, but for the first `done` rows, into `place`, an address of elements of `dtype` with rows `ld` apart.
    pub(crate) fn block_weights(
        device: CudaDevice,
        weights: &[BlockWeight],
        dtype: DType,
        mut place: u64,
        ld: usize,
        mut done: usize,
    ) -> Result<()> {
        for weight in weights {
            let rows = weight.shape.dims()[0];
            let first = done.min(rows);
            if first < rows {
                block_weight(device, weight, dtype, place, ld, first)?;
            }
            done -= first;
            place += (rows * ld * dtype.size()) as u64;
        }
        Ok(())
    }

    /// The address of the 16 values of a format, on the device.
    pub(crate) fn levels(device: CudaDevice, format: nf4::Format) -> Result<u64> {
        match format {
            nf4::Format::Nf4 => device.table("nf4", &nf4::NF4),
            nf4::Format::Fp4 => device.table("fp4", &nf4::FP4),
        }
    }

    /// The 16 values of a weight's format.
    pub(crate) fn code(device: CudaDevice, weight: &BlockWeight) -> Result<Arg> {
        Ok(Arg::Pointer(levels(device, weight.config.format)?))
    }

    /// y = x Wᵀ + bias for at most [`FEW`] rows of x, reading the codes themselves; false for what the kernels do not serve.
    pub(crate) fn product_of_few(
        device: CudaDevice,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        y: &mut Tensor,
    ) -> Result<bool> {
        let (Weight::Nf4(blocks) | Weight::Fp4(blocks)) = weight else { return Ok(false) };
        let (m, n, k) = (x.shape().rows(), blocks.shape.dims()[0], blocks.shape.last());
        if m > FEW || !k.is_multiple_of(32) {
            return Ok(false);
        }
        let suffix = suffix(OP, x.dtype())?;
        let (code, bias) = (code(device, blocks)?, Arg::read_or_none(bias)?);
        let sizes = [Arg::size(m), Arg::size(n), Arg::size(k), Arg::size(blocks.config.block_size)];
        let front = [Arg::write(y)?, Arg::read(x)?, Arg::read(&blocks.packed)?];
        let grid = Grid::new(n.div_ceil(8).min(device.info().multiprocessors), 512);
        match &blocks.absmax {
            Absmax::Plain(absmax) => {
                let args = [&front[..], &[Arg::read(absmax)?, code, bias], &sizes].concat();
                device.launch(&format!("gemv_plain_{suffix}"), grid, &args)?;
            }
            Absmax::Nested { codes, absmax, offset, map } => {
                let scales = [Arg::read(codes)?, Arg::read(absmax)?, Arg::read(map)?, code, bias, Arg::F32(*offset)];
                device.launch(&format!("gemv_nested_{suffix}"), grid, &[&front[..], &scales, &sizes].concat())?;
            }
        }
        Ok(true)
    }

    /// Into `out`, an address of elements of `dtype` with rows `ld` apart, the rows from `first` on: of whole groups of 256 blocks.
    fn block_weight(device: CudaDevice, weight: &BlockWeight, dtype: DType, out: u64, ld: usize, first: usize) -> Result<()> {
        let suffix = suffix(OP, dtype)?;
        let (rows, cols, block_size) = (weight.shape.dims()[0] - first, weight.shape.last(), weight.config.block_size);
        let sizes = [Arg::size(rows), Arg::size(cols), Arg::size(ld), Arg::size(block_size)];
        let code = code(device, weight)?;
        let from = |tensor: &Tensor, bytes: usize| Ok::<_, Error>(Arg::Pointer(tensor.address()? + bytes as u64));
        let (skipped, blocks) = (first * cols, first * cols / block_size);
        let (out, packed) = (Arg::Pointer(out + (first * ld * dtype.size()) as u64), from(&weight.packed, skipped / 2)?);
        // A thread widens 32 codes: 16 bytes read.
        let grid = Grid::over(rows * cols, 256 * 32, 256);
        match &weight.absmax {
            Absmax::Plain(absmax) => {
                let args = [&[out, packed, from(absmax, 4 * blocks)?, code][..], &sizes].concat();
                device.launch_early(&format!("dequantize_plain_{suffix}"), grid, &args)
            }
            Absmax::Nested { codes, absmax, offset, map } => {
                let (codes, absmax) = (from(codes, blocks)?, from(absmax, 4 * (blocks / 256))?);
                let args = [&[out, packed, codes, absmax, Arg::read(map)?, code, Arg::F32(*offset)][..], &sizes].concat();
                device.launch_early(&format!("dequantize_nested_{suffix}"), grid, &args)
            }
        }
    }

    fn int8_weight(device: CudaDevice, weight: &Int8Weight, dtype: DType, out: u64, ld: usize) -> Result<()> {
        let (rows, cols) = (weight.codes.dims()[0], weight.codes.dims()[1]);
        let name = format!("dequantize_int8_{}", suffix(OP, dtype)?);
        let args = [
            Arg::Pointer(out),
            Arg::read(&weight.codes)?,
            Arg::read(&weight.scale)?,
            Arg::size(rows),
            Arg::size(cols),
            Arg::size(ld),
        ];
        device.launch(&name, Grid::new(rows, 256), &args)
    }
}

#[cfg(test)]
mod tests {
    use nibble_nf4::{Format, QuantConfig};
    use nibble_testkit::{normals, sizes};
    use proptest::prelude::*;

    use super::*;
    use crate::ops::samples::{arena, float};

    proptest! {
        #[test]
        fn values_are_those_of_the_format_rounded_to_the_type(
            [n, k] in sizes([40, 300]), to in float(), fp4: bool, double_quant: bool, log in 5..9u32, seed in 0..1000u64,
        ) {
            let format = if fp4 { Format::Fp4 } else { Format::Nf4 };
            let config = QuantConfig { format, block_size: 1 << log, double_quant };
            let blocks = nibble_nf4::quantize(&normals(seed, n * k), &config).unwrap();
            let mut values = vec![0.0f32; n * k];
            nibble_nf4::dequantize(&blocks, &mut values).unwrap();
            let expected = Tensor::from_slice(&crate::Arena::new(Device::Cpu), &values, [n, k]).unwrap().to_dtype(to).unwrap();
            let found = forward(&Weight::from_blocks(&arena(), &blocks, [n, k]).unwrap(), to).unwrap();
            prop_assert_eq!((found.dtype(), found.shape()), (to, expected.shape()));
            prop_assert_eq!(found.to_f32_vec().unwrap(), expected.to_f32_vec().unwrap());
        }
    }
}
