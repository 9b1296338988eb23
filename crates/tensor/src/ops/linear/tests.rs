//! The formulas of the parent module's head against f64, for every weight format, with what is added, and its signs.

use nibble_nf4::{Format, QuantConfig, int8::quantize_rows, quantize};
use nibble_testkit::UNIT_F32;

use super::*;
use crate::{
    Arena, DType, Int8Weight,
    ops::samples::{normal, wide},
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
    let arena = Arena::new(Device::Cpu);
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
        let cell = |row: &[f64], j: usize| row.iter().enumerate().map(|(k, x)| x * other.0[k * n + j]).sum();
        Self(self.0.chunks(self.1).flat_map(|row| (0..n).map(move |j| cell(row, j))).collect(), n)
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
            assert_eq!(saved.0[0].is_some(), adapter);
            assert_close(&wide(&ys[0]), &expected_y(&Matrix::of(&x), &part), INPUTS + RANK);
        }
    }
}

/// What backward gives, in f64: dx, then dW, dbias, dA and dB of each part, added to `START`.
struct Found {
    dx: Vec<f64>,
    parts: Vec<[Vec<f64>; 4]>,
}

/// What the gradients hold before.
const START: f32 = 0.5;

fn run_backward(dys: &[Tensor], x: &Tensor, parts: &[Part]) -> Found {
    let arena = Arena::new(Device::Cpu);
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
    Found { dx: wide(&dx), parts: sums.iter().map(|sums| sums.each_ref().map(wide)).collect() }
}

fn check_backward(kind: Kind, dropout: Option<Dropout>) {
    let x = normal(2, DType::F32, [ROWS, INPUTS]);
    let parts = [part(kind, 22, 20, dropout), part(kind, 9, 30, dropout)];
    let dys = [normal(40, DType::F32, [ROWS, 22]), normal(41, DType::F32, [ROWS, 9])];
    let found = run_backward(&dys, &x, &parts);
    let x = Matrix::of(&x);
    let mut dx = Matrix(vec![0.0; ROWS * INPUTS], INPUTS);
    for ((part, dy), found) in parts.iter().zip(&dys).zip(&found.parts) {
        let (dy, adapter) = (Matrix::of(dy), part.adapter.as_ref().unwrap());
        let (a, b, s) = (Matrix::of(&adapter.a), Matrix::of(&adapter.b), f64::from(adapter.scale));
        let dropped = x.dropped(dropout);
        let (h, t) = (dropped.times(&a.transposed()), dy.times(&b));
        dx = dx.plus(&dy.times(&base(part)), 1.0).plus(&t.times(&a).dropped(dropout), s);
        let ones = Matrix(vec![1.0; ROWS], ROWS);
        let gradients = [
            (dy.transposed().times(&x), 1.0),
            (ones.times(&dy), 1.0),
            (t.transposed().times(&dropped), s),
            (dy.transposed().times(&h), s),
        ];
        for (found, (gradient, s)) in found.iter().zip(&gradients) {
            let start = Matrix(vec![f64::from(START); gradient.0.len()], gradient.1);
            assert_close(found, &start.plus(gradient, *s), ROWS + INPUTS + 22);
        }
    }
    assert_close(&found.dx, &dx, 2 * (22 + RANK) + INPUTS);
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
    minus.adapter.as_mut().unwrap().b = Tensor::from_slice(&Arena::new(Device::Cpu), &flipped, [22, RANK]).unwrap();
    let alone = Part { adapter: None, ..plus.clone() };
    let y = |part: &Part| Matrix(wide(&forward(&x, std::slice::from_ref(part)).unwrap().0[0]), 22);
    let (plus, minus, alone) = (y(&plus), y(&minus), y(&alone));
    assert_close(&plus.plus(&minus, 1.0).0, &alone.plus(&alone, 1.0), 2 * INPUTS);
    let share = plus.plus(&minus, -1.0).0.iter().fold(0.0f64, |size, x| size.max(x.abs()));
    assert!(share > 1.0, "the adapter's share is {share}");
}
