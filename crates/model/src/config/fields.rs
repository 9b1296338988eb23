//! Reading JSON fields while collecting every problem, so that one run reports them all.

use serde_json::{Map, Value};

use super::Note;
use crate::error::ConfigProblem;
use crate::files::StoredType;

/// A JSON object being read. Getters return a placeholder after a problem; [`Fields::into_problems`] says whether
/// any was met.
pub(crate) struct Fields<'a> {
    map: &'a Map<String, Value>,
    prefix: &'static str,
    problems: Vec<ConfigProblem>,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(map: &'a Map<String, Value>) -> Self {
        Self { map, prefix: "", problems: Vec::new() }
    }

    /// A nested object, whose problems are named `prefix.field`; hand it back with [`Fields::absorb`].
    pub(crate) fn nested(map: &'a Map<String, Value>, prefix: &'static str) -> Self {
        Self { map, prefix, problems: Vec::new() }
    }

    pub(crate) fn absorb(&mut self, nested: Fields<'_>) {
        self.problems.extend(nested.problems);
    }

    pub(crate) fn into_problems(self) -> Vec<ConfigProblem> {
        self.problems
    }

    pub(crate) fn raw(&self) -> &'a Map<String, Value> {
        self.map
    }

    /// The value, with `null` as absent.
    pub(crate) fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    pub(crate) fn object(&mut self, field: &str) -> Option<&'a Map<String, Value>> {
        let value = self.get(field)?;
        let object = value.as_object();
        if object.is_none() {
            self.wrong(field, "an object", value);
        }
        object
    }

    pub(crate) fn problem(&mut self, problem: ConfigProblem) {
        self.problems.push(problem);
    }

    pub(crate) fn wrong(&mut self, field: &str, expected: &'static str, found: &Value) {
        let field = self.name(field);
        self.problems.push(ConfigProblem::Wrong { field, expected, found: found.to_string() });
    }

    pub(crate) fn missing(&mut self, field: &str, expected: &'static str) {
        let field = self.name(field);
        self.problems.push(ConfigProblem::Missing { field, expected });
    }

    pub(crate) fn contradiction(&mut self, field: &'static str, expected: String, other: &'static str, found: String) {
        self.problems.push(ConfigProblem::Contradiction { field, expected, other, found });
    }

    fn name(&self, field: &str) -> String {
        if self.prefix.is_empty() { field.to_owned() } else { format!("{}.{field}", self.prefix) }
    }

    /// A required positive integer.
    pub(crate) fn size(&mut self, field: &str) -> usize {
        if self.get(field).is_none() {
            self.missing(field, "a positive integer");
        }
        self.opt_size(field).unwrap_or(0)
    }

    pub(crate) fn size_or(&mut self, field: &str, default: usize) -> usize {
        self.opt_size(field).unwrap_or(default)
    }

    /// A positive integer below 2³¹, or nothing. The limit keeps products of two sizes, and thrice them, within 64 bits.
    pub(crate) fn opt_size(&mut self, field: &str) -> Option<usize> {
        let value = self.get(field)?;
        let size = value.as_u64().filter(|&size| size > 0 && i32::try_from(size).is_ok());
        if size.is_none() {
            self.wrong(field, "a positive integer", value);
        }
        size.map(|size| size as usize)
    }

    /// The required number of layers. The limit is far above any model, and keeps per-layer lists small.
    pub(crate) fn layers(&mut self, field: &str) -> usize {
        let layers = self.size(field);
        if layers <= 1 << 16 {
            return layers;
        }
        self.wrong(field, "at most 65536", &Value::from(layers));
        0
    }

    /// A required positive number.
    pub(crate) fn positive(&mut self, field: &str) -> f64 {
        if self.get(field).is_none() {
            self.missing(field, "a positive number");
        }
        self.opt_positive(field).unwrap_or(1.0)
    }

    pub(crate) fn opt_positive(&mut self, field: &str) -> Option<f64> {
        let value = self.get(field)?;
        let number = value.as_f64().filter(|&number| number > 0.0 && number.is_finite());
        if number.is_none() {
            self.wrong(field, "a positive number", value);
        }
        number
    }

    pub(crate) fn flag_or(&mut self, field: &str, default: bool) -> bool {
        let Some(value) = self.get(field) else { return default };
        value.as_bool().unwrap_or_else(|| {
            self.wrong(field, "true or false", value);
            default
        })
    }

    pub(crate) fn text(&mut self, field: &str) -> Option<&'a str> {
        let value = self.get(field)?;
        let text = value.as_str();
        if text.is_none() {
            self.wrong(field, "a string", value);
        }
        text
    }

    pub(crate) fn token(&mut self, field: &str) -> Option<u32> {
        let value = self.get(field)?;
        // Some published configs say -1 for "none".
        if value.as_i64() == Some(-1) {
            return None;
        }
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        if id.is_none() {
            self.wrong(field, "a token id", value);
        }
        id
    }

    pub(crate) fn tokens(&mut self, field: &str) -> Vec<u32> {
        let Some(Value::Array(list)) = self.get(field) else {
            return self.token(field).into_iter().collect();
        };
        let ids: Option<Vec<u32>> = list.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect();
        ids.unwrap_or_else(|| {
            self.wrong(field, "a token id or a list of them", &Value::Array(list.clone()));
            Vec::new()
        })
    }

    /// `dtype` (v5) or `torch_dtype` (v4), with or without the prefix `torch.`.
    pub(crate) fn dtype(&mut self) -> Option<StoredType> {
        let field = if self.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        let text = self.text(field)?;
        if text == "auto" {
            return None;
        }
        let dtype = StoredType::from_torch_name(text.strip_prefix("torch.").unwrap_or(text));
        if dtype.is_none() {
            self.wrong(field, "float32, bfloat16 or float16", &Value::from(text));
        }
        dtype
    }

    pub(crate) fn refuse_quantized(&mut self) {
        let Some(config) = self.object("quantization_config") else { return };
        let method = config.get("quant_method").and_then(Value::as_str);
        let on = |key: &str| config.get(key).and_then(Value::as_bool) == Some(true);
        let kind = config.get("bnb_4bit_quant_type").and_then(Value::as_str).unwrap_or("4-bit");
        let method = match method {
            None | Some("bitsandbytes") if on("load_in_4bit") => format!("bitsandbytes {kind}"),
            None | Some("bitsandbytes") if on("load_in_8bit") => "bitsandbytes int8".to_owned(),
            Some(method) => method.to_owned(),
            None => "an unnamed method".to_owned(),
        };
        self.problem(ConfigProblem::Quantized { method });
    }

    /// The known fields that do nothing here, where they are set to something.
    pub(crate) fn notes(&self) -> Vec<Note> {
        const SET_ASIDE: [(&str, &str); 4] = [
            ("attention_dropout", "the base is frozen; dropout belongs to the adapters"),
            ("embd_pdrop", "the base is frozen; dropout belongs to the adapters"),
            ("resid_pdrop", "the base is frozen; dropout belongs to the adapters"),
            ("pretraining_tp", "slices of one matrix product add up to the same product"),
        ];
        let neutral = |field: &str, value: &Value| value.as_f64() == Some(if field == "pretraining_tp" { 1.0 } else { 0.0 });
        SET_ASIDE
            .into_iter()
            .filter_map(|(field, reason)| {
                let value = self.get(field).filter(|value| !neutral(field, value))?;
                Some(Note { field, value: value.to_string(), reason })
            })
            .collect()
    }
}
