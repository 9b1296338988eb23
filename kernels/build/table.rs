//! Writes the Rust text that the library includes.

use std::{fmt::Write as _, fs, io, path::Path};

use crate::{images::Image, sources::Module};

/// Writes `table.rs` into the folder of build outputs.
pub(crate) fn write(out: &Path, modules: &[Module], images: &[Image]) -> io::Result<()> {
    let text = text(modules, images).map_err(io::Error::other)?;
    fs::write(out.join("table.rs"), text)
}

fn text(modules: &[Module], images: &[Image]) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(out, "static MODULES: &[Module] = &[")?;
    for module in modules {
        let (name, hopper_only) = (&module.name, module.hopper_only());
        writeln!(out, "    Module {{ name: {name:?}, hopper_only: {hopper_only}, source: {:?}, headers: &[", module.source)?;
        for (name, source) in &module.headers {
            writeln!(out, "        Header {{ name: {name:?}, source: {source:?} }},")?;
        }
        writeln!(out, "    ] }},")?;
    }
    writeln!(out, "];\nstatic KERNELS: &[Kernel] = &[")?;
    let mut kernels: Vec<_> =
        modules.iter().flat_map(|module| module.kernels.iter().map(move |kernel| (&kernel.name, &module.name, kernel))).collect();
    kernels.sort_by_key(|(name, module, _)| (*name, *module));
    for (name, module, kernel) in kernels {
        writeln!(out, "    Kernel {{ name: {name:?}, module: {module:?}, args: &[")?;
        for arg in &kernel.args {
            let (name, kind, writes, element) = (&arg.name, arg.kind, arg.writes, &arg.element);
            writeln!(out, "        Arg {{ name: {name:?}, kind: ArgKind::{kind}, writes: {writes}, element: {element:?} }},")?;
        }
        writeln!(out, "    ] }},")?;
    }
    writeln!(out, "];\nstatic IMAGES: &[Image] = &[")?;
    for Image { module, device, path, size } in images {
        let device = format!("ComputeCapability::new({}, {})", device.major, device.minor);
        let path = path.to_string_lossy();
        writeln!(out, "    Image {{ module: {module:?}, device: {device}, size: {size}, packed: include_bytes!({path:?}) }},")?;
    }
    writeln!(out, "];")?;
    Ok(out)
}
