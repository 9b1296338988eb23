//! What a family does differently from the common block: pre-norm RMSNorm, rotary grouped-query attention without
//! biases, a SiLU-gated MLP.

use serde_json::Value;

use super::family::Family;
use super::fields::Fields;

/// The differences between decoder-only families, as data.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::struct_excessive_bools)] // independent facts of a family
pub struct Features {
    /// Biases on the query, key and value projections.
    pub qkv_bias: bool,
    /// A bias on the attention's output projection.
    pub o_bias: bool,
    /// Biases on the three projections of the MLP.
    pub mlp_bias: bool,
    /// Norms on queries and keys, before the rotary embedding.
    pub qk_norm: QkNorm,
    /// Where the block's norms are.
    pub norms: NormPlacement,
    /// Norms multiply by 1 + w, in f32 before the cast to 16 bits, instead of by w after it.
    pub norm_offset: bool,
    /// The function on the MLP's gate.
    pub activation: Activation,
    /// One matrix for q, k and v, and one for gate and up.
    pub fused_projections: bool,
    /// Embeddings are multiplied by this (√C in Gemma, rounded to the model's element type there).
    pub embed_scale: Option<f32>,
    /// Attention scores are multiplied by this: 1 / √D but for Gemma's `query_pre_attn_scalar`.
    pub query_scale: f32,
    /// c in c · tanh(score / c), before the softmax.
    pub attn_softcap: Option<f32>,
    /// c in c · tanh(logit / c), on the logits.
    pub final_logit_softcap: Option<f32>,
    /// Per layer: token i sees token j ≤ i only where i − j < window.
    pub windows: Vec<Option<usize>>,
}

/// Norms on queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Over each head, with one weight of size D (Qwen3, Gemma 3).
    Head,
    /// Over all heads together, with a weight of size H · D (OLMo 2).
    Full,
}

/// Where the norms of a block are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPlacement {
    /// x += f(norm(x)): `input_layernorm`, `post_attention_layernorm`.
    Pre,
    /// x += norm(f(norm(x))): four norms (Gemma 2 and 3).
    PreAndPost,
    /// x += norm(f(x)): `post_attention_layernorm`, `post_feedforward_layernorm` (OLMo 2).
    Post,
}

/// The function on the MLP's gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · σ(x).
    Silu,
    /// x · Φ(x), by the error function.
    Gelu,
    /// x · Φ(x), Φ approximated by tanh.
    GeluTanh,
}

impl Features {
    /// The features that the transformer does not run yet, each said in words. A feature is run once its line is gone
    /// from here.
    #[must_use]
    pub fn not_run(&self) -> Vec<&'static str> {
        [
            (self.norm_offset, "norms scaled by 1 + w"),
            (self.norms != NormPlacement::Pre, "norms after attention and MLP"),
            (self.qk_norm == QkNorm::Full, "a norm over whole queries and keys"),
            (self.activation != Activation::Silu, "a GELU-gated MLP"),
            (self.fused_projections, "fused `qkv_proj` and `gate_up_proj`"),
            (self.embed_scale.is_some(), "scaled embeddings"),
            (self.attn_softcap.is_some(), "a soft cap on attention scores"),
            (self.final_logit_softcap.is_some(), "a soft cap on logits"),
        ]
        .into_iter()
        .filter_map(|(needed, feature)| needed.then_some(feature))
        .collect()
    }
}

pub(super) fn read(family: Family, fields: &mut Fields<'_>, layers: usize, hidden: usize, head_dim: usize) -> Features {
    let bias = fields.flag_or("attention_bias", false);
    // Mistral, Qwen2 and Phi-3 ignore the field; their biases are fixed.
    let bias = bias && !matches!(family, Family::Mistral | Family::Qwen2 | Family::Phi3);
    let capped = family == Family::Gemma2;
    let scalar = match family {
        Family::Gemma2 | Family::Gemma3 => fields.opt_positive("query_pre_attn_scalar").unwrap_or(256.0),
        _ => head_dim.max(1) as f64,
    };
    refuse_fields(fields);
    Features {
        qkv_bias: bias || family == Family::Qwen2,
        o_bias: bias,
        mlp_bias: family == Family::Llama && fields.flag_or("mlp_bias", false),
        qk_norm: match family {
            Family::Qwen3 | Family::Gemma3 => QkNorm::Head,
            Family::Olmo2 => QkNorm::Full,
            _ => QkNorm::None,
        },
        norms: match family {
            Family::Gemma2 | Family::Gemma3 => NormPlacement::PreAndPost,
            Family::Olmo2 => NormPlacement::Post,
            _ => NormPlacement::Pre,
        },
        norm_offset: family.is_gemma(),
        activation: activation(family, fields),
        fused_projections: family == Family::Phi3,
        embed_scale: family.is_gemma().then(|| (hidden as f32).sqrt()),
        query_scale: scalar.powf(-0.5) as f32,
        attn_softcap: softcap(fields, "attn_logit_softcapping", capped, 50.0),
        final_logit_softcap: softcap(fields, "final_logit_softcapping", capped, 30.0),
        windows: windows(family, fields, layers),
    }
}

