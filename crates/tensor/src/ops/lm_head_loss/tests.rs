use half::bf16;
use nibble_testkit::cases;
use proptest::prelude::*;

use super::*;
use crate::ops::loss_scale::LossScale;
use crate::{
    DType, Float, Rng,
    ops::samples::{arena, on_cpu},
};

/// The head's config, and the scale of its labels.
#[derive(Clone, Copy)]
struct Config {
    scale: f32,
    softcap: Option<f32>,
}

/// An [`Output`] with its loss on the host.
#[derive(Debug)]
struct Found {
    loss: f64,
    rows: usize,
    dh: Option<Tensor>,
}

fn labels_of(labels: &Tensor, config: Config) -> Result<Labels> {
    Labels::new(labels.arena(), &labels.to_vec::<i32>()?, config.scale)
}

fn forward(h: &Tensor, w: &Tensor, labels: &Tensor, config: Config, want_dh: bool) -> Result<Found> {
    let cap = super::Config { softcap: config.softcap };
    let output = super::forward(h, w, &labels_of(labels, config)?, cap, want_dh)?;
    Ok(Found { loss: f64::from(output.loss.to_f32_vec()?[0]), rows: output.rows, dh: output.dh })
}

fn nll(h: &Tensor, w: &Tensor, labels: &Tensor, config: Config) -> Result<(f64, usize)> {
    let found = forward(h, w, labels, config, false)?;
    Ok((found.loss, found.rows))
}

/// A case as f64: loss, dh and dW by the formulas in the module's documentation.
struct Reference {
    loss: f64,
    dh: Vec<f64>,
    dw: Vec<f64>,
}

fn loss(h: &[f64], w: &[f64], labels: &[i32], inputs: usize, config: Config) -> f64 {
    let sum: f64 = rows(h, labels, inputs)
        .map(|(_, h, label)| {
            let z = capped(h, w, inputs, config);
            z.iter().map(|z| z.exp()).sum::<f64>().ln() - z[label]
        })
        .sum();
    f64::from(config.scale) * sum
}

fn rows<'a>(h: &'a [f64], labels: &'a [i32], inputs: usize) -> impl Iterator<Item = (usize, &'a [f64], usize)> {
    h.chunks(inputs).zip(labels).enumerate().filter(|(_, (_, label))| **label >= 0).map(|(t, (h, label))| (t, h, *label as usize))
}

fn capped(h: &[f64], w: &[f64], inputs: usize, config: Config) -> Vec<f64> {
    let dot = |w: &[f64]| w.iter().zip(h).map(|(w, h)| w * h).sum::<f64>();
    let cap = |s: f64| config.softcap.map_or(s, |cap| f64::from(cap) * (s / f64::from(cap)).tanh());
    w.chunks(inputs).map(dot).map(cap).collect()
}

fn reference(h: &[f64], w: &[f64], labels: &[i32], inputs: usize, config: Config) -> Reference {
    let (mut dh, mut dw) = (vec![0.0; h.len()], vec![0.0; w.len()]);
    for (t, row, label) in rows(h, labels, inputs) {
        let z = capped(row, w, inputs, config);
        let sum: f64 = z.iter().map(|z| z.exp()).sum();
        for (v, z) in z.iter().enumerate() {
            let slope = config.softcap.map_or(1.0, |cap| 1.0 - (z / f64::from(cap)).powi(2));
            let ds = f64::from(config.scale) * (z.exp() / sum - f64::from(u8::from(v == label))) * slope;
            for c in 0..inputs {
                dh[t * inputs + c] += ds * w[v * inputs + c];
                dw[v * inputs + c] += ds * row[c];
            }
        }
    }
    Reference { loss: loss(h, w, labels, inputs, config), dh, dw }
}

struct Case {
    h: Tensor,
    w: Tensor,
    labels: Tensor,
    inputs: usize,
}

