//! The layers around a gated unit: gradients are the differences of the output, and the same bits whatever is kept for them.

#![forbid(unsafe_code)]

use nibble_autograd::{ParamStore, ParamStoreBuilder, Tape, Var};
use nibble_lora::{Adapter, Linear, Lora, forward_gated};
use nibble_tensor::{Arena, Device, Result, Rng, Tensor, Weight, ops::glu::Activation};
use nibble_testkit::assert_within;

const ROWS: usize = 3;
/// Of x, of the unit, of y.
const SIZES: [usize; 3] = [4, 6, 5];
const RANK: usize = 2;
/// Of the differences: what rounding and the third derivative make of them is about the same.
const STEP: f64 = 0.01;

/// What trains.
#[derive(Clone, Copy, Debug)]
struct Case {
    /// Whether gate and up have adapters, and x a gradient.
    upstream: bool,
    /// Whether down has one.
    down: bool,
    dropout: f32,
    /// Whether down's base trains.
    base: bool,
}

/// What is kept for the backward pass.
#[derive(Clone, Copy, Debug)]
enum Kept {
    All,
    Products,
    Input,
}

struct Mlp {
    layers: [Linear; 3],
    params: ParamStore,
    x: Tensor,
    case: Case,
}

/// Numbers below 1 of either sign.
fn numbers(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 37 + seed * 101) as f32 * 1.3).sin()).collect()
}

fn dy() -> Vec<f32> {
    numbers(2, ROWS * SIZES[2])
}

impl Mlp {
    /// With `values` as x and what trains, one after the other, if there are any.
    fn new(case: Case, values: Option<&[f64]>) -> Self {
        let arena = Arena::new(Device::Cpu);
        let mut builder = ParamStoreBuilder::default();
        let mut layers = [(0, SIZES[1], SIZES[0]), (1, SIZES[1], SIZES[0]), (2, SIZES[2], SIZES[1])].map(|(i, n, k)| {
            let weight = Tensor::from_slice(&arena, &numbers(10 + i, n * k), [n, k]).unwrap();
            let mut layer = Linear::new(format!("layer.{i}"), Weight::Dense(weight), None);
            if if i == 2 { case.down } else { case.upstream } {
                let a = builder.add(format!("a.{i}"), [RANK, k], numbers(20 + i, RANK * k));
                let b = builder.add(format!("b.{i}"), [n, RANK], numbers(30 + i, n * RANK));
                layer.adapter = Some(Adapter::Lora(Lora { a, b, scale: 0.5, dropout: case.dropout }));
            }
            layer
        });
        if case.base {
            layers[2].train_base(&mut builder).unwrap();
        }
        let mut params = builder.build(&arena).unwrap();
        let mut x = numbers(1, ROWS * SIZES[0]);
        if let Some(values) = values {
            let (first, rest) = values.split_at(x.len());
            x = first.iter().map(|&x| x as f32).collect();
            let data = params.data_mut().as_mut_slice::<f32>().unwrap();
            data.iter_mut().zip(rest).for_each(|(to, &from)| *to = from as f32);
        }
        let x = Tensor::from_slice(&arena, &x, [ROWS, SIZES[0]]).unwrap();
        Self { layers, params, x, case }
    }

    /// x and what trains.
    fn values(&self) -> Vec<f64> {
        let params = self.params.data().to_f32_vec().unwrap();
        self.x.to_f32_vec().unwrap().into_iter().chain(params).map(f64::from).collect()
    }

    fn forward<'m>(&'m self, tape: &mut Tape<'m>, x: Var) -> Result<Var> {
        let [gate, up, down] = &self.layers;
        let dropout = [0, 1].map(|i| (self.case.dropout > 0.0).then(|| Rng::new(7).stream(i)));
        forward_gated(tape, [gate, up, down], x, Activation::Silu, dropout)
    }

    /// Σ y dy.
    fn loss(&self) -> f64 {
        let y = self.forward(&mut Tape::inference(&self.params), Var::from(self.x.clone())).unwrap();
        y.tensor().to_f32_vec().unwrap().iter().zip(dy()).map(|(y, dy)| f64::from(*y) * f64::from(dy)).sum()
    }

    /// dx where anything upstream trains, and the gradients of what trains.
    fn gradients(&self, kept: Kept) -> Vec<f32> {
        let mut grads = self.params.zero_grads().unwrap();
        let mut tape = Tape::new(&self.params);
        tape.set_recomputing(matches!(kept, Kept::Products));
        let x = if self.case.upstream { tape.input(self.x.clone()) } else { Var::from(self.x.clone()) };
        let id = x.id();
        let y = if matches!(kept, Kept::Input) {
            let [y] = tape.checkpoint([x], true, |tape, [x]| Ok([self.forward(tape, x)?])).unwrap();
            y
        } else {
            self.forward(&mut tape, x).unwrap()
        };
        let dy = Tensor::from_slice(self.x.arena(), &dy(), [ROWS, SIZES[2]]).unwrap();
        let [dx] = tape.backward([y], [dy], [id], &mut grads).unwrap();
        let dx = dx.map(|dx| dx.to_f32_vec().unwrap()).unwrap_or_default();
        dx.into_iter().chain(grads.flat().to_f32_vec().unwrap()).collect()
    }
}

/// Of the loss by each value.
fn differences(case: Case, values: &[f64]) -> Vec<f64> {
    let loss = |i: usize, by: f64| {
        let mut values = values.to_vec();
        values[i] += by;
        Mlp::new(case, Some(&values)).loss()
    };
    (0..values.len()).map(|i| (loss(i, STEP) - loss(i, -STEP)) / (2.0 * STEP)).collect()
}

#[test]
fn gradients_around_a_gated_unit_are_the_differences_of_its_output_whatever_is_kept() {
    let all = Case { upstream: true, down: true, dropout: 0.0, base: false };
    for case in [
        all,
        Case { dropout: 0.4, ..all },
        Case { down: false, ..all },
        Case { down: false, base: true, ..all },
        Case { base: true, ..all },
        Case { upstream: false, ..all },
        Case { upstream: false, down: false, base: true, ..all },
    ] {
        let mlp = Mlp::new(case, None);
        let found = mlp.gradients(Kept::All);
        for kept in [Kept::Products, Kept::Input] {
            assert_eq!(mlp.gradients(kept), found, "{case:?}, {kept:?}");
        }
        // Without anything that trains upstream there is no dx.
        let expected = differences(case, &mlp.values()).split_off(if case.upstream { 0 } else { ROWS * SIZES[0] });
        let size = expected.iter().fold(1.0f64, |size, x| size.max(x.abs()));
        assert_within(&format!("{case:?}"), &found, &expected, |_| 1e-3 * size);
    }
}
