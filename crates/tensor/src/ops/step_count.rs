//! The number t of an optimizer's updates where a GPU's kernels count it, so that a captured step which changes nothing does not
//! count.
//!
//! Between [`super::global_norm::clip`] and an update, on the values of a step ([`super::step`]):
//!
//! ```text
//! finite     = the norm and the losses are
//! halted     = halted or (not finite and S ≤ 1)          S: the loss scale, 0 without one
//! finite and not halted:  t = t + 1, size = lr / (1 − β₁ᵗ), inverse_root = 1 / √(1 − β₂ᵗ), β₂ of Adafactor = 1 − t^exponent
//! else:                   t stays, and the update changes nothing
//! ```
//!
//! Steps are handed to a GPU before the results of those before are read: one that is not finite, and not for its loss scale,
//! halts those behind it until the host says [`StepCount::resume`]. There is no backward.
//!
//! Shapes: values F32 \[16\], losses F32 \[any\]. An optimizer on the CPU counts by itself; there this is the specification.

use super::{loss_scale::LEAST, step, typed};
use crate::{Arena, DType, Device, Result, Tensor};

const OP: &str = "step_count";

/// What t enters into. An optimizer leaves those that it does not have at 0.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Corrections {
    /// β₁, of [`super::adamw`].
    pub beta1: f64,
    /// β₂, of [`super::adamw`].
    pub beta2: f64,
    /// Of t, in β₂ of [`super::adafactor`].
    pub exponent: f64,
}

/// t, and whether updates are halted.
#[derive(Debug)]
pub struct StepCount {
    /// U32 `[1]`.
    steps: Tensor,
    /// U32 `[1]`: 1 or 0.
    halted: Tensor,
}

impl StepCount {
    /// Before the first update.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(arena: &Arena) -> Result<Self> {
        Ok(Self { steps: Tensor::zeros(arena, DType::U32, [1])?, halted: Tensor::zeros(arena, DType::U32, [1])? })
    }

    /// Updates so far, read from the device: waits for it.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn steps(&self) -> Result<u32> {
        Ok(self.steps.to_vec::<u32>()?.first().copied().unwrap_or(0))
    }

    /// Continues after `steps` updates.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn load(&mut self, steps: u32) -> Result<()> {
        self.steps.write(&[steps])
    }

    /// Ends the halt, for steps that are handed over from now on.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn resume(&mut self) -> Result<()> {
        self.halted.write(&[0u32])
    }

    /// Gives the step its number and `values` what depends on it, or leaves word there that it changes nothing.
    ///
    /// # Errors
    /// [`crate::Error::Shape`], [`crate::Error::DType`] when `values` are not those of a step, [`crate::Error::Cuda`].
    pub fn advance(&mut self, values: &mut Tensor, losses: Option<&Tensor>, corrections: &Corrections) -> Result<()> {
        values.expect_shape(OP, "values", [step::LEN])?;
        if let Some(losses) = losses {
            typed::expect_dtype(OP, "losses", losses, DType::F32)?;
        }
        match values.device() {
            Device::Cpu => {
                let losses = losses.map_or(Ok(&[][..]), Tensor::as_slice::<f32>)?;
                let (steps, halted) = (self.steps.as_mut_slice()?, self.halted.as_mut_slice()?);
                cpu::advance(values.as_mut_slice()?, &mut steps[0], &mut halted[0], losses, corrections);
                Ok(())
            }
            Device::Cuda(device) => cuda::advance(device, self, values, losses, corrections),
        }
    }
}

mod cpu {
    use super::{Corrections, LEAST};
    use crate::ops::step::{BETA2, INVERSE_ROOT, LOSS_SCALE, NOT_FINITE, SIZE, WIDE_LR, correction};

    pub(super) fn advance(values: &mut [f32], steps: &mut u32, halted: &mut u32, losses: &[f32], corrections: &Corrections) {
        let finite = values[NOT_FINITE] == 0.0 && losses.iter().all(|loss| loss.is_finite());
        if !finite && values[LOSS_SCALE] <= LEAST {
            *halted = 1;
        }
        if !finite || *halted != 0 {
            values[NOT_FINITE] = 1.0;
            return;
        }
        *steps += 1;
        let t = *steps;
        let lr: f64 = bytemuck::cast([values[WIDE_LR], values[WIDE_LR + 1]]);
        let Corrections { beta1, beta2, exponent } = *corrections;
        values[SIZE] = (lr / correction(beta1, t)) as f32;
        values[INVERSE_ROOT] = (1.0 / correction(beta2, t).sqrt()) as f32;
        values[BETA2] = (1.0 - f64::from(t).powf(exponent)) as f32;
    }
}

mod cuda {
    use super::{Corrections, LEAST, StepCount};
    use crate::{
        Result, Tensor,
        cuda::{Arg, CudaDevice, Grid},
    };

