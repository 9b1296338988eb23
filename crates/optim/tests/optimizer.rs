//! What every optimizer keeps to.

mod common;

use common::arena;
use nibble_optim::{
    AdafactorConfig, AdamWConfig, DecayOrder, Error, Layout, LionConfig, Optimizer, OptimizerConfig, OptimizerName, SgdConfig,
};
use nibble_tensor::{DType, Rng, Shape, Tensor};

const LEN: usize = 20_001;
/// Parameters of these sizes, of which every second one does not decay.
const SIZES: [usize; 5] = [5, 12, 883, 18_100, 1001];

fn layout() -> Layout {
    Layout::new(SIZES.iter().enumerate().map(|(i, &size)| (Shape::from([size]), i % 2 == 0)))
}

fn all_decayed() -> Layout {
    Layout::new(SIZES.iter().map(|&size| (Shape::from([size]), true)))
}

fn new(config: OptimizerConfig, layout: &Layout) -> Optimizer {
    Optimizer::new(&arena(), layout, config).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.to_f32_vec().unwrap()
}

fn normal(seed: u64) -> Tensor {
    let values: Vec<f32> = (0..LEN as u64).map(|i| Rng::new(seed).normal(i)).collect();
    Tensor::from_slice(&arena(), &values, [LEN]).unwrap()
}

fn configs() -> Vec<OptimizerConfig> {
    let sgd = SgdConfig { momentum: 0.9, weight_decay: 0.1, ..SgdConfig::default() };
    let mut configs: Vec<_> = OptimizerName::ALL.iter().map(|name| name.config(0.1)).collect();
    configs.extend([OptimizerConfig::Sgd(sgd), OptimizerConfig::Sgd(SgdConfig { nesterov: true, ..sgd })]);
    configs
}

fn run(optimizer: &mut Optimizer, params: &mut Tensor, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        optimizer.step(params, &normal(seed), 1e-2, 0.5).unwrap();
    }
}

#[test]
fn seven_steps_equal_three_saved_loaded_and_four() {
    for config in configs() {
        let mut straight = normal(0);
        run(&mut new(config, &layout()), &mut straight, 1..8);

        let mut resumed = normal(0);
        let mut first = new(config, &layout());
        run(&mut first, &mut resumed, 1..4);
        let mut second = new(config, &layout());
        let state = first.state().unwrap();
        second.load_state(first.steps().unwrap(), &state.iter().map(|(name, state)| (*name, state)).collect::<Vec<_>>()).unwrap();
        drop((first, state));
        run(&mut second, &mut resumed, 4..8);
        assert_eq!(second.steps().unwrap(), 7);
        assert_eq!(floats(&straight), floats(&resumed), "{config:?}");
    }
}

