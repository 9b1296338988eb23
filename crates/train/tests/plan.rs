//! What is planned is what runs: peaks that were measured on a GPU, and laws of the device that only counts.

#![forbid(unsafe_code)]

use nibble_lora::{AdapterConfig, TargetModules};
use nibble_model::{Checkpointing, LoadOptions, config::ModelConfig, files::StoredType};
use nibble_nf4::QuantConfig;
use nibble_optim::OptimizerName;
use nibble_tensor::{DType, Owner};
use nibble_train::{
    TrainConfig,
    plan::{self, Footprint, Gpu, MethodPlan, Mode, Request, Setup, Streamed},
};

fn model(kind: &str, sizes: [usize; 6], tied: bool) -> ModelConfig {
    let [hidden, intermediate, layers, heads, kv_heads, vocab] = sizes;
    let config = serde_json::json!({
        "architectures": [format!("{kind}ForCausalLM")], "model_type": kind.to_lowercase(), "hidden_size": hidden,
        "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "vocab_size": vocab, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied, "hidden_act": "silu", "torch_dtype": "bfloat16",
    });
    ModelConfig::from_json(&config.to_string(), "made").unwrap()
}

fn llama3_8b() -> ModelConfig {
    model("Llama", [4096, 14336, 32, 32, 8, 128_256], false)
}

fn small() -> ModelConfig {
    model("Llama", [64, 96, 3, 4, 2, 300], true)
}

fn h200() -> &'static Gpu {
    plan::find_gpu("H200").unwrap()
}

fn qlora(checkpointing: Checkpointing) -> Setup {
    let target_modules = Some(TargetModules::Pattern(TargetModules::ALL_LINEAR.to_owned()));
    Setup {
        load: LoadOptions {
            quant: Some(QuantConfig::default()),
            compute_dtype: DType::Bf16,
            max_positions: 0,
            blocks_on_host: 0,
        },
        adapter: Some(AdapterConfig { r: 16, lora_alpha: 32.0, target_modules, ..AdapterConfig::default() }),
        documents: Vec::new(),
        evaluation: Vec::new(),
        train: TrainConfig { checkpointing, ..TrainConfig::default() },
    }
}

fn needed(model: &ModelConfig, setup: &Setup, batch: usize, length: usize) -> Footprint {
    plan::needed(model, h200(), &setup.with_documents(batch, length)).unwrap()
}

/// The table of BENCHMARKS.md: an H200, rank 16 on all linears, AdamW with f32 states.
#[test]
fn peaks_are_those_that_were_measured() {
    let qwen = model("Qwen2", [1536, 8960, 28, 12, 2, 151_936], true);
    let smollm = model("Llama", [576, 1536, 30, 9, 3, 49_152], true);
    let llama = llama3_8b();
    for (model, batch, length, checkpointing, measured) in [
        (&llama, 4, 2048, Checkpointing::None, 36.27),
        (&llama, 4, 2048, Checkpointing::Selective, 31.98),
        (&llama, 4, 2048, Checkpointing::Full, 10.04),
        (&llama, 1, 16_384, Checkpointing::Full, 13.28),
        (&llama, 2, 512, Checkpointing::Full, 6.97),
        (&qwen, 2, 1024, Checkpointing::Full, 1.88),
        (&qwen, 1, 512, Checkpointing::Full, 1.68),
        (&qwen, 8, 1024, Checkpointing::Selective, 13.17),
        (&qwen, 8, 1024, Checkpointing::None, 14.61),
        (&smollm, 8, 512, Checkpointing::None, 2.60),
    ] {
        let peak = needed(model, &qlora(checkpointing), batch, length).peak as f64 / 1e9;
        assert!((peak / measured - 1.0).abs() < 0.01, "{batch} x {length} {checkpointing:?}: {peak} GB, measured {measured}");
    }
}

