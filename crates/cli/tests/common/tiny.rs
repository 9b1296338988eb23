//! Model files of a few kilobytes.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Value, json};

/// Sizes of the model.
pub(crate) const HIDDEN: usize = 32;
const INTER: usize = 48;
const LAYERS: usize = 2;
const KV: usize = 16;
/// Rows of the embedding.
pub(crate) const VOCAB: usize = 264;
const POSITIONS: usize = 256;

/// Names, shapes and values in f32.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Numbers from -1 to 1 that are the same everywhere.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// The weights of the model.
pub(crate) fn tensors(tied: bool) -> Tensors {
    let mut tensors = Tensors::new();
    let mut add = |name: &str, shape: &[usize]| {
        let seed = tensors.len() as u64 + 1;
        let scale = if shape.len() == 1 { 0.1 } else { 2.0 / (shape[1] as f32).sqrt() };
        let shift = if shape.len() == 1 { 1.0 } else { 0.0 };
        let values = noise(seed, shape.iter().product()).iter().map(|x| shift + scale * x).collect();
        tensors.insert(name.to_owned(), (shape.to_vec(), values));
    };
    add("model.embed_tokens.weight", &[VOCAB, HIDDEN]);
    for layer in 0..LAYERS {
        let mut part = |part: &str, shape: &[usize]| add(&format!("model.layers.{layer}.{part}.weight"), shape);
        part("input_layernorm", &[HIDDEN]);
        part("self_attn.q_proj", &[HIDDEN, HIDDEN]);
        part("self_attn.k_proj", &[KV, HIDDEN]);
        part("self_attn.v_proj", &[KV, HIDDEN]);
        part("self_attn.o_proj", &[HIDDEN, HIDDEN]);
        part("post_attention_layernorm", &[HIDDEN]);
        part("mlp.gate_proj", &[INTER, HIDDEN]);
        part("mlp.up_proj", &[INTER, HIDDEN]);
        part("mlp.down_proj", &[HIDDEN, INTER]);
    }
    add("model.norm.weight", &[HIDDEN]);
    if !tied {
        add("lm_head.weight", &[VOCAB, HIDDEN]);
    }
    tensors
}

/// The config of it.
pub(crate) fn config(tied: bool) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": POSITIONS,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "bos_token_id": 257,
        "eos_token_id": 258
    })
}

/// A folder as `save_pretrained` writes it.
pub(crate) fn write_model(folder: &Path, tied: bool) {
    fs::create_dir_all(folder).expect("a folder");
    write_tensors(&folder.join("model.safetensors"), &tensors(tied));
    fs::write(folder.join("config.json"), config(tied).to_string()).expect("a file");
    fs::write(folder.join("generation_config.json"), r#"{"eos_token_id": 258}"#).expect("a file");
    fs::write(folder.join("tokenizer.json"), tokenizer().to_string()).expect("a file");
    let config = json!({ "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML });
    fs::write(folder.join("tokenizer_config.json"), config.to_string()).expect("a file");
}

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// Byte-level BPE without a merge: a token a byte, and three special ones.
fn tokenizer() -> Value {
    let is_shown = |byte: u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut hidden = 256;
    let mut vocab = serde_json::Map::new();
    for byte in 0..=255u8 {
        let code = if is_shown(byte) { u32::from(byte) } else { hidden };
        hidden += u32::from(!is_shown(byte));
        vocab.insert(char::from_u32(code).expect("a character").to_string(), byte.into());
    }
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let added: Vec<_> = special.iter().zip(256..).map(|(text, id)| {
        json!({ "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true })
    }).collect();
    for (text, id) in special.iter().zip(256..) {
        vocab.insert((*text).to_owned(), id.into());
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "post_processor": null,
        "decoder": { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": []
        }
    })
}

/// Writes safetensors.
pub(crate) fn write_tensors(path: &Path, tensors: &Tensors) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, (shape, values)) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        header.insert(name.clone(), json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] }));
    }
    let header = Value::Object(header).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    fs::write(path, bytes).expect("a file");
}

