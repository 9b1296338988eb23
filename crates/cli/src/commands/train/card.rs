//! The model card, and the commands that use an adapter.

use std::{fmt, path::Path};

use nibble_lora::AdapterConfig;
use nibble_train::{EvalStats, LogEntry, TrainConfig};

use crate::{
    base::weights_path,
    source::{ModelSource, is_gguf},
    ui,
};

/// How an adapter is used: here, in PEFT, in llama.cpp.
#[derive(Clone, Copy, Debug)]
pub(in crate::commands) struct UsageLines<'a> {
    /// `--model`, as given.
    pub(in crate::commands) model: &'a str,
    /// What it was found to be.
    pub(in crate::commands) source: &'a ModelSource,
    /// The adapter's folder.
    pub(in crate::commands) adapter: &'a Path,
    /// Whether whole modules are saved with it.
    pub(in crate::commands) saves_modules: bool,
}

impl UsageLines<'_> {
    /// Onto the screen.
    pub(in crate::commands) fn say(&self) {
        ui::say(format_args!("\n# ask it\n{}\n\n# in PEFT\n{}\n\n# in llama.cpp", self.generate(), self.peft()));
        ui::say(self.llama_cpp());
    }

    /// `nibble generate`.
    pub(in crate::commands) fn generate(&self) -> String {
        let (model, adapter) = (quoted(self.model), quoted(&self.adapter.to_string_lossy()));
        format!("nibble generate --model {model} --adapter {adapter} --prompt 'Hello!'")
    }

    /// Python for PEFT.
    fn peft(&self) -> String {
        let adapter = python(&self.adapter.to_string_lossy());
        let base = self.python_base();
        format!(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\
             from peft import PeftModel\n\
             tokenizer = AutoTokenizer.from_pretrained({adapter})\n\
             model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), {adapter})"
        )
    }

    /// What transformers calls the base.
    fn python_base(&self) -> String {
        let path = weights_path(self.source);
        if !is_gguf(&path) {
            let name =
                if self.is_unpacked() { self.source.path.to_string_lossy().into_owned() } else { self.source.name.clone() };
            return python(&name);
        }
        let folder = path.parent().map_or_else(|| ".".into(), |folder| folder.to_string_lossy());
        let folder = if folder.is_empty() { "." } else { &*folder };
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        format!("{}, gguf_file={}", python(folder), python(&file))
    }

    /// Whether the name is one that only this program knows.
    fn is_unpacked(&self) -> bool {
        self.source.name == crate::assets::TINY_MODEL
    }

    /// The conversion for llama.cpp.
    fn llama_cpp(&self) -> String {
        let adapter = quoted(&self.adapter.to_string_lossy());
        if self.saves_modules {
            let model = quoted(self.model);
            return format!(
                "# convert_lora_to_gguf.py takes no adapter with modules_to_save: merge it, then convert the model\n\
                 nibble merge --model {model} --adapter {adapter} --output merged && python convert_hf_to_gguf.py merged"
            );
        }
        let base = if is_gguf(&weights_path(self.source)) {
            // The converter reads the base's config.json, which a GGUF file does not have.
            "FOLDER_OF_THE_HUGGING_FACE_MODEL".to_owned()
        } else {
            quoted(&self.source.path.to_string_lossy())
        };
        format!("python convert_lora_to_gguf.py {adapter} --base {base} --outfile adapter.gguf")
    }
}

/// `README.md`, as the Hub reads it.
#[derive(Debug)]
pub(super) struct Card<'a> {
    pub(super) adapter: &'a AdapterConfig,
    pub(super) train: &'a TrainConfig,
    pub(super) quantisation: String,
    pub(super) last: Option<LogEntry>,
    pub(super) evaluation: Option<EvalStats>,
    pub(super) usage: UsageLines<'a>,
}

impl fmt::Display for Card<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = self.usage.source;
        writeln!(f, "---\nlibrary_name: peft\npipeline_tag: text-generation")?;
        // A path means nothing to others; the Hub refuses a card whose base it does not know.
        if source.revision.is_some() {
            writeln!(f, "base_model: {}", source.name)?;
        }
        writeln!(f, "tags:\n- lora\n- qlora\n- nibble\n---\n")?;
        writeln!(f, "# LoRA adapter for {}\n", source.name)?;
        writeln!(f, "Trained with [nibble]({}) {}.\n", env!("CARGO_PKG_REPOSITORY"), env!("CARGO_PKG_VERSION"))?;
        self.table(f)?;
        writeln!(f, "\n## Use\n\n```bash\n{}\n```\n\n```python\n{}\n```", self.usage.generate(), self.usage.peft())
    }
}

impl Card<'_> {
    fn table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let AdapterConfig { r, lora_alpha, lora_dropout, use_rslora, target_modules, .. } = self.adapter;
        let targets = target_modules.as_ref().map_or_else(String::new, ToString::to_string);
        writeln!(f, "| | |\n|---|---|")?;
        writeln!(f, "| base | {} |", self.quantisation)?;
        writeln!(f, "| r, alpha, dropout | {r}, {lora_alpha}, {lora_dropout} |")?;
        writeln!(f, "| rsLoRA | {use_rslora} |\n| target modules | {} |", targets.replace(',', ", ").replace('|', "\\|"))?;
        let TrainConfig { learning_rate, lr_scheduler_type, optim, .. } = self.train;
        writeln!(f, "| learning rate | {learning_rate}, {lr_scheduler_type} |\n| optimizer | {optim} |")?;
        if let Some(LogEntry { step, epoch, loss, tokens, .. }) = self.last {
            writeln!(f, "| steps, epochs, tokens | {step}, {epoch:.2}, {tokens} |\n| last training loss | {loss:.4} |")?;
        }
        if let Some(EvalStats { loss, perplexity, tokens }) = self.evaluation {
            writeln!(f, "| held-out loss | {loss:.4} (perplexity {perplexity:.3}, {tokens} tokens) |")?;
        }
        Ok(())
    }
}

/// A word for a POSIX shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./@:+=,~".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

/// A string for Python.
fn python(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', r"\\").replace('"', "\\\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, name: &str) -> ModelSource {
        ModelSource { path: path.into(), name: name.into(), revision: None }
    }

    #[test]
    fn words_survive_the_shell() {
        assert_eq!(quoted("org/name@v1"), "org/name@v1");
        assert_eq!(quoted("a b"), "'a b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
        assert_eq!(python(r#"C:\a "b""#), r#""C:\\a \"b\"""#);
    }

    #[test]
    fn a_gguf_base_is_named_as_transformers_takes_it() {
        let source = source("/models/m.Q4_0.gguf", "/models/m.Q4_0.gguf");
        let usage = UsageLines { model: "/models/m.Q4_0.gguf", source: &source, adapter: Path::new("out"), saves_modules: false };
        assert_eq!(usage.python_base(), r#""/models", gguf_file="m.Q4_0.gguf""#);
        assert!(usage.llama_cpp().starts_with("python convert_lora_to_gguf.py out --base "));
    }

    #[test]
    fn whole_modules_are_merged_before_llama_cpp() {
        let source = source("/models/m", "/models/m");
        let usage = UsageLines { model: "/models/m", source: &source, adapter: Path::new("out"), saves_modules: true };
        assert!(usage.llama_cpp().contains("nibble merge --model /models/m --adapter out"));
    }
}