/// Random h and W (of standard deviation 1 and 1 / √C), and labels of which about a third are ignored.
fn case(seed: u64, [tokens, vocab, inputs]: [usize; 3], dtype: DType) -> Case {
    let arena = arena();
    let rng = Rng::new(seed);
    let random =
        |stream, len: usize, size: f32| -> Vec<f32> { (0..len as u64).map(|i| size * rng.stream(stream).normal(i)).collect() };
    let label = |t| if rng.stream(2).uniform(t) < 0.3 { IGNORE } else { (rng.stream(3).bits(t) % vocab as u64) as i32 };
    let labels: Vec<i32> = (0..tokens as u64).map(label).collect();
    let tensor =
        |values: Vec<f32>, shape: [usize; 2]| Tensor::from_slice(&arena, &values, shape).unwrap().to_dtype(dtype).unwrap();
    Case {
        h: tensor(random(0, tokens * inputs, 1.0), [tokens, inputs]),
        w: tensor(random(1, vocab * inputs, 1.5 / (inputs as f32).sqrt()), [vocab, inputs]),
        labels: Tensor::from_slice(&arena, &labels, [tokens]).unwrap(),
        inputs,
    }
}

impl Case {
    fn wide(tensor: &Tensor) -> Vec<f64> {
        tensor.to_f32_vec().unwrap().iter().map(|&x| f64::from(x)).collect()
    }

    fn reference(&self, config: Config) -> Reference {
        reference(&Self::wide(&self.h), &Self::wide(&self.w), &self.labels(), self.inputs, config)
    }

    fn labels(&self) -> Vec<i32> {
        self.labels.to_vec().unwrap()
    }

    /// Bounded by the largest row of h and of W.
    fn largest_logit(&self) -> f64 {
        let norm = |x: &Tensor| {
            let rows = Self::wide(x);
            rows.chunks(self.inputs).map(|row| row.iter().map(|x| x * x).sum::<f64>().sqrt()).fold(0.0, f64::max)
        };
        norm(&self.h) * norm(&self.w)
    }

    fn forward(&self, config: Config) -> Found {
        forward(&self.h, &self.w, &self.labels, config, true).unwrap()
    }

    fn dweight(&self, config: Config, start: f32) -> Vec<f32> {
        let mut dw = Tensor::from_slice(self.h.arena(), &vec![start; self.w.numel()], [self.w.dims()[0], self.inputs]).unwrap();
        let (labels, cap) = (labels_of(&self.labels, config).unwrap(), super::Config { softcap: config.softcap });
        backward_weight(&self.h, &self.w, &labels, cap, dw.view_mut().unwrap()).unwrap();
        dw.to_f32_vec().unwrap()
    }
}

fn largest(x: &Tensor) -> f64 {
    Case::wide(x).iter().fold(0.0, |size, x| size.max(x.abs()))
}

/// Largest |x - y| where y is at most about `size`.
fn assert_near(name: &str, found: &[f32], exact: &[f64], bound: f64) {
    assert_eq!(found.len(), exact.len());
    for (i, (x, y)) in found.iter().zip(exact).enumerate() {
        let error = (f64::from(*x) - y).abs();
        assert!(error <= bound, "{name}[{i}]: expected {y:e}, found {x:e}, bound {bound:e}");
    }
}

/// Sums of at most `inputs` or `vocab` terms, a few roundings each, of rows whose size is about 1.
fn bound(unit: f64, [tokens, vocab, inputs]: [usize; 3], scale: f32) -> f64 {
    // A logit is off by about 3 √C units of its size (up to 8); p by as much of itself; a sum over V of |ds| ≤ 2.
    let logit = unit * (8.0 + 3.0 * (inputs as f64).sqrt()) * 8.0;
    f64::from(scale) * (2.0 * logit + unit * (vocab as f64).sqrt()) * 6.0 * (tokens as f64).sqrt()
}

fn config(scale: f32, softcap: Option<f32>) -> Config {
    Config { scale, softcap }
}

