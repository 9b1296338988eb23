//! What must hold of every training step. More than 500 lines: the laws share one model, its adapters and its data.

use std::sync::Arc;

use nibble_autograd::{ParamStore, Tape};
use nibble_data::{Batch, DataLoader, Dataset, DatasetOptions, LoaderOptions, Packer};
use nibble_lora::{AdapterConfig, AdapterFile, Init, InitLoraWeights, TargetModules, save_adapter};
use nibble_model::{Checkpointing, LoadOptions, LossOptions, Mix, Stream, Transformer, files::Checkpoint};
use nibble_nf4::QuantConfig;
use nibble_optim::{OptimizerName, Paging};
use nibble_tensor::{
    DType, Device, Rng,
    ops::{lm_head_loss::Labels, loss_scale},
};
use nibble_tests::{golden, relative_error};
use nibble_train::{Observer, StepStats, TrainConfig, Trainer};

fn adapter(init: InitLoraWeights, dropout: f64) -> AdapterConfig {
    AdapterConfig {
        r: 4,
        lora_alpha: 8.0,
        lora_dropout: dropout,
        init_lora_weights: init,
        target_modules: Some(TargetModules::Pattern(TargetModules::ALL_LINEAR.to_owned())),
        ..AdapterConfig::default()
    }
}

/// The tiny Llama with NF4 linears and an adapter.
fn model(config: &AdapterConfig, dtype: DType) -> (Transformer, ParamStore) {
    model_on_host(config, dtype, 0)
}

/// The same with the codes of its first blocks on the host.
fn model_on_host(config: &AdapterConfig, dtype: DType, blocks_on_host: usize) -> (Transformer, ParamStore) {
    model_from(config, Init::Random(7), dtype, blocks_on_host)
}

fn model_from(config: &AdapterConfig, init: Init<'_>, dtype: DType, blocks_on_host: usize) -> (Transformer, ParamStore) {
    let path = golden("models/llama31").expect("the project has its own copy");
    let quant = Some(QuantConfig { double_quant: true, ..QuantConfig::default() });
    let options = LoadOptions { quant, compute_dtype: dtype, max_positions: 256, blocks_on_host };
    let mut model =
        Transformer::load(&Checkpoint::open(&path).unwrap(), &nibble_tests::arena(), &options, &mut |_, _| {}).unwrap();
    let params = model.attach(config, init).unwrap();
    (model, params)
}

/// `rows` documents of different lengths and numbers of labels.
fn dataset(rows: u64) -> Arc<Dataset> {
    let rows = (0..rows).map(|row| {
        let rng = Rng::new(3).stream(row);
        let ids: Vec<u64> = (0..5 + rng.bits(0) % 20).map(|i| 3 + rng.bits(i + 1) % 300).collect();
        let labels: Vec<i64> = ids.iter().enumerate().map(|(i, &id)| if i < 3 { -100 } else { id as i64 }).collect();
        serde_json::json!({ "input_ids": ids, "labels": labels })
    });
    let options = DatasetOptions { vocab_size: Some(320), ..DatasetOptions::default() };
    Arc::new(Dataset::from_tokenized_rows(rows, &options).unwrap())
}

fn trainer(adapter_config: &AdapterConfig, batch_size: usize, config: TrainConfig) -> Trainer {
    trainer_in(DType::F32, adapter_config, batch_size, config)
}

fn trainer_in(dtype: DType, adapter_config: &AdapterConfig, batch_size: usize, config: TrainConfig) -> Trainer {
    let (model, params) = model(adapter_config, dtype);
    trainer_of(model, params, dataset(8), batch_size, config)
}

/// Rows in the order of the dataset.
fn trainer_of(model: Transformer, params: ParamStore, data: Arc<Dataset>, batch_size: usize, config: TrainConfig) -> Trainer {
    let options = LoaderOptions { packer: Packer::Documents { batch_size }, seed: 0, shuffle: false };
    Trainer::new(model, params, DataLoader::new(data, options).unwrap(), config).unwrap()
}

