mod before_rope;

use nibble_testkit::{cases, central_difference};
use proptest::prelude::*;

use super::*;
use crate::ops::samples::{arena, normal, on_cpu, unit, wide};

/// Sizes of a case: documents of these lengths, H, K, D.
#[derive(Clone, Debug)]
struct Shape {
    lengths: Vec<usize>,
    heads: usize,
    kv_heads: usize,
    size: usize,
}

impl Shape {
    fn new(lengths: &[usize], heads: usize, kv_heads: usize, size: usize) -> Self {
        Self { lengths: lengths.to_vec(), heads, kv_heads, size }
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    fn offsets(&self) -> Vec<usize> {
        std::iter::once(0)
            .chain(self.lengths.iter().scan(0, |end, len| {
                *end += len;
                Some(*end)
            }))
            .collect()
    }

    fn documents(&self) -> Documents {
        let offsets: Vec<u32> = self.offsets().iter().map(|&x| x as u32).collect();
        Documents::new(&arena(), &offsets).unwrap()
    }

    /// (document's first token, i, h) of each query.
    fn queries(&self) -> impl Iterator<Item = (usize, usize, usize)> {
        let (offsets, heads) = (self.offsets(), self.heads);
        (0..self.tokens()).flat_map(move |i| {
            let start = *offsets.iter().rfind(|start| **start <= i).unwrap();
            (0..heads).map(move |h| (start, i, h))
        })
    }
}

fn config(size: usize) -> Config {
    Config { scale: 1.0 / (size as f32).sqrt(), window: None, softcap: None }
}

/// o, lse and what the gradients need, by the formulas in the module's documentation.
struct Exact {
    o: Vec<f64>,
    lse: Vec<f64>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Row (token, head) of a matrix [T, heads, D].
fn row(x: &[f64], token: usize, head: usize, heads: usize, size: usize) -> &[f64] {
    &x[(token * heads + head) * size..][..size]
}

/// (first visible key, capped scores) of one query.
fn scores(q: &[f64], k: &[f64], shape: &Shape, config: Config, (start, i, h): (usize, usize, usize)) -> (usize, Vec<f64>) {
    let first = config.window.map_or(start, |window| start.max((i + 1).saturating_sub(window)));
    let g = h * shape.kv_heads / shape.heads;
    let score = |j| {
        let s = f64::from(config.scale) * dot(row(q, i, h, shape.heads, shape.size), row(k, j, g, shape.kv_heads, shape.size));
        config.softcap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh())
    };
    (first, (first..=i).map(score).collect())
}

fn exact(q: &[f64], k: &[f64], v: &[f64], shape: &Shape, config: Config) -> Exact {
    let (tokens, size) = (shape.tokens(), shape.size);
    let (mut o, mut lse) = (vec![0.0; q.len()], vec![0.0; shape.heads * tokens]);
    for (start, i, h) in shape.queries() {
        let (first, z) = scores(q, k, shape, config, (start, i, h));
        let total = z.iter().map(|z| z.exp()).sum::<f64>().ln();
        lse[h * tokens + i] = total;
        for (j, z) in z.iter().enumerate() {
            let v = row(v, first + j, h * shape.kv_heads / shape.heads, shape.kv_heads, size);
            for d in 0..size {
                o[(i * shape.heads + h) * size + d] += (z - total).exp() * v[d];
            }
        }
    }
    Exact { o, lse }
}

fn exact_backward(d_o: &[f64], q: &[f64], k: &[f64], v: &[f64], shape: &Shape, config: Config) -> [Vec<f64>; 3] {
    let Exact { o, lse } = exact(q, k, v, shape, config);
    let (size, scale) = (shape.size, f64::from(config.scale));
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    for (start, i, h) in shape.queries() {
        let g = h * shape.kv_heads / shape.heads;
        let (first, z) = scores(q, k, shape, config, (start, i, h));
        let d_row = row(d_o, i, h, shape.heads, size);
        let delta = dot(d_row, row(&o, i, h, shape.heads, size));
        for (j, z) in z.iter().enumerate().map(|(j, z)| (first + j, z)) {
            let p = (z - lse[h * shape.tokens() + i]).exp();
            let slope = config.softcap.map_or(1.0, |cap| 1.0 - (z / f64::from(cap)).powi(2));
            let ds = p * (dot(d_row, row(v, j, g, shape.kv_heads, size)) - delta) * slope * scale;
            for d in 0..size {
                let (at, key) = ((i * shape.heads + h) * size + d, (j * shape.kv_heads + g) * size + d);
                dq[at] += ds * k[key];
                dk[key] += ds * q[at];
                dv[key] += p * d_o[at];
            }
        }
    }
    [dq, dk, dv]
}

struct Case {
    shape: Shape,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_o: Tensor,
}

impl Case {
    fn new(seed: u64, shape: &Shape, dtype: DType) -> Self {
        let (queries, keys) = ([shape.tokens(), shape.heads, shape.size], [shape.tokens(), shape.kv_heads, shape.size]);
        Self {
            shape: shape.clone(),
            q: normal(seed, dtype, queries),
            k: normal(seed ^ 1, dtype, keys),
            v: normal(seed ^ 2, dtype, keys),
            d_o: normal(seed ^ 3, dtype, queries),
        }
    }