proptest! {
    #![proptest_config(cases(48))]

    #[test]
    fn loss_and_gradients_equal_the_formulas(seed: u64, tokens in 1usize..40, vocab in 1usize..70, inputs in 1usize..40, cap: bool) {
        let shape = [tokens, vocab, inputs];
        let case = case(seed, shape, DType::F32);
        let config = config(0.25, cap.then_some(2.5));
        let (output, exact) = (case.forward(config), case.reference(config));
        let bound = bound(6e-8, shape, 0.25);
        prop_assert!((output.loss - exact.loss).abs() <= bound * tokens as f64, "{} {}", output.loss, exact.loss);
        prop_assert_eq!(output.rows, case.labels().iter().filter(|l| **l >= 0).count());
        assert_near("dh", &output.dh.unwrap().to_f32_vec().unwrap(), &exact.dh, bound);
        let plus_one: Vec<f64> = exact.dw.iter().map(|x| x + 1.0).collect();
        assert_near("dweight", &case.dweight(config, 1.0), &plus_one, bound + 1.2e-7);
    }

    #[test]
    fn low_precision_is_as_near_as_its_rounding(seed: u64, tokens in 1usize..20, vocab in 1usize..50, inputs in 1usize..40) {
        assert_as_near_as_rounding(seed, [tokens, vocab, inputs]);
    }
}

/// Loss and dh in both 16-bit types.
fn assert_as_near_as_rounding(seed: u64, shape: [usize; 3]) {
    for (dtype, unit) in [(DType::Bf16, 1.0 / 256.0), (DType::F16, 1.0 / 2048.0)] {
        let case = case(seed, shape, dtype);
        let config = config(0.25, None);
        let (output, exact) = (case.forward(config), case.reference(config));
        // Operands are exact in their type: only ds and dh are rounded to it. The loss is as near as in f32.
        let single = bound(6e-8, shape, 0.25);
        // But a GPU keeps a chunk's logits in the activations' type, and a rounding of all moves a probability by twice as much.
        let logit = if on_cpu() { 0.0 } else { unit * case.largest_logit() };
        let most = (single + 0.25 * 2.0 * logit) * shape[0] as f64;
        assert!((output.loss - exact.loss).abs() <= most, "{shape:?}: {} {}", output.loss, exact.loss);
        let dh = output.dh.unwrap();
        assert_eq!(dh.dtype(), dtype);
        assert_near("dh", &dh.to_f32_vec().unwrap(), &exact.dh, {
            single + unit * 0.25 * 2.0 * 6.0 + 0.25 * (2.0 * logit).exp_m1() * largest(&case.w)
        });
    }
}

#[test]
fn wide_rows_in_16_bits_are_as_near_as_their_rounding() {
    // On Hopper a row in one block, two (of 48 KiB each, and what they have besides), four and eight, whose last warps have less of
    // it, or nothing.
    for vocab in [8, 264, 32_008, 49_152, 50_000, 128_256, 160_008] {
        assert_as_near_as_rounding(7, [5, vocab, 2]);
    }
}

#[test]
fn the_references_gradients_are_those_of_its_loss() {
    for softcap in [None, Some(2.0)] {
        let case = case(5, [5, 7, 3], DType::F32);
        let config = config(0.5, softcap);
        let (h, w) = (Case::wide(&case.h), Case::wide(&case.w));
        let labels = &case.labels();
        let exact = case.reference(config);
        let nudged = |values: &[f64], i: usize, by: f64| {
            let mut values = values.to_vec();
            values[i] += by;
            values
        };
        let e = 1e-5;
        for i in 0..h.len() {
            let d =
                (loss(&nudged(&h, i, e), &w, labels, 3, config) - loss(&nudged(&h, i, -e), &w, labels, 3, config)) / (2.0 * e);
            assert!((d - exact.dh[i]).abs() < 1e-8, "dh[{i}]");
        }
        for i in 0..w.len() {
            let d =
                (loss(&h, &nudged(&w, i, e), labels, 3, config) - loss(&h, &nudged(&w, i, -e), labels, 3, config)) / (2.0 * e);
            assert!((d - exact.dw[i]).abs() < 1e-8, "dw[{i}]");
        }
        assert!(exact.dh.iter().chain(&exact.dw).any(|x| x.abs() > 0.05));
    }
}