fn one_step(batch_size: usize, gradient_accumulation_steps: usize) -> (f64, Vec<f32>) {
    let config = TrainConfig { gradient_accumulation_steps, max_steps: Some(1), ..TrainConfig::default() };
    let mut trainer = trainer(&adapter(InitLoraWeights::Random, 0.0), batch_size, config);
    let stats = trainer.step().unwrap();
    (stats.loss, trainer.grads().flat().to_f32_vec().unwrap())
}

#[test]
fn batch_8_by_1_and_1_by_8_give_the_same_loss_and_gradients() {
    let (loss, grads) = one_step(8, 1);
    for (batch_size, accumulation) in [(1, 8), (2, 4), (4, 2)] {
        let (other_loss, other) = one_step(batch_size, accumulation);
        assert!((loss - other_loss).abs() <= 1e-6 * loss, "{batch_size} x {accumulation}: {other_loss} instead of {loss}");
        let error = relative_error(&other, &grads);
        assert!(error < 1e-5, "{batch_size} x {accumulation}: gradients off by {error:.1e}");
    }
}

#[test]
fn after_one_step_every_adapter_matrix_of_every_layer_has_a_gradient() {
    let config = TrainConfig { max_steps: Some(2), learning_rate: 1e-2, ..TrainConfig::default() };
    let mut trainer = trainer(&adapter(InitLoraWeights::Default, 0.0), 4, config);
    // B is zero at first, so A has a gradient only once B has moved.
    for matrices in [&["lora_B"][..], &["lora_A", "lora_B"]] {
        trainer.step().unwrap();
        let params = trainer.params().params().to_vec();
        assert_eq!(params.len(), 2 * 7 * 3);
        for param in params.iter().filter(|param| matrices.iter().any(|name| param.name.contains(name))) {
            let gradient = trainer.grads().get(param).unwrap();
            assert!(gradient.to_vec::<f32>().unwrap().iter().any(|&g| g != 0.0), "{} has no gradient", param.name);
        }
    }
}

fn gradients(checkpointing: Checkpointing, dropout: f64, dtype: DType) -> (f64, Vec<f32>) {
    let mut model = model(&adapter(InitLoraWeights::Random, dropout), dtype);
    // Tensors of this model are small: on a GPU none would leave it.
    model.0.set_smallest_on_host(0);
    let found = gradients_of(&model, checkpointing);
    let sends = matches!(checkpointing, Checkpointing::Offload | Checkpointing::Mixed(_));
    assert_eq!(model.0.host().bytes() > 0, sends, "{checkpointing:?}");
    found
}

fn gradients_of(model: &(Transformer, ParamStore), checkpointing: Checkpointing) -> (f64, Vec<f32>) {
    gradients_for(model, &dataset(4).batch(&[0, 1, 2, 3]), checkpointing)
}

fn gradients_for((model, params): &(Transformer, ParamStore), batch: &Batch, checkpointing: Checkpointing) -> (f64, Vec<f32>) {
    let stream = Stream::new(model.arena(), &batch.tokens, &batch.cu_seqlens).unwrap();
    let labels = Labels::new(model.arena(), &batch.labels, 0.1).unwrap();
    let mut grads = params.zero_grads().unwrap();
    let mut tape = Tape::new(params);
    let options = LossOptions { checkpointing, dropout: Some(Rng::new(5)) };
    let loss = model.loss(&mut tape, &stream, &labels, options).unwrap();
    let value = loss.value().unwrap();
    loss.backward(tape, &mut grads).unwrap();
    (value, grads.flat().to_f32_vec().unwrap())
}

#[test]
fn padding_changes_neither_loss_nor_gradients() {
    let model = model(&adapter(InitLoraWeights::Random, 0.0), DType::F32);
    let batch = dataset(4).batch(&[0, 1, 2, 3]);
    let (loss, plain) = gradients_for(&model, &batch, Checkpointing::Selective);
    for (tokens, documents) in [(batch.len(), 8), (80, 8), (192, 16)] {
        let padded = batch.clone().padded(tokens, |n| n.next_multiple_of(documents));
        assert_eq!((padded.len(), padded.documents()), (tokens, documents));
        let (found, gradients) = gradients_for(&model, &padded, Checkpointing::Selective);
        assert!((found - loss).abs() <= 1e-6 * loss, "{tokens}: {found} instead of {loss}");
        let error = relative_error(&gradients, &plain);
        assert!(error < 1e-5, "{tokens}: gradients off by {error:.1e}");
    }
}

