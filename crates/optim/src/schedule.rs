//! Learning-rate schedules, as the reference stack's `lr_scheduler_type` names and computes them.

use std::{f64::consts::PI, str::FromStr};

use crate::{Error, Result, names};

/// A schedule by its Hugging Face name. With s the step from 0, W the warm-up, T the total and p = (s − W) / (T − W), the
/// factor is s / W below W (so step 0 has rate 0 when there is a warm-up), and from W on:
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ScheduleName {
    /// `constant`: 1, without warm-up.
    Constant,
    /// `constant_with_warmup`: 1.
    ConstantWithWarmup,
    /// `linear`: max(0, 1 − p).
    Linear,
    /// `cosine`: max(0, ½ (1 + cos(2π c p))), c = `num_cycles` (½).
    Cosine,
    /// `cosine_with_restarts`: ½ (1 + cos(π (c p mod 1))), 0 from p = 1 on, c = `num_cycles` (1).
    CosineWithRestarts,
    /// `polynomial`: ((lr − lr_end) (1 − p)^power + lr_end) / lr, `lr_end` 1e-7, `power` 1; lr_end / lr after T.
    Polynomial,
    /// `inverse_sqrt`: 1 / √((s + τ − W) / τ), τ = `timescale` (W, or 10,000 without warm-up).
    InverseSqrt,
    /// `cosine_with_min_lr`: `cosine` · (1 − r) + r, r = `min_lr_rate` or `min_lr` / lr.
    CosineWithMinLr,
}

impl ScheduleName {
    /// Every name.
    pub const ALL: [Self; 8] = [
        Self::Constant,
        Self::ConstantWithWarmup,
        Self::Linear,
        Self::Cosine,
        Self::CosineWithRestarts,
        Self::Polynomial,
        Self::InverseSqrt,
        Self::CosineWithMinLr,
    ];

    /// As it is spelt.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::ConstantWithWarmup => "constant_with_warmup",
            Self::Linear => "linear",
            Self::Cosine => "cosine",
            Self::CosineWithRestarts => "cosine_with_restarts",
            Self::Polynomial => "polynomial",
            Self::InverseSqrt => "inverse_sqrt",
            Self::CosineWithMinLr => "cosine_with_min_lr",
        }
    }

    /// The options that this schedule reads.
    const fn options(self) -> &'static [&'static str] {
        match self {
            Self::Constant | Self::ConstantWithWarmup | Self::Linear => &[],
            Self::Cosine | Self::CosineWithRestarts => &["num_cycles"],
            Self::Polynomial => &["lr_end", "power"],
            Self::InverseSqrt => &["timescale"],
            Self::CosineWithMinLr => &["num_cycles", "min_lr", "min_lr_rate"],
        }
    }
}

impl std::fmt::Display for ScheduleName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for ScheduleName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|known| known.as_str() == name).ok_or_else(|| Error::UnknownSchedule {
            name: name.to_owned(),
            nearest: names::nearest(name, &Self::ALL.map(Self::as_str)),
        })
    }
}

/// The options of schedules (`lr_scheduler_kwargs`); those that the schedule does not read must be absent.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ScheduleOptions {
    /// Waves of the cosine (½: one half-wave), or hard restarts (1).
    pub num_cycles: Option<f64>,
    /// Exponent of the polynomial (1).
    pub power: Option<f64>,
    /// Last rate of the polynomial (1e-7).
    pub lr_end: Option<f64>,
    /// Scale of the inverse root, in steps (the warm-up, or 10,000).
    pub timescale: Option<f64>,
    /// Lowest rate of `cosine_with_min_lr`.
    pub min_lr: Option<f64>,
    /// The same as a fraction of the peak.
    pub min_lr_rate: Option<f64>,
}

impl ScheduleOptions {
    fn given(&self) -> impl Iterator<Item = (&'static str, f64)> {
        let Self { num_cycles, power, lr_end, timescale, min_lr, min_lr_rate } = *self;
        [
            ("num_cycles", num_cycles),
            ("power", power),
            ("lr_end", lr_end),
            ("timescale", timescale),
            ("min_lr", min_lr),
            ("min_lr_rate", min_lr_rate),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
    }
}

/// The learning rate as a function of the optimizer's step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LrSchedule {
    name: ScheduleName,
    lr: f64,
    warmup: f64,
    total: f64,
    options: ScheduleOptions,
}

impl LrSchedule {
    /// A schedule with peak `lr`, over `total_steps` optimizer steps of which `warmup_steps` warm up.
    ///
    /// # Errors
    /// [`Error::UnusedOptions`] for options that the schedule does not read, [`Error::MinLr`] unless `cosine_with_min_lr` has
    /// exactly one floor, [`Error::Option`] for numbers out of range.
    pub fn new(name: ScheduleName, lr: f64, warmup_steps: u64, total_steps: u64, options: ScheduleOptions) -> Result<Self> {
        let schedule = Self { name, lr, warmup: warmup_steps as f64, total: total_steps as f64, options };
        schedule.check()?;
        Ok(schedule)
    }

