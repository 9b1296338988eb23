//! The scale of a loss whose gradients are computed in f16, whose smallest number is 6e-8: without one, small gradients are lost.
//!
//! Gradients are those of S · loss; the update divides by S, which is a power of two. As torch's `GradScaler` does, S starts at 65536;
//! a step whose gradients are not finite changes nothing but S, which it halves (to 1 at the least); 2000 steps in a row
//! with finite ones double it (Micikevicius et al. 2018). There is no backward.
//!
//! On a GPU S lies in device memory, so that a captured step reads and changes it; on the CPU it is a number.

use crate::{Arena, Device, Result, Tensor};

/// S of the first step.
pub const START: f32 = 65_536.0;
/// S at the least: there a gradient that is not finite is not the scale's fault.
pub const LEAST: f32 = 1.0;
/// Steps with finite gradients after which S is doubled.
pub const INTERVAL: u32 = 2000;

/// S, and the steps since it changed.
#[derive(Debug)]
pub struct LossScale {
    scale: f32,
    good: u32,
    /// F32 `[2]`: both, on a GPU.
    device: Option<Tensor>,
}

impl LossScale {
    /// [`START`], on the device of `arena`.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`].
    pub fn new(arena: &Arena) -> Result<Self> {
        let device = match arena.device() {
            Device::Cpu => None,
            Device::Cuda(_) => Some(Tensor::from_slice(arena, &[START, 0.0], [2])?),
        };
        Ok(Self { scale: START, good: 0, device })
    }

    /// S and the number of steps since it changed, read from the device: to continue from later.
    ///
    /// # Errors
    /// What the device reports.
    pub fn state(&self) -> Result<(f32, u32)> {
        match &self.device {
            None => Ok((self.scale, self.good)),
            Some(memory) => memory.to_f32_vec().map(|values| (values[0], values[1] as u32)),
        }
    }

    /// Continues from what [`LossScale::state`] gave.
    ///
    /// # Errors
    /// [`crate::Error::Shared`] while labels hold the scale.
    pub fn load(&mut self, (scale, good): (f32, u32)) -> Result<()> {
        (self.scale, self.good) = (scale, good);
        self.device.as_mut().map_or(Ok(()), |memory| memory.write(&[scale, good as f32]))
    }

    /// S, on the CPU.
    #[must_use]
    pub fn value(&self) -> f32 {
        self.scale
    }

    /// On the CPU, after a step's gradients are known to be `finite` or not.
    pub fn update(&mut self, finite: bool) {
        self.good = if finite { self.good + 1 } else { 0 };
        if !finite {
            self.scale = (0.5 * self.scale).max(LEAST);
        } else if self.good == INTERVAL {
            (self.scale, self.good) = (2.0 * self.scale, 0);
        }
    }

    /// On a GPU, before the update: leaves 1 / S where the optimizer's kernels read the gradients' factor ([`super::step`]), and S for the
    /// report. On the CPU it does nothing.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn divide(&self, values: &Tensor) -> Result<()> {
        self.device.as_ref().map_or(Ok(()), |memory| cuda::divide(values, memory))
    }

    /// On a GPU, after the update: what [`LossScale::update`] does, by what the kernels found. On the CPU it does nothing.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn update_from(&self, values: &Tensor) -> Result<()> {
        self.device.as_ref().map_or(Ok(()), |memory| cuda::update(values, memory))
    }

    /// Where S is, on a GPU.
    pub(crate) fn memory(&self) -> Option<&Tensor> {
        self.device.as_ref()
    }
}

mod cuda {
    use super::{INTERVAL, LEAST};
    use crate::{
        Device, Result, Tensor,
        cuda::{Arg, CudaDevice, Grid},
    };

    fn launch(values: &Tensor, name: &str, args: &[Arg]) -> Result<()> {
        let Device::Cuda(device) = values.device() else { return Ok(()) };
        CudaDevice::launch(device, name, Grid::new(1, 32), args)
    }

    /// Both tensors are the device's own state, which its kernels write in the order of the stream: others hold them meanwhile.
    pub(super) fn divide(values: &Tensor, memory: &Tensor) -> Result<()> {
        launch(values, "loss_scale_divide", &[Arg::Pointer(values.address()?), Arg::read(memory)?])
    }

    pub(super) fn update(values: &Tensor, memory: &Tensor) -> Result<()> {
        let args = [Arg::Pointer(memory.address()?), Arg::read(values)?, Arg::F32(LEAST), Arg::U32(INTERVAL)];
        launch(values, "loss_scale_update", &args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{samples::arena, step};

    /// The scale as it is after steps with finite gradients or not, on the device that tests run on.
    fn after(scale: &mut LossScale, steps: impl Iterator<Item = bool>) -> (f32, u32) {
        let mut values = [0.0; step::LEN];
        for finite in steps {
            if scale.memory().is_none() {
                scale.update(finite);
                continue;
            }
            values[step::NOT_FINITE] = f32::from(u8::from(!finite));
            scale.update_from(&Tensor::from_slice(&arena(), &values, [step::LEN]).unwrap()).unwrap();
        }
        scale.state().unwrap()
    }

    #[test]
    fn it_is_halved_at_once_and_doubled_after_two_thousand_good_steps() {
        let mut scale = LossScale::new(&arena()).unwrap();
        assert_eq!(after(&mut scale, [true, true, false].into_iter()), (START / 2.0, 0));
        assert_eq!(after(&mut scale, (1..INTERVAL).map(|_| true)), (START / 2.0, INTERVAL - 1));
        assert_eq!(after(&mut scale, [true].into_iter()), (START, 0));
        assert_eq!(after(&mut scale, (0..40).map(|_| false)), (LEAST, 0));
        scale.load((8.0, 7)).unwrap();
        assert_eq!(after(&mut scale, [true].into_iter()), (8.0, 8));
    }

    #[test]
    fn a_gpu_divides_by_it_in_the_steps_values() {
        let scale = LossScale::new(&arena()).unwrap();
        let values = Tensor::zeros(&arena(), crate::DType::F32, [step::LEN]).unwrap();
        scale.divide(&values).unwrap();
        let values = values.to_f32_vec().unwrap();
        let expected = if scale.memory().is_some() { [1.0 / START, START] } else { [0.0; 2] };
        assert_eq!([values[0], values[step::LOSS_SCALE]], expected);
    }
}