#[test]
fn checkpointed_step_is_bitwise_equal() {
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        for dropout in [0.0, 0.3] {
            let plain = gradients(Checkpointing::None, dropout, dtype);
            let mix = Mix { everything: 1, products: 0, attention_on_host: 1, inputs_on_host: true };
            for checkpointing in
                [Checkpointing::Selective, Checkpointing::Full, Checkpointing::Offload, Checkpointing::Mixed(mix)]
            {
                assert_eq!(plain, gradients(checkpointing, dropout, dtype), "{checkpointing:?} {dtype} {dropout}");
            }
        }
    }
}

#[test]
fn activations_below_the_smallest_that_is_sent_stay_on_the_device() {
    let mut model = model(&adapter(InitLoraWeights::Random, 0.0), DType::F32);
    // The residual stream that a block keeps: 64 channels of 4 bytes.
    let bytes = dataset(4).batch(&[0, 1, 2, 3]).len() * 64 * 4;
    let sent = [bytes + 1, bytes].map(|smallest| {
        model.0.set_smallest_on_host(smallest);
        gradients_of(&model, Checkpointing::Offload);
        model.0.host().bytes()
    });
    assert!(sent[0] == 0 && sent[1] >= 3 * bytes, "{sent:?}");
}

#[test]
fn weights_that_come_from_the_host_give_the_same_gradients() {
    let config = adapter(InitLoraWeights::Random, 0.0);
    let plain = gradients_of(&model(&config, DType::F32), Checkpointing::Full);
    for blocks in 1..=3 {
        let mut on_host = model_on_host(&config, DType::F32, blocks);
        on_host.0.set_smallest_on_host(0);
        let weights = on_host.0.arena().stats().live;
        for checkpointing in [Checkpointing::Offload, Checkpointing::Selective] {
            assert_eq!(plain, gradients_of(&on_host, checkpointing), "{blocks} blocks {checkpointing:?}");
            on_host.0.release_weights().unwrap();
            assert_eq!(on_host.0.arena().stats().live, weights);
        }
    }
}

#[test]
fn dropout_changes_the_loss_and_is_a_function_of_the_seed() {
    let plain = gradients(Checkpointing::None, 0.0, DType::F32).0;
    let dropped = gradients(Checkpointing::None, 0.3, DType::F32).0;
    assert!(plain != dropped);
    assert_eq!(dropped, gradients(Checkpointing::None, 0.3, DType::F32).0);
}

#[test]
fn bf16_gradients_point_where_f32_ones_do() {
    let (exact, half) = (gradients(Checkpointing::None, 0.0, DType::F32), gradients(Checkpointing::None, 0.0, DType::Bf16));
    assert!((exact.0 - half.0).abs() < 0.01 * exact.0, "{} {}", exact.0, half.0);
    assert!(nibble_tests::cosine(&exact.1, &half.1) > 0.999);
}

#[test]
fn documents_in_one_stream_do_not_see_each_other() {
    let (model, params) = model(&adapter(InitLoraWeights::Random, 0.0), DType::F32);
    let data = dataset(3);
    let logits = |indices: &[usize]| {
        let batch = data.batch(indices);
        let stream = Stream::new(model.arena(), &batch.tokens, &batch.cu_seqlens).unwrap();
        model.logits(&params, &stream).unwrap().to_f32_vec().unwrap()
    };
    let alone: Vec<f32> = [0, 1, 2].iter().flat_map(|&i| logits(&[i])).collect();
    assert!(relative_error(&logits(&[0, 1, 2]), &alone) < 1e-6);
}

