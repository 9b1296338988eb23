//! Signatures of kernels, read off the text of a source.

/// A kernel as its source declares it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Signature {
    pub(crate) name: String,
    pub(crate) args: Vec<Argument>,
}

/// An argument: its name, the name of its `ArgKind`, whether it is a pointer to values that are not `const`, and to what.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Argument {
    pub(crate) name: String,
    pub(crate) kind: &'static str,
    pub(crate) writes: bool,
    pub(crate) element: Option<&'static str>,
}

/// What a pointer may point to.
const ELEMENTS: [&str; 13] = ["float", "bf16", "f16", "u8", "i8", "u16", "i16", "u32", "i32", "u64", "i64", "double", "void"];

/// What every kernel's declaration begins with.
const BEGINS: [&str; 3] = ["extern", "__global__", "void"];

/// The kernels of a source, in its order. They must be written out: a kernel that a macro makes is not seen, and its name in a
/// macro's text is refused.
pub(crate) fn parse(source: &str) -> Result<Vec<Signature>, String> {
    let text = without_comments(source);
    let mut found = Vec::new();
    for (at, _) in text.match_indices("__global__") {
        let line = text[..at].matches('\n').count() + 1;
        let fail = |why: String| format!("line {line}: {why}");
        let begin = text[..at].rfind(['\n', ';', '}']).map_or(0, |at| at + 1);
        if text[begin..at].trim() != "extern \"C\"" {
            return Err(fail("a kernel's declaration begins with `extern \"C\" __global__`".to_owned()));
        }
        found.push(declaration(&text[at + BEGINS[1].len()..]).map_err(fail)?);
    }
    Ok(found)
}

/// What follows `__global__`: `void`, attributes, the name and the arguments in parentheses.
fn declaration(text: &str) -> Result<Signature, String> {
    let mut rest = text.trim_start();
    loop {
        let end = rest.find(|c: char| !is_word(c)).unwrap_or(rest.len());
        let (word, after) = (&rest[..end], rest[end..].trim_start());
        if word.is_empty() {
            let near: String = rest.chars().take(20).collect();
            return Err(format!("expected a kernel's name, found `{}`", near.trim_end()));
        }
        if word == BEGINS[2] {
            rest = after;
            continue;
        }
        let (inside, after) = parentheses(after).ok_or_else(|| format!("expected arguments after `{word}`"))?;
        if word.starts_with("__") {
            rest = after.trim_start();
            continue;
        }
        let args = split(inside).into_iter().map(argument).collect::<Result<_, _>>();
        return Ok(Signature { name: word.to_owned(), args: args.map_err(|why| format!("`{word}`: {why}"))? });
    }
}

fn argument(text: &str) -> Result<Argument, String> {
    let spaced = text.replace('*', " * ");
    let words: Vec<&str> = spaced.split_whitespace().filter(|word| !matches!(*word, "__restrict__" | "__restrict")).collect();
    let expected = || format!("argument `{}` is none of the types that a kernel takes", text.trim());
    let (name, types) = words.split_last().ok_or_else(expected)?;
    let argument = |kind, writes, element| Argument { name: (*name).to_owned(), kind, writes, element };
    if !name.chars().all(is_word) {
        return Err(expected());
    }
    let element = |word: &&str| ELEMENTS.into_iter().find(|element| element == word);
    let value = |kind| Ok(argument(kind, false, None));
    match types {
        [to, "*"] if element(to).is_some() => Ok(argument("Pointer", true, element(to))),
        ["const", to, "*"] | [to, "const", "*"] if element(to).is_some() => Ok(argument("Pointer", false, element(to))),
        ["const", "__grid_constant__", "TensorMap"] => value("TensorMap"),
        ["const", "__grid_constant__", "Share"] => value("Share"),
        ["const", "__grid_constant__", "Widen"] => value("Widen"),
        ["u32"] | ["const", "u32"] => value("U32"),
        ["i32"] | ["const", "i32"] => value("I32"),
        ["u64"] | ["const", "u64"] => value("U64"),
        ["i64"] | ["const", "i64"] => value("I64"),
        ["float"] | ["const", "float"] => value("F32"),
        _ => Err(expected()),
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// What stands in the parentheses at the start, and what follows them.
fn parentheses(text: &str) -> Option<(&str, &str)> {
    let mut depth = 0;
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' if depth == 1 => return Some((&text[1..at], &text[at + 1..])),
            ')' => depth -= 1,
            _ if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// Parts between commas; none of an empty list.
fn split(text: &str) -> Vec<&str> {
    if text.trim().is_empty() { Vec::new() } else { text.split(',').collect() }
}

/// The text with comments as spaces; lines stay lines.
fn without_comments(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find('/') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let length = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else {
            out.push('/');
            rest = &rest[1..];
            continue;
        };
        out.extend(rest[..length].chars().map(|c| if c == '\n' { c } else { ' ' }));
        rest = &rest[length..];
    }
    out.push_str(rest);
    out
}
