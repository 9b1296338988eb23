//! What the compiler says of each kernel: that it is in the image, and the registers that it spills.

use std::collections::BTreeMap;

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

/// Bytes that each kernel of an image spills (stores and loads, the larger), by the log of `ptxas -v`.
pub(crate) fn spills(log: &str) -> BTreeMap<String, usize> {
    let mut found = BTreeMap::new();
    let mut kernel = None;
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let name = rest.split('\'').next().unwrap_or_default();
            found.entry(name.to_owned()).or_insert(0);
        } else if let Some((_, name)) = line.split_once("Function properties for ") {
            kernel = Some(name.trim().to_owned());
        } else if let (Some(name), true) = (&kernel, line.contains("bytes spill stores")) {
            let bytes = |of: &str| {
                let before = line.split(of).next().unwrap_or_default();
                before.split([',', ' ']).rfind(|word| !word.is_empty()).and_then(|word| word.parse().ok()).unwrap_or(0)
            };
            let most = bytes(" bytes spill stores").max(bytes(" bytes spill loads"));
            found.entry(name.clone()).and_modify(|spilled: &mut usize| *spilled = (*spilled).max(most)).or_insert(most);
        }
    }
    found
}
