//! Steps on a GPU that is not there: every launch fits its kernel, and memory is what the states say.

use nibble_optim::{Layout, Optimizer, OptimizerName, Paging};
use nibble_tensor::{
    Arena, DType, Device, Shape, Tensor,
    cuda::{ComputeCapability, CudaDevice, DeviceInfo},
};

fn arena() -> Arena {
    let capability = ComputeCapability::new(9, 0);
    let name = "a GPU of this test".to_owned();
    let info = DeviceInfo { ordinal: 0, name, capability, memory: 8 << 30, multiprocessors: 132, driver: 12_090 };
    Arena::on(Device::Cuda(CudaDevice::dry(&info)), usize::MAX).unwrap()
}

/// A large matrix that decays, a vector that does not, an odd one.
fn layout() -> Layout {
    Layout::new([(Shape::from([4096, 64]), true), ([300].into(), false), ([5001].into(), true)])
}

#[test]
fn every_launch_fits_its_kernel_and_a_second_step_takes_no_memory() {
    let arena = arena();
    let zeros = || Tensor::zeros(&arena, DType::F32, [layout().numel()]).unwrap();
    let (mut params, grads) = (zeros(), zeros());
    for name in OptimizerName::ALL {
        let config = name.config(0.1);
        let page = 1 << 16;
        let paging = Paging { device_memory: Some(3 * page), file: None, masters: false, page: Some(page) };
        let plain = Optimizer::new(&arena, &layout(), config).unwrap();
        for mut optimizer in [plain, Optimizer::paged(&arena, &layout(), config, &paging).unwrap()] {
            optimizer.begin(1e-3).unwrap();
            optimizer.apply(&mut params, &grads, None, 1.0).unwrap();
            let after_one = arena.stats();
            optimizer.begin(1e-3).unwrap();
            optimizer.apply(&mut params, &grads, None, 1.0).unwrap();
            assert_eq!((arena.stats().live, arena.stats().peak), (after_one.live, after_one.peak), "{name}");
            optimizer.step(&mut params, &grads, 1e-3, 1.0).unwrap();
        }
    }
}

#[test]
fn values_in_pages_leave_copies_of_16_bits() {
    let arena = arena();
    let grads = Tensor::zeros(&arena, DType::F32, [layout().numel()]).unwrap();
    let page = 1 << 16;
    let paging = Paging { device_memory: Some(3 * page), file: None, masters: true, page: Some(page) };
    for name in OptimizerName::ALL.into_iter().filter(|name| name.is_paged()) {
        let mut optimizer = Optimizer::paged(&arena, &layout(), name.config(0.1), &paging).unwrap();
        assert!(optimizer.holds_values() && optimizer.pages().is_some());
        optimizer.set_values(&grads).unwrap();
        let mut copy = grads.to_dtype(DType::Bf16).unwrap();
        optimizer.begin(1e-3).unwrap();
        optimizer.apply(&mut copy, &grads, None, 1.0).unwrap();
        assert!(optimizer.state().unwrap().iter().all(|(name, _)| *name != "values"));
        assert_eq!(optimizer.values().unwrap().unwrap().numel(), layout().numel());
    }
}

#[test]
fn states_take_of_the_device_what_they_may() {
    let arena = arena();
    let config = OptimizerName::PagedAdamW32bit.config(0.0);
    let all = config.state_bytes(&layout());
    let taken = |paging: Paging| {
        let before = arena.stats().live;
        let optimizer = Optimizer::paged(&arena, &layout(), config, &paging).unwrap();
        (arena.stats().live - before, optimizer.pages())
    };
    let page = 1 << 16;
    let (bytes, pages) = taken(Paging { device_memory: Some(all / 2), file: None, masters: false, page: Some(page) });
    let (pages, resident) = pages.unwrap();
    assert!(bytes <= all / 2 + 16 * 1024, "{bytes} of {all}: lists of blocks and step values are small");
    assert!(resident > 0 && resident < pages, "{resident} of {pages}");
    // All of it: no pages at all.
    assert_eq!(taken(Paging { device_memory: Some(all), file: None, masters: false, page: Some(page) }).1, None);
    assert_eq!(taken(Paging::default()).1, None, "half of a free device is enough here");
}
