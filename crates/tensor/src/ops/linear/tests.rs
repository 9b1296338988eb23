//! The formulas of the parent module's head against f64, for every weight format, with what is added, and its signs.

use nibble_nf4::{Format, QuantConfig, int8::quantize_rows, quantize};
use nibble_testkit::{UNIT_F32, relative_error};

use super::*;
use crate::{
    DType, Int8Weight,
    ops::samples::{arena, normal, on_cpu, unit, wide},
};

const ROWS: usize = 13;
const INPUTS: usize = 64;
const RANK: usize = 5;
const SCALE: f32 = 2.0;
const DROPOUT: Dropout = Dropout { p: 0.25, rng: Rng::new(7) };

#[derive(Clone, Copy, Debug)]
enum Kind {
    Nf4,
    Fp4,
    Int8,
    F32,
    Bf16,
}

const KINDS: [Kind; 5] = [Kind::Nf4, Kind::Fp4, Kind::Int8, Kind::F32, Kind::Bf16];

fn weight(kind: Kind, outputs: usize, seed: u64) -> Weight {
    let arena = arena();
    let shape = [outputs, INPUTS];
    let values = normal(seed, DType::F32, shape).to_f32_vec().unwrap();
    let blocks = |format| {
        let config = QuantConfig { format, block_size: 64, double_quant: true };
        Weight::from_blocks(&arena, &quantize(&values, &config).unwrap(), shape).unwrap()
    };
    match kind {
        Kind::Nf4 => blocks(Format::Nf4),
        Kind::Fp4 => blocks(Format::Fp4),
        Kind::Int8 => {
            let rows = quantize_rows(&values, shape).unwrap();
            Weight::Int8(Int8Weight {
                codes: Tensor::from_slice(&arena, &rows.cb, shape).unwrap(),
                scale: Tensor::from_slice(&arena, &rows.scb, [outputs]).unwrap(),
            })
        }
        Kind::F32 => Weight::Dense(normal(seed, DType::F32, shape)),
        Kind::Bf16 => Weight::Dense(normal(seed, DType::Bf16, shape)),
    }
}

fn part(kind: Kind, outputs: usize, seed: u64, dropout: Option<Dropout>) -> Part {
    let adapter = Adapter {
        a: normal(seed + 1, DType::F32, [RANK, INPUTS]),
        b: normal(seed + 2, DType::F32, [outputs, RANK]),
        scale: SCALE,
        dropout,
    };
    let bias = Some(normal(seed + 3, DType::F32, [outputs]));
    Part { weight: weight(kind, outputs, seed), bias, adapter: Some(adapter) }
}

/// A matrix in f64 with its columns.
#[derive(Clone)]
struct Matrix(Vec<f64>, usize);

impl Matrix {
    fn of(tensor: &Tensor) -> Self {
        Self(wide(tensor), tensor.shape().last())
    }

    fn transposed(&self) -> Self {
        let rows = self.0.len() / self.1;
        Self((0..self.0.len()).map(|i| self.0[i % rows * self.1 + i / rows]).collect(), rows)
    }

    fn times(&self, other: &Self) -> Self {
        let n = other.1;
        let mut product = vec![0.0; self.0.len() / self.1 * n];
        for (sums, row) in product.chunks_mut(n).zip(self.0.chunks(self.1)) {
            for (x, other) in row.iter().zip(other.0.chunks(n)) {
                sums.iter_mut().zip(other).for_each(|(sum, y)| *sum += x * y);
            }
        }
        Self(product, n)
    }

    fn plus(&self, other: &Self, factor: f64) -> Self {
        Self(self.0.iter().zip(&other.0).map(|(x, y)| x + factor * y).collect(), self.1)
    }

    fn dropped(&self, dropout: Option<Dropout>) -> Self {
        let factor = |i| dropout.map_or(1.0, |d| f64::from(d.factor(i)));
        Self(self.0.iter().enumerate().map(|(i, x)| x * factor(i)).collect(), self.1)
    }
}

fn base(part: &Part) -> Matrix {
    Matrix(part.weight.to_f32_vec().unwrap().iter().map(|&w| f64::from(w)).collect(), INPUTS)
}