#[test]
fn what_is_held_all_the_time_is_what_its_formats_take() {
    let found = needed(&llama3_8b(), &qlora(Checkpointing::Full), 1, 512);
    let linears = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 4096 * 14_336);
    // Codes, scales of 64 in 8 bits, their scales of 256 in f32; and a table a matrix.
    let packed = linears / 2 + linears / 64 + linears / 64 / 256 * 4;
    let base = found.of(|owner| owner == Owner::BaseWeights);
    assert!(base >= packed && base < packed + 32 * 7 * 2048, "{base} {packed}");
    let trained = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14_336));
    assert_eq!(found.trained, trained);
    // f32, and the working copy in bf16.
    assert_eq!(found.of(|owner| owner == Owner::Trained), 6 * trained);
    assert_eq!(found.of(|owner| owner == Owner::Gradients), 4 * trained);
    assert!(found.of(|owner| owner == Owner::Optimizer) - 8 * trained < 4096);
    assert_eq!(found.owners.iter().map(|(_, bytes)| bytes).sum::<usize>(), found.peak);
    assert!(found.device >= found.peak && found.device < found.peak + found.peak / 20, "{found:?}");
}

#[test]
fn a_step_takes_the_same_whatever_type_the_checkpoint_is_stored_in() {
    let stored = [StoredType::BF16, StoredType::F16, StoredType::F32];
    let models = stored.map(|dtype| {
        let mut model = llama3_8b();
        model.dtype = Some(dtype);
        model
    });
    for quant in [Some(QuantConfig::default()), None] {
        let mut setup = qlora(Checkpointing::Full);
        setup.load.quant = quant;
        // Long enough to take more than loading, where one matrix is there in both types.
        let [bf16, f16, f32] = models.each_ref().map(|model| needed(model, &setup, 4, 2048).owners);
        assert_eq!(bf16, f16);
        assert_eq!(bf16, f32);
    }
    // On the processor matrices are as stored.
    let embeddings = models.each_ref().map(|model| {
        let found = plan::Place::Cpu.needed(model, &qlora(Checkpointing::Full).with_documents(1, 512)).unwrap();
        found.of(|owner| owner == Owner::Embeddings)
    });
    assert_eq!(embeddings, [embeddings[0], embeddings[0], 2 * embeddings[0]]);
}

#[test]
fn what_keeps_less_takes_less_and_a_plan_is_the_same_twice() {
    let model = llama3_8b();
    let peaks: Vec<usize> =
        plan::MODES.iter().map(|(_, checkpointing)| needed(&model, &qlora(*checkpointing), 2, 2048).peak).collect();
    assert!(peaks.is_sorted_by(|more, less| more > less), "{peaks:?}");
    let setup = qlora(Checkpointing::Full);
    assert_eq!(needed(&model, &setup, 2, 2048), needed(&model, &setup, 2, 2048));
}

/// From what the least takes to what all takes, whatever part of a step's memory the sizes make the larger: the head of a small model, rooms
/// behind narrow rows, a long document's activations.
#[test]
fn auto_fits_wherever_a_step_can_run() {
    let qwen = model("Qwen2", [1536, 8960, 28, 12, 2, 151_936], true);
    let smollm = model("Llama", [576, 1536, 30, 9, 3, 49_152], true);
    let llama = llama3_8b();
    for (model, batch, length, dtype, rank) in [
        (&smollm, 8, 512, DType::Bf16, 16),
        (&smollm, 1, 8192, DType::Bf16, 64),
        (&smollm, 2, 100, DType::F32, 16),
        (&smollm, 8, 512, DType::F16, 8),
        (&qwen, 2, 1024, DType::Bf16, 16),
        (&qwen, 4, 256, DType::F16, 32),
        (&llama, 4, 2048, DType::Bf16, 16),
        (&llama, 1, 16_384, DType::Bf16, 128),
        (&llama, 1, 300, DType::F16, 16),
    ] {
        let setup = |checkpointing| {
            let mut setup = qlora(checkpointing).with_documents(batch, length);
            setup.load.compute_dtype = dtype;
            setup.adapter.as_mut().unwrap().r = rank;
            setup
        };
        let needed = |checkpointing| plan::needed(model, h200(), &setup(checkpointing)).unwrap().device;
        let (least, all) = (needed(Checkpointing::Offload), needed(Checkpointing::None));
        for step in 0..=12 {
            let memory = least + (all + all / 20 - least) / 12 * step;
            let found = plan::footprint(model, &h200().device(memory), &setup(Checkpointing::Auto));
            let label = format!("{batch} x {length}, {dtype}, rank {rank}: {memory} of {least} to {all} bytes");
            let taken = found.unwrap_or_else(|error| panic!("{label}: {error}")).device;
            assert!(step < 12 || taken == all, "{label}: {taken}");
            // What is left is little: some blocks' worth, and a granule.
            let block = (all - least) / model.num_hidden_layers;
            assert!(taken == all || memory - taken <= 3 * block + (32 << 20), "{label}: {taken}");
        }
    }
}

