//! GGUF files, built byte by byte.
#![allow(dead_code, reason = "each test uses a part of it")]

/// A GGUF file in the making.
#[derive(Clone, Default)]
pub(crate) struct Builder {
    pub(crate) metadata: Vec<u8>,
    pub(crate) pairs: u64,
    pub(crate) infos: Vec<u8>,
    pub(crate) tensors: u64,
    pub(crate) data: Vec<u8>,
}

pub(crate) fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.bytes());
}

impl Builder {
    pub(crate) fn pair(mut self, key: &str, code: u32, value: &[u8]) -> Self {
        text(&mut self.metadata, key);
        self.metadata.extend(code.to_le_bytes());
        self.metadata.extend(value);
        self.pairs += 1;
        self
    }
    pub(crate) fn number(self, key: &str, value: u32) -> Self {
        self.pair(key, 4, &value.to_le_bytes())
    }
    pub(crate) fn float(self, key: &str, value: f32) -> Self {
        self.pair(key, 6, &value.to_le_bytes())
    }
    pub(crate) fn string(self, key: &str, value: &str) -> Self {
        let mut bytes = Vec::new();
        text(&mut bytes, value);
        self.pair(key, 8, &bytes)
    }
    pub(crate) fn strings(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = 8u32.to_le_bytes().to_vec();
        bytes.extend((values.len() as u64).to_le_bytes());
        for value in values {
            text(&mut bytes, value);
        }
        self.pair(key, 9, &bytes)
    }
    /// `shape` outermost first, as torch has it.
    pub(crate) fn tensor(mut self, name: &str, shape: &[usize], code: u32, bytes: &[u8]) -> Self {
        text(&mut self.infos, name);
        self.infos.extend((shape.len() as u32).to_le_bytes());
        for &dim in shape.iter().rev() {
            self.infos.extend((dim as u64).to_le_bytes());
        }
        self.infos.extend(code.to_le_bytes());
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        self.tensors += 1;
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self
    }
    pub(crate) fn f32s(self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensor(name, shape, 0, &bytes)
    }
    pub(crate) fn build(&self, version: u32) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(version.to_le_bytes());
        out.extend(self.tensors.to_le_bytes());
        out.extend(self.pairs.to_le_bytes());
        out.extend(&self.metadata);
        out.extend(&self.infos);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }
}

/// Two heads of four, one key head, width 8, two layers' worth of nothing: metadata alone.
pub(crate) fn metadata(arch: &str) -> Builder {
    let key = |name: &str| format!("{arch}.{name}");
    Builder::default()
        .string("general.architecture", arch)
        .number(&key("block_count"), 1)
        .number(&key("context_length"), 128)
        .number(&key("embedding_length"), 8)
        .number(&key("feed_forward_length"), 12)
        .number(&key("attention.head_count"), 2)
        .number(&key("attention.head_count_kv"), 1)
        .float(&key("attention.layer_norm_rms_epsilon"), 1e-5)
        .float(&key("rope.freq_base"), 10_000.0)
        .number("tokenizer.ggml.bos_token_id", 1)
        .number("tokenizer.ggml.eos_token_id", 2)
}

pub(crate) fn counted(count: usize) -> Vec<f32> {
    (0..count).map(|i| i as f32).collect()
}

/// A whole model of `arch` with counted weights.
pub(crate) fn model(arch: &str) -> Builder {
    let mut builder = metadata(arch);
    let mut add = |name: &str, shape: &[usize]| {
        builder = builder.clone().f32s(name, shape, &counted(shape.iter().product()));
    };
    add("token_embd.weight", &[5, 8]);
    add("output_norm.weight", &[8]);
    for (name, shape) in [
        ("attn_norm", &[8][..]),
        ("attn_q", &[8, 8]),
        ("attn_k", &[4, 8]),
        ("attn_v", &[4, 8]),
        ("attn_output", &[8, 8]),
        ("ffn_norm", &[8]),
        ("ffn_gate", &[12, 8]),
        ("ffn_up", &[12, 8]),
        ("ffn_down", &[8, 12]),
    ] {
        add(&format!("blk.0.{name}.weight"), shape);
    }
    match arch {
        "qwen2" => {
            add("blk.0.attn_q.bias", &[8]);
            add("blk.0.attn_k.bias", &[4]);
            add("blk.0.attn_v.bias", &[4]);
        }
        "qwen3" => {
            add("blk.0.attn_q_norm.weight", &[4]);
            add("blk.0.attn_k_norm.weight", &[4]);
        }
        _ => {}
    }
    builder
}
