//! Known GPUs: the sizes that decide what fits, and the rates that decide how fast it runs.

use nibble_tensor::cuda::{ComputeCapability, DeviceInfo};

/// What a process takes beside its tensors: the driver's context, kernels, cuBLASLt with its workspace.
pub const RESERVED: usize = 640 << 20;

/// A GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    /// The maker's name, without the maker.
    pub name: &'static str,
    /// Memory in MiB, as the driver reports it.
    pub mib: usize,
    /// Compute capability, major and minor.
    pub capability: (u8, u8),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Peak of dense bf16 (f16 before Ampere) products with sums in f32, in TFLOP/s.
    pub tflops: f64,
    /// Peak of the memory, in GB/s.
    pub bandwidth: f64,
    /// Peak of the link to the host, one way, in GB/s: the card's own PCI Express, which a slot may not have.
    pub link: f64,
}

const fn gpu(
    name: &'static str,
    mib: usize,
    capability: (u8, u8),
    multiprocessors: usize,
    [tflops, bandwidth, link]: [f64; 3],
) -> Gpu {
    Gpu { name, mib, capability, multiprocessors, tflops, bandwidth, link }
}

// PCI Express by its generation, with 16 lanes, and with 8.
const GEN3: f64 = 15.75;
const GEN4: f64 = 31.5;
const GEN4_X8: f64 = 15.75;
const GEN5: f64 = 63.0;
const GEN5_X8: f64 = 31.5;
/// NVLink between the chips of one module.
const C2C: f64 = 450.0;

/// Figures of NVIDIA's data sheets and architecture papers (Turing, GA102, Ada, Blackwell; A100, H100, H200, B200), without
/// sparsity; GeForce cards at their half rate for sums in f32.
pub const GPUS: [Gpu; 33] = [
    gpu("T4", 15_360, (7, 5), 40, [65.0, 320.0, GEN3]),
    gpu("RTX 2080 Ti", 11_264, (7, 5), 68, [53.8, 616.0, GEN3]),
    gpu("RTX 3060", 12_288, (8, 6), 28, [25.6, 360.0, GEN4]),
    gpu("RTX 3070", 8192, (8, 6), 46, [40.6, 448.0, GEN4]),
    gpu("RTX 3080", 10_240, (8, 6), 68, [59.5, 760.0, GEN4]),
    gpu("RTX 3090", 24_576, (8, 6), 82, [71.0, 936.0, GEN4]),
    gpu("RTX A4000", 16_376, (8, 6), 48, [76.7, 448.0, GEN4]),
    gpu("RTX A6000", 49_140, (8, 6), 84, [154.8, 768.0, GEN4]),
    gpu("A10", 24_576, (8, 6), 72, [125.0, 600.0, GEN4]),
    gpu("A10G", 24_576, (8, 6), 80, [70.0, 600.0, GEN4]),
    gpu("A100 40GB", 40_960, (8, 0), 108, [312.0, 1555.0, GEN4]),
    gpu("A100 80GB", 81_920, (8, 0), 108, [312.0, 2039.0, GEN4]),
    gpu("RTX 4060", 8188, (8, 9), 24, [30.2, 272.0, GEN4_X8]),
    gpu("RTX 4060 Ti", 16_380, (8, 9), 34, [44.1, 288.0, GEN4_X8]),
    gpu("RTX 4070", 12_282, (8, 9), 46, [58.3, 504.0, GEN4]),
    gpu("RTX 4070 Ti Super", 16_376, (8, 9), 66, [88.2, 672.0, GEN4]),
    gpu("RTX 4080", 16_376, (8, 9), 76, [97.5, 716.8, GEN4]),
    gpu("RTX 4090", 24_564, (8, 9), 128, [165.2, 1008.0, GEN4]),
    gpu("RTX 6000 Ada", 49_140, (8, 9), 142, [364.2, 960.0, GEN4]),
    gpu("L4", 23_034, (8, 9), 58, [121.0, 300.0, GEN4]),
    gpu("L40S", 46_068, (8, 9), 142, [362.0, 864.0, GEN4]),
    gpu("H100 PCIe", 81_559, (9, 0), 114, [756.0, 2000.0, GEN5]),
    gpu("H100", 81_559, (9, 0), 132, [989.0, 3350.0, GEN5]),
    gpu("GH200", 97_871, (9, 0), 132, [989.0, 4000.0, C2C]),
    gpu("H200", 143_771, (9, 0), 132, [989.0, 4800.0, GEN5]),
    gpu("B200", 183_359, (10, 0), 148, [2250.0, 8000.0, GEN5]),
    gpu("RTX 5060", 8151, (12, 0), 30, [38.4, 448.0, GEN5_X8]),
    gpu("RTX 5060 Ti", 16_311, (12, 0), 36, [47.4, 448.0, GEN5_X8]),
    gpu("RTX 5070", 12_227, (12, 0), 48, [61.7, 672.0, GEN5]),
    gpu("RTX 5070 Ti", 16_303, (12, 0), 70, [87.9, 896.0, GEN5]),
    gpu("RTX 5080", 16_303, (12, 0), 84, [112.6, 960.0, GEN5]),
    gpu("RTX 5090", 32_607, (12, 0), 170, [209.5, 1792.0, GEN5]),
    gpu("RTX PRO 6000", 97_887, (12, 0), 188, [503.8, 1792.0, GEN5]),
];

