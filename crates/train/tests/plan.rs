//! What is planned is what runs: peaks that were measured on a GPU, and laws of the device that only counts.

#![forbid(unsafe_code)]

use nibble_lora::{AdapterConfig, TargetModules};
use nibble_model::{Checkpointing, LoadOptions, config::ModelConfig, files::StoredType};
use nibble_nf4::QuantConfig;
use nibble_tensor::{DType, Owner};
use nibble_train::{
    TrainConfig,
    plan::{self, Footprint, Gpu, MethodPlan, Request, Setup},
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
        (&llama, 4, 2048, Checkpointing::None, 43.5),
        (&llama, 4, 2048, Checkpointing::Selective, 31.7),
        (&llama, 4, 2048, Checkpointing::Full, 9.8),
        (&llama, 1, 16_384, Checkpointing::Full, 13.0),
        (&llama, 2, 512, Checkpointing::Full, 7.0),
        (&qwen, 2, 1024, Checkpointing::Full, 1.83),
        (&qwen, 1, 512, Checkpointing::Full, 1.68),
        (&qwen, 8, 1024, Checkpointing::Selective, 13.1),
        (&qwen, 8, 1024, Checkpointing::None, 18.6),
        (&smollm, 8, 512, Checkpointing::None, 2.52),
    ] {
        let peak = needed(model, &qlora(checkpointing), batch, length).peak as f64 / 1e9;
        assert!((peak / measured - 1.0).abs() < 0.05, "{batch} x {length} {checkpointing:?}: {peak} GB, measured {measured}");
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
