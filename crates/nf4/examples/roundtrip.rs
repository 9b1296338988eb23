//! Quantises a normal-looking weight in each format and prints the bits an element takes and the error it makes.
//!
//! `cargo run --release -p nibble-nf4 --example roundtrip`
#![expect(clippy::print_stdout, reason = "an example shows its results")]

use nibble_nf4::{DynamicMap, Format, QuantConfig, dequantize, dequantize_dynamic, quantize, quantize_dynamic};

const N: usize = 1 << 20;

/// Sums of twelve uniform values, less their mean: nearly normal, with standard deviation 1.
fn normal() -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u32 << 24) as f32
    };
    (0..N).map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0).collect()
}

/// Root of the mean square error.
fn rms(x: &[f32], y: &[f32]) -> f64 {
    (x.iter().zip(y).map(|(x, y)| f64::from(x - y).powi(2)).sum::<f64>() / x.len() as f64).sqrt()
}

fn main() -> Result<(), nibble_nf4::Error> {
    let x = normal();
    let mut back = vec![0f32; N];
    println!("{:<24}{:>8}{:>12}", "format", "bits", "rms error");
    for (format, double_quant) in [(Format::Nf4, false), (Format::Nf4, true), (Format::Fp4, false), (Format::Fp4, true)] {
        let q = quantize(&x, &QuantConfig { format, block_size: 64, double_quant })?;
        dequantize(&q, &mut back)?;
        let name = format!("{} 64{}", format.name(), if double_quant { ", double" } else { "" });
        println!("{name:<24}{:>8.3}{:>12.5}", q.bytes() as f64 * 8.0 / N as f64, rms(&x, &back));
    }
    let q = quantize_dynamic(&x, DynamicMap::Signed, 256)?;
    dequantize_dynamic(&q, &mut back)?;
    println!("{:<24}{:>8.3}{:>12.5}", "dynamic 8-bit 256", 8.0 + 32.0 / 256.0, rms(&x, &back));
    Ok(())
}