/// y of one part in f64.
fn expected_y(x: &Matrix, part: &Part) -> Matrix {
    let mut y = x.times(&base(part).transposed());
    if let Some(adapter) = &part.adapter {
        let h = x.dropped(adapter.dropout).times(&Matrix::of(&adapter.a).transposed());
        y = y.plus(&h.times(&Matrix::of(&adapter.b).transposed()), f64::from(adapter.scale));
    }
    if let Some(bias) = &part.bias {
        let bias = wide(bias);
        let n = y.1;
        y.0.iter_mut().enumerate().for_each(|(i, y)| *y += bias[i % n]);
    }
    y
}

/// Every element within rounding of `terms` products, whose sizes are of the order of the largest element's.
fn assert_close(found: &[f64], expected: &Matrix, terms: usize) {
    let size = expected.0.iter().fold(1.0f64, |size, x| size.max(x.abs()));
    assert_eq!(found.len(), expected.0.len());
    for (i, (found, expected)) in found.iter().zip(&expected.0).enumerate() {
        assert!((found - expected).abs() <= 4.0 * terms as f64 * UNIT_F32 * size, "{i}: expected {expected}, found {found}");
    }
}

#[test]
fn forward_is_the_formula_for_every_weight_format() {
    let x = normal(1, DType::F32, [ROWS, INPUTS]);
    for kind in KINDS {
        for (bias, adapter, dropout) in
            [(false, false, None), (true, false, None), (false, true, None), (true, true, None), (true, true, Some(DROPOUT))]
        {
            let mut part = part(kind, 22, 10, dropout);
            part.bias = part.bias.filter(|_| bias);
            part.adapter = part.adapter.filter(|_| adapter);
            let (ys, saved) = forward(&x, std::slice::from_ref(&part)).unwrap();
            assert_eq!(saved.0.iter().any(Option::is_some), adapter);
            assert_close(&wide(&ys[0]), &expected_y(&Matrix::of(&x), &part), INPUTS + RANK);
        }
    }
}

#[test]
fn what_an_unread_forward_keeps_has_the_same_bits() {
    // On the CPU products of so many values are done one by one, smaller ones together.
    for (outputs, inputs) in [(2600, 2568), (200, 2568), (136, 200)] {
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let weight = Weight::Dense(normal(1, dtype, [outputs, inputs]));
            let [a, b] = [[8, inputs], [outputs, 8]].map(|shape| normal(2, dtype, shape));
            let parts = [Part { weight, bias: None, adapter: Some(Adapter { a, b, scale: SCALE, dropout: None }) }];
            let x = normal(3, dtype, [64, inputs]);
            let (_, read) = forward(&x, &parts).unwrap();
            let unread = forward_unread(&x, &parts).unwrap();
            for (read, unread) in read.0.iter().flatten().zip(unread.0.iter().flatten()) {
                assert!(wide(read) == wide(unread), "{outputs} x {inputs}, {dtype:?}");
            }
            assert_eq!(read.0.len(), unread.0.len());
        }
    }
}

/// What backward gives, in f64: dx, then dW, dbias, dA and dB of each part, added to `START`.
struct Gradients<M> {
    dx: M,
    parts: Vec<[M; 4]>,
}

/// What the gradients hold before.
const START: f32 = 0.5;

fn run_backward(dys: &[Tensor], x: &Tensor, parts: &[Part]) -> Gradients<Vec<f64>> {
    let arena = arena();
    let (_, saved) = forward(x, parts).unwrap();
    let start = |shape: Shape| Tensor::from_slice(&arena, &vec![START; shape.numel()], shape).unwrap();
    let mut sums: Vec<[Tensor; 4]> = parts
        .iter()
        .map(|p| {
            let n = p.outputs();
            [[n, INPUTS].into(), [n].into(), [RANK, INPUTS].into(), [n, RANK].into()].map(start)
        })
        .collect();
    let grads = sums
        .iter_mut()
        .map(|[w, bias, a, b]| PartGrads {
            weight: Some(w.view_mut().unwrap()),
            bias: Some(bias.view_mut().unwrap()),
            adapter: Some((a.view_mut().unwrap(), b.view_mut().unwrap())),
        })
        .collect();
    let dx = backward(dys, x.clone(), &saved, parts, grads, true).unwrap().unwrap();
    Gradients { dx: wide(&dx), parts: sums.iter().map(|sums| sums.each_ref().map(wide)).collect() }
}

