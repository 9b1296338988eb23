//! The laws of the product, on every instruction set of the machine.

use super::*;
use nibble_nf4::{Format, QuantConfig, QuantizedBlocks, dequantize, quantize};
use proptest::prelude::*;

const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::F16];

/// Numbers in (-1, 1) with full mantissas, none of them subnormal.
pub(super) fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    F32,
    Bf16,
    F16,
    Nf4,
    Int8,
}

const KINDS: [Kind; 5] = [Kind::F32, Kind::Bf16, Kind::F16, Kind::Nf4, Kind::Int8];

/// A stored matrix that owns its elements, and what they mean.
struct Stored {
    kind: Kind,
    ld: usize,
    f32: Vec<f32>,
    bf16: Vec<bf16>,
    f16: Vec<f16>,
    int8: Vec<i8>,
    row_scale: Vec<f32>,
    blocks: Option<QuantizedBlocks>,
    /// The elements as f32, contiguous.
    decoded: Vec<f32>,
}

impl Stored {
    fn new(kind: Kind, rows: usize, cols: usize, slack: usize, seed: u64) -> Self {
        let ld = if kind == Kind::Nf4 { cols } else { cols + slack };
        let x = values(rows * ld, seed);
        let bf16: Vec<_> = x.iter().map(|&x| bf16::from_f32(x)).collect();
        let f16: Vec<_> = x.iter().map(|&x| f16::from_f32(x)).collect();
        let int8: Vec<_> = x.iter().map(|&x| (x * 127.0) as i8).collect();
        let row_scale: Vec<_> = values(rows, seed + 1).iter().map(|x| x.abs() + 0.1).collect();
        let config = QuantConfig { format: Format::Nf4, block_size: 64, double_quant: true };
        let blocks = (kind == Kind::Nf4).then(|| quantize(&x, &config).unwrap());
        let all: Vec<f32> = match kind {
            Kind::F32 => x.clone(),
            Kind::Bf16 => bf16.iter().map(|x| x.to_f32()).collect(),
            Kind::F16 => f16.iter().map(|x| x.to_f32()).collect(),
            Kind::Int8 => {
                let code = |(i, &code): (usize, &i8)| f32::from(code) * (row_scale[i / ld] / 127.0);
                int8.iter().enumerate().map(code).collect()
            }
            Kind::Nf4 => {
                let mut out = vec![0.0; rows * ld];
                dequantize(blocks.as_ref().unwrap(), &mut out).unwrap();
                out
            }
        };
        let decoded = all.chunks(ld.max(1)).flat_map(|row| row[..cols].to_vec()).collect();
        Self { kind, ld, f32: x, bf16, f16, int8, row_scale, blocks, decoded }
    }

    fn source(&self) -> Source<'_> {
        let ld = self.ld;
        match self.kind {
            Kind::F32 => Source::F32 { data: &self.f32, ld },
            Kind::Bf16 => Source::Bf16 { data: &self.bf16, ld },
            Kind::F16 => Source::F16 { data: &self.f16, ld },
            Kind::Int8 => Source::Int8 { codes: &self.int8, row_scale: &self.row_scale, ld },
            Kind::Nf4 => Source::Blocks { view: self.blocks.as_ref().unwrap().view(), cols: ld },
        }
    }
}

fn rounded(x: f32, precision: Precision) -> f64 {
    f64::from(match precision {
        Precision::F32 => x,
        Precision::Bf16 => bf16::from_f32(x).to_f32(),
        Precision::F16 => f16::from_f32(x).to_f32(),
    })
}

#[derive(Clone, Debug)]
struct Part {
    k: usize,
    a: (Kind, bool),
    b: (Kind, bool),
    scale: f32,
}

#[derive(Clone, Debug)]
struct Case {
    m: usize,
    n: usize,
    parts: Vec<Part>,
    slack: usize,
    accumulate: bool,
    bias: bool,
    seed: u64,
}

impl Case {
    fn new(m: usize, n: usize, parts: Vec<Part>) -> Self {
        Self { m, n, parts, slack: 0, accumulate: false, bias: false, seed: 1 }
    }
}

/// The operands of a case.
struct Data {
    m: usize,
    n: usize,
    parts: Vec<(Stored, Stored, Part)>,
    c: Vec<f32>,
    bias: Option<Vec<f32>>,
    accumulate: bool,
}