    pub(super) fn advance(
        device: CudaDevice,
        count: &mut StepCount,
        values: &mut Tensor,
        losses: Option<&Tensor>,
        corrections: &Corrections,
    ) -> Result<()> {
        let Corrections { beta1, beta2, exponent } = *corrections;
        let [beta1, beta2, exponent] = [beta1, beta2, exponent].map(|wide| Arg::U64(wide.to_bits()));
        let args = [
            Arg::write(values)?,
            Arg::write(&mut count.steps)?,
            Arg::write(&mut count.halted)?,
            Arg::read_or_none(losses)?,
            Arg::size(losses.map_or(0, Tensor::numel)),
            beta1,
            beta2,
            exponent,
            Arg::F32(LEAST),
        ];
        device.launch("step_count", Grid::new(1, 32), &args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{adafactor, adamw, samples::arena};

    const ADAMW: Corrections = Corrections { beta1: 0.9, beta2: 0.999, exponent: 0.0 };

    /// A step with learning rate 0.1, this loss scale and these losses: its values.
    fn after(count: &mut StepCount, finite: bool, scale: f32, losses: &[f32]) -> Vec<f32> {
        let mut start = step::start(0.1, 0.0, 1.0);
        (start[step::NOT_FINITE], start[step::LOSS_SCALE]) = (f32::from(u8::from(!finite)), scale);
        let mut values = Tensor::from_slice(&arena(), &start, [step::LEN]).unwrap();
        let losses = Tensor::from_slice(&arena(), losses, [losses.len()]).unwrap();
        count.advance(&mut values, Some(&losses), &ADAMW).unwrap();
        values.to_f32_vec().unwrap()
    }

    fn adamw(lr: f64, t: u32) -> adamw::Hyper {
        let Corrections { beta1, beta2, .. } = ADAMW;
        adamw::Hyper { lr, beta1, beta2, eps: 0.0, weight_decay: 0.1, step: t, decay: adamw::DecayOrder::Before }
    }

    #[test]
    fn corrections_are_those_that_an_optimizer_on_the_cpu_computes_to_the_last_digit() {
        let mut count = StepCount::new(&arena()).unwrap();
        let decay_rate = -0.8;
        let adafactor = adafactor::Hyper { lr: 0.0, eps: 0.0, clip_threshold: 1.0, decay_rate, weight_decay: 0.0, step: 0 };
        for t in (1..200).chain([1000, 4321, 65_537, 3_000_000]) {
            let lr = 1e-3 / f64::from(t).sqrt();
            let mut values = Tensor::from_slice(&arena(), &step::start(lr, 0.1, 0.5), [step::LEN]).unwrap();
            count.load(t - 1).unwrap();
            count.advance(&mut values, None, &Corrections { exponent: decay_rate, ..ADAMW }).unwrap();
            let mut want = step::values(&adamw(lr, t), 0.5);
            want[step::BETA2] = adafactor::Hyper { step: t, ..adafactor }.values(1.0)[step::BETA2];
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&values.to_f32_vec().unwrap()), bits(&want), "{t}");
            assert_eq!(count.steps().unwrap(), t);
        }
    }

    #[test]
    fn powers_by_squaring_are_powers() {
        for t in [1, 2, 3, 10, 999, 100_000] {
            let want = -(f64::from(t) * 0.999f64.ln()).exp_m1();
            assert!((step::correction(0.999, t) / want - 1.0).abs() < 1e-10, "{t}");
        }
        assert_eq!((step::correction(0.0, 7), step::correction(0.5, 3)), (1.0, 0.875));
    }

    #[test]
    fn a_step_that_the_loss_scale_spoilt_does_not_count() {
        let mut count = StepCount::new(&arena()).unwrap();
        for (finite, losses) in [(false, [1.0, 2.0]), (true, [1.0, f32::NAN]), (true, [f32::INFINITY, 1.0])] {
            assert_eq!(after(&mut count, finite, 1024.0, &losses)[step::NOT_FINITE], 1.0);
        }
        for t in 1..3 {
            let values = after(&mut count, true, 512.0, &[1.0]);
            let want = step::values(&adamw(0.1, t), 1.0);
            assert_eq!(values[step::SIZE..=step::INVERSE_ROOT], want[step::SIZE..=step::INVERSE_ROOT]);
            assert_eq!((values[step::NOT_FINITE], count.steps().unwrap()), (0.0, t));
        }
    }

    #[test]
    fn one_that_no_loss_scale_spoilt_halts_those_behind_it_until_the_host_resumes() {
        for scale in [0.0, LEAST] {
            let mut count = StepCount::new(&arena()).unwrap();
            let not_finite = [true, false, true, true].map(|finite| after(&mut count, finite, scale, &[1.0])[step::NOT_FINITE]);
            assert_eq!((not_finite, count.steps().unwrap()), ([0.0, 1.0, 1.0, 1.0], 1));
            count.resume().unwrap();
            assert_eq!((after(&mut count, true, scale, &[1.0])[step::NOT_FINITE], count.steps().unwrap()), (0.0, 2));
        }
    }
}