#[test]
fn every_gpu_of_the_table_can_be_planned_for() {
    for gpu in &plan::GPUS {
        // bf16 begins with Ampere.
        let dtype = if gpu.capability.0 >= 8 { DType::Bf16 } else { DType::F16 };
        for checkpointing in [Checkpointing::None, Checkpointing::Offload] {
            let mut setup = qlora(checkpointing).with_documents(2, 100);
            setup.load.compute_dtype = dtype;
            let found = plan::footprint(&small(), &gpu.device(gpu.memory()), &setup).unwrap();
            assert!(found.peak > 0 && found.device <= gpu.memory(), "{}", gpu.name);
        }
    }
}

#[test]
fn more_than_there_is_is_out_of_memory_and_gives_all_back() {
    let device = h200().device(64 << 20);
    let setup = qlora(Checkpointing::None);
    let error = plan::footprint(&llama3_8b(), &device, &setup.with_documents(1, 512)).unwrap_err();
    assert!(error.is_out_of_memory(), "{error}");
    plan::footprint(&small(), &device, &setup.with_documents(1, 64)).unwrap();
}

#[test]
fn the_longest_and_the_largest_fit_and_a_little_more_does_not() {
    let (model, setup) = (llama3_8b(), qlora(Checkpointing::Full));
    let room = 16 << 30;
    let longest = plan::longest(&model, h200(), &setup, room).unwrap().unwrap();
    let mut unlimited = model.clone();
    unlimited.max_position_embeddings = plan::MOST_TOKENS;
    assert!(needed(&unlimited, &setup, 1, longest).device <= room);
    assert!(needed(&unlimited, &setup, 1, longest + longest / 64).device > room, "{longest}");
    let batch = plan::largest_batch(&model, h200(), &setup, 2048, room).unwrap().unwrap();
    assert!(needed(&model, &setup, batch, 2048).device <= room && needed(&model, &setup, batch + 1, 2048).device > room);
    assert_eq!(plan::longest(&model, h200(), &setup, 1 << 30).unwrap(), None);
}

#[test]
fn methods_take_more_the_more_they_train() {
    let load =
        LoadOptions { quant: Some(QuantConfig::default()), compute_dtype: DType::Bf16, max_positions: 0, blocks_on_host: 0 };
    let request = Request::new(load);
    let peaks = plan::Method::ALL.map(|method| {
        let planned = MethodPlan::new(&small(), h200(), 1 << 26, &request, method).unwrap();
        assert!(planned.fastest(1 << 26).is_some() && planned.fastest(0).is_none());
        planned.modes[0].footprint.peak
    });
    assert!(peaks.is_sorted(), "{peaks:?}");
    // Values, working copy, gradients and two states of each weight.
    let full = needed(&small(), &request.setup(plan::Method::Full, Checkpointing::Full), 1, 64);
    assert!(full.peak > full.trained * (4 + 2 + 4 + 8), "{full:?}");
}

/// Llama-2-70B with rank 64 in 24 GB of an H200.
fn llama2_70b() -> (ModelConfig, Setup) {
    let model = model("Llama", [8192, 28_672, 80, 64, 8, 32_000], false);
    let mut setup = qlora(Checkpointing::Full).with_documents(1, 512);
    setup.adapter.as_mut().unwrap().r = 64;
    setup.train.optim = OptimizerName::PagedAdamW8bit;
    (model, setup)
}