#[test]
fn a_run_repeats_bit_for_bit() {
    let run = || {
        let config = TrainConfig { max_steps: Some(5), ..TrainConfig::default() };
        let mut trainer = trainer(&adapter(InitLoraWeights::Default, 0.1), 2, config);
        trainer.train(None, &mut ()).unwrap();
        trainer.params().data().to_f32_vec().unwrap()
    };
    assert_eq!(run(), run());
}

/// How a step keeps what it needs.
#[derive(Clone, Copy, Debug, Default)]
struct Mode {
    checkpointing: Checkpointing,
    blocks_on_host: usize,
    paged: bool,
}

/// Five steps of one shape whose documents, labels, learning rate, masks and (in f16) loss scale differ: the values' bits and how many
/// steps ran as a graph. While a profile is made none does.
fn five_steps(dtype: DType, mode: Mode, profiled: bool) -> (Vec<u32>, usize) {
    let lengths = [5u64, 15, 12, 8, 9, 11, 7, 13, 10, 10];
    let rows = lengths.into_iter().zip(0..).map(|(len, row)| {
        let ids: Vec<u64> = (0..len).map(|i| 3 + Rng::new(row).bits(i) % 300).collect();
        let labels: Vec<i64> = ids.iter().enumerate().map(|(i, &id)| if i < 3 { -100 } else { id as i64 }).collect();
        serde_json::json!({ "input_ids": ids, "labels": labels })
    });
    let options = DatasetOptions { vocab_size: Some(320), ..DatasetOptions::default() };
    let data = Arc::new(Dataset::from_tokenized_rows(rows, &options).unwrap());
    let (mut model, params) = model_on_host(&adapter(InitLoraWeights::Random, 0.1), dtype, mode.blocks_on_host);
    model.set_smallest_on_host(0);
    let device = model.arena().device();
    let page = 8 << 10;
    let folder = tempfile::tempdir().unwrap();
    let file = (device == Device::Cpu).then(|| folder.path().join("pages"));
    let config = TrainConfig {
        max_steps: Some(5),
        learning_rate: 1e-2,
        warmup_steps: 2,
        optim: if mode.paged { OptimizerName::PagedAdamW32bit } else { OptimizerName::AdamWTorchFused },
        optim_paging: Paging { device_memory: Some(3 * (page + 4096)), file, masters: false, page: Some(page) },
        checkpointing: mode.checkpointing,
        ..TrainConfig::default()
    };
    let mut trainer = trainer_of(model, params, data, 2, config);
    trainer.load_loss_scale((loss_scale::START, loss_scale::INTERVAL - 3)).unwrap();
    match device {
        Device::Cuda(device) if profiled => {
            device.start_profile();
            trainer.train(None, &mut ()).unwrap();
            assert!(!device.end_profile().unwrap().is_empty());
        }
        _ => drop(trainer.train(None, &mut ()).unwrap()),
    }
    let scale = trainer.loss_scale().unwrap();
    assert_eq!(scale, (dtype == DType::F16).then_some((2.0 * loss_scale::START, 2)));
    (trainer.params().data().to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect(), trainer.replayed_steps())
}

#[test]
fn replayed_steps_are_those_one_by_one() {
    let plain = Mode::default();
    let modes = [
        plain,
        Mode { checkpointing: Checkpointing::Offload, ..plain },
        Mode { checkpointing: Checkpointing::Full, blocks_on_host: 2, ..plain },
        Mode { paged: true, ..plain },
    ];
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let (want, by_graph) = five_steps(dtype, plain, true);
        assert_eq!(by_graph, 0);
        for mode in modes {
            let (found, by_graph) = five_steps(dtype, mode, false);
            assert!(found == want, "{dtype} {mode:?}");
            // The first step runs kernel by kernel.
            assert_eq!(by_graph, if nibble_tests::arena().device() == Device::Cpu { 0 } else { 4 }, "{dtype} {mode:?}");
        }
    }
}

