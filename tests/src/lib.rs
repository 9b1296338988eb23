//! What nibble's whole-system tests share: reference files of the peer stack, and how results are compared with them.

#![forbid(unsafe_code)]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use nibble_tensor::{
    Arena, Device,
    cuda::{
        CudaDevice, OpenOptions,
        libraries::{self, SearchPaths},
    },
};
use nibble_testkit::{golden_folder, gpu_library_folders};
use safetensors::{Dtype, SafeTensors};

/// A folder of reference results: the project's own copy when it has one, else that of `NIBBLE_GOLDEN`. A copy of the tests on
/// another machine is told its folder by `CARGO_MANIFEST_DIR`, as by cargo.
///
/// `None` when there is no copy and the environment names no folder.
///
/// # Panics
/// When the environment names one, and it is missing there.
#[must_use]
pub fn golden(name: &str) -> Option<PathBuf> {
    let root = std::env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
    let full = golden_folder();
    // Those in f64 are copies alone: there is one for each that differs.
    let required = full.is_some() && !name.starts_with("float64/");
    let found = [Some(root.join("data")), full].into_iter().flatten().map(|dir| dir.join(name)).find(|dir| dir.exists());
    assert!(found.is_some() || !required, "the reference results `{name}` are missing");
    found
}

/// The real model (SmolLM2-135M-Instruct as GGUF) in the user's cache.
///
/// `None` when it is not there; with `REQUIRE_REAL_MODEL=1` in the environment that is a failure.
///
/// # Panics
/// When the model is required and missing.
#[must_use]
pub fn real_model() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let found = cache.map(|dir| dir.join("nibble/SmolLM2-135M-Instruct.Q4_1.gguf")).filter(|file| file.exists());
    assert!(found.is_some() || std::env::var_os("REQUIRE_REAL_MODEL").is_none(), "the real model is missing from the cache");
    found
}

/// Memory of the device that the tests run on: the CPU, or with `NIBBLE_TEST_DEVICE=cuda` the first GPU.
///
/// # Panics
/// When a GPU is asked for and cannot be used.
#[must_use]
pub fn arena() -> Arena {
    let Some(folders) = gpu_library_folders() else { return Arena::new(Device::Cpu) };
    let libraries = libraries::find(&SearchPaths { folders, ..SearchPaths::of_system() });
    let device = CudaDevice::open(0, &OpenOptions { libraries, cache: None }).expect("a GPU");
    Arena::on(Device::Cuda(device), usize::MAX).expect("its memory")
}

/// The tensors of a safetensors file, in memory.
#[derive(Debug, Default)]
pub struct Tensors(BTreeMap<String, (Vec<usize>, Values)>);

#[derive(Debug)]
enum Values {
    Float(Vec<f32>),
    Int(Vec<i64>),
}

impl Tensors {
    /// Reads a file.
    ///
    /// # Panics
    /// When it is not there or malformed: a reference file is part of the test.
    #[must_use]
    pub fn read(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let entries = file.tensors().into_iter().map(|(name, view)| {
            let data = view.data();
            let values = match view.dtype() {
                Dtype::F32 => Values::Float(data.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()),
                Dtype::I64 => Values::Int(data.as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b)).collect()),
                other => panic!("{}: `{name}` is {other:?}", path.display()),
            };
            (name, (view.shape().to_vec(), values))
        });
        Self(entries.collect())
    }

    /// The names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Whether there is such a tensor.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Sizes.
    ///
    /// # Panics
    /// When there is no such tensor.
    #[must_use]
    pub fn shape(&self, name: &str) -> &[usize] {
        &self.0[name].0
    }

    /// Values of an f32 tensor.
    ///
    /// # Panics
    /// When there is no such tensor, or it holds integers.
    #[must_use]
    pub fn floats(&self, name: &str) -> &[f32] {
        match self.0.get(name) {
            Some((_, Values::Float(values))) => values,
            _ => panic!("no float tensor `{name}`"),
        }
    }

    /// Values of an i64 tensor.
    ///
    /// # Panics
    /// When there is no such tensor, or it holds floats.
    #[must_use]
    pub fn ints(&self, name: &str) -> &[i64] {
        match self.0.get(name) {
            Some((_, Values::Int(values))) => values,
            _ => panic!("no integer tensor `{name}`"),
        }
    }
}

/// A padded batch of the reference stack as a stream of documents without padding.
#[derive(Debug, Default)]
pub struct Unpadded {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Shifted: the target of each position, -100 for none.
    pub labels: Vec<i32>,
    /// `[0, ..., T]`.
    pub cu_seqlens: Vec<u32>,
    /// For each token of the stream, its place in the padded batch, row by row.
    pub places: Vec<usize>,
}

impl Unpadded {
    /// From `input_ids`, `attention_mask` and `labels` [B, S], named with `suffix`.
    #[must_use]
    pub fn new(tensors: &Tensors, suffix: &str) -> Self {
        let get = |name: &str| tensors.ints(&format!("{name}{suffix}"));
        let (ids, mask, labels) = (get("input_ids"), get("attention_mask"), get("labels"));
        let width = tensors.shape(&format!("input_ids{suffix}"))[1];
        let mut stream = Self { cu_seqlens: vec![0], ..Self::default() };
        for row in 0..ids.len() / width {
            let places: Vec<usize> = (row * width..(row + 1) * width).filter(|&at| mask[at] != 0).collect();
            for (i, &at) in places.iter().enumerate() {
                stream.tokens.push(u32::try_from(ids[at]).expect("a token id"));
                stream.labels.push(places.get(i + 1).map_or(-100, |&next| i32::try_from(labels[next]).expect("a label")));
            }
            stream.places.extend(places);
            stream.cu_seqlens.push(u32::try_from(stream.tokens.len()).expect("a length"));
        }
        stream
    }

    /// Labelled tokens.
    #[must_use]
    pub fn label_count(&self) -> usize {
        self.labels.iter().filter(|&&label| label != -100).count()
    }
}

/// ‖a - b‖ / ‖b‖ in f64; 0 when both are zero.
///
/// # Panics
/// When the lengths differ.
#[must_use]
pub fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len(), "lengths differ");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    let reference = norm(&mut b.iter().map(|&b| f64::from(b)));
    if difference == 0.0 { 0.0 } else { difference / reference }
}

/// ⟨a, b⟩ / (‖a‖ ‖b‖) in f64.
#[must_use]
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
