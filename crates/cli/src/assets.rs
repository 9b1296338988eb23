//! What the binary carries: a small model, and data to train it on.

use std::{fs, path::PathBuf};

use serde_json::Value;

use crate::{
    env,
    error::{Result, io_error},
};

/// The name of the model in the binary: a 2.8 M parameter Llama pretrained on WordNet's glosses.
pub(crate) const TINY_MODEL: &str = "tiny-wordnet";

macro_rules! files {
    ($($name:literal),*) => { [$(($name, include_bytes!(concat!("../assets/tiny-wordnet/", $name)) as &[u8])),*] };
}

const TINY_FILES: [(&str, &[u8]); 6] = files!(
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors"
);

const TRAIN_ROWS: &str = include_str!("../assets/wordnet/train.jsonl");
const EVAL_ROWS: &str = include_str!("../assets/wordnet/eval.jsonl");

/// Writes the model into the cache, unless it is there, and gives its folder.
///
/// # Errors
/// When the cache cannot be written.
pub(crate) fn unpack_tiny_model() -> Result<PathBuf> {
    let folder = env::nibble_cache().join(TINY_MODEL);
    fs::create_dir_all(&folder).map_err(io_error("create", &folder))?;
    for (name, bytes) in TINY_FILES {
        let path = folder.join(name);
        // Written again where the size differs: by an earlier version, or cut short.
        if fs::metadata(&path).is_ok_and(|meta| meta.len() == bytes.len() as u64) {
            continue;
        }
        let mut file = tempfile::NamedTempFile::new_in(&folder).map_err(io_error("write", &path))?;
        std::io::Write::write_all(&mut file, bytes).map_err(io_error("write", &path))?;
        file.persist(&path).map_err(|error| io_error("write", &path)(error.error))?;
    }
    Ok(folder)
}

/// 2,200 rows of WordNet 3.0 in Alpaca's form.
pub(crate) fn train_rows() -> impl Iterator<Item = Value> {
    rows(TRAIN_ROWS)
}

/// 200 more, held out.
pub(crate) fn eval_rows() -> impl Iterator<Item = Value> {
    rows(EVAL_ROWS)
}

fn rows(text: &'static str) -> impl Iterator<Item = Value> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_embedded_row_is_read() {
        assert_eq!((train_rows().count(), eval_rows().count()), (2200, 200));
        assert!(train_rows().chain(eval_rows()).all(|row| row["instruction"].is_string() && row["output"].is_string()));
    }
}