    fn forward(&self, config: Config) -> (Tensor, Tensor) {
        forward(&self.q, &self.k, &self.v, &self.shape.documents(), config).unwrap()
    }

    fn backward(&self, config: Config) -> [Tensor; 3] {
        let (o, lse) = self.forward(config);
        let (dq, dk, dv) = backward(&self.d_o, &self.q, &self.k, &self.v, &o, &lse, &self.shape.documents(), config).unwrap();
        [dq, dk, dv]
    }

    fn exact(&self, config: Config) -> Exact {
        exact(&wide(&self.q), &wide(&self.k), &wide(&self.v), &self.shape, config)
    }

    fn exact_backward(&self, config: Config) -> [Vec<f64>; 3] {
        exact_backward(&wide(&self.d_o), &wide(&self.q), &wide(&self.k), &wide(&self.v), &self.shape, config)
    }
}

/// Fails unless |found - exact| <= `bound` everywhere.
#[track_caller]
fn assert_near(what: &str, found: &Tensor, exact: &[f64], bound: impl Fn(f64) -> f64) {
    nibble_testkit::assert_within(what, &found.to_f32_vec().unwrap(), exact, |i| bound(exact[i]));
}

/// Bound of o: a score s is a sum of D products, off by `(D + 2) u |q| |k| scale` with norms about √D; its error moves each
/// probability, in relative terms, by as much (twice: numerator and sum); then the sum over keys of p |v|.
fn forward_bound(shape: &Shape, dtype: DType) -> f64 {
    let u = unit(DType::F32);
    let score = (shape.size as f64 + 2.0) * u * 3.0 * (shape.size as f64).sqrt() + 6.0 * u * 8.0;
    let keys = shape.lengths.iter().max().copied().unwrap_or(1) as f64;
    let rounded = if dtype == DType::F32 { 0.0 } else { unit(dtype) };
    (2.0 * score + (keys.sqrt() + 4.0) * u + rounded) * LARGEST
}

/// Normal numbers of these tests are smaller.
const LARGEST: f64 = 5.0;

/// As [`forward_bound`], with dp about √D and sums of the group's and document's rows, each of which sees p <= 1.
fn backward_bound(shape: &Shape, dtype: DType) -> f64 {
    let rows = (shape.lengths.iter().max().copied().unwrap_or(1) * shape.heads / shape.kv_heads) as f64;
    let norm = (shape.size as f64).sqrt() * 3.0;
    let rounded_o = unit(dtype) * if dtype == DType::F32 { 1.0 } else { 2.0 };
    (forward_bound(shape, DType::F32) * norm + rounded_o * norm) * rows.sqrt()
}

fn shapes() -> impl Strategy<Value = Shape> {
    // A GPU's kernels take multiples of 8; those on wgmma serve 64 and 128.
    let sizes = if on_cpu() { vec![1, 3, 8, 16, 17, 40] } else { vec![8, 32, 40, 64, 64, 96, 128, 128, 256] };
    (proptest::collection::vec(1usize..90, 1..4), 1usize..4, 1usize..4, proptest::sample::select(sizes))
        .prop_map(|(lengths, kv_heads, group, size)| Shape { lengths, heads: kv_heads * group, kv_heads, size })
}

fn configs() -> impl Strategy<Value = (Option<usize>, Option<f32>)> {
    (proptest::option::of(1usize..80), proptest::option::of(0.5f32..4.0))
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn o_and_lse_equal_the_formulas(seed: u64, shape in shapes(), (window, softcap) in configs()) {
        let config = Config { window, softcap, ..config(shape.size) };
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let case = Case::new(seed, &shape, dtype);
            let ((o, lse), exact) = (case.forward(config), case.exact(config));
            let bound = forward_bound(&shape, dtype);
            let stored = if dtype == DType::F32 { 0.0 } else { unit(dtype) };
            assert_near("o", &o, &exact.o, |x| bound + stored * x.abs());
            assert_near("lse", &lse, &exact.lse, |_| forward_bound(&shape, DType::F32));
        }
    }

