//! JSON as Python's `json.dumps` writes it.

use std::fmt::Write;

use serde_json::Value;

/// The options of `json.dumps` that Hugging Face's `tojson` passes on.
#[derive(Debug, Default)]
pub(super) struct Style {
    pub(super) ensure_ascii: bool,
    pub(super) indent: Option<String>,
    /// Between items, and between key and value.
    pub(super) separators: Option<(String, String)>,
    pub(super) sort_keys: bool,
}

/// Writes a value: `, ` and `: ` between, unless the style says otherwise.
pub(super) fn dumps(value: &Value, style: &Style) -> String {
    let mut writer = Writer { style, out: String::new(), depth: 0 };
    writer.value(value);
    writer.out
}

struct Writer<'s> {
    style: &'s Style,
    out: String,
    depth: usize,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value) {
        match value {
            Value::Array(items) => self.group('[', ']', items.iter(), Self::value),
            Value::Object(map) => {
                let mut entries: Vec<_> = map.iter().collect();
                if self.style.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.group('{', '}', entries.into_iter(), |w, (key, value)| {
                    w.string(key);
                    let colon = w.style.separators.as_ref().map_or(": ", |s| &s.1);
                    w.out.push_str(colon);
                    w.value(value);
                });
            }
            Value::String(text) => self.string(text),
            Value::Number(n) => self.number(n),
            Value::Bool(_) | Value::Null => self.out.push_str(&value.to_string()),
        }
    }

    fn group<T>(&mut self, open: char, close: char, items: impl ExactSizeIterator<Item = T>, mut each: impl FnMut(&mut Self, T)) {
        self.out.push(open);
        let filled = items.len() > 0;
        self.depth += 1;
        for (i, item) in items.enumerate() {
            if i > 0 {
                // With an indent the line break takes the place of the space.
                let usual = if self.style.indent.is_some() { "," } else { ", " };
                self.out.push_str(self.style.separators.as_ref().map_or(usual, |s| &s.0));
            }
            self.line_break();
            each(self, item);
        }
        self.depth -= 1;
        if filled {
            self.line_break();
        }
        self.out.push(close);
    }

    fn line_break(&mut self) {
        if let Some(indent) = &self.style.indent {
            self.out.push('\n');
            for _ in 0..self.depth {
                self.out.push_str(indent);
            }
        }
    }

    /// Python writes the shortest decimal that reads back, with an exponent of two digits from 1e16 on and below 1e-4.
    fn number(&mut self, n: &serde_json::Number) {
        let Some(x) = n.as_f64().filter(|_| n.is_f64()) else {
            self.out.push_str(&n.to_string());
            return;
        };
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        if (-4..16).contains(&exponent) || x == 0.0 {
            let _ = write!(self.out, "{x:?}");
        } else {
            let sign = if exponent < 0 { '-' } else { '+' };
            let _ = write!(self.out, "{digits}e{sign}{:02}", exponent.abs());
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            self.character(c);
        }
        self.out.push('"');
    }

    fn character(&mut self, c: char) {
        match c {
            '"' => self.out.push_str("\\\""),
            '\\' => self.out.push_str("\\\\"),
            '\n' => self.out.push_str("\\n"),
            '\r' => self.out.push_str("\\r"),
            '\t' => self.out.push_str("\\t"),
            '\u{8}' => self.out.push_str("\\b"),
            '\u{c}' => self.out.push_str("\\f"),
            c if (c as u32) < 0x20
                || (self.style.ensure_ascii && !c.is_ascii())
                || (self.style.ensure_ascii && c == '\u{7f}') =>
            {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(self.out, "\\u{unit:04x}");
                }
            }
            c => self.out.push(c),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn writes_what_python_writes() {
        let value =
            json!({ "b": [1, 2.0, 1e16, 1e-5, 1.5e-7, 123456789.125, -0.0], "a": { "t": "é\"\n\u{1}" }, "e": [], "n": null });
        assert_eq!(
            dumps(&value, &Style::default()),
            r#"{"b": [1, 2.0, 1e+16, 1e-05, 1.5e-07, 123456789.125, -0.0], "a": {"t": "é\"\n\u0001"}, "e": [], "n": null}"#
        );
        let style = Style { ensure_ascii: true, indent: Some("  ".into()), separators: None, sort_keys: true };
        assert_eq!(
            dumps(&json!({ "b": [true, "é😀"], "a": {} }), &style),
            "{\n  \"a\": {},\n  \"b\": [\n    true,\n    \"\\u00e9\\ud83d\\ude00\"\n  ]\n}"
        );
        let compact = Style { separators: Some((",".into(), ":".into())), ..Style::default() };
        assert_eq!(dumps(&json!({ "a": [1, 2] }), &compact), r#"{"a":[1,2]}"#);
    }
}
