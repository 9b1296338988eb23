//! The Jinja environment of chat templates.

use std::fmt;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Kwargs;
use minijinja::{Environment, ErrorKind, Value};

use super::{date, json, python};
use crate::error::Error;

/// The name of the one template in an environment; without `.html` nothing is escaped.
pub(super) const NAME: &str = "chat_template";

/// Begins an answer in marked text. Noncharacters, which no text may hold.
pub(super) const ANSWER_OPEN: char = '\u{FDD0}';
/// Ends an answer in marked text.
pub(super) const ANSWER_CLOSE: char = '\u{FDD1}';

/// What `raise_exception` raised.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// An environment with one template in it.
pub(super) fn new(template: String) -> Result<Environment<'static>, minijinja::Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(python::method);
    environment.add_function("raise_exception", raise_exception);
    environment.add_filter("tojson", to_json);
    environment.add_filter("answer", |text: String| format!("{ANSWER_OPEN}{text}{ANSWER_CLOSE}"));
    environment.add_template_owned(NAME, template)?;
    Ok(environment)
}

/// Defines `strftime_now`.
pub(super) fn set_time(environment: &mut Environment<'static>, unix_seconds: i64) {
    environment.add_function("strftime_now", move |format: String| date::strftime(&format, unix_seconds));
}

/// Turns `{% generation %}` … `{% endgeneration %}` into a filter block around the same text, which has the same
/// rules for the white space around it. Returns whether there was one.
pub(super) fn mark_generation_blocks(template: &str) -> (String, bool) {
    let mut out = String::with_capacity(template.len());
    let mut rest = template;
    let mut found = false;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        out.push_str(before);
        let sign = usize::from(tag.starts_with(['-', '+']));
        let name = tag[sign..].trim_start();
        out.push_str(&tag[..tag.len() - name.len()]);
        rest = name;
        for (from, to) in [("generation", "filter answer"), ("endgeneration", "endfilter")] {
            if let Some(after) = name.strip_prefix(from).filter(|after| closes_tag(after)) {
                out.push_str(to);
                rest = after;
                found = true;
            }
        }
    }
    out.push_str(rest);
    (out, found)
}

fn closes_tag(text: &str) -> bool {
    let text = text.trim_start();
    text.strip_prefix(['-', '+']).unwrap_or(text).starts_with("%}")
}

/// The template's own refusal, told apart from its faults.
pub(super) fn render_error(source: minijinja::Error) -> Error {
    let mut cause: Option<&dyn std::error::Error> = Some(&source);
    while let Some(error) = cause {
        if let Some(Raised(message)) = error.downcast_ref() {
            return Error::TemplateRaised { message: message.clone() };
        }
        cause = error.source();
    }
    Error::TemplateRender { source }
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

/// `json.dumps(value, ensure_ascii=False, …)`, not Jinja's own HTML-safe filter.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a filter")]
fn to_json(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let fault = |e: serde_json::Error| minijinja::Error::new(ErrorKind::InvalidOperation, e.to_string());
    let style = json::Style {
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        indent: indent(options.get("indent")?)?,
        separators: separators(options.get("separators")?)?,
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    Ok(json::dumps(&serde_json::to_value(&value).map_err(fault)?, &style))
}

fn indent(value: Option<Value>) -> Result<Option<String>, minijinja::Error> {
    Ok(match value.filter(|v| !v.is_none()) {
        None => None,
        Some(v) => Some(match v.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(v)?),
        }),
    })
}

fn separators(value: Option<Value>) -> Result<Option<(String, String)>, minijinja::Error> {
    let Some(value) = value.filter(|v| !v.is_none()) else { return Ok(None) };
    let both: Vec<String> = value.try_iter()?.map(|v| v.to_string()).collect();
    match <[String; 2]>::try_from(both) {
        Ok([item, key]) => Ok(Some((item, key))),
        Err(_) => Err(minijinja::Error::new(ErrorKind::InvalidOperation, "`separators` is not a pair")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_blocks_become_filter_blocks_and_nothing_else_changes() {
        let text = "{%- if a %}x{%- generation -%}{{ y }}{% endgeneration %}{% set generation = 1 %}{% endif %}";
        let (marked, found) = mark_generation_blocks(text);
        assert!(found);
        assert_eq!(marked, "{%- if a %}x{%- filter answer -%}{{ y }}{% endfilter %}{% set generation = 1 %}{% endif %}");
        assert_eq!(mark_generation_blocks("{% for generation in x %}{%"), ("{% for generation in x %}{%".into(), false));
    }
}
