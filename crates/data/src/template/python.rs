//! Methods of Python's strings, mappings and lists that chat templates call.

use minijinja::value::{ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// Answers a method call that Jinja itself does not know.
pub(super) fn method(_: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => string_method(value.as_str().unwrap_or_default(), name, args),
        ValueKind::Map => map_method(value, name, args),
        ValueKind::Seq => sequence_method(value, name, args),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    Ok(match name {
        "strip" | "lstrip" | "rstrip" => strip(text, name, from_args::<(Option<&str>,)>(args)?.0).into(),
        "startswith" | "endswith" => affix(text, name, args)?.into(),
        "removeprefix" => text.strip_prefix(from_args::<(&str,)>(args)?.0).unwrap_or(text).into(),
        "removesuffix" => text.strip_suffix(from_args::<(&str,)>(args)?.0).unwrap_or(text).into(),
        "split" | "rsplit" => split(text, name == "rsplit", args)?,
        "splitlines" => text.lines().map(Value::from).collect(),
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            let parts: Vec<String> = items.try_iter()?.map(|v| v.to_string()).collect();
            parts.join(text).into()
        }
        "replace" => {
            let (from, to, count): (&str, &str, Option<i64>) = from_args(args)?;
            match count.and_then(|n| usize::try_from(n).ok()) {
                Some(n) => text.replacen(from, to, n).into(),
                None => text.replace(from, to).into(),
            }
        }
        "find" | "rfind" => find(text, name, from_args::<(&str,)>(args)?.0).into(),
        "count" => text.matches(from_args::<(&str,)>(args)?.0).count().into(),
        "upper" => no_args(args, || text.to_uppercase().into())?,
        "lower" => no_args(args, || text.to_lowercase().into())?,
        "title" => no_args(args, || title(text).into())?,
        "capitalize" => no_args(args, || capitalize(text).into())?,
        "isdigit" | "isnumeric" => no_args(args, || all(text, char::is_numeric))?,
        "isalpha" => no_args(args, || all(text, char::is_alphabetic))?,
        "isalnum" => no_args(args, || all(text, char::is_alphanumeric))?,
        "isspace" => no_args(args, || all(text, char::is_whitespace))?,
        "isupper" => no_args(args, || (text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase)).into())?,
        "islower" => no_args(args, || (text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase)).into())?,
        _ => return Err(ErrorKind::UnknownMethod.into()),
    })
}

fn map_method(map: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let keys = || map.try_iter();
    Ok(match name {
        "keys" => no_args(args, keys)??.collect(),
        "values" => no_args(args, keys)??.map(|k| map.get_item(&k)).collect::<Result<Value, _>>()?,
        "items" => {
            let pair = |key: Value| Ok(Value::from(vec![key.clone(), map.get_item(&key)?]));
            no_args(args, keys)??.map(pair).collect::<Result<Value, Error>>()?
        }
        "get" => {
            let (key, default): (&Value, Option<Value>) = from_args(args)?;
            let value = map.get_item(key)?;
            if value.is_undefined() { default.unwrap_or_else(|| ().into()) } else { value }
        }
        _ => return Err(ErrorKind::UnknownMethod.into()),
    })
}

fn sequence_method(list: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (wanted,): (&Value,) = match name {
        "count" | "index" => from_args(args)?,
        _ => return Err(ErrorKind::UnknownMethod.into()),
    };
    let mut items = list.try_iter()?;
    if name == "count" {
        return Ok(items.filter(|v| v == wanted).count().into());
    }
    let found = items.position(|v| v == *wanted);
    found.map(Value::from).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, format!("`{wanted}` is not in list")))
}

fn no_args<T>(args: &[Value], result: impl FnOnce() -> T) -> Result<T, Error> {
    let () = from_args(args)?;
    Ok(result())
}

fn all(text: &str, test: impl Fn(char) -> bool) -> Value {
    (!text.is_empty() && text.chars().all(test)).into()
}

fn strip<'a>(text: &'a str, name: &str, chars: Option<&str>) -> &'a str {
    let drop = |c: char| chars.map_or_else(|| c.is_whitespace(), |set| set.contains(c));
    match name {
        "lstrip" => text.trim_start_matches(drop),
        "rstrip" => text.trim_end_matches(drop),
        _ => text.trim_matches(drop),
    }
}

/// One affix, or a tuple of which any will do.
fn affix(text: &str, name: &str, args: &[Value]) -> Result<bool, Error> {
    let (wanted,): (&Value,) = from_args(args)?;
    let test = |part: &str| if name == "startswith" { text.starts_with(part) } else { text.ends_with(part) };
    if let Some(part) = wanted.as_str() {
        return Ok(test(part));
    }
    Ok(wanted.try_iter()?.any(|v| v.as_str().is_some_and(test)))
}

fn split(text: &str, from_right: bool, args: &[Value]) -> Result<Value, Error> {
    let (separator, limit): (Option<&str>, Option<i64>) = from_args(args)?;
    // Python counts splits, Rust pieces; a negative limit is none.
    let pieces = limit.and_then(|n| usize::try_from(n).ok()).map_or(usize::MAX, |n| n.saturating_add(1));
    let Some(separator) = separator else {
        return Ok(split_whitespace(text, from_right, pieces));
    };
    if separator.is_empty() {
        return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
    }
    Ok(if from_right {
        let mut parts: Vec<&str> = text.rsplitn(pieces, separator).collect();
        parts.reverse();
        parts.into_iter().map(Value::from).collect()
    } else {
        text.splitn(pieces, separator).map(Value::from).collect()
    })
}

/// Runs of white space separate, none at the ends counts; the rest after the last split keeps its inner white space.
fn split_whitespace(text: &str, from_right: bool, pieces: usize) -> Value {
    let mut parts: Vec<&str> = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let cut = if from_right { rest.rfind(char::is_whitespace) } else { rest.find(char::is_whitespace) };
        let Some(cut) = cut.filter(|_| parts.len() + 1 < pieces) else {
            parts.push(rest);
            break;
        };
        let (left, right) = (&rest[..cut], &rest[cut..]);
        let (part, remaining) = if from_right { (right.trim_start(), left.trim_end()) } else { (left, right.trim_start()) };
        parts.push(part);
        rest = remaining;
    }
    if from_right {
        parts.reverse();
    }
    parts.into_iter().map(Value::from).collect()
}

/// Position in characters, -1 if absent.
fn find(text: &str, name: &str, part: &str) -> i64 {
    let at = if name == "rfind" { text.rfind(part) } else { text.find(part) };
    at.map_or(-1, |byte| text[..byte].chars().count() as i64)
}

fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let first = chars.next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
    first + &chars.as_str().to_lowercase()
}

fn title(text: &str) -> String {
    let mut inside = false;
    let mut out = String::new();
    for c in text.chars() {
        if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_alphabetic();
    }
    out
}
