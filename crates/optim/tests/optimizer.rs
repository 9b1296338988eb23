//! What every optimizer keeps to.

use nibble_optim::{AdamWConfig, DecayOrder, Error, Optimizer, OptimizerConfig, OptimizerName, SgdConfig};
use nibble_tensor::{Arena, DType, Device, Rng, Tensor};

const LEN: usize = 20_001;

fn arena() -> Arena {
    Arena::new(Device::Cpu)
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
        run(&mut Optimizer::new(&arena(), LEN, config, &[]).unwrap(), &mut straight, 1..8);

        let mut resumed = normal(0);
        let mut first = Optimizer::new(&arena(), LEN, config, &[]).unwrap();
        run(&mut first, &mut resumed, 1..4);
        let mut second = Optimizer::new(&arena(), LEN, config, &[]).unwrap();
        second.load_state(first.steps(), &first.state()).unwrap();
        drop(first);
        run(&mut second, &mut resumed, 4..8);
        assert_eq!(second.steps(), 7);
        assert_eq!(straight.as_slice::<f32>().unwrap(), resumed.as_slice::<f32>().unwrap(), "{config:?}");
    }
}

#[test]
fn ranges_without_decay_are_stepped_as_if_it_were_zero() {
    let without = |config| match config {
        OptimizerConfig::AdamW(config) => OptimizerConfig::AdamW(AdamWConfig { weight_decay: 0.0, ..config }),
        OptimizerConfig::Sgd(config) => OptimizerConfig::Sgd(SgdConfig { weight_decay: 0.0, ..config }),
        other => other,
    };
    let ranges = [5..17, 900..19_000];
    for config in configs() {
        let [mut all, mut none, mut some] = [(); 3].map(|()| normal(0));
        run(&mut Optimizer::new(&arena(), LEN, config, &[]).unwrap(), &mut all, 1..4);
        run(&mut Optimizer::new(&arena(), LEN, without(config), &[]).unwrap(), &mut none, 1..4);
        run(&mut Optimizer::new(&arena(), LEN, config, &ranges).unwrap(), &mut some, 1..4);
        let [all, none, some] = [&all, &none, &some].map(|t| t.as_slice::<f32>().unwrap());
        for i in 0..LEN {
            let want = if ranges.iter().any(|range| range.contains(&i)) { none[i] } else { all[i] };
            assert_eq!(some[i], want, "{config:?} {i}");
        }
        assert_ne!(all, none);
    }
}

#[test]
fn a_state_that_does_not_fit_is_refused_whole() {
    let config = OptimizerConfig::AdamW(AdamWConfig::default());
    let mut optimizer = Optimizer::new(&arena(), 4, config, &[]).unwrap();
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
    assert_eq!(optimizer.steps(), 0);
    assert!(optimizer.state().iter().all(|(_, state)| state.as_slice::<f32>().unwrap() == [0.0; 4]));
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
    let new = |config| Optimizer::new(&arena(), 2, config, &[]).map(|_| ()).unwrap_err().to_string();
    let adamw = AdamWConfig::default();
    let error = new(OptimizerConfig::AdamW(AdamWConfig { beta2: 1.0, ..adamw }));
    assert_eq!(error, "adamw: `adam_beta2` must be at least 0 and below 1, found 1");
    let error = new(OptimizerConfig::AdamW(AdamWConfig { weight_decay: -0.1, ..adamw }));
    assert_eq!(error, "adamw: `weight_decay` must be finite and at least 0, found -0.1");
    let error = new(OptimizerConfig::Sgd(SgdConfig { nesterov: true, ..SgdConfig::default() }));
    assert_eq!(error, "sgd: `momentum` must be above 0 with `nesterov`, found 0");

    for config in configs() {
        let mut optimizer = Optimizer::new(&arena(), LEN, config, &[]).unwrap();
        let mut params = normal(0);
        assert!(optimizer.step(&mut params, &normal(1), f64::NAN, 1.0).is_err());
        assert!(optimizer.step(&mut params, &normal(1).view(0, [4]).unwrap(), 0.1, 1.0).is_err());
        let held = params.clone();
        assert!(optimizer.step(&mut params, &normal(1), 0.1, 1.0).is_err());
        assert_eq!(optimizer.steps(), 0);
        assert_eq!(held.as_slice::<f32>().unwrap(), normal(0).as_slice::<f32>().unwrap());
    }
}