#[test]
fn a_steady_step_asks_the_system_for_no_memory() {
    for checkpointing in [Checkpointing::Selective, Checkpointing::Offload] {
        let config = TrainConfig { max_steps: Some(20), checkpointing, ..TrainConfig::default() };
        let (mut model, params) = model(&adapter(InitLoraWeights::Default, 0.0), DType::F32);
        model.set_smallest_on_host(0);
        let mut trainer = trainer_of(model, params, dataset(8), 8, config);
        let account = |trainer: &Trainer| {
            let stats = trainer.model().arena().stats();
            (stats.system_allocations, stats.peak, trainer.model().host().bytes())
        };
        trainer.step().unwrap();
        let before = account(&trainer);
        for _ in 0..5 {
            trainer.step().unwrap();
        }
        assert_eq!(account(&trainer), before, "{checkpointing:?}");
        assert!(before.0 > 0 && (before.2 > 0) == (checkpointing == Checkpointing::Offload), "{before:?}");
    }
}

#[test]
fn memory_does_not_grow_over_steps_of_changing_lengths() {
    // Many lengths, in an order of its own in each epoch.
    let rows = 24;
    let options = LoaderOptions { packer: Packer::Documents { batch_size: 1 }, seed: 3, shuffle: true };
    let (model, params) = model(&adapter(InitLoraWeights::Default, 0.1), DType::F32);
    let arena = model.arena().clone();
    let config = TrainConfig { max_steps: Some(20 * rows), ..TrainConfig::default() };
    let loader = DataLoader::new(dataset(rows as u64), options).unwrap();
    let mut trainer = Trainer::new(model, params, loader, config).unwrap();
    let mut held = Vec::new();
    for step in 1..=20 * rows {
        trainer.step().unwrap();
        if [4 * rows, 8 * rows, 20 * rows].contains(&step) {
            held.push((arena.stats(), arena.device_bytes()));
        }
    }
    assert!(held.iter().all(|found| *found == held[0]), "{held:?}");
}

#[test]
fn a_loss_that_is_no_number_names_the_batch_and_changes_nothing() {
    let config = TrainConfig { max_steps: Some(3), ..TrainConfig::default() };
    let mut trainer = trainer(&adapter(InitLoraWeights::Default, 0.0), 2, TrainConfig { learning_rate: f64::MAX, ..config });
    trainer.step().unwrap();
    let before = trainer.params().data().to_f32_vec().unwrap();
    let error = trainer.step().unwrap_err();
    assert!(error.to_string().contains("step 2") && error.to_string().contains("rows 3, 4"), "{error}");
    let after = trainer.params().data().to_f32_vec().unwrap();
    assert!(before.iter().map(|x| x.to_bits()).eq(after.iter().map(|x| x.to_bits())));
}

#[test]
fn in_f16_losses_are_within_a_percent_of_those_in_f32() {
    let losses = |dtype| -> Vec<f64> {
        let config = TrainConfig { max_steps: Some(12), learning_rate: 1e-2, ..TrainConfig::default() };
        let mut trainer = trainer_in(dtype, &adapter(InitLoraWeights::Default, 0.0), 4, config);
        let steps: Vec<_> = (0..12).map(|_| trainer.step().unwrap()).collect();
        assert!(steps.iter().all(|step| !step.skipped && step.loss_scale.is_some() == (dtype == DType::F16)));
        steps.iter().map(|step| step.loss).collect()
    };
    let (half, single) = (losses(DType::F16), losses(DType::F32));
    assert!(single[11] < 0.9 * single[0], "{single:?}");
    for (half, single) in half.iter().zip(&single) {
        assert!((half - single).abs() <= 0.01 * single, "{half} instead of {single}");
    }
}

#[test]
fn gradients_beyond_f16_halve_the_loss_scale_and_change_nothing_else() {
    let config = TrainConfig { max_steps: Some(4), learning_rate: 1e-2, ..TrainConfig::default() };
    let mut trainer = trainer_in(DType::F16, &adapter(InitLoraWeights::Random, 0.0), 4, config);
    let huge = 2f32.powi(60);
    trainer.load_loss_scale((huge, 5)).unwrap();
    let before = trainer.params().data().to_f32_vec().unwrap();
    for halvings in 0..2 {
        let stats = trainer.step().unwrap();
        assert!(stats.skipped && stats.loss.is_finite() && !stats.grad_norm.is_finite());
        assert_eq!(stats.loss_scale, Some(f64::from(huge) / f64::from(1 << halvings)));
    }
    assert_eq!(trainer.loss_scale().unwrap(), Some((huge / 4.0, 0)));
    assert_eq!(trainer.params().data().to_f32_vec().unwrap(), before);
}

