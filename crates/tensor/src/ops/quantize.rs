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

    /// All memory is there before the first kernel: the device goes from one to the next, and the host waits at the end.
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
    use nf4::{Format, QuantConfig};

    use super::*;
    use crate::{
        Absmax, Arena, DType,
        ops::samples::{arena, normal},
    };

    /// Blocks of zeros, of the smallest numbers of the format, and of ordinary ones; the first begins with the largest.
    fn uncommon(dtype: DType, [rows, cols]: [usize; 2]) -> Tensor {
        let (largest, scales) =
            if dtype == DType::F16 { (6e4, [0.0, 1e-7, 6e-5, 0.02]) } else { (3e38, [0.0, 1e-40, 1e-38, 0.02]) };
        let scale = |i: usize| if i < 32 { largest } else { scales[i / 64 * 3 % 4] };
        let values: Vec<f32> = (0..rows * cols).map(|i| scale(i) * (i as f32).sin()).collect();
        Tensor::from_slice(&arena(), &values, [rows, cols]).unwrap().to_dtype(dtype).unwrap()
    }

    /// Codes and scales bit for bit.
    fn assert_right(x: &Tensor, config: QuantConfig) {
        let label = format!("{:?} {config:?} {}", x.dims(), x.dtype());
        let found = forward(x, &config).unwrap();
        let blocks = nf4::quantize(&x.to_f32_vec().unwrap(), &config).unwrap();
        let expected = Weight::from_blocks(&Arena::new(Device::Cpu), &blocks, x.shape()).unwrap();
        let (Weight::Nf4(a) | Weight::Fp4(a), Weight::Nf4(b) | Weight::Fp4(b)) = (&found, &expected) else { panic!("{label}") };
        assert_eq!(a.packed.to_vec::<u8>().unwrap(), b.packed.to_vec::<u8>().unwrap(), "{label}: codes");
        match (&a.absmax, &b.absmax) {
            (Absmax::Plain(a), Absmax::Plain(b)) => {
                assert_eq!(a.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap(), "{label}: absmax");
            }
            (Absmax::Nested { codes: a, absmax: x, offset: m, .. }, Absmax::Nested { codes: b, absmax: y, offset: n, .. }) => {
                assert_eq!(m, n, "{label}: offset");
                assert_eq!(a.to_vec::<u8>().unwrap(), b.to_vec::<u8>().unwrap(), "{label}: scales' codes");
                assert_eq!(x.to_vec::<f32>().unwrap(), y.to_vec::<f32>().unwrap(), "{label}: scales' absmax");
            }
            _ => panic!("{label}"),
        }
        assert_eq!(found.to_f32_vec().unwrap(), expected.to_f32_vec().unwrap(), "{label}: values");
    }

    #[test]
    fn codes_and_scales_are_the_quantizers_bit_for_bit() {
        let cases = [
            ([96, 320], 64),
            ([33, 47], 32),
            ([1000, 4096], 64),
            ([7, 5000], 4096),
            ([96, 320], 128),
            ([96, 320], 512),
            ([7, 5000], 1024),
            ([1, 50], 64),
        ];
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            // Elements that do not begin on 16 bytes.
            assert_right(&normal(6, dtype, [2 * 4096 + 1]).view(1, [2, 4096]).unwrap(), QuantConfig::default());
            for (shape, block_size) in cases {
                for x in [normal(5, dtype, shape), uncommon(dtype, shape), Tensor::zeros(&arena(), dtype, shape).unwrap()] {
                    for (format, double_quant) in [(Format::Nf4, true), (Format::Nf4, false), (Format::Fp4, true)] {
                        assert_right(&x, QuantConfig { format, block_size, double_quant });
                    }
                }
            }
        }
    }

    /// More scales than one block of threads of a GPU sums, several turns for each block, and a ragged end.
    #[test]
    fn many_blocks_are_the_quantizers_bit_for_bit() {
        let pattern = normal(5, DType::F32, [1 << 20]).to_f32_vec().unwrap();
        let x = Tensor::tiled(&arena(), &pattern, [2201, 4095]).unwrap().to_dtype(DType::Bf16).unwrap();
        for block_size in [64, 4096] {
            assert_right(&x, QuantConfig { block_size, ..QuantConfig::default() });
        }
    }

    #[test]
    fn a_value_that_is_not_finite_is_named() {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            for (rows, at, value) in
                [(10, 333, f32::NAN), (65, 4095, f32::INFINITY), (65, 17, f32::NAN), (65, 4100, f32::NEG_INFINITY)]
            {
                let mut values = vec![0.5f32; rows * 64];
                values[at] = value;
                values[at + 40] = f32::NAN;
                let x = Tensor::from_slice(&arena(), &values, [rows, 64]).unwrap().to_dtype(dtype).unwrap();
                let error = forward(&x, &QuantConfig::default()).unwrap_err().to_string();
                assert!(error.contains(&format!("found {value} at `{at}`")), "{dtype}: {error}");
            }
        }
    }

    #[test]
    fn what_has_no_rows_or_no_mean_of_its_scales_is_refused() {
        assert!(forward(&normal(1, DType::F32, [32 * 64]), &QuantConfig::default()).is_err());
        let values = vec![3e38f32; 640];
        let x = Tensor::from_slice(&arena(), &values, [10, 64]).unwrap();
        let error = forward(&x, &QuantConfig::default()).unwrap_err().to_string();
        assert_eq!(error, nf4::quantize(&values, &QuantConfig::default()).unwrap_err().to_string());
    }
}
