//! Products done together equal those done one by one.

use half::bf16;

use super::super::tests::values;
use super::*;

/// Two layers over one input, each with an adapter, the first with a bias: x [m, k], W [n, k], A [r, k], B [n, r].
struct Layers {
    m: usize,
    k: usize,
    r: usize,
    ns: [usize; 2],
    x: Vec<f32>,
    w: [Vec<f32>; 2],
    a: [Vec<f32>; 2],
    b: [Vec<f32>; 2],
    bias: Vec<f32>,
}

impl Layers {
    fn new(m: usize, k: usize, r: usize, ns: [usize; 2]) -> Self {
        let pair = |f: &dyn Fn(usize) -> usize, seed: u64| [0, 1].map(|i| values(f(i), seed + i as u64));
        let (w, a, b) = (pair(&|i| ns[i] * k, 10), pair(&|_| r * k, 20), pair(&|i| ns[i] * r, 30));
        Self { m, k, r, ns, x: values(m * k, 1), w, a, b, bias: values(ns[0], 2) }
    }

    fn inputs(&self) -> [Input<'_>; 3] {
        [Input::Stored { source: Source::F32 { data: &self.x, ld: self.k }, k: self.k }, Input::Result(0), Input::Result(1)]
    }

    /// h and y of both layers; y in bf16 for the second.
    fn products<'a>(&'a self, h: &'a mut [Vec<f32>; 2], y: &'a mut [f32], z: &'a mut [bf16]) -> Vec<Product<'a>> {
        let term = |input, data: &'a [f32], ld, scale| Term { input, b: Operand::transpose(Source::F32 { data, ld }), scale };
        let [h0, h1] = h;
        let early = [(h0, &self.a[0]), (h1, &self.a[1])].map(|(h, a)| Product {
            c: Output::F32(h),
            n: self.r,
            terms: vec![term(0, a, self.k, 1.0)],
            bias: None,
        });
        let terms = |i: usize| vec![term(0, &self.w[i], self.k, 1.0), term(1 + i, &self.b[i], self.r, 2.0)];
        let late = [
            Product { c: Output::F32(y), n: self.ns[0], terms: terms(0), bias: Some(&self.bias[..]) },
            Product { c: Output::Bf16(z), n: self.ns[1], terms: terms(1), bias: None },
        ];
        early.into_iter().chain(late).collect()
    }

    fn run(&self, run: impl FnOnce(&[Input], Vec<Product>)) -> Vec<f32> {
        let mut h = [vec![f32::NAN; self.m * self.r], vec![f32::NAN; self.m * self.r]];
        let (mut y, mut z) = (vec![f32::NAN; self.m * self.ns[0]], vec![bf16::NAN; self.m * self.ns[1]]);
        run(&self.inputs(), self.products(&mut h, &mut y, &mut z));
        let z = z.into_iter().map(bf16::to_f32);
        h.concat().into_iter().chain(y).chain(z).collect()
    }

    fn alone(&self, precision: Precision) -> Vec<f32> {
        let widths = [self.r, self.r, self.ns[0], self.ns[1]];
        self.run(|inputs, mut products| one_by_one(self.m, inputs, &mut products, 2, &widths, precision))
    }
}

const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::Bf16, Precision::F16];

#[test]
fn together_and_one_by_one_are_the_same_but_for_rounding() {
    for (m, k, r, ns) in [(50, 40, 5, [33, 64]), (101, 700, 16, [1024, 48]), (230, 330, 24, [20, 7])] {
        let layers = Layers::new(m, k, r, ns);
        for precision in PRECISIONS {
            let expected = layers.alone(precision);
            // Sums of k products below 1; results of 16 bits, and operands rounded to them, by a unit in the last place.
            let unit = if precision == Precision::F32 { 1e-6 } else { 1.0 / 256.0 };
            for kernel in Kernel::available(precision) {
                let found = layers.run(|inputs, products| {
                    let all = products.len();
                    gemm_rows_with(kernel, m, inputs, products, all, precision);
                });
                let narrow = found.len() - m * ns[1];
                for (i, (x, y)) in found.iter().zip(&expected).enumerate() {
                    let unit = if i < narrow { unit } else { 1.0 / 128.0 };
                    let bound = unit * (k as f32).sqrt() * 3.0 + y.abs() * unit;
                    assert!((x - y).abs() <= bound, "{kernel:?} {precision:?} {i}: {x} for {y}");
                }
            }
        }
    }
}

#[test]
fn threads_do_not_change_the_bits() {
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    let layers = Layers::new(300, 650, 16, [200, 90]);
    for precision in PRECISIONS {
        let run = |threads| pool(threads).install(|| layers.run(|inputs, products| gemm_rows(300, inputs, products, precision)));
        let one = run(1);
        assert!(one == run(2) && one == run(5));
    }
}

#[test]
fn stretches_are_cut_by_the_widths_alone_and_short_ones_join() {
    let source = Source::F32 { data: &[], ld: 0 };
    let inputs = [Input::Stored { source, k: 576 }, Input::Result(0), Input::Result(1)];
    for kernel in Kernel::available(Precision::F32) {
        let plan = Plan::new(kernel, &inputs, &[], &[16, 16]);
        let last = plan.blocks.last().unwrap();
        assert_eq!(last.iter().map(|stretch| stretch.input).collect::<Vec<_>>(), [0, 1, 2]);
        let covered: usize = plan.blocks.iter().flatten().map(|stretch| stretch.k.len()).sum();
        assert_eq!(covered, 576 + 32);
    }
}