    fn check(&self) -> Result<()> {
        let of = self.name.as_str();
        let unused: Vec<_> =
            self.options.given().map(|(name, _)| name).filter(|name| !self.name.options().contains(name)).collect();
        if !unused.is_empty() {
            return Err(Error::UnusedOptions { schedule: of, options: unused });
        }
        for (option, found) in self.options.given().chain([("learning_rate", self.lr)]) {
            crate::optimizer::expect_at_least_zero(of, option, found)?;
        }
        if let Some(found) = self.options.timescale.filter(|&timescale| timescale == 0.0) {
            return Err(Error::Option { of, option: "timescale", expected: "above 0", found });
        }
        if self.name == ScheduleName::Polynomial && self.lr_end() >= self.lr {
            return Err(Error::Option { of, option: "lr_end", expected: "below the learning rate", found: self.lr_end() });
        }
        let floors = usize::from(self.options.min_lr.is_some()) + usize::from(self.options.min_lr_rate.is_some());
        if self.name == ScheduleName::CosineWithMinLr && floors != 1 {
            return Err(Error::MinLr { found: floors });
        }
        Ok(())
    }

    /// The rate of the step after `step` finished ones (0 for the first).
    #[must_use]
    pub fn lr(&self, step: u64) -> f64 {
        self.lr * self.multiplier(step)
    }

    /// [`LrSchedule::lr`] as a factor of the peak.
    #[must_use]
    pub fn multiplier(&self, step: u64) -> f64 {
        let step = step as f64;
        if self.name == ScheduleName::Constant {
            return 1.0;
        }
        if step < self.warmup {
            return step / self.warmup;
        }
        let progress = (step - self.warmup) / (self.total - self.warmup).max(1.0);
        match self.name {
            ScheduleName::Constant | ScheduleName::ConstantWithWarmup => 1.0,
            ScheduleName::Linear => ((self.total - step) / (self.total - self.warmup).max(1.0)).max(0.0),
            ScheduleName::Cosine => self.cosine(progress),
            ScheduleName::CosineWithRestarts if progress >= 1.0 => 0.0,
            ScheduleName::CosineWithRestarts => {
                0.5 * (1.0 + (PI * (self.options.num_cycles.unwrap_or(1.0) * progress).fract()).cos())
            }
            ScheduleName::Polynomial => self.polynomial(step, progress),
            ScheduleName::InverseSqrt => self.inverse_sqrt(step),
            ScheduleName::CosineWithMinLr => {
                let floor = self.options.min_lr_rate.or(self.options.min_lr.map(|min| min / self.lr)).unwrap_or(0.0);
                self.cosine(progress) * (1.0 - floor) + floor
            }
        }
    }

    fn cosine(&self, progress: f64) -> f64 {
        (0.5 * (1.0 + (PI * self.options.num_cycles.unwrap_or(0.5) * 2.0 * progress).cos())).max(0.0)
    }

    fn lr_end(&self) -> f64 {
        self.options.lr_end.unwrap_or(1e-7)
    }

    fn polynomial(&self, step: f64, progress: f64) -> f64 {
        let end = self.lr_end();
        if step > self.total {
            return end / self.lr;
        }
        ((self.lr - end) * (1.0 - progress).powf(self.options.power.unwrap_or(1.0)) + end) / self.lr
    }

    fn inverse_sqrt(&self, step: f64) -> f64 {
        let warmup = if self.warmup > 0.0 { self.warmup } else { 10_000.0 };
        let timescale = self.options.timescale.unwrap_or(warmup);
        1.0 / ((step + timescale - self.warmup) / timescale).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use ScheduleName as S;

    use super::*;

    const NONE: ScheduleOptions =
        ScheduleOptions { num_cycles: None, power: None, lr_end: None, timescale: None, min_lr: None, min_lr_rate: None };

    /// Factors at steps 0, 1, 2 (warm-up of 2 over 10), then 4, 6, 10, 12.
    fn factors(name: ScheduleName, options: ScheduleOptions) -> [f64; 7] {
        let schedule = LrSchedule::new(name, 1e-3, 2, 10, options).unwrap();
        [0, 1, 2, 4, 6, 10, 12].map(|step| schedule.multiplier(step))
    }

    fn assert_factors(name: ScheduleName, options: ScheduleOptions, want: [f64; 7]) {
        let found = factors(name, options);
        let off = found.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off < 1e-12, "{name}: expected {want:?}, found {found:?}");
    }

