//! How long a checkpoint takes to load and quantise (NF4 with double quantisation; embedding and head as stored), from a warm page
//! cache.
//!
//! `cargo run --release -p nibble-model --example bench_load -- FOLDER [--make llama3-8b|smollm2-135m] [--device cuda|cpu] [--times 3]`
//!
//! `--make` first writes a made-up bf16 checkpoint of that shape to FOLDER, where there is none: four shards of normal numbers times
//! 0.02 (16 GB for `llama3-8b`; a folder in memory, such as one below /dev/shm, is as good as a warm cache).
#![allow(clippy::print_stdout)]

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Write as _,
    path::Path,
    thread,
    time::Instant,
};

use half::bf16;
use nibble_model::{LoadOptions, Transformer, config::ModelConfig, files::Checkpoint};
use nibble_nf4::QuantConfig;
use nibble_tensor::{
    Arena, DType, Device, Rng,
    cuda::{
        CudaDevice, OpenOptions,
        libraries::{self, SearchPaths},
    },
};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Name; hidden, intermediate, layers, heads, key/value heads, vocabulary; theta, tied.
type Named = (&'static str, [usize; 6], f64, bool);

const SHAPES: [Named; 2] = [
    ("llama3-8b", [4096, 14_336, 32, 32, 8, 128_256], 500_000.0, false),
    ("smollm2-135m", [576, 1536, 30, 9, 3, 49_152], 100_000.0, true),
];

const SHARDS: usize = 4;
/// Numbers that are written again and again.
const PATTERN: u64 = 16 << 20;

fn config(name: &str) -> Result<String> {
    let found = SHAPES.iter().find(|shape| shape.0 == name);
    let &(_, [hidden, intermediate, layers, heads, kv_heads, vocab], theta, tied) =
        found.ok_or_else(|| format!("unknown shape `{name}`: one of {}", SHAPES.map(|shape| shape.0).join(", ")))?;
    Ok(serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
        "rope_theta": theta, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
        "hidden_act": "silu", "torch_dtype": "bfloat16",
    })
    .to_string())
}

/// Writes a checkpoint of made-up numbers.
fn make(folder: &Path, name: &str) -> Result<()> {
    let text = config(name)?;
    let specs = ModelConfig::from_json(&text, name)?.tensors();
    fs::create_dir_all(folder)?;
    let rng = Rng::new(1);
    let pattern: Vec<u8> = (0..PATTERN).flat_map(|n| bf16::from_f32(0.02 * rng.normal(n)).to_le_bytes()).collect();
    let bytes = |shape: &[usize]| 2 * shape.iter().product::<usize>();
    let total: usize = specs.iter().map(|spec| bytes(&spec.shape)).sum();
    let (mut shards, mut written) = (vec![Vec::new(); SHARDS], 0);
    for spec in specs {
        shards[written * SHARDS / total].push((spec.name, spec.shape.clone()));
        written += bytes(&spec.shape);
    }
    let file_of = |shard: usize| format!("model-{:05}-of-{SHARDS:05}.safetensors", shard + 1);
    thread::scope(|scope| -> Result<()> {
        let writers: Vec<_> = shards
            .iter()
            .enumerate()
            .map(|(i, tensors)| {
                let (path, pattern) = (folder.join(file_of(i)), &pattern);
                scope.spawn(move || shard(&path, tensors, pattern))
            })
            .collect();
        writers.into_iter().try_for_each(|writer| writer.join().map_err(|_| "a writer failed")?)
    })?;
    let files: HashMap<&String, String> =
        shards.iter().enumerate().flat_map(|(i, tensors)| tensors.iter().map(move |(name, _)| (name, file_of(i)))).collect();
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": files });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string())?;
    Ok(fs::write(folder.join("config.json"), text)?)
}

/// One file of the checkpoint: each tensor begins somewhere else in the pattern.
fn shard(path: &Path, tensors: &[(String, Vec<usize>)], pattern: &[u8]) -> Result<()> {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let begin = end;
        end += 2 * shape.iter().product::<usize>();
        header.insert(name.clone(), serde_json::json!({ "dtype": "BF16", "shape": shape, "data_offsets": [begin, end] }));
    }
    let mut header = serde_json::Value::Object(header).to_string();
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    let mut file = File::create(path)?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    for (i, (_, shape)) in tensors.iter().enumerate() {
        let (mut left, mut at) = (2 * shape.iter().product::<usize>(), i * 7_919_602 % pattern.len());
        while left > 0 {
            let piece = &pattern[at..pattern.len().min(at + left)];
            file.write_all(piece)?;
            (left, at) = (left - piece.len(), 0);
        }
    }
    Ok(())
}

fn device(name: &str) -> Result<Device> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let folders = std::env::var_os("LD_LIBRARY_PATH").map(|list| std::env::split_paths(&list).collect()).unwrap_or_default();
    let libraries = libraries::find(&SearchPaths { folders, ..SearchPaths::of_system() });
    Ok(Device::Cuda(CudaDevice::open(0, &OpenOptions { libraries, cache: None })?))
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("usage: bench_load FOLDER [--option value ...]")?;
    let (folder, mut options) = (Path::new(&folder), HashMap::new());
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| format!("`{flag}` needs a value"))?;
        options.insert(flag, value);
    }
    let get = |name: &str| options.get(name).map(String::as_str);
    let device = device(get("--device").unwrap_or("cuda"))?;
    if let Some(name) = get("--make").filter(|_| !folder.join("config.json").exists()) {
        let begin = Instant::now();
        make(folder, name)?;
        println!("{}: written in {:.1} s", folder.display(), begin.elapsed().as_secs_f64());
    }
    for time in 1..=get("--times").unwrap_or("3").parse()? {
        let arena = Arena::on(device, usize::MAX)?;
        let begin = Instant::now();
        let checkpoint = Checkpoint::open(folder)?;
        let compute_dtype = if device == Device::Cpu { DType::F32 } else { DType::Bf16 };
        let options = LoadOptions { quant: Some(QuantConfig::default()), compute_dtype, max_positions: 2048, blocks_on_host: 0 };
        let model = Transformer::load(&checkpoint, &arena, &options, &mut |_, _| {})?;
        if let Device::Cuda(device) = device {
            device.synchronize()?;
        }
        let seconds = begin.elapsed().as_secs_f64();
        let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
        let bytes =
            names.iter().map(|name| checkpoint.info(name).map(|info| info.bytes)).sum::<std::result::Result<usize, _>>()?;
        println!(
            "RESULT load {time}, {} values: {seconds:.2} s, {:.1} GB/s of files, base {:.2} GB, peak {:.2} GB",
            model.num_parameters(),
            bytes as f64 / seconds / 1e9,
            arena.stats().live as f64 / 1e9,
            arena.stats().peak as f64 / 1e9,
        );
    }
    Ok(())
}
