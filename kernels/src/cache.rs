//! Images compiled on this machine, kept for the next run.

use std::{fs, io::Write as _, path::Path};

use crate::{
    arch::ComputeCapability,
    error::{Result, Version},
    hash::Hash,
    nvrtc::options,
    table::{Module, compile, opened},
};

/// Bytes of the hash that a file ends in, by which a damaged one is told.
const TRAILER: usize = 16;

/// The image of a module for a device: from `folder` if it was compiled before, else compiled as by [`compile`] and written
/// there. A file's name says what it was compiled from (source, headers, options, compiler); a file that is damaged is
/// replaced, and a folder that cannot be written only costs the time to compile again.
///
/// # Errors
/// Those of [`compile`].
pub fn cached(folder: &Path, nvrtc: &Path, module: &str, device: ComputeCapability) -> Result<Vec<u8>> {
    let found = Module::find(module, device)?;
    let key = key(found, device, opened(nvrtc)?.version());
    let path = folder.join(format!("{module}-{}-{key}.cubin", device.arch_name()));
    if let Some(image) = fs::read(&path).ok().and_then(checked) {
        return Ok(image);
    }
    let image = compile(nvrtc, module, device)?;
    // A failure leaves no file: the image is compiled again the next time.
    let _ = write(&path, &image);
    Ok(image)
}

fn key(module: &Module, device: ComputeCapability, version: Version) -> String {
    let mut hash = Hash::new().add(version.to_string().as_bytes()).add(module.source.as_bytes());
    for header in module.headers {
        hash = hash.add(header.name.as_bytes()).add(header.source.as_bytes());
    }
    for option in options(device) {
        hash = hash.add(option.as_bytes());
    }
    hash.name()
}

/// The image in a file's bytes, if they are whole.
fn checked(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let length = bytes.len().checked_sub(TRAILER)?;
    if bytes[length..] != Hash::new().add(&bytes[..length]).bytes() {
        return None;
    }
    bytes.truncate(length);
    Some(bytes)
}

/// Written beside, then renamed: another process sees the whole file or none.
fn write(path: &Path, image: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    file.write_all(image)?;
    file.write_all(&Hash::new().add(image).bytes())?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_image_is_read_and_a_damaged_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/image.cubin");
        write(&path, b"an image").unwrap();
        let bytes = fs::read(&path).unwrap();
        assert_eq!(checked(bytes.clone()), Some(b"an image".to_vec()));
        assert_eq!(checked(bytes[..bytes.len() - 1].to_vec()), None);
        let mut wrong = bytes;
        wrong[0] ^= 1;
        assert_eq!(checked(wrong), None);
        assert_eq!(checked(Vec::new()), None);
    }
}