    #[test]
    fn gradients_equal_the_formulas(seed: u64, shape in shapes(), (window, softcap) in configs()) {
        let config = Config { window, softcap, ..config(shape.size) };
        for dtype in [DType::F32, DType::Bf16] {
            let case = Case::new(seed, &shape, dtype);
            let bound = backward_bound(&shape, dtype);
            for ((name, found), exact) in ["dq", "dk", "dv"].into_iter().zip(case.backward(config)).zip(case.exact_backward(config)) {
                assert_near(name, &found, &exact, |x| bound + unit(dtype) * x.abs());
            }
        }
    }

    #[test]
    fn cached_tokens_attend_as_in_the_stream(seed: u64, len in prop_oneof![1usize..150, 250usize..600], spare in 0usize..9, n in prop_oneof![1usize..6, 1usize..150], group in 1usize..4, (window, softcap) in configs()) {
        let n = n.min(len);
        let shape = Shape::new(&[len], 2 * group, 2, 24);
        let config = Config { window, softcap, ..config(24) };
        let case = Case::new(seed, &shape, DType::F32);
        let o = case.exact(config).o;
        let cache = |x: &Tensor| {
            let mut values = x.to_f32_vec().unwrap();
            values.resize((len + spare) * 2 * 24, f32::NAN);
            Tensor::from_slice(x.arena(), &values, [len + spare, 2, 24]).unwrap()
        };
        let q = case.q.rows(len - n, n).unwrap();
        let found = cached_forward(&q, &cache(&case.k), &cache(&case.v), len, config).unwrap();
        let bound = forward_bound(&shape, DType::F32);
        assert_near("o", &found, &o[(len - n) * 2 * group * 24..], |_| bound);
    }
}

#[test]
fn the_references_gradients_are_those_of_its_output() {
    let shape = Shape::new(&[4, 1, 3], 4, 2, 3);
    for (window, softcap) in [(None, None), (Some(2), None), (None, Some(1.5)), (Some(3), Some(0.7))] {
        let config = Config { window, softcap, ..config(3) };
        let case = Case::new(9, &shape, DType::F32);
        let (d_o, q, k, v) = (wide(&case.d_o), wide(&case.q), wide(&case.k), wide(&case.v));
        let value = |q: &[f64], k: &[f64], v: &[f64]| dot(&d_o, &exact(q, k, v, &shape, config).o);
        let [dq, dk, dv] = case.exact_backward(config);
        let differences = [
            (dq, central_difference(|x| value(x, &k, &v), &q)),
            (dk, central_difference(|x| value(&q, x, &v), &k)),
            (dv, central_difference(|x| value(&q, &k, x), &v)),
        ];
        for (gradient, difference) in differences {
            assert!(gradient.iter().any(|x| x.abs() > 0.1));
            for (a, b) in gradient.iter().zip(&difference) {
                assert!((a - b).abs() < 1e-7, "expected {b}, found {a}");
            }
        }
    }
}

#[test]
fn gradients_are_larger_than_their_bounds() {
    // A gradient with the wrong sign would be off by twice its size, which the bounds above must notice.
    let shape = Shape::new(&[70, 33], 4, 2, 16);
    let case = Case::new(4, &shape, DType::F32);
    for gradient in case.exact_backward(Config { window: Some(50), softcap: Some(2.0), ..config(16) }) {
        let largest = gradient.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        assert!(largest > 100.0 * backward_bound(&shape, DType::F32), "{largest}");
    }
}

