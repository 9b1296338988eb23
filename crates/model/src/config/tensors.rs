//! The tensors that a config calls for, by their names in Hugging Face checkpoints.

use super::ModelConfig;
use super::features::{NormPlacement, QkNorm};

/// One tensor of a model: its name in the checkpoint, its shape, and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// The name, such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// The shape as torch has it: `[out, in]` for linears, `[V, C]` for embeddings.
    pub shape: Vec<usize>,
    /// The block it belongs to, or none for embedding, last norm and head.
    pub layer: Option<usize>,
    /// What it is.
    pub role: Role,
}

/// What a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The token embedding, `[V, C]`.
    Embedding,
    /// The output projection, `[V, C]`, where it is not the embedding.
    LmHead,
    /// The weight of a norm.
    Norm,
    /// The matrix of a linear inside a block, `[out, in]`: what is quantised.
    Linear,
    /// The bias of a linear inside a block.
    Bias,
}

impl ModelConfig {
    /// Every tensor that the model needs, in the order in which it uses them. A tied model has no `lm_head.weight`.
    #[must_use]
    pub fn tensors(&self) -> Vec<TensorSpec> {
        let mut list = List { specs: Vec::new(), layer: None };
        list.add("model.embed_tokens.weight", &[self.vocab_size, self.hidden_size], Role::Embedding);
        for layer in 0..self.num_hidden_layers {
            list.layer = Some(layer);
            self.block(&mut list);
        }
        list.layer = None;
        list.add("model.norm.weight", &[self.hidden_size], Role::Norm);
        if !self.tie_word_embeddings {
            list.add("lm_head.weight", &[self.vocab_size, self.hidden_size], Role::LmHead);
        }
        list.specs
    }

    fn block(&self, list: &mut List) {
        let norms = self.features.norms;
        if norms != NormPlacement::Post {
            list.norm("input_layernorm", self.hidden_size);
        }
        self.attention(list);
        list.norm("post_attention_layernorm", self.hidden_size);
        if norms == NormPlacement::PreAndPost {
            list.norm("pre_feedforward_layernorm", self.hidden_size);
        }
        self.mlp(list);
        if norms != NormPlacement::Pre {
            list.norm("post_feedforward_layernorm", self.hidden_size);
        }
    }

    fn attention(&self, list: &mut List) {
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let (hidden, bias) = (self.hidden_size, self.features.qkv_bias);
        if self.features.fused_projections {
            list.linear("self_attn.qkv_proj", queries + 2 * keys, hidden, bias);
        } else {
            list.linear("self_attn.q_proj", queries, hidden, bias);
            list.linear("self_attn.k_proj", keys, hidden, bias);
            list.linear("self_attn.v_proj", keys, hidden, bias);
        }
        match self.features.qk_norm {
            QkNorm::None => {}
            QkNorm::Head => {
                list.norm("self_attn.q_norm", self.head_dim);
                list.norm("self_attn.k_norm", self.head_dim);
            }
            QkNorm::Full => {
                list.norm("self_attn.q_norm", queries);
                list.norm("self_attn.k_norm", keys);
            }
        }
        list.linear("self_attn.o_proj", hidden, queries, self.features.o_bias);
    }

    fn mlp(&self, list: &mut List) {
        let (hidden, inner, bias) = (self.hidden_size, self.intermediate_size, self.features.mlp_bias);
        if self.features.fused_projections {
            list.linear("mlp.gate_up_proj", 2 * inner, hidden, bias);
        } else {
            list.linear("mlp.gate_proj", inner, hidden, bias);
            list.linear("mlp.up_proj", inner, hidden, bias);
        }
        list.linear("mlp.down_proj", hidden, inner, bias);
    }
}

struct List {
    specs: Vec<TensorSpec>,
    layer: Option<usize>,
}

impl List {
    fn add(&mut self, name: &str, shape: &[usize], role: Role) {
        let name = match self.layer {
            Some(layer) => format!("model.layers.{layer}.{name}"),
            None => name.to_owned(),
        };
        self.specs.push(TensorSpec { name, shape: shape.to_vec(), layer: self.layer, role });
    }

    fn norm(&mut self, module: &str, size: usize) {
        self.add(&format!("{module}.weight"), &[size], Role::Norm);
    }

    fn linear(&mut self, module: &str, out: usize, input: usize, bias: bool) {
        self.add(&format!("{module}.weight"), &[out, input], Role::Linear);
        if bias {
            self.add(&format!("{module}.bias"), &[out], Role::Bias);
        }
    }
}
