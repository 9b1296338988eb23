//! Gradients of what q and k were rotary embeddings of.

use nibble_testkit::{assert_within, reference};

use super::*;

fn frequencies(half: usize) -> Vec<f32> {
    (0..half).map(|i| 10_000f32.powf(-(i as f32) / half as f32)).collect()
}

fn table(half: usize, documents: &Documents) -> RopeTable {
    RopeTable::new(&arena(), &frequencies(half), 1.0, documents.last_position() + 1).unwrap()
}

fn positions(shape: &Shape) -> Vec<u32> {
    shape.lengths.iter().flat_map(|&len| 0..len as u32).collect()
}

/// Heads turned by the angles of their tokens, times `direction`.
fn turned(x: &[f64], heads: usize, shape: &Shape, half: usize, direction: f64) -> Vec<f64> {
    let frequencies: Vec<f64> = frequencies(half).iter().map(|&f| direction * f64::from(f)).collect();
    reference::rope(x, heads, shape.size, &positions(shape), &frequencies)
}

/// |a| + |b| of the pair that element i is turned in; 0 for one that stays.
fn pair(x: &[f64], i: usize, size: usize, half: usize) -> f64 {
    let (row, d) = (i / size * size, i % size);
    if d < 2 * half { x[row + d % half].abs() + x[row + half + d % half].abs() } else { 0.0 }
}

/// The gradients before rope, by the op.
fn before_rope(case: &Case, config: Config, half: usize, side_by_side: Option<usize>) -> [Tensor; 3] {
    let (documents, (o, lse)) = (case.shape.documents(), case.forward(config));
    let Case { q, k, v, d_o, .. } = case;
    let table = table(half, &documents);
    let wanted = Wanted { side_by_side, rope: Some(&table) };
    let (dq, dk, dv) = backward_to(&Saved { d_o, q, k, v, o: &o, lse: &lse }, &documents, config, wanted).unwrap();
    [dq, dk, dv]
}

proptest! {
    #![proptest_config(cases(40))]

    #[test]
    fn gradients_before_rope_equal_the_formulas(seed: u64, shape in shapes(), part in proptest::sample::select(vec![1usize, 1, 3]), window in proptest::option::of(1usize..80), beside: bool) {
        let config = Config { window, ..config(shape.size) };
        let half = shape.size / 2 / part;
        prop_assume!(half > 0);
        for dtype in [DType::F32, DType::Bf16, DType::F16] {
            let case = Case::new(seed, &shape, dtype);
            let [exact_q, exact_k, exact_v] = case.exact_backward(config);
            let found = before_rope(&case, config, half, beside.then_some(8));
            let bound = backward_bound(&shape, dtype);
            for ((name, found), (exact, heads)) in ["dq", "dk"].into_iter().zip(&found).zip([(exact_q, shape.heads), (exact_k, shape.kv_heads)]) {
                let want = turned(&exact, heads, &shape, half, -1.0);
                // Both of a pair are off by their bound and may be rounded; angles are rounded to f32.
                assert_within(name, &found.to_f32_vec().unwrap(), &want, |i| {
                    2.0 * bound + (unit(dtype) + 128.0 * unit(DType::F32)) * (pair(&exact, i, shape.size, half) + want[i].abs())
                });
            }
            assert_within("dv", &found[2].to_f32_vec().unwrap(), &exact_v, |i| bound + unit(dtype) * exact_v[i].abs());
        }
    }
}