impl Data {
    fn new(case: &Case) -> Self {
        let (m, n, seed) = (case.m, case.n, case.seed);
        let stored = |rows, cols, (kind, transposed), seed| {
            let (rows, cols) = if transposed { (cols, rows) } else { (rows, cols) };
            Stored::new(kind, rows, cols, case.slack, seed)
        };
        let parts = case.parts.iter().enumerate().map(|(i, part)| {
            let seed = seed + 10 * i as u64;
            let (a, b) = (stored(m, part.k, part.a, seed), stored(part.k, n, part.b, seed + 5));
            (a, b, part.clone())
        });
        Self {
            m,
            n,
            parts: parts.collect(),
            c: values(m * n, seed + 1000),
            bias: case.bias.then(|| values(n, seed + 2000)),
            accumulate: case.accumulate,
        }
    }

    fn segments<'a>(&'a self) -> Vec<Segment<'a>> {
        let segment = |(a, b, part): &'a (Stored, Stored, Part)| Segment {
            a: Operand { source: a.source(), transposed: part.a.1 },
            b: Operand { source: b.source(), transposed: part.b.1 },
            k: part.k,
            scale: part.scale,
        };
        self.parts.iter().map(segment).collect()
    }

    fn run(&self, kernel: Kernel, precision: Precision) -> Vec<f32> {
        let mut c = if self.accumulate { self.c.clone() } else { vec![f32::NAN; self.m * self.n] };
        let (segments, bias) = (self.segments(), self.bias.as_deref());
        gemm_with(kernel, Output::F32(&mut c), self.accumulate, self.m, self.n, &segments, bias, precision);
        c
    }

    /// The product in f64 of the operands as they are after rounding, and the sum of the absolute terms.
    fn reference(&self, precision: Precision) -> Vec<(f64, f64)> {
        let (m, n) = (self.m, self.n);
        let mut out = vec![(0.0, 0.0); m * n];
        let mut add = |at: usize, x: f64| {
            out[at].0 += x;
            out[at].1 += x.abs();
        };
        for i in 0..m {
            for j in 0..n {
                let at = i * n + j;
                for (a, b, part) in &self.parts {
                    let (sa, sb) = if n < m { (1.0, part.scale) } else { (part.scale, 1.0) };
                    for l in 0..part.k {
                        let x = a.decoded[if part.a.1 { l * m + i } else { i * part.k + l }];
                        let y = b.decoded[if part.b.1 { j * part.k + l } else { l * n + j }];
                        add(at, rounded(sa * x, precision) * rounded(sb * y, precision));
                    }
                }
                if self.accumulate {
                    add(at, f64::from(self.c[at]));
                }
                if let Some(bias) = &self.bias {
                    add(at, f64::from(bias[j]));
                }
            }
        }
        out
    }

    /// `|err| <= (K + 2) eps sum |terms|` with `eps = 2^-24`, for any order of the `K + 2` additions.
    fn bound(&self, terms: f64) -> f64 {
        let k: usize = self.parts.iter().map(|(_, _, part)| part.k).sum();
        (k + 2) as f64 * f64::from(f32::EPSILON) / 2.0 * terms
    }

    fn check(&self, kernel: Kernel, precision: Precision) {
        let c = self.run(kernel, precision);
        for (at, (&c, (expected, terms))) in c.iter().zip(self.reference(precision)).enumerate() {
            let bound = self.bound(terms);
            let error = (f64::from(c) - expected).abs();
            let (row, column) = (at / self.n, at % self.n);
            assert!(error <= bound, "{kernel:?} {precision:?} ({row}, {column}): expected {expected} within {bound}, found {c}");
        }
    }
}

fn each_kernel(mut f: impl FnMut(Kernel, Precision)) {
    for precision in PRECISIONS {
        for kernel in Kernel::available(precision) {
            f(kernel, precision);
        }
    }
}

fn dimension() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1), 1..8usize, 1..40usize, 60..130usize]
}

fn operand() -> impl Strategy<Value = (Kind, bool)> {
    (prop::sample::select(&KINDS[..]), any::<bool>())
}

fn part() -> impl Strategy<Value = Part> {
    let scale = prop::sample::select(vec![1.0f32, 0.5, 2.0, -1.7]);
    (dimension(), operand(), operand(), scale).prop_map(|(k, a, b, scale)| Part { k, a, b, scale })
}

fn case() -> impl Strategy<Value = Case> {
    let parts = prop::collection::vec(part(), 1..4);
    let rest = (0..3usize, any::<bool>(), any::<bool>(), 1..1000u64);
    (dimension(), dimension(), parts, rest).prop_map(|(m, n, parts, (slack, accumulate, bias, seed))| Case {
        m,
        n,
        parts,
        slack,
        accumulate,
        bias,
        seed,
    })
}

const DENSE: (Kind, bool) = (Kind::F32, false);
const DENSE_T: (Kind, bool) = (Kind::F32, true);