impl Gpu {
    /// Bytes of memory.
    #[must_use]
    pub const fn memory(&self) -> usize {
        self.mib << 20
    }

    /// As a device of which `memory` bytes are for tensors.
    #[must_use]
    pub fn device(&self, memory: usize) -> DeviceInfo {
        let (major, minor) = self.capability;
        DeviceInfo {
            ordinal: 0,
            name: self.name.to_owned(),
            capability: ComputeCapability { major, minor },
            memory,
            multiprocessors: self.multiprocessors,
            driver: 12_000,
        }
    }

    /// A device of this machine, with the rates of the table if it is in it.
    #[must_use]
    pub fn of_device(info: &DeviceInfo) -> Self {
        let known = find_gpu(&info.name).copied().unwrap_or_else(|| Self::of_memory(info.memory));
        let capability = (info.capability.major, info.capability.minor);
        Self { mib: info.memory >> 20, capability, multiprocessors: info.multiprocessors, ..known }
    }

    /// A GPU of which only the memory is known, taken for a consumer's card of the Ada generation.
    #[must_use]
    pub fn of_memory(bytes: usize) -> Self {
        gpu("GPU", bytes >> 20, (8, 9), 76, [0.0; 3])
    }
}

/// The GPU of that name: spelt as the maker does or nearly so (`rtx4090`, `NVIDIA GeForce RTX 4090`, `h100-80gb-hbm3`).
#[must_use]
pub fn find_gpu(name: &str) -> Option<&'static Gpu> {
    let joined = words(name).concat();
    let exact = GPUS.iter().find(|gpu| words(gpu.name).concat() == joined);
    // A driver's name says more than the table's.
    let given = words(name);
    let inside = |gpu: &&Gpu| words(gpu.name).iter().all(|word| given.contains(word));
    let driver = || GPUS.iter().filter(inside).max_by_key(|gpu| words(gpu.name).len());
    // And people say less: `4090`, `a100`.
    let part = |gpu: &&Gpu| !given.is_empty() && given.iter().all(|word| words(gpu.name).contains(word));
    exact.or_else(driver).or_else(|| GPUS.iter().filter(part).min_by_key(|gpu| words(gpu.name).len()))
}

/// The name in the table that is most like `name`.
#[must_use]
pub fn nearest_gpu(name: &str) -> &'static str {
    let name = words(name).concat();
    let differs = |gpu: &&Gpu| differing(&words(gpu.name).concat(), &name);
    GPUS.iter().min_by_key(differs).map_or("", |gpu| gpu.name)
}

/// Characters of two names that are not in what they begin or end with alike: 2 after one misspelt letter.
fn differing(a: &str, b: &str) -> usize {
    let [a, b] = [a, b].map(|name| name.chars().collect::<Vec<_>>());
    let alike = |pairs: &mut dyn Iterator<Item = (&char, &char)>| pairs.take_while(|(x, y)| x == y).count();
    let head = alike(&mut a.iter().zip(&b));
    let tail = alike(&mut a[head..].iter().rev().zip(b[head..].iter().rev()));
    a.len() + b.len() - 2 * (head + tail)
}

/// Its words of letters and digits, small, without the maker's name and family.
fn words(name: &str) -> Vec<String> {
    let name = name.to_lowercase();
    let words = name.split(|c: char| !c.is_alphanumeric());
    words.filter(|word| !matches!(*word, "" | "nvidia" | "geforce" | "tesla" | "quadro")).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_as_drivers_and_people_spell_them() {
        for (name, found) in [
            ("rtx4090", "RTX 4090"),
            ("NVIDIA GeForce RTX 4090", "RTX 4090"),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090"),
            ("rtx-4060-ti", "RTX 4060 Ti"),
            ("NVIDIA H100 80GB HBM3", "H100"),
            ("NVIDIA H100 PCIe", "H100 PCIe"),
            ("h200", "H200"),
            ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
            ("a100-40gb", "A100 40GB"),
            ("Tesla T4", "T4"),
            ("A10G", "A10G"),
            ("4090", "RTX 4090"),
            ("a100", "A100 40GB"),
        ] {
            assert_eq!(find_gpu(name).map(|gpu| gpu.name), Some(found), "{name}");
        }
        assert_eq!(find_gpu("rtx 4091"), None);
        for (name, nearest) in
            [("rtx 4091", "RTX 4090"), ("rtz 4090", "RTX 4090"), ("h10", "H100"), ("B2000", "B200"), ("gl40s", "L40S")]
        {
            assert_eq!(nearest_gpu(name), nearest, "{name}");
        }
    }

    #[test]
    fn every_gpu_is_found_by_its_own_name_alone() {
        for gpu in &GPUS {
            assert_eq!(find_gpu(gpu.name), Some(gpu));
        }
    }
}
