//! The machine's memory.

use std::fs;

use serde::Serialize;

/// Memory of the machine, in bytes.
#[derive(Debug, Serialize)]
pub(crate) struct Memory {
    /// All of it.
    pub(crate) total: usize,
    /// What programs may take without swapping.
    pub(crate) available: usize,
}

impl Memory {
    /// Where the system tells it.
    pub(crate) fn look() -> Option<Self> {
        Self::read(&fs::read_to_string("/proc/meminfo").ok()?)
    }

    fn read(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            value.trim().strip_suffix("kB")?.trim().parse::<usize>().ok().map(|kib| kib * 1024)
        };
        Some(Self { total: field("MemTotal")?, available: field("MemAvailable")? })
    }
}

/// Bytes of the machine's memory that a program can have, where the system tells.
pub(crate) fn available_memory() -> Option<usize> {
    Memory::look().map(|memory| memory.available)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_bytes() {
        let memory = Memory::read("MemTotal:       16384 kB\nMemFree: 1 kB\nMemAvailable:    8192 kB\n").unwrap();
        assert_eq!((memory.total, memory.available), (16 << 20, 8 << 20));
        assert!(Memory::read("MemTotal: 1 kB\n").is_none());
    }
}
