//! PEFT's adapter folder.

use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use nibble_autograd::ParamStore;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::{AdapterConfig, Error, Mismatch, Result};

/// What PEFT puts before a module's path.
pub const PREFIX: &str = "base_model.model.";

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// Whether `dir` is an adapter's folder.
#[must_use]
pub fn is_adapter(dir: &Path) -> bool {
    dir.join(CONFIG).is_file()
}

/// A saved adapter: its config and its tensors in f32.
#[derive(Debug)]
pub struct AdapterFile {
    path: PathBuf,
    /// `adapter_config.json`.
    pub config: AdapterConfig,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

impl AdapterFile {
    /// Reads an adapter's folder.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Json`], [`Error::Safetensors`], [`Error::DType`], [`Error::Unsupported`].
    pub fn open(dir: &Path) -> Result<Self> {
        let config = AdapterConfig::read(&dir.join(CONFIG))?;
        let path = dir.join(TENSORS);
        let bytes = std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let file = SafeTensors::deserialize(&bytes).map_err(|source| Error::Safetensors { path: path.clone(), source })?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            let values = widen(&path, &name, &view)?;
            tensors.insert(name, (view.shape().to_vec(), values));
        }
        Ok(Self { path: dir.to_path_buf(), config, tensors })
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sizes and values of a tensor.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<(&[usize], &[f32])> {
        self.tensors.get(name).map(|(shape, values)| (&shape[..], &values[..]))
    }

    /// Checks that every tensor of the file became a parameter.
    ///
    /// # Errors
    /// [`Error::Mismatches`] with all that did not.
    pub fn expect_all_used(&self, params: &ParamStore) -> Result<()> {
        let used = |name: &str| params.params().iter().any(|param| &*param.name == name);
        let mismatches: Vec<_> =
            self.tensors.keys().filter(|name| !used(name)).map(|name| Mismatch::Unexpected { name: name.clone() }).collect();
        if mismatches.is_empty() { Ok(()) } else { Err(Error::Mismatches { path: self.path.clone(), mismatches }) }
    }
}

fn widen(path: &Path, name: &str, view: &TensorView<'_>) -> Result<Vec<f32>> {
    let bytes = view.data();
    let halves = |f: fn(u16) -> f32| bytes.as_chunks::<2>().0.iter().map(|&b| f(u16::from_le_bytes(b))).collect();
    match view.dtype() {
        Dtype::F32 => Ok(bytes.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect()),
        Dtype::BF16 => Ok(halves(|bits| bf16::from_bits(bits).to_f32())),
        Dtype::F16 => Ok(halves(|bits| f16::from_bits(bits).to_f32())),
        found => Err(Error::DType { path: path.to_path_buf(), name: name.to_owned(), found: format!("{found:?}") }),
    }
}

/// Writes `adapter_config.json` and `adapter_model.safetensors` (f32, as PEFT does by default) into `dir`, each beside its
/// place first and then renamed, the config last: a folder that has a config has its tensors.
///
/// # Errors
/// [`Error::Io`], [`Error::Safetensors`].
pub fn save_adapter(dir: &Path, config: &AdapterConfig, params: &ParamStore) -> Result<()> {
    let io = |path: &Path, source| Error::Io { path: path.to_path_buf(), source };
    std::fs::create_dir_all(dir).map_err(|source| io(dir, source))?;
    let path = dir.join(TENSORS);
    let invalid = |source| Error::Safetensors { path: path.clone(), source };
    let flat = params.values()?;
    let mut views = Vec::with_capacity(params.params().len());
    for param in params.params() {
        let values = &flat[param.offset..param.offset + param.shape.numel()];
        let view = TensorView::new(Dtype::F32, param.shape.dims().to_vec(), bytemuck::cast_slice(values)).map_err(invalid)?;
        views.push((param.name.to_string(), view));
    }
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(invalid)?;
    write(&path, &bytes)?;
    write(&dir.join(CONFIG), config.to_json().as_bytes())
}

/// Writes beside `path`, then renames.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let io = |source| Error::Io { path: path.to_path_buf(), source };
    let mut file = tempfile::NamedTempFile::new_in(path.parent().unwrap_or(Path::new("."))).map_err(io)?;
    std::io::Write::write_all(&mut file, bytes).map_err(io)?;
    let file = file.persist(path).map_err(|error| io(error.error))?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        // A temporary file is private to its owner; what is written here is to be shared.
        file.set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(io)?;
    }
    file.sync_all().map_err(io)
}