#[test]
fn gradients_before_rope_are_the_central_differences_of_the_output() {
    let (shape, half) = (Shape::new(&[5, 1, 3], 4, 2, 8), 3);
    let config = Config { window: Some(4), ..config(8) };
    // The case's q and k are taken for what is embedded.
    let mut case = Case::new(9, &shape, DType::F32);
    let (d_o, q, k, v) = (wide(&case.d_o), wide(&case.q), wide(&case.k), wide(&case.v));
    let value = |q: &[f64], k: &[f64]| {
        let (q, k) = (turned(q, 4, &shape, half, 1.0), turned(k, 2, &shape, half, 1.0));
        dot(&d_o, &exact(&q, &k, &v, &shape, config).o)
    };
    let differences = [central_difference(|x| value(x, &k), &q), central_difference(|x| value(&q, x), &k)];
    let documents = shape.documents();
    let table = table(half, &documents);
    case.q = rope::forward(case.q, documents.positions(), &table).unwrap();
    case.k = rope::forward(case.k, documents.positions(), &table).unwrap();
    let gradients = before_rope(&case, config, half, None);
    for (found, difference) in gradients.iter().zip(&differences) {
        assert!(difference.iter().any(|x| x.abs() > 0.1));
        assert_within("gradient", &found.to_f32_vec().unwrap(), difference, |_| 2.0 * backward_bound(&shape, DType::F32));
    }
}

/// Turned where they are made or afterwards: rounding apart the same, whatever the tiles, parts and heads in turn.
#[test]
fn gradients_turned_at_once_are_those_turned_afterwards() {
    let mut all = vec![
        Shape::new(&[1, 200, 64, 0, 131], 4, 2, 64),
        Shape::new(&[129, 63, 70], 3, 3, 128),
        Shape::new(&[65, 192], 6, 1, 128),
        Shape::new(&[90], 2, 1, 96),
    ];
    if !on_cpu() {
        // Tiles enough that none is split, and that a block takes several heads in turn.
        all.push(Shape::new(&[1500, 900, 1, 1899], 32, 8, 128));
        all.push(Shape::new(&[2300, 2000], 34, 17, 64));
    }
    for (shape, dtype) in all.iter().flat_map(|shape| [DType::Bf16, DType::F16, DType::F32].map(|dtype| (shape, dtype))) {
        if shape.tokens() > 1000 && dtype == DType::F32 {
            continue;
        }
        let (half, case) = (shape.size / 2, Case::new(5, shape, dtype));
        let (documents, config) = (shape.documents(), config(shape.size));
        let table = table(half, &documents);
        let [dq, dk, dv] = case.backward(config);
        let made = [wide(&dq), wide(&dk)];
        let afterwards = [dq, dk].map(|x| wide(&rope::backward(x, documents.positions(), &table).unwrap()));
        let found = before_rope(&case, config, half, None);
        for (found, (made, want)) in found.iter().zip(made.iter().zip(&afterwards)) {
            assert!(made.iter().zip(want).any(|(a, b)| (a - b).abs() > 0.1), "{shape:?}: nothing was turned");
            assert_within("gradient", &found.to_f32_vec().unwrap(), want, |i| {
                1e-5 + (unit(dtype) + 8.0 * unit(DType::F32)) * (pair(made, i, shape.size, half) + 2.0 * want[i].abs())
            });
        }
        assert_eq!(found[2].to_f32_vec().unwrap(), dv.to_f32_vec().unwrap());
        for (alone, beside) in found.iter().zip(before_rope(&case, config, half, Some(16))) {
            assert_eq!(alone.to_f32_vec().unwrap(), beside.to_f32_vec().unwrap(), "{shape:?}: side by side");
        }
    }
}

#[test]
fn tables_that_do_not_fit_are_refused() {
    let case = Case::new(2, &Shape::new(&[6], 4, 2, 8), DType::F32);
    let (documents, (o, lse)) = (case.shape.documents(), case.forward(config(8)));
    let Case { q, k, v, d_o, .. } = &case;
    let table = table(5, &documents);
    let wanted = Wanted { rope: Some(&table), ..Wanted::default() };
    let error = backward_to(&Saved { d_o, q, k, v, o: &o, lse: &lse }, &documents, config(8), wanted).unwrap_err();
    assert_eq!(error.to_string(), "rope: `q` must be heads of at least twice the table's width, found 8");
}