#[test]
fn gradients_are_larger_than_their_bounds() {
    // A gradient with the wrong sign would be off by twice its size, which the bound must notice.
    let shape = [39, 69, 39];
    let exact = case(4, shape, DType::F32).reference(config(0.25, Some(2.5)));
    for gradient in [exact.dh, exact.dw] {
        let largest = gradient.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        assert!(largest > 100.0 * bound(6e-8, shape, 0.25), "{largest}");
    }
}

#[test]
fn several_chunks_equal_the_formulas() {
    // 600 rows in three chunks of at most 256.
    let shape = [600, 33, 8];
    let case = case(11, shape, DType::F32);
    let config = config(0.01, None);
    let (output, exact) = (case.forward(config), case.reference(config));
    let bound = bound(6e-8, shape, 0.01);
    assert!(output.rows > 256);
    assert!((output.loss - exact.loss).abs() <= bound * 600.0);
    assert_near("dh", &output.dh.unwrap().to_f32_vec().unwrap(), &exact.dh, bound);
    assert_near("dweight", &case.dweight(config, 0.0), &exact.dw, bound);
}

#[test]
fn untrained_rows_change_nothing_and_get_zero() {
    let case = case(3, [20, 19, 6], DType::F32);
    let config = config(0.1, None);
    let labels = &case.labels();
    let mut poisoned = case.h.to_f32_vec().unwrap();
    for (row, _) in poisoned.chunks_mut(6).zip(labels).filter(|(_, label)| **label == IGNORE) {
        row.fill(f32::NAN);
    }
    let poisoned = Tensor::from_slice(case.h.arena(), &poisoned, [20, 6]).unwrap();
    let (clean, with_nan) = (case.forward(config), forward(&poisoned, &case.w, &case.labels, config, true).unwrap());
    assert_eq!(clean.loss, with_nan.loss);
    let (a, b) = (clean.dh.unwrap().to_f32_vec().unwrap(), with_nan.dh.unwrap().to_f32_vec().unwrap());
    assert_eq!(a, b);
    for (row, label) in a.chunks(6).zip(labels) {
        assert_eq!(row.iter().all(|x| *x == 0.0), *label == IGNORE);
    }
}

#[test]
fn no_trained_row_is_no_loss() {
    let mut case = case(3, [4, 5, 6], DType::F32);
    case.labels = Tensor::from_slice(case.h.arena(), &[IGNORE; 4], [4]).unwrap();
    let output = case.forward(config(1.0, None));
    assert_eq!((output.loss, output.rows), (0.0, 0));
    assert!(output.dh.unwrap().to_f32_vec().unwrap().iter().all(|x| *x == 0.0));
    assert!(case.dweight(config(1.0, None), 3.0).iter().all(|x| *x == 3.0));
}

#[test]
fn labels_outside_the_vocabulary_are_refused() {
    let mut case = case(3, [3, 5, 6], DType::F32);
    for bad in [5, -1, -99, i32::MIN] {
        case.labels = Tensor::from_slice(case.h.arena(), &[1, bad, 2], [3]).unwrap();
        let error = forward(&case.h, &case.w, &case.labels, config(1.0, None), false).unwrap_err();
        assert!(
            matches!(error, Error::TokenOutOfRange { position: 1, id, vocab_size: 5, .. } if id == i64::from(bad)),
            "{error}"
        );
    }
}

#[test]
fn a_loss_that_is_not_finite_is_returned() {
    let case = case(3, [3, 5, 6], DType::F32);
    for bad in [f32::NAN, f32::INFINITY] {
        let h = Tensor::from_slice(case.h.arena(), &[bad; 18], [3, 6]).unwrap();
        let labels = Tensor::from_slice(case.h.arena(), &[0; 3], [3]).unwrap();
        assert!(!nll(&h, &case.w, &labels, config(1.0, None)).unwrap().0.is_finite());
    }
}