fn expected_backward(dys: &[Tensor], x: &Tensor, parts: &[Part]) -> Gradients<Matrix> {
    let x = Matrix::of(x);
    let rows = x.0.len() / INPUTS;
    let (mut dx, mut sums) = (Matrix(vec![0.0; rows * INPUTS], INPUTS), Vec::new());
    for (part, dy) in parts.iter().zip(dys) {
        let (dy, adapter) = (Matrix::of(dy), part.adapter.as_ref().unwrap());
        let (a, b, s) = (Matrix::of(&adapter.a), Matrix::of(&adapter.b), f64::from(adapter.scale));
        let dropped = x.dropped(adapter.dropout);
        let (h, t) = (dropped.times(&a.transposed()), dy.times(&b));
        dx = dx.plus(&dy.times(&base(part)), 1.0).plus(&t.times(&a).dropped(adapter.dropout), s);
        let ones = Matrix(vec![1.0; rows], rows);
        let gradients = [
            (dy.transposed().times(&x), 1.0),
            (ones.times(&dy), 1.0),
            (t.transposed().times(&dropped), s),
            (dy.transposed().times(&h), s),
        ];
        sums.push(gradients.map(|(gradient, s)| {
            let start = Matrix(vec![f64::from(START); gradient.0.len()], gradient.1);
            start.plus(&gradient, s)
        }));
    }
    Gradients { dx, parts: sums }
}

fn check_backward(kind: Kind, dropout: Option<Dropout>) {
    let x = normal(2, DType::F32, [ROWS, INPUTS]);
    let parts = [part(kind, 22, 20, dropout), part(kind, 9, 30, dropout)];
    let dys = [normal(40, DType::F32, [ROWS, 22]), normal(41, DType::F32, [ROWS, 9])];
    let (found, expected) = (run_backward(&dys, &x, &parts), expected_backward(&dys, &x, &parts));
    for (found, expected) in found.parts.iter().flatten().zip(expected.parts.iter().flatten()) {
        assert_close(found, expected, ROWS + INPUTS + 22);
    }
    assert_close(&found.dx, &expected.dx, 2 * (22 + RANK) + INPUTS);
}

#[test]
fn backward_adds_the_formula_for_every_weight_format() {
    for kind in KINDS {
        check_backward(kind, None);
    }
}

#[test]
fn backward_with_dropout_uses_the_mask_of_forward() {
    for kind in KINDS {
        check_backward(kind, Some(DROPOUT));
    }
}

/// `rows` of 16-bit x, and the gradients of a wide and a narrow part, whose A lie side by side.
fn check_rounded(dtype: DType, rows: usize, outputs: usize, dropout: Option<Dropout>) {
    let x = normal(5, dtype, [rows, INPUTS]);
    let a = normal(6, dtype, [2 * RANK, INPUTS]);
    let parts = [(Kind::Nf4, outputs, 100), (Kind::Int8, 48, 110)].map(|(kind, outputs, seed)| {
        let mut part = part(kind, outputs, seed, dropout);
        let (first, b) = (if seed == 100 { 0 } else { RANK }, normal(seed + 2, dtype, [outputs, RANK]));
        part.adapter = Some(Adapter { a: a.rows(first, RANK).unwrap(), b, scale: SCALE, dropout });
        part
    });
    let dys = [normal(7, dtype, [rows, outputs]), normal(8, dtype, [rows, 48])];
    // The weight, h or t, their factor and the result are each rounded once.
    let assert_rounded = |what: &str, found: &[f64], expected: &Matrix| {
        let error = relative_error(found, &expected.0);
        assert!(error <= 3.0 * unit(dtype), "{what} of {rows} x {outputs} in {dtype}: {error:e}");
    };
    for (y, part) in forward(&x, &parts).unwrap().0.iter().zip(&parts) {
        assert_rounded("y", &wide(y), &expected_y(&Matrix::of(&x), part));
    }
    let (found, expected) = (run_backward(&dys, &x, &parts), expected_backward(&dys, &x, &parts));
    assert_rounded("dx", &found.dx, &expected.dx);
    for (found, expected) in found.parts.iter().zip(&expected.parts) {
        for (i, name) in ["dW", "dbias", "dA", "dB"].into_iter().enumerate() {
            assert_rounded(name, &found[i], &expected[i]);
        }
    }
}

