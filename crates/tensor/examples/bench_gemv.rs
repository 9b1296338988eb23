//! One to eight rows times NF4 matrices (double quantisation) on a GPU, as in generation: microseconds of a launch, GB/s of the bytes
//! that W takes, and their share of the rate of a plain copy in the same run (read + write).
//!
//! `cargo run --release -p nibble-tensor --example bench_gemv`; an argument picks the shapes whose line contains it (`"1 x [4096]"`).
//!
//! Each shape is a graph of launches over matrices in turn, several times the second-level cache together, replayed; the result of
//! the last is compared with the CPU's product of the same codes (`error`: largest difference over the largest value).
#![allow(clippy::print_stdout)]

mod shared;

use nibble_nf4::QuantConfig;
use nibble_tensor::{
    Arena, Device, Rng, Tensor, Weight,
    cuda::CudaDevice,
    ops::linear::{self, Adapter, Part},
};
use shared::{Result, normal};

/// Rows of x; outputs of each part; inputs; rank of the adapters.
type Case = (usize, &'static [usize], usize, usize);

const CASES: [Case; 16] = [
    (1, &[14336], 4096, 0),
    (1, &[28672], 8192, 0),
    (1, &[4096], 4096, 0),
    (1, &[4096], 14336, 0),
    (1, &[1024], 4096, 0),
    (1, &[4096, 1024, 1024], 4096, 0),
    (1, &[14336, 14336], 4096, 0),
    (1, &[4096, 1024, 1024], 4096, 16),
    (1, &[8960, 8960], 1536, 0),
    (1, &[1536], 8960, 0),
    (1, &[1536, 256, 256], 1536, 0),
    (2, &[14336], 4096, 0),
    (4, &[14336], 4096, 0),
    (8, &[14336], 4096, 0),
    (8, &[4096], 14336, 0),
    (3, &[1000], 192, 16),
];
/// Bytes of matrices that a graph goes through.
const BYTES: usize = 600 << 20;

fn main() -> Result<()> {
    let (device, arena, copy) = shared::open()?;
    let picked = std::env::args().nth(1).unwrap_or_default();
    for case in CASES {
        if name(case).contains(&picked) {
            run(device, &arena, copy, case)?;
        }
    }
    Ok(())
}

fn parts(arena: &Arena, seed: u64, outputs: &[usize], inputs: usize, rank: usize) -> Result<Vec<Part>> {
    let make = |(i, &n): (usize, &usize)| {
        let rng = Rng::new(seed).stream(i as u64);
        let weight = Weight::random(arena, [n, inputs], &QuantConfig::default(), 0.02, rng)?;
        let adapter = (rank > 0)
            .then(|| -> Result<_> {
                let (a, b) = (normal(seed + 7, arena, [rank, inputs])?, normal(seed + 8, arena, [n, rank])?);
                Ok(Adapter { a, b, scale: 0.01, dropout: None })
            })
            .transpose()?;
        Ok(Part { weight, bias: None, adapter })
    };
    outputs.iter().enumerate().map(make).collect()
}

fn name((rows, outputs, inputs, rank): Case) -> String {
    format!("{rows} x {outputs:?} x {inputs} rank {rank}")
}

fn run(device: CudaDevice, arena: &Arena, copy: f64, case: Case) -> Result<()> {
    let (rows, outputs, inputs, rank) = case;
    let first = parts(arena, 1, outputs, inputs, rank)?;
    let bytes: usize = first.iter().map(|part| part.weight.bytes() - 1024).sum();
    let count = (BYTES / bytes).clamp(2, 200);
    let all = (0..count as u64).map(|i| parts(arena, 1 + i, outputs, inputs, rank)).collect::<Result<Vec<_>>>()?;
    let x = normal(3, arena, [rows, inputs])?;
    let ys = linear::forward(&x, &first)?.0;
    let error = error(&x, &first, &ys)?;
    let body = || -> nibble_tensor::Result<()> {
        for parts in &all {
            linear::forward(&x, parts)?;
        }
        Ok(())
    };
    let best = shared::seconds(device, arena, body)? / count as f64;
    let rate = bytes as f64 / best / 1e9;
    println!(
        "{}: {:.2} us, {rate:.0} GB/s, {:.1} % of the copy rate, error {error:.1e}",
        name(case),
        best * 1e6,
        100.0 * rate / copy
    );
    Ok(())
}

/// Against the same product on the CPU.
fn error(x: &Tensor, parts: &[Part], ys: &[Tensor]) -> Result<f32> {
    let host = Arena::new(Device::Cpu);
    let x = x.to_arena(&host)?;
    let mut worst = 0.0f32;
    for (part, y) in parts.iter().zip(ys) {
        let weight = match &part.weight {
            Weight::Nf4(blocks) => blocks.clone(),
            _ => return Err("expected NF4".into()),
        };
        let absmax = match weight.absmax {
            nibble_tensor::Absmax::Nested { codes, absmax, offset, map } => nibble_tensor::Absmax::Nested {
                codes: codes.to_arena(&host)?,
                absmax: absmax.to_arena(&host)?,
                offset,
                map: map.to_arena(&host)?,
            },
            nibble_tensor::Absmax::Plain(absmax) => nibble_tensor::Absmax::Plain(absmax.to_arena(&host)?),
        };
        let weight = nibble_tensor::BlockWeight { packed: weight.packed.to_arena(&host)?, absmax, ..weight };
        let adapter = part
            .adapter
            .as_ref()
            .map(|adapter| -> Result<_> {
                Ok(Adapter { a: adapter.a.to_arena(&host)?, b: adapter.b.to_arena(&host)?, ..adapter.clone() })
            })
            .transpose()?;
        let twin = Part { weight: Weight::Nf4(weight), bias: None, adapter };
        let expected = linear::forward(&x, &[twin])?.0[0].to_f32_vec()?;
        let found = y.to_f32_vec()?;
        let size = expected.iter().fold(0.0f32, |size, x| size.max(x.abs()));
        worst = expected.iter().zip(&found).fold(worst, |worst, (a, b)| worst.max((a - b).abs() / size));
    }
    Ok(worst)
}
