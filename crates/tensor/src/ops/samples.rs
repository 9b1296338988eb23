//! Tensors of random numbers for the tests of ops, on the device that the tests run on.

use std::sync::OnceLock;

use nibble_testkit::{UNIT_BF16, UNIT_F16, UNIT_F32, gpu_library_folders, normals, widen};
use proptest::prelude::*;

use crate::{
    Arena, DType, Device, Shape, Tensor,
    cuda::{
        CudaDevice, OpenOptions,
        libraries::{self, SearchPaths},
    },
};

/// The GPU's memory, opened once a process; nothing where tests run on the CPU.
fn gpu() -> Option<&'static Arena> {
    static ARENA: OnceLock<Option<Arena>> = OnceLock::new();
    let open = |folders| {
        let libraries = libraries::find(&SearchPaths { folders, ..SearchPaths::of_system() });
        let device = CudaDevice::open(0, &OpenOptions { libraries, cache: None }).expect("a GPU");
        Arena::on(Device::Cuda(device), usize::MAX).expect("its memory")
    };
    ARENA.get_or_init(|| gpu_library_folders().map(open)).as_ref()
}

/// Memory of the device that tests run on: the CPU, or with `NIBBLE_TEST_DEVICE=cuda` the first GPU.
pub(crate) fn arena() -> Arena {
    gpu().cloned().unwrap_or_else(|| Arena::new(Device::Cpu))
}

/// Whether tests run on the CPU: for laws that a GPU keeps in another form.
pub(crate) fn on_cpu() -> bool {
    gpu().is_none()
}

/// Where the first element lies.
pub(super) fn place(tensor: &Tensor) -> u64 {
    if on_cpu() { tensor.as_slice::<f32>().unwrap().as_ptr() as u64 } else { tensor.address().unwrap() }
}

/// Numbers of the standard normal distribution, rounded to `dtype`.
pub(super) fn normal(seed: u64, dtype: DType, shape: impl Into<Shape>) -> Tensor {
    let shape = shape.into();
    let values = normals(seed, shape.numel());
    Tensor::from_slice(&arena(), &values, shape).unwrap().to_dtype(dtype).unwrap()
}

/// The exact values.
pub(super) fn wide(tensor: &Tensor) -> Vec<f64> {
    widen(&tensor.to_f32_vec().unwrap())
}

/// Token ids or positions.
pub(super) fn ids(values: &[u32]) -> Tensor {
    Tensor::from_slice(&arena(), values, [values.len()]).unwrap()
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