fn one_part(k: usize, a: (Kind, bool), b: (Kind, bool)) -> Vec<Part> {
    vec![Part { k, a, b, scale: 1.0 }]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_kernel_is_within_the_rounding_bound(case in case()) {
        let data = Data::new(&case);
        each_kernel(|kernel, precision| data.check(kernel, precision));
    }
}

#[test]
fn every_source_and_transposition_fits_every_path() {
    for kind in KINDS {
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            for (m, n, k) in [(1, 33, 70), (3, 50, 2051), (7, 40, 65), (37, 5, 33), (101, 67, 19)] {
                let mut case = Case::new(m, n, one_part(k, (kind, ta), (kind, tb)));
                case.slack = 1;
                let data = Data::new(&case);
                each_kernel(|kernel, precision| data.check(kernel, precision));
            }
        }
    }
}

#[test]
fn every_kernel_transposes_what_there_is() {
    for (lanes, steps, width) in [(1, 1, 1), (6, 9, 6), (14, 33, 14), (16, 16, 16), (21, 8, 32), (64, 16, 64), (3, 40, 16)] {
        let ld = steps + 3;
        let src = values(lanes * ld, 1);
        each_kernel(|kernel, _| {
            let mut dst = vec![7.0; (steps - 1) * width + lanes];
            kernel.transpose(&src, ld, lanes, steps, &mut dst, width);
            for (at, x) in dst.iter().enumerate() {
                let (step, lane) = (at / width, at % width);
                assert_eq!(*x, if lane < lanes { src[lane * ld + step] } else { 7.0 }, "{kernel:?} {lanes} {steps} {width}");
            }
        });
    }
}

#[test]
fn rows_that_share_cache_sets_are_within_the_bound() {
    for accumulate in [false, true] {
        let mut case = Case::new(90, 1024, one_part(330, DENSE, (Kind::Bf16, true)));
        (case.bias, case.accumulate) = (true, accumulate);
        let data = Data::new(&case);
        each_kernel(|kernel, precision| data.check(kernel, precision));
    }
}

#[test]
fn sums_over_several_blocks_of_the_reduction_are_within_the_bound() {
    for (k, b) in [(1025, (Kind::Nf4, true)), (641, (Kind::Bf16, false)), (1300, DENSE_T)] {
        let mut parts = one_part(k, DENSE, b);
        parts.extend(one_part(17, DENSE, DENSE_T));
        let mut case = Case::new(45, 70, parts);
        (case.bias, case.accumulate) = (true, true);
        let data = Data::new(&case);
        each_kernel(|kernel, precision| data.check(kernel, precision));
    }
}

#[test]
fn segments_are_one_product_over_the_joined_reduction() {
    let (m, n, k, r) = (40, 50, 64, 16);
    let (a, b) = (values(m * (k + r), 1), values(n * (k + r), 2));
    let f32 = |data, ld| Source::F32 { data, ld };
    let segment = |at: usize, k| Segment {
        a: Operand::new(Source::F32 { data: &a[at..], ld: 80 }),
        b: Operand::transpose(Source::F32 { data: &b[at..], ld: 80 }),
        k,
        scale: 1.0,
    };
    let joined = Segment { a: Operand::new(f32(&a[..], k + r)), b: Operand::transpose(f32(&b[..], k + r)), k: k + r, scale: 1.0 };
    each_kernel(|kernel, precision| {
        let run = |segments: &[Segment]| {
            let mut c = vec![0.0; m * n];
            gemm_with(kernel, Output::F32(&mut c), false, m, n, segments, None, precision);
            c
        };
        assert_eq!(run(&[segment(0, k), segment(k, r)]), run(&[joined]));
    });
}

#[test]
fn one_thread_and_several_give_the_same_bits() {
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    let (one, two, five) = (pool(1), pool(2), pool(5));
    let shapes = [(3, 400, 700), (16, 576, 512), (130, 192, 700), (512, 16, 192), (20, 3200, 65), (60, 1024, 650)];
    for (m, n, k) in shapes {
        let mut case = Case::new(m, n, one_part(k, DENSE, (Kind::Nf4, true)));
        (case.bias, case.accumulate) = (true, true);
        let data = Data::new(&case);
        each_kernel(|kernel, precision| {
            let expected = one.install(|| data.run(kernel, precision));
            assert_eq!(expected, two.install(|| data.run(kernel, precision)), "{m} {n} {k}");
            assert_eq!(expected, five.install(|| data.run(kernel, precision)), "{m} {n} {k}");
        });
    }
}

#[test]
fn calls_inside_parallel_tasks_give_the_same_bits() {
    use rayon::prelude::*;
    let data = Data::new(&Case::new(70, 200, one_part(300, DENSE, (Kind::Nf4, true))));
    let kernel = Kernel::best(Precision::F32);
    let expected = data.run(kernel, Precision::F32);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
    let all = pool.install(|| (0..24).into_par_iter().map(|_| data.run(kernel, Precision::F32) == expected));
    assert!(pool.install(|| all.all(|same| same)));
}

