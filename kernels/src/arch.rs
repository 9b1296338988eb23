//! Architectures of devices.

use std::fmt;

/// A device's compute capability.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ComputeCapability {
    /// The generation: 8 for Ampere and Ada, 9 for Hopper, 10 and 12 for Blackwell.
    pub major: u8,
    /// Within the generation.
    pub minor: u8,
}

impl ComputeCapability {
    /// Hopper: what modules with `_sm90` in their names are for.
    pub const HOPPER: Self = Self::new(9, 0);

    /// What images are built for.
    pub const BUILT: [Self; 7] =
        [Self::new(7, 5), Self::new(8, 0), Self::new(8, 6), Self::new(8, 9), Self::new(9, 0), Self::new(10, 0), Self::new(12, 0)];

    /// Capability `major.minor`.
    #[must_use]
    pub const fn new(major: u8, minor: u8) -> Self {
        Self { major, minor }
    }

    /// The compiler's name of the target, such as `sm_86` or `sm_90a`. From Hopper on it is the target with all of the device's
    /// instructions (the `a`).
    #[must_use]
    pub fn arch_name(self) -> String {
        format!("sm_{}{}{}", self.major, self.minor, if self.is_exact() { "a" } else { "" })
    }

    /// Whether images for it run on it alone: those for `sm_90a` and later targets with an `a`.
    #[must_use]
    pub const fn is_exact(self) -> bool {
        self.major >= 9
    }

    /// Whether an image for `self` runs on `device`: the same generation, and no newer within it.
    #[must_use]
    pub fn runs_on(self, device: Self) -> bool {
        self == device || (!self.is_exact() && self.major == device.major && self.minor <= device.minor)
    }
}

impl fmt::Display for ComputeCapability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_run_on_later_devices_of_the_generation_unless_the_target_is_exact() {
        let new = ComputeCapability::new;
        assert!(new(8, 6).runs_on(new(8, 6)) && new(8, 6).runs_on(new(8, 9)) && new(8, 0).runs_on(new(8, 7)));
        assert!(!new(8, 6).runs_on(new(8, 0)) && !new(8, 0).runs_on(new(9, 0)) && !new(7, 5).runs_on(new(8, 0)));
        assert!(new(9, 0).runs_on(new(9, 0)) && !new(10, 0).runs_on(new(10, 3)) && !new(12, 0).runs_on(new(12, 1)));
    }

    #[test]
    fn targets_are_named_as_the_compiler_names_them() {
        let names = ComputeCapability::BUILT.map(ComputeCapability::arch_name);
        assert_eq!(names, ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120a"]);
    }
}