/// Reads safetensors; 16-bit floats are widened.
pub(crate) fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).expect("a JSON header");
    let data = &bytes[8 + length..];
    let number = |value: &Value| value.as_u64().expect("a number") as usize;
    let tensors = header.iter().filter(|(name, _)| *name != "__metadata__").map(|(name, info)| {
        let data = &data[number(&info["data_offsets"][0])..number(&info["data_offsets"][1])];
        let halves = |widen: fn(u16) -> f32| data.as_chunks::<2>().0.iter().map(|&b| widen(u16::from_le_bytes(b))).collect();
        let values: Vec<f32> = match info["dtype"].as_str() {
            Some("F32") => data.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
            Some("BF16") => halves(|bits| half::bf16::from_bits(bits).to_f32()),
            Some("F16") => halves(|bits| half::f16::from_bits(bits).to_f32()),
            other => panic!("{name}: {other:?}"),
        };
        let shape: Vec<usize> = info["shape"].as_array().expect("a shape").iter().map(number).collect();
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        (name.clone(), (shape, values))
    });
    tensors.collect()
}

/// A GGUF file of the same model: F32 tensors under llama.cpp's names, the rows of queries and keys interleaved.
pub(crate) fn write_gguf(path: &Path) {
    let mut file = Gguf::default();
    file.text("general.architecture", "llama");
    for (key, value) in [
        ("block_count", LAYERS),
        ("context_length", POSITIONS),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", INTER),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("vocab_size", VOCAB),
        ("rope.dimension_count", HIDDEN / 4),
    ] {
        file.number(&format!("llama.{key}"), value as u32);
    }
    file.float("llama.attention.layer_norm_rms_epsilon", 1e-5);
    file.float("llama.rope.freq_base", 10000.0);
    file.write(path, &tensors(true));
}

#[derive(Default)]
struct Gguf {
    metadata: Vec<u8>,
    keys: u64,
}

impl Gguf {
    fn key(&mut self, key: &str, kind: u32) {
        self.keys += 1;
        put_text(&mut self.metadata, key);
        self.metadata.extend(kind.to_le_bytes());
    }

    fn text(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        put_text(&mut self.metadata, value);
    }

    fn number(&mut self, key: &str, value: u32) {
        self.key(key, 4);
        self.metadata.extend(value.to_le_bytes());
    }

    fn float(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.metadata.extend(value.to_le_bytes());
    }

    fn write(self, path: &Path, tensors: &Tensors) {
        let mut header = [&b"GGUF"[..], &3u32.to_le_bytes()].concat();
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend(self.keys.to_le_bytes());
        header.extend(self.metadata);
        let mut data: Vec<u8> = Vec::new();
        for (name, (shape, values)) in tensors {
            put_text(&mut header, &gguf_name(name));
            header.extend((shape.len() as u32).to_le_bytes());
            for &dim in shape.iter().rev() {
                header.extend((dim as u64).to_le_bytes());
            }
            header.extend(0u32.to_le_bytes());
            data.resize(data.len().next_multiple_of(32), 0);
            header.extend((data.len() as u64).to_le_bytes());
            data.extend(interleaved(name, shape, values).iter().flat_map(|value| value.to_le_bytes()));
        }
        header.resize(header.len().next_multiple_of(32), 0);
        header.extend(data);
        fs::write(path, header).expect("a file");
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn gguf_name(name: &str) -> String {
    let parts = [
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    parts.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to))
}

/// llama.cpp's converter: the two halves of each head's rows, row by row in turn.
fn interleaved(name: &str, shape: &[usize], values: &[f32]) -> Vec<f32> {
    if !name.contains("q_proj") && !name.contains("k_proj") {
        return values.to_vec();
    }
    let (head, row) = (HIDDEN / 4, shape[1]);
    let rows = values.chunks(row * head).flat_map(|head_rows| {
        (0..head / 2).flat_map(move |i| [i, head / 2 + i]).map(move |i| &head_rows[i * row..(i + 1) * row])
    });
    rows.flatten().copied().collect()
}