    #[test]
    fn factors_are_those_computed_by_hand() {
        // cos(π/4) = √½: a quarter of the half-wave is done at step 4, half at step 6.
        let quarter = 0.5 * (1.0 + 0.5f64.sqrt());
        assert_factors(S::Constant, NONE, [1.0; 7]);
        assert_factors(S::ConstantWithWarmup, NONE, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]);
        assert_factors(S::Linear, NONE, [0.0, 0.5, 1.0, 0.75, 0.5, 0.0, 0.0]);
        // The reference does not stop at T: a cosine comes up again.
        assert_factors(S::Cosine, NONE, [0.0, 0.5, 1.0, quarter, 0.5, 0.0, 1.0 - quarter]);
        assert_factors(S::CosineWithRestarts, NONE, [0.0, 0.5, 1.0, quarter, 0.5, 0.0, 0.0]);
        assert_factors(S::Polynomial, NONE, [0.0, 0.5, 1.0, 0.75 * 0.9999 + 1e-4, 0.5 * 0.9999 + 1e-4, 1e-4, 1e-4]);
        assert_factors(S::InverseSqrt, NONE, [0.0, 0.5, 1.0, 0.5f64.sqrt(), 1.0 / 3f64.sqrt(), 0.2f64.sqrt(), 1.0 / 6f64.sqrt()]);
    }

    #[test]
    fn options_change_what_they_say() {
        let quarter = 0.5 * (1.0 + 0.5f64.sqrt());
        let cycles = |num_cycles| ScheduleOptions { num_cycles: Some(num_cycles), ..NONE };
        assert_factors(S::Cosine, cycles(1.0), [0.0, 0.5, 1.0, 0.5, 0.0, 1.0, 0.5]);
        assert_factors(S::CosineWithRestarts, cycles(2.0), [0.0, 0.5, 1.0, 0.5, 1.0, 0.0, 0.0]);
        let options = ScheduleOptions { power: Some(2.0), lr_end: Some(1e-4), ..NONE };
        assert_factors(S::Polynomial, options, [0.0, 0.5, 1.0, 0.5625 * 0.9 + 0.1, 0.25 * 0.9 + 0.1, 0.1, 0.1]);
        let options = ScheduleOptions { timescale: Some(8.0), ..NONE };
        let root = |x: f64| 1.0 / x.sqrt();
        assert_factors(S::InverseSqrt, options, [0.0, 0.5, 1.0, root(1.25), root(1.5), root(2.0), root(2.25)]);
        for options in [ScheduleOptions { min_lr: Some(1e-4), ..NONE }, ScheduleOptions { min_lr_rate: Some(0.1), ..NONE }] {
            let floor = |x: f64| x * 0.9 + 0.1;
            assert_factors(S::CosineWithMinLr, options, [0.0, 0.5, 1.0, floor(quarter), floor(0.5), 0.1, floor(1.0 - quarter)]);
        }
    }

    #[test]
    fn the_rate_is_the_factor_of_the_peak() {
        let schedule = LrSchedule::new(S::Linear, 2.0, 0, 4, NONE).unwrap();
        assert_eq!([0, 1, 4].map(|step| schedule.lr(step)), [2.0, 1.5, 0.0]);
        assert_eq!(LrSchedule::new(S::InverseSqrt, 1.0, 0, 4, NONE).unwrap().multiplier(30_000), 0.5);
    }

    #[test]
    fn degenerate_lengths_give_numbers() {
        for name in S::ALL {
            let options = if name == S::CosineWithMinLr { ScheduleOptions { min_lr_rate: Some(0.5), ..NONE } } else { NONE };
            for (warmup, total) in [(0, 0), (0, 1), (5, 5), (9, 3)] {
                let schedule = LrSchedule::new(name, 1e-3, warmup, total, options).unwrap();
                assert!((0..20).all(|step| (0.0..=1.0).contains(&schedule.multiplier(step))), "{name} {warmup} {total}");
            }
        }
    }

    #[test]
    fn names_round_trip_and_a_misspelt_one_meets_its_nearest() {
        for name in S::ALL {
            assert_eq!(name.to_string().parse::<S>().unwrap(), name);
        }
        let error = "cosine_with_restart".parse::<S>().unwrap_err().to_string();
        assert_eq!(
            error,
            "lr_scheduler_type: `cosine_with_restart` is not a schedule known here; the nearest name is `cosine_with_restarts`"
        );
    }

    #[test]
    fn no_option_is_ignored() {
        let error = |name, options| LrSchedule::new(name, 1e-3, 2, 10, options).unwrap_err().to_string();
        let options = ScheduleOptions { power: Some(2.0), num_cycles: Some(1.0), ..NONE };
        assert_eq!(error(S::Linear, options), "linear: takes no option `num_cycles`, `power`");
        assert_eq!(error(S::CosineWithMinLr, NONE), "cosine_with_min_lr: expected one of `min_lr` and `min_lr_rate`, found 0");
        let both = ScheduleOptions { min_lr: Some(1e-4), min_lr_rate: Some(0.1), ..NONE };
        assert_eq!(error(S::CosineWithMinLr, both), "cosine_with_min_lr: expected one of `min_lr` and `min_lr_rate`, found 2");
        let end = ScheduleOptions { lr_end: Some(1e-3), ..NONE };
        assert_eq!(error(S::Polynomial, end), "polynomial: `lr_end` must be below the learning rate, found 0.001");
        let scale = ScheduleOptions { timescale: Some(0.0), ..NONE };
        assert_eq!(error(S::InverseSqrt, scale), "inverse_sqrt: `timescale` must be above 0, found 0");
    }
}