#[test]
fn sixteen_bit_activations_are_within_their_rounding() {
    for dtype in [DType::Bf16, DType::F16] {
        for dropout in [None, Some(DROPOUT)] {
            check_rounded(dtype, 70, 40, dropout);
        }
    }
    if !on_cpu() {
        // So many that columns ride beside x and dy, and t and dB come from one pass.
        check_rounded(DType::Bf16, 300, 96, None);
        check_rounded(DType::Bf16, 1100, 4096, None);
    }
}

/// Σ y c over the parts, in f64.
fn loss(x: &Matrix, parts: &[Part], dys: &[Tensor]) -> f64 {
    let one = |(part, dy): (&Part, &Tensor)| expected_y(x, part).0.iter().zip(wide(dy)).map(|(y, c)| y * c).sum::<f64>();
    parts.iter().zip(dys).map(one).sum()
}

#[test]
fn dx_is_the_central_difference_of_the_loss() {
    let x = normal(3, DType::F32, [ROWS, INPUTS]);
    let parts = [part(Kind::Nf4, 22, 50, Some(DROPOUT)), part(Kind::Int8, 9, 60, None)];
    let dys = [normal(70, DType::F32, [ROWS, 22]), normal(71, DType::F32, [ROWS, 9])];
    let found = run_backward(&dys, &x, &parts).dx;
    let at = |i: usize, step: f64| {
        let mut x = Matrix::of(&x);
        x.0[i] += step;
        loss(&x, &parts, &dys)
    };
    for i in (0..ROWS * INPUTS).step_by(37) {
        let slope = (at(i, 0.5) - at(i, -0.5)) / 1.0; // exact but for rounding: the loss is linear in x
        assert!((found[i] - slope).abs() <= 1e-4 * (1.0 + slope.abs()), "{i}: expected {slope}, found {}", found[i]);
    }
}

#[test]
fn a_flipped_sign_of_lora_b_flips_its_share_alone() {
    let x = normal(4, DType::F32, [ROWS, INPUTS]);
    let plus = part(Kind::Nf4, 22, 80, None);
    let mut minus = plus.clone();
    let flipped: Vec<f32> = plus.adapter.as_ref().unwrap().b.to_f32_vec().unwrap().iter().map(|b| -b).collect();
    minus.adapter.as_mut().unwrap().b = Tensor::from_slice(&arena(), &flipped, [22, RANK]).unwrap();
    let alone = Part { adapter: None, ..plus.clone() };
    let y = |part: &Part| Matrix(wide(&forward(&x, std::slice::from_ref(part)).unwrap().0[0]), 22);
    let (plus, minus, alone) = (y(&plus), y(&minus), y(&alone));
    assert_close(&plus.plus(&minus, 1.0).0, &alone.plus(&alone, 1.0), 2 * INPUTS);
    let share = plus.plus(&minus, -1.0).0.iter().fold(0.0f64, |size, x| size.max(x.abs()));
    assert!(share > 1.0, "the adapter's share is {share}");
}

#[test]
fn a_backward_of_no_layers_is_refused() {
    let x = normal(5, DType::F32, [ROWS, INPUTS]);
    let (_, saved) = forward(&x, &[]).unwrap();
    let error = backward(&[], x, &saved, &[], Vec::new(), true).unwrap_err();
    assert!(matches!(error, Error::Argument { argument: "parts", .. }), "{error}");
}
