//! Just enough of Rust's lexical structure to look for words in code: not in comments, texts or tests.

use std::path::{Path, PathBuf};

/// A source file, line by line.
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) lines: Vec<Line>,
}

/// A line of it.
pub(crate) struct Line {
    /// As written.
    pub(crate) text: String,
    /// Code alone: comments and the insides of literals are blank.
    pub(crate) code: String,
    /// Whether it belongs to an item under `#[cfg(test)]`.
    pub(crate) test: bool,
}

impl Source {
    pub(crate) fn new(path: &Path, text: &str) -> Self {
        let code = blank(text);
        let mut lines: Vec<Line> = text
            .lines()
            .zip(code.lines())
            .map(|(text, code)| Line { text: text.to_owned(), code: code.to_owned(), test: false })
            .collect();
        mark_tests(&mut lines);
        Self { path: path.to_owned(), lines }
    }

    /// Lines that are no tests, with their numbers.
    pub(crate) fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.lines.iter().enumerate().filter(|(_, line)| !line.test);
        lines.map(|(i, line)| (i + 1, &line.code[..]))
    }

    /// Modules declared under `#[cfg(test)]` in files of their own.
    pub(crate) fn test_modules(&self) -> Vec<PathBuf> {
        let folder = self.path.parent().unwrap_or(Path::new(""));
        let stem = self.path.file_stem().unwrap_or_default().to_string_lossy();
        let folder = if matches!(&*stem, "mod" | "lib" | "main") { folder.to_owned() } else { folder.join(&*stem) };
        let names = self.lines.iter().filter(|line| line.test).filter_map(|line| {
            let words: Vec<_> = line.code.split_whitespace().collect();
            let at = words.iter().position(|word| *word == "mod")?;
            words.get(at + 1)?.strip_suffix(';').map(str::to_owned)
        });
        names.flat_map(|name| [folder.join(format!("{name}.rs")), folder.join(name)]).collect()
    }

    /// The comment that the file begins with.
    pub(crate) fn first_comment(&self) -> String {
        let comment = |line: &&Line| line.text.trim_start().starts_with("//");
        self.lines.iter().take_while(comment).map(|line| &line.text[..]).collect::<Vec<_>>().join("\n")
    }
}

/// Whether `word` stands in `code` with no letter, digit or underscore directly before or after it.
pub(crate) fn has_word(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word).any(|(at, _)| {
        let before = code[..at].chars().next_back().is_some_and(part);
        let after = word.ends_with(part) && code[at + word.len()..].chars().next().is_some_and(part);
        !before && !after
    })
}

