//! GGUF's tensor names and row order, and their Hugging Face counterparts.

use super::{Gguf, Value};
use crate::error::GgufProblem;
use crate::files::checkpoint::Entry;

/// The factors by which rotary frequencies are divided (Llama 3.1). The name is GGUF's own: a checkpoint has no such tensor.
pub(in crate::files) const ROPE_FREQS: &str = "rope_freqs.weight";

/// Architectures whose tensors and metadata are read. `llama` is also Mistral's, SmolLM2's and many others'.
const ARCHITECTURES: [&str; 3] = ["llama", "qwen2", "qwen3"];

pub(super) fn check_architecture(gguf: &Gguf) -> Result<(), GgufProblem> {
    let found = gguf.architecture();
    if ARCHITECTURES.contains(&found) {
        return Ok(());
    }
    let known = format!("`{}`", ARCHITECTURES.join("`, `"));
    Err(GgufProblem::Architecture { known, found: found.to_owned() })
}

/// A tensor's Hugging Face name, and for `llama`'s queries and keys the interleaving to undo. A name that is not known stays
/// as it is, so that checking a checkpoint against its config reports it.
pub(super) fn to_hugging_face(gguf: &Gguf, name: String, mut entry: Entry) -> Result<(String, Entry), GgufProblem> {
    let Some(renamed) = rename(&name) else { return Ok((name, entry)) };
    let heads = match renamed.rsplit('.').nth(1) {
        Some("q_proj") => "attention.head_count",
        Some("k_proj") => "attention.head_count_kv",
        _ => return Ok((renamed, entry)),
    };
    if gguf.architecture() == "llama" {
        let heads = head_count(gguf, heads)?;
        let rows = entry.shape.first().copied().unwrap_or(1);
        if heads == 0 || !rows.is_multiple_of(heads) || (rows / heads) % 2 != 0 {
            let found = format!("{rows} rows for {heads} heads");
            return Err(GgufProblem::Tensor { name, expected: "an even number of rows a head", found });
        }
        if entry.shape.len() == 1 && entry.stored.is_quantized() {
            let found = entry.stored.to_string();
            return Err(GgufProblem::Tensor { name, expected: "a bias of plain floats", found });
        }
        entry.interleaved = Some(rows / heads);
    }
    Ok((renamed, entry))
}

/// The head count; that of keys is the queries' where the file is silent.
pub(super) fn head_count(gguf: &Gguf, key: &str) -> Result<usize, GgufProblem> {
    let (full, value) = gguf.of_arch(key);
    match value {
        Some(value) => value.as_u64().map(|heads| heads as usize).ok_or_else(|| GgufProblem::Metadata {
            key: full,
            expected: "one count for all layers",
            found: value.brief(),
        }),
        None if key == "attention.head_count_kv" => head_count(gguf, "attention.head_count"),
        None => Err(GgufProblem::Metadata { key: full, expected: "a count", found: "nothing".to_owned() }),
    }
}

fn rename(name: &str) -> Option<String> {
    match name {
        "token_embd.weight" => return Some("model.embed_tokens.weight".to_owned()),
        "output_norm.weight" => return Some("model.norm.weight".to_owned()),
        "output.weight" => return Some("lm_head.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (module, kind) = rest.rsplit_once('.')?;
    let module = match module {
        "attn_norm" => "input_layernorm",
        "attn_q" => "self_attn.q_proj",
        "attn_k" => "self_attn.k_proj",
        "attn_v" => "self_attn.v_proj",
        "attn_output" => "self_attn.o_proj",
        "attn_q_norm" => "self_attn.q_norm",
        "attn_k_norm" => "self_attn.k_norm",
        "ffn_norm" => "post_attention_layernorm",
        "ffn_gate" => "mlp.gate_proj",
        "ffn_up" => "mlp.up_proj",
        "ffn_down" => "mlp.down_proj",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{module}.{kind}"))
}

/// The row of a GGUF tensor that holds row `row` of the checkpoint's, for heads of `head` rows: the checkpoint has a head's
/// first half before its second (the halves that rotate together), GGUF has them interleaved.
pub(in crate::files) fn stored_row(row: usize, head: usize) -> usize {
    let (start, i) = (row / head * head, row % head);
    let half = head / 2;
    start + 2 * (i % half) + i / half
}

/// The text of a value that must be one.
pub(super) fn required<'a, T>(
    key: String,
    value: Option<&'a Value>,
    expected: &'static str,
    as_type: impl FnOnce(&'a Value) -> Option<T>,
) -> Result<T, GgufProblem> {
    let found = value.map_or_else(|| "nothing".to_owned(), Value::brief);
    value.and_then(as_type).ok_or(GgufProblem::Metadata { key, expected, found })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The converter's `permute`: reshape to (heads, 2, head / 2), swap the last two axes.
        #[test]
        fn stored_rows_undo_the_converters_permutation(heads in 1..5usize, half in 1..9usize) {
            let head = 2 * half;
            let mut gguf_rows = vec![0; heads * head];
            let mut to = 0;
            for h in 0..heads {
                for i in 0..half {
                    for part in 0..2 {
                        gguf_rows[to] = h * head + part * half + i;
                        to += 1;
                    }
                }
            }
            for row in 0..heads * head {
                prop_assert_eq!(gguf_rows[stored_row(row, head)], row);
            }
        }
    }

    #[test]
    fn unknown_names_stay_for_the_check_to_report() {
        assert_eq!(rename("blk.3.ffn_gate_exps.weight"), None);
        assert_eq!(rename("blk.x.attn_q.weight"), None);
        assert_eq!(rename("blk.12.attn_q.bias").as_deref(), Some("model.layers.12.self_attn.q_proj.bias"));
    }
}
