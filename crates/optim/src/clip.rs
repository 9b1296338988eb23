//! Clipping of gradients by their norm.

use nibble_tensor::{Tensor, ops::global_norm};

use crate::{Error, Result};

/// What clipping found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipInfo {
    /// The norm of all gradients before clipping.
    pub norm: f64,
    /// The factor for the gradients, to be given to the optimizer's step: at most 1, NaN if the norm is.
    pub scale: f32,
}

/// The norm of `grads` (F32) and the factor that brings it to `max_norm`: min(1, max_norm / (norm + 1e-6)), as torch's
/// `clip_grad_norm_`. The gradients are not touched. A `max_norm` of 0 disables clipping: the factor is 1.
///
/// # Errors
/// [`Error::Option`] for a negative or NaN `max_norm`, [`Error::Tensor`] unless `grads` is F32.
pub fn clip_grad_norm(grads: &Tensor, max_norm: f64) -> Result<ClipInfo> {
    if max_norm.is_nan() || max_norm < 0.0 {
        return Err(Error::Option { of: "clip_grad_norm", option: "max_grad_norm", expected: "at least 0", found: max_norm });
    }
    let norm = global_norm::forward(grads)?;
    let factor = max_norm / (norm + 1e-6);
    // `min` would turn NaN into 1.
    let scale = if max_norm == 0.0 || factor > 1.0 { 1.0 } else { factor as f32 };
    Ok(ClipInfo { norm, scale })
}

#[cfg(test)]
mod tests {
    use nibble_tensor::{Arena, Device};

    use super::*;

    fn clip(grads: &[f32], max_norm: f64) -> ClipInfo {
        let grads = Tensor::from_slice(&Arena::new(Device::Cpu), grads, [grads.len()]).unwrap();
        clip_grad_norm(&grads, max_norm).unwrap()
    }

    #[test]
    fn the_factor_is_that_of_torch() {
        assert_eq!(clip(&[3.0, 4.0], 1.0), ClipInfo { norm: 5.0, scale: (1.0f64 / 5.000_001) as f32 });
        assert_eq!(clip(&[3.0, 4.0], 6.0).scale, 1.0);
        assert_eq!(clip(&[0.0], 0.3).scale, 1.0);
    }

    #[test]
    fn zero_disables_and_nan_is_not_hidden() {
        assert_eq!(clip(&[3.0, 4.0], 0.0), ClipInfo { norm: 5.0, scale: 1.0 });
        let nan = clip(&[f32::NAN], 1.0);
        assert!(nan.norm.is_nan() && nan.scale.is_nan());
        assert_eq!(clip(&[f32::INFINITY], 1.0).scale, 0.0);
    }

    #[test]
    fn a_negative_limit_is_refused() {
        let grads = Tensor::from_slice(&Arena::new(Device::Cpu), &[1.0f32], [1]).unwrap();
        for bad in [-1.0, f64::NAN] {
            assert!(matches!(clip_grad_norm(&grads, bad), Err(Error::Option { option: "max_grad_norm", .. })));
        }
    }
}
