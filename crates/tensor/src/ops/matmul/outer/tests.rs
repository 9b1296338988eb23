//! Columns read in place give what packed ones do.

use super::super::tests::values;
use super::*;

#[test]
fn sums_in_place_are_those_of_the_product() {
    for (m, n, k) in [(1, 1, 1), (29, 16, 130), (84, 5, 300), (192, 16, 512), (31, 40, 70), (6, 64, 129)] {
        let (a, b, c) = (values(k * m, 1), values(k * n, 2), values(m * n, 3));
        for kernel in Kernel::available(Precision::F32) {
            for transposed in [false, true] {
                let mut found = c.clone();
                let (left, right) = (Source::F32 { data: &a, ld: m }, Source::F32 { data: &b, ld: n });
                let product = Outer { c: &mut found, a: left, b: right, m, n, k, scale: 0.5, transposed };
                add_outer_with(kernel, &mut [product], Precision::F32);
                for (at, (found, c)) in found.iter().zip(&c).enumerate() {
                    let (i, j) = if transposed { (at % m, at / m) } else { (at / n, at % n) };
                    let sum: f64 = (0..k).map(|l| f64::from(a[l * m + i]) * f64::from(b[l * n + j])).sum();
                    let expected = f64::from(*c) + 0.5 * sum;
                    assert!((f64::from(*found) - expected).abs() <= 1e-7 * (k as f64 + 4.0), "{kernel:?} {m} {n} {k} {at}");
                }
            }
        }
    }
}

#[test]
fn narrow_types_are_multiplied_as_products_are() {
    for (m, n, k) in [(1, 1, 1), (40, 16, 60), (29, 16, 131), (200, 5, 77), (31, 40, 70)] {
        let narrow = |x: Vec<f32>| x.into_iter().map(half::bf16::from_f32).collect::<Vec<_>>();
        let (a, b, c) = (narrow(values(k * m, 1)), narrow(values(k * n, 2)), values(m * n, 3));
        for kernel in Kernel::available(Precision::Bf16) {
            for transposed in [false, true] {
                let mut found = c.clone();
                let (left, right) = (Source::Bf16 { data: &a, ld: m }, Source::Bf16 { data: &b, ld: n });
                let product = Outer { c: &mut found, a: left, b: right, m, n, k, scale: 0.5, transposed };
                add_outer_with(kernel, &mut [product], Precision::Bf16);
                for (at, (found, c)) in found.iter().zip(&c).enumerate() {
                    let (i, j) = if transposed { (at % m, at / m) } else { (at / n, at % n) };
                    let sum: f64 = (0..k).map(|l| a[l * m + i].to_f64() * b[l * n + j].to_f64()).sum();
                    let expected = f64::from(*c) + 0.5 * sum;
                    assert!((f64::from(*found) - expected).abs() <= 1e-6 * (k as f64 + 4.0), "{kernel:?} {m} {n} {k} {at}");
                }
            }
        }
    }
}
