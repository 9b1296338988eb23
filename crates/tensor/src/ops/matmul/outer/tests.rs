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
    let (m, n, k) = (40, 16, 60);
    let (a, b) = (values(k * m, 1), values(k * n, 2));
    let narrow = |x: &[f32]| x.iter().map(|&x| half::bf16::from_f32(x)).collect::<Vec<_>>();
    let (a, b) = (narrow(&a), narrow(&b));
    let mut c = vec![0.0; m * n];
    let product = Outer {
        c: &mut c,
        a: Source::Bf16 { data: &a, ld: m },
        b: Source::Bf16 { data: &b, ld: n },
        m,
        n,
        k,
        scale: 1.0,
        transposed: false,
    };
    add_outer(&mut [product], Precision::Bf16);
    for (at, c) in c.iter().enumerate() {
        let sum: f32 = (0..k).map(|l| a[l * m + at / n].to_f32() * b[l * n + at % n].to_f32()).sum();
        assert!((c - sum).abs() < 1e-4);
    }
}