#[test]
fn a_document_is_as_it_is_alone() {
    let shape = Shape::new(&[37, 150, 1, 64], 6, 2, 24);
    let case = Case::new(1, &shape, DType::F32);
    let config = Config { window: Some(70), ..config(24) };
    let (packed, packed_lse) = case.forward(config);
    let packed_lse = packed_lse.to_f32_vec().unwrap();
    let gradients = case.backward(config);
    for range in shape.documents().ranges() {
        let part = |x: &Tensor| x.rows(range.start, range.len()).unwrap();
        let alone = Case {
            shape: Shape { lengths: vec![range.len()], ..shape.clone() },
            q: part(&case.q),
            k: part(&case.k),
            v: part(&case.v),
            d_o: part(&case.d_o),
        };
        let (o, lse) = alone.forward(config);
        let lse = lse.to_f32_vec().unwrap();
        assert_eq!(part(&packed).to_f32_vec().unwrap(), o.to_f32_vec().unwrap());
        for head in 0..6 {
            let packed = &packed_lse[head * shape.tokens()..][range.clone()];
            assert_eq!(packed, &lse[head * range.len()..][..range.len()]);
        }
        for (packed, alone) in gradients.iter().zip(alone.backward(config)) {
            // Alone, a document is split over more tasks: sums differ by rounding.
            assert_near("gradient", &part(packed), &wide(&alone), |x| 2e-6 * (1.0 + x.abs()));
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let shape = Shape::new(&[300, 37, 90], 3, 1, 16);
    for dtype in [DType::F32, DType::Bf16] {
        let case = Case::new(2, &shape, dtype);
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (o, lse) = case.forward(config(16));
                let [dq, dk, dv] = case.backward(config(16));
                [o, lse, dq, dk, dv].map(|x| x.to_f32_vec().unwrap())
            })
        };
        let one = run(1);
        for threads in [2, 5] {
            assert!(one == run(threads), "{dtype:?}: {threads} threads differ from one");
        }
    }
}

#[test]
fn a_window_of_one_returns_the_own_value() {
    let shape = Shape::new(&[70], 2, 2, 8);
    let case = Case::new(2, &shape, DType::F32);
    let (o, _) = case.forward(Config { window: Some(1), ..config(8) });
    assert_eq!(o.to_f32_vec().unwrap(), case.v.to_f32_vec().unwrap());
}

#[test]
fn scores_of_any_size_stay_finite() {
    let shape = Shape::new(&[130], 1, 1, 8);
    let case = Case::new(2, &shape, DType::F32);
    let (o, lse) = case.forward(Config { scale: 1e4, window: None, softcap: None });
    let [dq, dk, dv] = case.backward(Config { scale: 1e4, window: None, softcap: None });
    for x in [o, lse, dq, dk, dv] {
        assert!(x.to_f32_vec().unwrap().iter().all(|x| x.is_finite()));
    }
}

#[test]
fn nan_is_not_hidden() {
    let shape = Shape::new(&[5], 1, 1, 8);
    let mut case = Case::new(2, &shape, DType::F32);
    let mut k = case.k.to_f32_vec().unwrap();
    k[2 * 8] = f32::NAN;
    case.k = Tensor::from_slice(case.k.arena(), &k, [5, 1, 8]).unwrap();
    let o = case.forward(config(8)).0.to_f32_vec().unwrap();
    for (i, o) in o.chunks(8).enumerate() {
        assert_eq!(o.iter().any(|x| x.is_nan()), i >= 2, "token {i}");
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let shape = Shape::new(&[6], 4, 2, 8);
    let case = Case::new(2, &shape, DType::F32);
    let run = |q: &Tensor, k: &Tensor, v: &Tensor, config| forward(q, k, v, &shape.documents(), config).unwrap_err().to_string();
    let Case { q, k, v, .. } = &case;
    assert_eq!(
        run(q, &k.rows(0, 5).unwrap(), v, config(8)),
        "attention: `v` has the wrong shape: expected (5, 2, 8), found (6, 2, 8)"
    );
    let short = |x: &Tensor| x.rows(0, 5).unwrap();
    assert_eq!(
        run(q, &short(k), &short(v), config(8)),
        "attention: `k` has the wrong shape: expected (6, 2, 8), found (5, 2, 8)"
    );
    assert_eq!(
        run(&q.reshape([6, 32]).unwrap(), k, v, config(8)),
        "attention: `q` must be of three sizes (tokens, heads, head size), found 2"
    );
    assert_eq!(
        run(&k.reshape([6, 1, 16]).unwrap(), k, v, config(8)),
        "attention: `heads` must be a multiple of the key/value heads, both positive, found 1"
    );
    let half = k.to_dtype(DType::Bf16).unwrap();
    assert_eq!(run(q, &half, v, config(8)), "attention: `k` has the wrong dtype: expected float32, found bfloat16");
    assert!(forward(q, k, v, &shape.documents(), Config { window: Some(0), ..config(8) }).is_err());
    assert!(cached_forward(q, k, v, 7, config(8)).is_err());
    assert!(cached_forward(q, k, v, 5, config(8)).is_err());
}