/// Measured on an H200, the last on an H100 (BENCHMARKS.md): with few blocks the link is done before the kernels, with most it decides.
#[test]
fn weights_on_the_host_cost_what_was_measured() {
    let (model, setup) = llama2_70b();
    for (blocks, host, rate) in [(18, 7.7, 1145.0), (60, 25.7, 549.0), (72, 30.8, 436.0)] {
        let setup = setup.with_blocks_on_host(blocks);
        let streamed = Streamed::of(&model, h200(), &setup).unwrap();
        assert_eq!((streamed.blocks, streamed.of, streamed.step_bytes), (blocks, 80, 2 * streamed.host_bytes));
        assert!((streamed.host_bytes as f64 / 1e9 - host).abs() < 0.05, "{streamed:?}");
        let found = plan::tokens_per_second(&model, h200(), &setup).unwrap();
        assert!((found / rate - 1.0).abs() < 0.1, "{blocks} blocks: {found} tokens/s, measured {rate}");
    }
    assert_eq!(Streamed::of(&model, h200(), &setup), None);
}

#[test]
fn what_does_not_fit_is_planned_with_the_fewest_blocks_on_the_host_and_with_all() {
    let model = plan::named_size("13B").unwrap().unwrap();
    let request = Request { length: 512, ..Request::new(qlora(Checkpointing::Full).load) };
    let room = 7 << 30;
    let planned = MethodPlan::new(&model, h200(), room, &request, plan::Method::QLora).unwrap();
    let [fewest, all] = &planned.modes[4..] else { panic!("{planned:?}") };
    let blocks = fewest.streamed.unwrap().blocks;
    assert!(fewest.footprint.device <= room && all.streamed.unwrap().blocks == 40, "{fewest:?} {all:?}");
    let one_less = request.setup(plan::Method::QLora, Checkpointing::Offload).with_blocks_on_host(blocks - 1);
    assert!(plan::needed(&model, h200(), &one_less).unwrap().device > room, "{blocks}");
    assert_eq!(planned.fastest(room).map(Mode::label), Some(format!("offload + {blocks}/40")));
    assert!(fewest.longest.unwrap() >= 512 && all.longest > fewest.longest && all.batch > fewest.batch);
    assert!(all.tokens_per_second < fewest.tokens_per_second, "{fewest:?} {all:?}");
    // Weights that are not in 4 bits stay, and what fits needs no such rows.
    assert_eq!(MethodPlan::new(&model, h200(), room, &request, plan::Method::Lora).unwrap().modes.len(), 4);
    let mut model = small();
    model.max_position_embeddings = 2048;
    let small = MethodPlan::new(&model, h200(), 1 << 29, &Request::new(request.load), plan::Method::QLora).unwrap();
    assert_eq!(small.modes.len(), 4);
}

#[test]
fn the_nearest_run_has_weights_on_the_host_where_nothing_else_fits() {
    let (model, setup) = llama2_70b();
    let room = 23 << 30;
    let fits = |setup: &Setup| Ok(plan::needed(&model, h200(), setup)?.device <= room);
    let nearest = plan::nearest(&setup, 1, 80, fits).unwrap().unwrap();
    let blocks = nearest.setup.load.blocks_on_host;
    assert_eq!((nearest.setup.train.checkpointing, nearest.parts, nearest.max_length), (Checkpointing::Offload, 1, None));
    assert!(blocks > 0 && fits(&nearest.setup).unwrap() && !fits(&nearest.setup.with_blocks_on_host(blocks - 1)).unwrap());
    // On a processor there is no other place for them; and nothing waits where less is enough.
    assert!(plan::nearest(&setup, 1, 0, fits).unwrap().is_none());
    let room = 48 << 30;
    let fits = |setup: &Setup| Ok(plan::needed(&model, h200(), setup)?.device <= room);
    let nearest = plan::nearest(&setup.with_documents(8, 512), 8, 80, fits).unwrap().unwrap();
    assert_eq!(nearest.setup.load.blocks_on_host, 0);
}
