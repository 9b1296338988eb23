//! A matrix on a device into a 4-bit format: codes and scales bit for bit those of [`nibble_nf4::quantize`].
//!
//! absmax\[b\] = max |x| over block b, code = the level nearest to x / absmax; with double quantisation the scales become 8-bit codes
//! of absmax − mean in blocks of 256. On the CPU, [`nibble_nf4`] does it on slices.

use nibble_nf4 as nf4;

use crate::{Device, Error, Result, Tensor, Weight};

/// `x` [N, K] in the format of `config`, on x's device.
///
/// # Errors
/// [`Error::Quantization`] for a value that is not finite (with its position) or a block size that the format does not have,
/// [`Error::Argument`] when `x` is not a matrix, [`Error::OutOfMemory`].
pub fn forward(x: &Tensor, config: &nf4::QuantConfig) -> Result<Weight> {
    if x.dims().len() != 2 {
        return Err(Error::Argument { op: "quantize", argument: "rank", expected: "2, for [N, K]", found: x.dims().len() });
    }
    config.check()?;
    match x.device() {
        Device::Cpu => {
            let blocks = nf4::quantize(&x.to_f32_vec()?, config)?;
            Weight::from_blocks(x.arena(), &blocks, x.shape())
        }
        Device::Cuda(device) => cuda::forward(device, x, config),
    }
}

mod cuda {
    use nibble_nf4 as nf4;

    use crate::{
        Absmax, Arena, BlockWeight, DType, Result, Tensor, Weight,
        cuda::{Arg, CudaDevice, Grid, suffix},
    };

    const OP: &str = "quantize";
    /// Blocks up to which one block of threads sums in the CPU's order.
    const IN_ORDER: usize = 130_560;

    /// All memory is there before the first kernel: the device goes from one to the next, and the host waits once, at the end.
    pub(super) fn forward(device: CudaDevice, x: &Tensor, config: &nf4::QuantConfig) -> Result<Weight> {
        let (n, arena) = (x.numel(), x.arena());
        let blocks = n.div_ceil(config.block_size);
        let grid = Grid::new(n.div_ceil(4096).min(4 * device.info().multiprocessors), 256);
        let mut packed = Tensor::empty(arena, DType::U8, [n.div_ceil(2)])?;
        let mut absmax = Tensor::empty(arena, DType::F32, [blocks])?;
        let mut bad = Tensor::from_slice(arena, &[u32::MAX; 2], [2])?;
        let mut nested = config.double_quant.then(|| Nested::new(arena, blocks, grid.blocks[0] as usize)).transpose()?;
        let format = match config.format {
            nf4::Format::Nf4 => 0,
            nf4::Format::Fp4 => 1,
        };
        let args = [
            Arg::write(&mut packed)?,
            Arg::write(&mut absmax)?,
            Arg::write(&mut bad)?,
            nested.as_mut().and_then(|nested| nested.partials.as_mut()).map_or(Ok(Arg::NONE), Arg::write)?,
            Arg::read(x)?,
            Arg::U64(n as u64),
            Arg::size(config.block_size),
            Arg::U32(format),
        ];
        device.launch(&format!("quantize_{}", suffix(OP, x.dtype())?), grid, &args)?;
        if let Some(nested) = &mut nested {
            nested.launch(device, &absmax)?;
        }
        expect_finite(x, &bad)?;
        let absmax = nested.map_or(Ok(Absmax::Plain(absmax)), Nested::finish)?;
        let weight = BlockWeight { shape: x.shape(), config: *config, packed, absmax };
        Ok(match config.format {
            nf4::Format::Nf4 => Weight::Nf4(weight),
            nf4::Format::Fp4 => Weight::Fp4(weight),
        })
    }

    /// Refuses a value that is not finite, with its position, as the CPU does.
    fn expect_finite(x: &Tensor, bad: &Tensor) -> Result<()> {
        let words = bad.to_vec::<u32>()?;
        let index = u64::from(words[0]) | u64::from(words[1]) << 32;
        if index == u64::MAX {
            return Ok(());
        }
        let value = x.view(index as usize, [1])?.to_f32_vec()?[0];
        Err(nf4::Error::NonFinite { op: OP, index: index as usize, value }.into())
    }

    /// The scales' own quantisation, about their mean.
    struct Nested {
        codes: Tensor,
        absmax: Tensor,
        offset: Tensor,
        map: Tensor,
        /// Sums of the scales, f64, from the blocks of threads that find them; without, one block of threads sums.
        partials: Option<Tensor>,
    }

    impl Nested {
        fn new(arena: &Arena, blocks: usize, sums: usize) -> Result<Self> {
            // f64: two words each.
            let partials = (blocks > IN_ORDER).then(|| Tensor::empty(arena, DType::U32, [sums, 2])).transpose()?;
            Ok(Self {
                codes: Tensor::empty(arena, DType::U8, [blocks])?,
                absmax: Tensor::empty(arena, DType::F32, [blocks.div_ceil(256)])?,
                offset: Tensor::empty(arena, DType::F32, [1])?,
                map: Tensor::from_slice(arena, nf4::dynamic_map_signed(), [256])?,
                partials,
            })
        }

        fn launch(&mut self, device: CudaDevice, absmax: &Tensor) -> Result<()> {
            let blocks = absmax.numel();
            if self.partials.is_none() {
                let args = [Arg::write(&mut self.offset)?, Arg::read(absmax)?, Arg::U64(blocks as u64)];
                device.launch("quantize_absmax_mean", Grid::new(1, 512), &args)?;
            }
            let args = [
                Arg::write(&mut self.codes)?,
                Arg::write(&mut self.absmax)?,
                Arg::write(&mut self.offset)?,
                Arg::read(absmax)?,
                Arg::read_or_none(self.partials.as_ref())?,
                Arg::read(&self.map)?,
                Arg::U64(blocks as u64),
                Arg::size(self.partials.as_ref().map_or(0, |partials| partials.dims()[0])),
            ];
            device.launch("quantize_absmax", Grid::over(blocks, 2048, 256), &args)
        }

        fn finish(self) -> Result<Absmax> {
            let offset = self.offset.to_f32_vec()?[0];
            if !offset.is_finite() {
                // As the host says it: the sum of the scales was too large, and the first less their mean has no value.
                return Err(nf4::Error::NonFinite { op: "quantize_dynamic", index: 0, value: -offset }.into());
            }
            Ok(Absmax::Nested { codes: self.codes, absmax: self.absmax, offset, map: self.map })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::samples::arena;

    #[test]
    fn the_weight_is_that_of_the_quantizer() {
        let arena = arena();
        let values: Vec<f32> = (0..32 * 64).map(|i| (i as f32 * 0.37).sin()).collect();
        let x = Tensor::from_slice(&arena, &values, [32, 64]).unwrap();
        let config = nf4::QuantConfig::default();
        let weight = forward(&x, &config).unwrap();
        let mut expected = vec![0.0f32; values.len()];
        nf4::dequantize(&nf4::quantize(&values, &config).unwrap(), &mut expected).unwrap();
        assert_eq!(weight.to_f32_vec().unwrap(), expected);
        assert!(forward(&x.reshape([32 * 64]).unwrap(), &config).is_err());
    }
}
