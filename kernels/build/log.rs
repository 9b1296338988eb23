//! What the compiler says of each kernel: that it is in the image, and what it spills of its registers.

use std::collections::{BTreeMap, BTreeSet};

/// A line `// spills: KERNEL BYTES WHY` in a source: the most that the kernel may spill, on any architecture.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Declared {
    pub(crate) kernel: String,
    pub(crate) bytes: usize,
}

impl Declared {
    /// Those of a source.
    pub(crate) fn read(source: &str) -> Result<Vec<Self>, String> {
        let lines = source.lines().filter_map(|line| line.trim_start().strip_prefix("// spills:"));
        lines
            .map(|line| {
                let mut words = line.split_whitespace();
                let (kernel, bytes) = (words.next(), words.next().and_then(|bytes| bytes.parse().ok()));
                match (kernel, bytes, words.next()) {
                    (Some(kernel), Some(bytes), Some(_)) => Ok(Self { kernel: kernel.to_owned(), bytes }),
                    _ => Err(format!("expected `// spills: KERNEL BYTES WHY`, found `// spills:{line}`")),
                }
            })
            .collect()
    }
}

/// What the log of `ptxas -v` says of an image.
#[derive(Debug, Default)]
pub(crate) struct Log {
    /// Its kernels.
    pub(crate) kernels: BTreeSet<String>,
    /// Bytes that each function spills (stores or loads, the larger): kernels, and functions that are not inlined.
    pub(crate) spills: BTreeMap<String, usize>,
}

impl Log {
    pub(crate) fn read(log: &str) -> Self {
        let mut found = Self::default();
        let mut function = "";
        for line in log.lines() {
            if let Some((_, rest)) = line.split_once("Compiling entry function '") {
                found.kernels.insert(rest.split('\'').next().unwrap_or_default().to_owned());
            } else if let Some((_, name)) = line.split_once("Function properties for ") {
                function = name.trim();
            } else if line.contains("bytes spill stores") {
                let bytes = |of: &str| {
                    let before = line.split(of).next().unwrap_or_default();
                    before.split([',', ' ']).rfind(|word| !word.is_empty()).and_then(|word| word.parse().ok()).unwrap_or(0)
                };
                let most = bytes(" bytes spill stores").max(bytes(" bytes spill loads"));
                found.spills.insert(function.to_owned(), most);
            }
        }
        found
    }
}