/// The text with comments and the insides of literals as spaces; lines stay lines.
fn blank(text: &str) -> String {
    let bytes: Vec<char> = text.chars().collect();
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    while i < bytes.len() {
        let length = token(&bytes[i..]);
        let code = length == 1 && !matches!(bytes[i], '"');
        for &c in &bytes[i..i + length] {
            out.push(if c == '\n' || code { c } else { ' ' });
        }
        i += length;
        // A word is copied whole, so that the `r` or `b` at its end begins no literal.
        if code && is_word(bytes[i - 1]) {
            while i < bytes.len() && is_word(bytes[i]) {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The length of the comment or literal at the start, or 1.
fn token(rest: &[char]) -> usize {
    let end = |found: Option<usize>| found.unwrap_or(rest.len());
    match rest {
        ['/', '/', ..] => end(rest.iter().position(|&c| c == '\n')),
        ['/', '*', ..] => block_comment(rest),
        ['"', ..] => string(rest, 1),
        ['b' | 'c', '"', ..] => string(rest, 2),
        ['b' | 'c', 'r', '"' | '#', ..] => raw_string(rest, 2).unwrap_or(1),
        ['r', '"' | '#', ..] => raw_string(rest, 1).unwrap_or(1),
        ['\'', '\\', ..] => 3 + end(rest[3.min(rest.len())..].iter().position(|&c| c == '\'')) + 1,
        ['\'', _, '\'', ..] => 3,
        _ => 1,
    }
    .min(rest.len())
}

fn block_comment(rest: &[char]) -> usize {
    let (mut depth, mut i) = (0, 0);
    while i + 1 < rest.len() {
        match (rest[i], rest[i + 1]) {
            ('/', '*') => (depth, i) = (depth + 1, i + 2),
            ('*', '/') => (depth, i) = (depth - 1, i + 2),
            _ => i += 1,
        }
        if depth == 0 {
            return i;
        }
    }
    rest.len()
}

fn string(rest: &[char], start: usize) -> usize {
    let mut i = start;
    while i < rest.len() && rest[i] != '"' {
        i += if rest[i] == '\\' { 2 } else { 1 };
    }
    i + 1
}

fn raw_string(rest: &[char], start: usize) -> Option<usize> {
    let hashes = rest[start..].iter().take_while(|&&c| c == '#').count();
    let open = start + hashes;
    if rest.get(open) != Some(&'"') {
        return None;
    }
    let closes = |i: &usize| rest[*i] == '"' && rest[i + 1..].iter().take(hashes).filter(|&&c| c == '#').count() == hashes;
    Some((open + 1..rest.len()).find(closes)? + 1 + hashes)
}

/// Marks the items that `#[cfg(test)]` stands before.
fn mark_tests(lines: &mut [Line]) {
    let mut i = 0;
    while i < lines.len() {
        if !lines[i].code.contains("#[cfg(test)]") && !lines[i].code.contains("#[cfg(all(test") {
            i += 1;
            continue;
        }
        let (mut depth, mut opened) = (0i32, false);
        while i < lines.len() {
            let start = if lines[i].code.trim_start().starts_with("#[") { lines[i].code.rfind(']').unwrap_or(0) } else { 0 };
            lines[i].test = true;
            let code = lines[i].code[start..].to_owned();
            for c in code.chars() {
                depth += i32::from(c == '{') - i32::from(c == '}');
                opened |= c == '{';
            }
            i += 1;
            if depth == 0 && (opened || code.contains(';')) {
                break;
            }
        }
    }
}

#[test]
fn words_in_comments_and_literals_are_not_code() {
    let text = "let a = \"println!\"; // dbg!\n/* eprintln! */ let r = r#\"print!\"#; let c = '\"'; println!(\"x\");\nlet l: &'a str = b\"dbg!\";\n";
    let source = Source::new(Path::new("a.rs"), text);
    let code: Vec<_> = source.code().map(|(_, code)| code).collect();
    assert_eq!(code.len(), 3);
    assert!(!code[0].contains("println") && !code[0].contains("dbg"), "{code:?}");
    assert!(has_word(code[1], "println!") && !has_word(code[1], "eprintln!") && !has_word(code[1], "print!"), "{code:?}");
    assert!(code[2].contains("&'a str") && !code[2].contains("dbg"), "{code:?}");
}

#[test]
fn items_under_cfg_test_are_tests_and_nothing_else_is() {
    let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n  fn b() { {} }\n}\nfn c() {}\n#[cfg(test)]\nmod samples;\nfn d() {}\n";
    let source = Source::new(Path::new("src/ops/mod.rs"), text);
    let code: Vec<_> = source.code().map(|(number, _)| number).collect();
    assert_eq!(code, [1, 6, 9]);
    assert_eq!(source.test_modules(), [PathBuf::from("src/ops/samples.rs"), PathBuf::from("src/ops/samples")]);
}

#[test]
fn words_are_whole() {
    assert!(has_word("std::env::var(x)", "env::"));
    assert!(!has_word("my_env::var(x)", "env::"));
    assert!(has_word("unsafe { f() }", "unsafe"));
    assert!(!has_word("allow(unsafe_code)", "unsafe"));
}