#[test]
fn steps_that_the_loss_scale_spoilt_do_not_count_for_the_optimizer() {
    let config = TrainConfig { max_steps: Some(100), learning_rate: 1e-2, ..TrainConfig::default() };
    let mut trainer = trainer_in(DType::F16, &adapter(InitLoraWeights::Random, 0.0), 8, config);
    trainer.load_loss_scale((2f32.powi(60), 0)).unwrap();
    let values = |trainer: &Trainer| trainer.params().data().to_f32_vec().unwrap();
    let before = values(&trainer);
    let mut stats = trainer.step().unwrap();
    assert!(stats.skipped);
    while stats.skipped {
        stats = trainer.step().unwrap();
    }
    // AdamW's first update is as large as the learning rate, where the gradient is far above eps.
    let moved = values(&trainer).iter().zip(&before).map(|(after, before)| f64::from((after - before).abs())).fold(0.0, f64::max);
    assert!((moved / stats.learning_rate - 1.0).abs() < 1e-3, "step {}: {moved} of {}", stats.step, stats.learning_rate);
}

/// A trainer in whose third step alone a token's embedding is NaN.
fn spoilt_in_step_3(dtype: DType) -> Trainer {
    const SPOILT: u64 = 310;
    let rows = (0..6u64).map(|row| {
        let ids: Vec<u64> = (0..12).map(|i| if row == 2 && i == 5 { SPOILT } else { 3 + Rng::new(row).bits(i) % 300 }).collect();
        serde_json::json!({ "input_ids": ids, "labels": ids })
    });
    let options = DatasetOptions { vocab_size: Some(320), ..DatasetOptions::default() };
    let data = Arc::new(Dataset::from_tokenized_rows(rows, &options).unwrap());
    let modules = Some(vec!["embed_tokens".to_owned()]);
    let (model, mut params) = model(&AdapterConfig { modules_to_save: modules, ..adapter(InitLoraWeights::Random, 0.0) }, dtype);
    let embedding = params.params().iter().find(|param| param.name.contains("embed_tokens")).unwrap();
    let (first, channels) = (embedding.offset + SPOILT as usize * 64, 64);
    let mut values = params.data().to_f32_vec().unwrap();
    values[first..first + channels].fill(f32::NAN);
    params.data_mut().write(&values).unwrap();
    params.prepare(dtype).unwrap();
    let config = TrainConfig { max_steps: Some(6), learning_rate: 1e-2, ..TrainConfig::default() };
    let mut trainer = trainer_of(model, params, data, 1, config);
    trainer.load_loss_scale((1.0, 0)).unwrap();
    trainer
}

#[test]
fn a_run_that_a_step_ends_leaves_the_values_before_that_step() {
    for dtype in [DType::F32, DType::F16] {
        let bits = |trainer: &Trainer| -> Vec<u32> {
            trainer.params().data().to_f32_vec().unwrap().into_iter().map(f32::to_bits).collect()
        };
        let mut one_by_one = spoilt_in_step_3(dtype);
        (0..2).for_each(|_| assert!(!one_by_one.step().unwrap().skipped));
        let mut run = spoilt_in_step_3(dtype);
        let error = run.train(None, &mut ()).unwrap_err();
        assert!(matches!(error, nibble_train::Error::NonFinite { step: 3, .. }), "{error}");
        let left = bits(&run);
        assert!(left == bits(&one_by_one), "{dtype}: a step behind the third has changed the values");
        // A run that goes on does the third step again, and no other in its stead.
        let folder = tempfile::tempdir().unwrap();
        run.save_state(folder.path()).unwrap();
        assert_eq!((spoilt_in_step_3(dtype).resume(folder.path()).unwrap(), run.steps_left()), (2, 4), "{dtype}");
        // The next one is an ordinary step again.
        assert!(!run.step().unwrap().skipped && bits(&run) != left);
    }
}

