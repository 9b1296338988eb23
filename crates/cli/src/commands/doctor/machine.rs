//! Operating system, processor, memory.

use std::fs;

use serde::Serialize;

use super::Check;
use crate::{machine::Memory, ui};

/// The operating system.
#[derive(Debug, Serialize)]
pub(super) struct System {
    pub(super) name: String,
    pub(super) kernel: Option<String>,
    pub(super) arch: &'static str,
}

impl System {
    pub(super) fn look() -> Self {
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
        Self {
            name: name.map_or_else(|| std::env::consts::OS.to_owned(), |name| name.trim_matches('"').to_owned()),
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| text.trim().to_owned()),
            arch: std::env::consts::ARCH,
        }
    }
}

/// The processor.
#[derive(Debug, Serialize)]
pub(super) struct Cpu {
    name: String,
    /// Threads that may run at once, as this process is confined.
    threads: usize,
    features: Vec<Feature>,
    /// The matmul that is chosen, for f32 and for bf16 activations.
    kernels: Kernels,
}

/// An instruction set.
#[derive(Clone, Copy, Debug, Serialize)]
struct Feature {
    name: &'static str,
    present: bool,
}

/// Instruction sets of the matmul.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Kernels {
    f32: &'static str,
    bf16: &'static str,
}

impl Cpu {
    pub(super) fn look() -> Self {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field =
            |name: &str| info.lines().find_map(|line| line.strip_prefix(name)?.split_once(':').map(|(_, value)| value.trim()));
        let name = field("model name").or_else(|| field("Model")).unwrap_or("unknown").to_owned();
        let features = features(field("flags").unwrap_or_default());
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let kernels = kernels(|name| features.iter().any(|feature| feature.name == name && feature.present));
        Self { name, threads, features, kernels }
    }

    pub(super) fn checks(&self) -> Vec<Check> {
        let features = self.features.iter().map(|f| format!("{}{}", if f.present { "" } else { "no " }, f.name));
        let features = features.collect::<Vec<_>>().join(", ");
        let Kernels { f32, bf16 } = self.kernels;
        let kernel = format!(
            "f32 on {f32}, bf16 on {bf16}; --compute-dtype auto is {} on the CPU",
            if bf16 == "avx512_bf16" { "bf16" } else { "f32" }
        );
        let kernel = if f32 == "portable" {
            Check::missing("kernel", kernel, "none for this machine: AVX2 and FMA make training 5 to 10 times as fast")
        } else {
            Check::ok("kernel", kernel)
        };
        vec![Check::ok("cpu", format!("{}, {} threads", self.name, self.threads)), Check::info("features", features), kernel]
    }
}

/// The sets that matter here. AMX is read off the system's list, the others are asked of the processor.
fn features(flags: &str) -> Vec<Feature> {
    let listed = |name: &str| flags.split_whitespace().any(|flag| flag == name);
    #[cfg(target_arch = "x86_64")]
    let detected = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512_bf16", is_x86_feature_detected!("avx512bf16")),
    ];
    #[cfg(not(target_arch = "x86_64"))]
    let detected = [("avx2", false), ("fma", false), ("avx512f", false), ("avx512_bf16", false)];
    let amx = [("amx_tile", listed("amx_tile")), ("amx_bf16", listed("amx_bf16"))];
    detected.into_iter().chain(amx).map(|(name, present)| Feature { name, present }).collect()
}

/// The choice that the matmul makes of what is there: the same order, best first.
fn kernels(has: impl Fn(&str) -> bool) -> Kernels {
    let avx2 = has("avx2") && has("fma");
    let avx512 = avx2 && has("avx512f");
    let f32 = if avx512 {
        "avx512f"
    } else if avx2 {
        "avx2"
    } else {
        "portable"
    };
    Kernels { f32, bf16: if avx512 && has("avx512_bf16") { "avx512_bf16" } else { f32 } }
}

pub(super) fn memory_check(memory: Option<&Memory>) -> Option<Check> {
    let Memory { total, available } = memory?;
    Some(Check::ok("memory", format!("{} available of {}", ui::bytes(*available), ui::bytes(*total))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_the_best_whose_instructions_are_all_there() {
        let of = |present: &[&str]| kernels(|name| present.contains(&name));
        let expect = |f32, bf16| Kernels { f32, bf16 };
        assert_eq!(of(&[]), expect("portable", "portable"));
        assert_eq!(of(&["avx2"]), expect("portable", "portable"));
        assert_eq!(of(&["avx2", "fma"]), expect("avx2", "avx2"));
        assert_eq!(of(&["avx2", "fma", "avx512f"]), expect("avx512f", "avx512f"));
        assert_eq!(of(&["avx2", "fma", "avx512f", "avx512_bf16"]), expect("avx512f", "avx512_bf16"));
        assert_eq!(of(&["avx2", "fma", "avx512_bf16"]), expect("avx2", "avx2"));
    }
}
