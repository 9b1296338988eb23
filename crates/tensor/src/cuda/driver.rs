//! Calls into the driver as results that name the call.

use cudarc::driver::sys;

use crate::{Error, Result};

/// The driver's answer as a result that names `call`.
pub(super) fn check(call: &'static str, status: sys::CUresult) -> Result<()> {
    match status {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => Err(Error::DriverOutOfMemory { call }),
        failed => Err(Error::Cuda { call, reason: describe(failed) }),
    }
}

/// The driver's name and words for a status.
pub(super) fn describe(status: sys::CUresult) -> String {
    let error = cudarc::driver::DriverError(status);
    let text = |found: Result<&std::ffi::CStr, _>| found.map(|text| text.to_string_lossy().into_owned()).ok();
    match (text(error.error_name()), text(error.error_string())) {
        (Some(name), Some(words)) => format!("{words} ({name})"),
        _ => format!("{status:?}"),
    }
}

/// The attributes of a device that decide what runs on it.
pub(super) fn attribute(device: sys::CUdevice, attribute: sys::CUdevice_attribute) -> Result<i32> {
    let mut value = 0;
    // SAFETY: `value` outlives the call; `device` came from `cuDeviceGet`.
    check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&raw mut value, attribute, device) })?;
    Ok(value)
}
