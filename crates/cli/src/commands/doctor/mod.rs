//! `nibble doctor`: what there is, what is missing, and how to get it.

mod folders;
mod hub;
mod libraries;
mod machine;

use serde::Serialize;

use crate::{args::DoctorArgs, error::Result, machine::Memory, ui};

/// How a thing is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Mark {
    /// There, and used.
    Ok,
    /// To know, neither good nor bad.
    Info,
    /// Not there.
    Missing,
}

/// One thing.
#[derive(Clone, Debug, Serialize)]
struct Check {
    name: &'static str,
    mark: Mark,
    found: String,
    /// What to do about it, where there is something to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    fix: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, mark: Mark::Ok, found: found.into(), fix: None }
    }

    fn info(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, mark: Mark::Info, found: found.into(), fix: None }
    }

    fn missing(name: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { name, mark: Mark::Missing, found: found.into(), fix: Some(fix.into()) }
    }
}

/// Everything, as `--json` writes it.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    system: machine::System,
    cpu: machine::Cpu,
    memory: Option<Memory>,
    /// Devices that can be used, the one that `--device auto` takes first.
    devices: Vec<&'static str>,
    cuda: libraries::Cuda,
    caches: Vec<folders::Cache>,
    hub: hub::Hub,
    python: hub::Python,
    checks: Vec<Check>,
}

/// Looks at the machine and writes what it found.
///
/// # Errors
/// When standard output cannot be written.
pub(crate) fn run(args: &DoctorArgs) -> Result<()> {
    let report = report();
    if args.json {
        return ui::line(serde_json::to_string_pretty(&report).unwrap_or_default());
    }
    ui::line(format_args!("nibble {} on {} {}", report.version, report.system.name, report.system.arch))?;
    for check in &report.checks {
        let mark = match check.mark {
            Mark::Ok => "ok",
            Mark::Info => "-",
            Mark::Missing => "missing",
        };
        ui::line(format_args!("{mark:<8} {:<10} {}", check.name, check.found))?;
        if let Some(fix) = &check.fix {
            ui::line(format_args!("{:<19} fix: {fix}", ""))?;
        }
    }
    Ok(())
}

fn report() -> Report {
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        system: machine::System::look(),
        cpu: machine::Cpu::look(),
        memory: Memory::look(),
        devices: Vec::new(),
        cuda: libraries::Cuda::look(),
        caches: folders::look(),
        hub: hub::Hub::look(),
        python: hub::Python::look(),
        checks: Vec::new(),
    };
    report.checks = report.cpu.checks();
    report.checks.extend(machine::memory_check(report.memory.as_ref()));
    report.devices = if report.cuda.usable() { vec!["cuda", "cpu"] } else { vec!["cpu"] };
    report.checks.push(Check::ok("device", format!("--device auto is {}", report.devices[0])));
    report.checks.extend(report.cuda.checks());
    report.checks.extend(report.caches.iter().map(folders::Cache::check));
    report.checks.extend(report.hub.checks());
    report.checks.push(report.python.check(report.hub.reachable));
    report
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_says_how_to_get_it() {
        for check in report().checks {
            assert_eq!(check.mark == Mark::Missing, check.fix.is_some(), "{check:?}");
            assert!(!check.found.is_empty(), "{check:?}");
        }
    }
}