/// Fields that change what is computed and that no described family's class reads.
fn refuse_fields(fields: &mut Fields<'_>) {
    if fields.get("use_bidirectional_attention").is_some_and(|value| value != &Value::Bool(false)) {
        let value = fields.raw()["use_bidirectional_attention"].clone();
        fields.wrong("use_bidirectional_attention", "false or null", &value);
    }
    if fields.flag_or("rope_interleaved", false) {
        fields.wrong("rope_interleaved", "false", &Value::Bool(true));
    }
}

/// A cap is `null` where it is off; a silent Gemma 2 file has the class's default.
fn softcap(fields: &mut Fields<'_>, field: &str, capped: bool, default: f32) -> Option<f32> {
    if capped && !fields.raw().contains_key(field) {
        return Some(default);
    }
    fields.opt_positive(field).map(|cap| cap as f32)
}

fn activation(family: Family, fields: &mut Fields<'_>) -> Activation {
    // Gemma 1's published files say `hidden_act: gelu`, and mean tanh-GELU: transformers reads `hidden_activation`,
    // and tanh-GELU where that is absent.
    if family.is_gemma() && fields.get("hidden_activation").is_none() {
        return Activation::GeluTanh;
    }
    let field = if family.is_gemma() { "hidden_activation" } else { "hidden_act" };
    match fields.text(field) {
        None | Some("silu" | "swish") => Activation::Silu,
        Some("gelu") => Activation::Gelu,
        Some("gelu_pytorch_tanh" | "gelu_new" | "gelu_fast") => Activation::GeluTanh,
        Some(other) => {
            fields.wrong(field, "silu, gelu or gelu_pytorch_tanh", &Value::from(other));
            Activation::Silu
        }
    }
}

/// The window of each layer: `layer_types` where the file has it, else the family's rule.
fn windows(family: Family, fields: &mut Fields<'_>, layers: usize) -> Vec<Option<usize>> {
    let qwen = matches!(family, Family::Qwen2 | Family::Qwen3);
    let used = match family {
        Family::Llama | Family::Gemma | Family::Olmo2 => false,
        Family::Qwen2 | Family::Qwen3 => fields.flag_or("use_sliding_window", false),
        _ => true,
    };
    let window = if used { fields.opt_size("sliding_window") } else { None };
    if let Some(types) = fields.get("layer_types") {
        return from_layer_types(fields, types, layers, window, qwen && !used);
    }
    let first = if qwen { fields.size_or("max_window_layers", 28) } else { 0 };
    let pattern = match family {
        Family::Gemma2 => 2,
        Family::Gemma3 => fields.size_or("sliding_window_pattern", 6),
        _ => usize::MAX,
    };
    (0..layers).map(|i| window.filter(|_| i >= first && (i + 1) % pattern != 0)).collect()
}

fn from_layer_types(
    fields: &mut Fields<'_>,
    types: &Value,
    layers: usize,
    window: Option<usize>,
    switched_off: bool,
) -> Vec<Option<usize>> {
    let Some(list) = types.as_array() else {
        fields.wrong("layer_types", "a list", types);
        return Vec::new();
    };
    if list.len() != layers {
        let expected = format!("{layers} entries");
        fields.contradiction("layer_types", expected, "num_hidden_layers", list.len().to_string());
    }
    let mut windows = Vec::with_capacity(layers);
    for layer in list {
        match layer.as_str() {
            Some("full_attention") => windows.push(None),
            Some("sliding_attention") => {
                if window.is_none() {
                    let other = if switched_off { "use_sliding_window" } else { "sliding_window" };
                    let expected = "full_attention only".to_owned();
                    fields.contradiction("layer_types", expected, other, layer.to_string());
                    return Vec::new();
                }
                windows.push(window);
            }
            _ => {
                fields.wrong("layer_types", "full_attention or sliding_attention", layer);
                return Vec::new();
            }
        }
    }
    windows
}