#[test]
fn large_logits_do_not_overflow() {
    let arena = arena();
    let h = Tensor::from_slice(&arena, &[1.0f32], [1, 1]).unwrap();
    let w = Tensor::from_slice(&arena, &[1000.0f32, -1000.0, 999.0], [3, 1]).unwrap();
    let labels = Tensor::from_slice(&arena, &[2], [1]).unwrap();
    let (loss, rows) = nll(&h, &w, &labels, config(1.0, None)).unwrap();
    assert_eq!(rows, 1);
    assert!((loss - (1.0f64.exp() + 1.0).ln()).abs() < 1e-6, "{loss}");
}

#[test]
fn logits_are_those_of_the_loss() {
    for softcap in [None, Some(2.0)] {
        let case = case(8, [9, 21, 5], DType::F32);
        let z = logits(&case.h, &case.w, softcap).unwrap();
        let (h, w) = (Case::wide(&case.h), Case::wide(&case.w));
        for (row, h) in z.to_f32_vec().unwrap().chunks(21).zip(h.chunks(5)) {
            assert_near("z", row, &capped(h, &w, 5, config(1.0, softcap)), 1e-5);
        }
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let case = case(21, [70, 3000, 24], DType::F32);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let output = case.forward(config(0.02, None));
            (output.loss.to_bits(), output.dh.unwrap().to_f32_vec().unwrap(), case.dweight(config(0.02, None), 0.0))
        })
    };
    let one = run(1);
    for threads in [2, 5] {
        assert!(one == run(threads), "{threads} threads differ from one");
    }
}

#[test]
fn memory_beyond_dh_is_one_chunk() {
    // A GPU's chunks are larger, and its tests share one arena.
    if !on_cpu() {
        return;
    }
    let case = case(2, [400, 512, 16], DType::F32);
    let arena = case.h.arena();
    arena.reset_peak();
    let before = arena.stats().live;
    drop(case.forward(config(0.1, None)));
    let (dh, chunk) = (400 * 16 * 4, 256 * (512 + 2 * 16) * 4);
    assert!(arena.stats().peak - before <= dh + chunk, "{:?}", arena.stats());
}

#[test]
fn a_loss_scale_multiplies_the_gradients_and_not_the_loss() {
    let case = case(6, [30, 40, 8], DType::F32);
    let (config, cap) = (config(0.1, None), super::Config { softcap: None });
    let plain = case.forward(config);
    let mut scale = LossScale::new(case.h.arena()).unwrap();
    scale.load((1024.0, 0)).unwrap();
    let labels = labels_of(&case.labels, config).unwrap().scaled(&scale);
    let scaled = super::forward(&case.h, &case.w, &labels, cap, true).unwrap();
    assert_eq!(f64::from(scaled.loss.to_f32_vec().unwrap()[0]), plain.loss);
    let times = |x: Vec<f32>| -> Vec<f32> { x.iter().map(|x| 1024.0 * x).collect() };
    assert_eq!(scaled.dh.unwrap().to_f32_vec().unwrap(), times(plain.dh.unwrap().to_f32_vec().unwrap()));
    let mut dw = Tensor::zeros(case.h.arena(), DType::F32, [40, 8]).unwrap();
    backward_weight(&case.h, &case.w, &labels, cap, dw.view_mut().unwrap()).unwrap();
    assert_eq!(dw.to_f32_vec().unwrap(), times(case.dweight(config, 0.0)));
}

#[test]
fn weights_of_another_type_are_read_as_they_are() {
    let case = case(2, [6, 9, 8], DType::F32);
    let half: Vec<bf16> = case.w.to_f32_vec().unwrap().iter().map(|&x| <bf16 as Float>::from_f32(x)).collect();
    let w = Tensor::from_slice(case.h.arena(), &half, [9, 8]).unwrap();
    let wide = w.to_dtype(DType::F32).unwrap();
    let run = |w: &Tensor| forward(&case.h, w, &case.labels, config(1.0, None), false).unwrap().loss;
    assert!((run(&w) - run(&wide)).abs() < 1e-5);
}