#[test]
fn narrow_outputs_are_the_f32_sums_rounded_once() {
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    for (m, n, k) in [(1, 40, 33), (20, 70, 700), (130, 50, 40)] {
        for accumulate in [false, true] {
            let mut case = Case::new(m, n, one_part(k, DENSE, DENSE_T));
            (case.bias, case.accumulate) = (true, accumulate);
            let mut data = Data::new(&case);
            let bf16_c: Vec<_> = data.c.iter().map(|&x| bf16::from_f32(x)).collect();
            // What bf16 holds, f16 holds too at this magnitude but for the smallest: start both from bf16's values.
            data.c = bf16_c.iter().map(|x| x.to_f32()).collect();
            let f16_c: Vec<_> = data.c.iter().map(|&x| f16::from_f32(x)).collect();
            data.c = f16_c.iter().map(|x| x.to_f32()).collect();
            let mut bf16_c: Vec<_> = data.c.iter().map(|&x| bf16::from_f32(x)).collect();
            let mut f16_c = f16_c;
            let kernel = Kernel::best(Precision::F32);
            let (segments, bias) = (data.segments(), data.bias.as_deref());
            for threads in [1, 4] {
                let (mut b, mut h) = (bf16_c.clone(), f16_c.clone());
                pool(threads).install(|| {
                    gemm(Output::Bf16(&mut b), accumulate, m, n, &segments, bias, Precision::F32);
                    gemm(Output::F16(&mut h), accumulate, m, n, &segments, bias, Precision::F32);
                });
                let f32 = data.run(kernel, Precision::F32);
                assert_eq!(b, f32.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>());
                assert_eq!(h, f32.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>());
            }
            bf16_c.clear();
            f16_c.clear();
        }
    }
}

#[test]
fn small_integers_are_exact_in_every_precision() {
    let (m, n, k) = (29, 35, 77);
    let integers = |len, seed| values(len, seed).iter().map(|x| (x * 4.0).round()).collect::<Vec<_>>();
    let (a, b) = (integers(m * k, 1), integers(n * k, 2));
    let segments = [Segment {
        a: Operand::new(Source::F32 { data: &a, ld: k }),
        b: Operand::transpose(Source::F32 { data: &b, ld: k }),
        k,
        scale: 2.0,
    }];
    each_kernel(|kernel, precision| {
        let mut c = vec![f32::NAN; m * n];
        gemm_with(kernel, Output::F32(&mut c), false, m, n, &segments, None, precision);
        for (at, c) in c.iter().enumerate() {
            let (a, b) = (&a[at / n * k..][..k], &b[at % n * k..][..k]);
            assert_eq!(*c, 2.0 * a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>());
        }
    });
}

#[test]
fn nothing_to_sum_leaves_bias_and_what_was_there() {
    let bias = values(7, 1);
    for (m, parts) in [(9, vec![]), (2, vec![]), (9, one_part(0, DENSE, DENSE_T)), (2, one_part(0, DENSE, DENSE_T))] {
        let mut case = Case::new(m, 7, parts);
        case.bias = true;
        let mut data = Data::new(&case);
        data.bias = Some(bias.clone());
        each_kernel(|kernel, precision| {
            assert!(data.run(kernel, precision).chunks(7).all(|row| row == bias));
        });
    }
}

#[test]
fn a_subnormal_or_infinite_or_nan_element_rounds_to_bf16_as_the_half_crate_does() {
    let mut bits: Vec<u32> = values(4000, 3).iter().map(|x| x.to_bits()).collect();
    bits.extend([0, 1, 0x8000_0001, 0x007f_ffff, 0x7f80_0000, 0xff80_0000, 0x7f80_0001, 0xffff_ffff, 0x7f7f_ffff]);
    bits.extend((0..4000u32).map(|i| i.wrapping_mul(0x9e37_79b9)));
    bits.extend((0..64u32).map(|i| 0x3f80_8000 + (i << 14)));
    let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
    let expected: Vec<u16> = x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
    each_kernel(|kernel, _| {
        let mut narrow = vec![bf16::ZERO; x.len()];
        kernel.narrow_bf16(&x, &mut narrow);
        assert_eq!(narrow.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), expected);
        let mut round = x.clone();
        kernel.round_bf16(&mut round);
        let mut wide = vec![0.0; x.len()];
        kernel.widen_bf16(&narrow, &mut wide);
        for (round, wide) in round.iter().zip(&wide) {
            assert_eq!(round.to_bits(), wide.to_bits());
        }
    });
}