#[test]
fn at_the_least_loss_scale_gradients_that_are_not_finite_are_an_error() {
    let (model, mut params) = model(&adapter(InitLoraWeights::Random, 0.0), DType::F16);
    let nan = vec![f32::NAN; params.numel()];
    params.data_mut().write(&nan).unwrap();
    params.prepare(DType::F16).unwrap();
    let config = TrainConfig { max_steps: Some(4), ..TrainConfig::default() };
    let mut trainer = trainer_of(model, params, dataset(8), 4, config);
    trainer.load_loss_scale((2.0, 0)).unwrap();
    assert!(trainer.step().unwrap().skipped);
    assert!(matches!(trainer.step(), Err(nibble_train::Error::NonFinite { step: 2, quantity: "loss", .. })));
}

/// Ends a run at [`STOP`]; the last step that it saw.
#[derive(Default)]
struct Ends(usize);

impl Observer for Ends {
    fn on_step(&mut self, stats: &StepStats) {
        self.0 = stats.step;
    }

    fn should_stop(&mut self) -> bool {
        self.0 >= STOP
    }
}

/// Where a run is ended; on a GPU the step after it is on its way by then.
const STOP: usize = 3;

#[test]
fn n_steps_an_end_and_m_steps_are_n_plus_m_steps_bit_for_bit() {
    let config = adapter(InitLoraWeights::Default, 0.1);
    for (dtype, optim) in [
        (DType::F32, OptimizerName::AdamWTorch),
        (DType::Bf16, OptimizerName::AdamW8bit),
        (DType::F16, OptimizerName::AdamWTorch),
        (DType::Bf16, OptimizerName::Adafactor),
    ] {
        let train = TrainConfig { max_steps: Some(8), learning_rate: 1e-2, optim, ..TrainConfig::default() };
        let mut whole = trainer_in(dtype, &config, 2, train.clone());
        whole.train(None, &mut ()).unwrap();

        let folder = tempfile::tempdir().unwrap();
        let mut part = trainer_in(dtype, &config, 2, train.clone());
        let outcome = part.train(None, &mut Ends::default()).unwrap();
        assert!(outcome.stopped_early && (STOP..=STOP + 1).contains(&outcome.steps));
        save_adapter(folder.path(), &config, part.params()).unwrap();
        part.save_state(folder.path()).unwrap();

        let mut rest = {
            let (model, params) = model_from(&config, Init::File(&AdapterFile::open(folder.path()).unwrap()), dtype, 0);
            let options = LoaderOptions { packer: Packer::Documents { batch_size: 2 }, seed: 0, shuffle: false };
            Trainer::new(model, params, DataLoader::new(dataset(8), options).unwrap(), train).unwrap()
        };
        assert_eq!(rest.resume(folder.path()).unwrap(), outcome.steps);
        assert_eq!(rest.train(None, &mut ()).unwrap().steps, 8 - outcome.steps);
        let bits = |trainer: &Trainer| trainer.params().values().unwrap().iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(bits(&rest) == bits(&whole), "{dtype} {optim}");
        assert_eq!(rest.loss_scale().unwrap(), whole.loss_scale().unwrap(), "{dtype} {optim}");
    }
}

#[test]
fn a_state_takes_the_place_of_an_older_one_whole() {
    let train = TrainConfig { max_steps: Some(8), ..TrainConfig::default() };
    let mut trainer = trainer_in(DType::F32, &adapter(InitLoraWeights::Default, 0.0), 2, train);
    let folder = tempfile::tempdir().unwrap();
    let [place, older] = ["training_state.safetensors", "older"].map(|name| folder.path().join(name));
    trainer.step().unwrap();
    trainer.save_state(folder.path()).unwrap();
    std::fs::hard_link(&place, &older).unwrap();
    let before = std::fs::read(&older).unwrap();
    trainer.step().unwrap();
    trainer.save_state(folder.path()).unwrap();
    assert!(std::fs::read(&older).unwrap() == before, "the older file was written over");
    assert!(std::fs::read(&place).unwrap() != before);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left beside them");
}