#[test]
fn parameters_without_decay_are_stepped_as_if_it_were_zero() {
    let without = |config| match config {
        OptimizerConfig::AdamW(config) => OptimizerConfig::AdamW(AdamWConfig { weight_decay: 0.0, ..config }),
        OptimizerConfig::AdamW8bit(config) => OptimizerConfig::AdamW8bit(AdamWConfig { weight_decay: 0.0, ..config }),
        OptimizerConfig::Lion(config) => OptimizerConfig::Lion(LionConfig { weight_decay: 0.0, ..config }),
        OptimizerConfig::Lion8bit(config) => OptimizerConfig::Lion8bit(LionConfig { weight_decay: 0.0, ..config }),
        OptimizerConfig::Adafactor(config) => OptimizerConfig::Adafactor(AdafactorConfig { weight_decay: 0.0, ..config }),
        OptimizerConfig::Sgd(config) => OptimizerConfig::Sgd(SgdConfig { weight_decay: 0.0, ..config }),
        other => other,
    };
    for config in configs() {
        let [mut all, mut none, mut some] = [(); 3].map(|()| normal(0));
        run(&mut new(config, &all_decayed()), &mut all, 1..4);
        run(&mut new(without(config), &all_decayed()), &mut none, 1..4);
        run(&mut new(config, &layout()), &mut some, 1..4);
        let [all, none, some] = [&all, &none, &some].map(floats);
        let mut at = 0;
        for (i, size) in SIZES.into_iter().enumerate() {
            let want = if i % 2 == 0 { &all } else { &none };
            assert_eq!(some[at..at + size], want[at..at + size], "{config:?} {i}");
            at += size;
        }
        assert_ne!(all, none);
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused_whole() {
    let mut optimizer = new(OptimizerConfig::AdamW(AdamWConfig::default()), &Layout::one(4));
    let short = Tensor::from_slice(&arena(), &[1.0f32; 3], [3]).unwrap();
    let right = Tensor::from_slice(&arena(), &[1.0f32; 4], [4]).unwrap();
    let error = optimizer.load_state(5, &[("exp_avg", &right), ("exp_avg_sq", &short), ("max_exp_avg_sq", &right)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "adamw: the saved state does not fit:\n  exp_avg_sq: expected float32 (4,), found float32 (3,)\n  max_exp_avg_sq: expected \
         nothing, found float32 (4,)"
    );
    let error = optimizer.load_state(5, &[("exp_avg", &right.to_dtype(DType::Bf16).unwrap())]).unwrap_err();
    assert!(matches!(&error, Error::State { mismatches, .. } if mismatches.len() == 2), "{error}");
    assert_eq!(optimizer.steps().unwrap(), 0);
    assert!(optimizer.state().unwrap().iter().all(|(_, state)| floats(state) == [0.0; 4]));
}

#[test]
fn names_round_trip_and_a_misspelt_one_meets_its_nearest() {
    for name in OptimizerName::ALL {
        assert_eq!(name.to_string().parse::<OptimizerName>().unwrap(), name);
    }
    let error = "adamw_torch_fuse".parse::<OptimizerName>().unwrap_err().to_string();
    assert_eq!(error, "optim: `adamw_torch_fuse` is not an optimizer known here; the nearest name is `adamw_torch_fused`");
    let OptimizerConfig::AdamW(bnb) = OptimizerName::AdamWBnb32bit.config(0.5) else { panic!("not AdamW") };
    assert_eq!((bnb.decay, bnb.weight_decay), (DecayOrder::After, 0.5));
}

#[test]
fn constants_and_buffers_out_of_range_are_refused() {
    let refused = |config| Optimizer::new(&arena(), &Layout::one(2), config).map(|_| ()).unwrap_err().to_string();
    let adamw = AdamWConfig::default();
    let error = refused(OptimizerConfig::AdamW(AdamWConfig { beta2: 1.0, ..adamw }));
    assert_eq!(error, "adamw: `adam_beta2` must be at least 0 and below 1, found 1");
    let error = refused(OptimizerConfig::AdamW(AdamWConfig { weight_decay: -0.1, ..adamw }));
    assert_eq!(error, "adamw: `weight_decay` must be finite and at least 0, found -0.1");
    let error = refused(OptimizerConfig::Sgd(SgdConfig { nesterov: true, ..SgdConfig::default() }));
    assert_eq!(error, "sgd: `momentum` must be above 0 with `nesterov`, found 0");

    for config in configs() {
        let mut optimizer = new(config, &layout());
        let mut params = normal(0);
        assert!(optimizer.step(&mut params, &normal(1), f64::NAN, 1.0).is_err());
        assert!(optimizer.step(&mut params, &normal(1).view(0, [4]).unwrap(), 0.1, 1.0).is_err());
        let held = params.clone();
        assert!(optimizer.step(&mut params, &normal(1), 0.1, 1.0).is_err());
        assert_eq!(optimizer.steps().unwrap(), 0);
        assert_eq!(floats(&held), floats(&normal(0)));
    }
}
