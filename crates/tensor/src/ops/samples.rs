//! Tensors of random numbers for the tests of ops.

use nibble_testkit::{UNIT_BF16, UNIT_F16, UNIT_F32, normals, widen};
use proptest::prelude::*;

use crate::{Arena, DType, Device, Shape, Tensor};

/// Numbers of the standard normal distribution, rounded to `dtype`.
pub(super) fn normal(seed: u64, dtype: DType, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let values = normals(seed, shape.numel());
    Tensor::from_slice(&Arena::new(Device::Cpu), &values, shape).unwrap().to_dtype(dtype).unwrap()
}

/// The exact values.
pub(super) fn wide(tensor: &Tensor) -> Vec<f64> {
    widen(&tensor.to_f32_vec().unwrap())
}

/// Token ids or positions.
pub(super) fn ids(values: &[u32]) -> Tensor {
    Tensor::from_slice(&Arena::new(Device::Cpu), values, [values.len()]).unwrap()
}

/// Half the relative spacing of `dtype`'s numbers.
pub(super) fn unit(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => UNIT_F32,
        DType::Bf16 => UNIT_BF16,
        DType::F16 => UNIT_F16,
        other => panic!("`{other}` is not a floating-point type"),
    }
}

/// Rounding of a result near `value` to `dtype`: half a unit, or half of the smallest subnormal.
pub(super) fn rounding(dtype: DType, value: f64) -> f64 {
    let smallest = match dtype {
        DType::F16 => 1.0 / 16_777_216.0,
        _ => f64::from(f32::MIN_POSITIVE),
    };
    unit(dtype) * value.abs() + smallest
}

/// Each floating-point type.
pub(super) fn float() -> impl Strategy<Value = DType> {
    prop_oneof![Just(DType::F32), Just(DType::Bf16), Just(DType::F16)]
}
