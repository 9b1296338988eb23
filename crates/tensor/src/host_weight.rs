//! Frozen 4-bit matrices whose codes wait in host memory and come to the device for the layer that runs.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nibble_nf4 as nf4;

use crate::{Absmax, Arena, BlockWeight, HostCopy, HostPool, Owner, Result, Shape, Weight};

/// A 4-bit matrix [out, in] whose codes are on the host. Its scales, a 32nd of the codes, stay on the device.
///
/// Cloning gives another handle to the same codes.
#[derive(Clone, Debug)]
pub struct HostWeight {
    shape: Shape,
    config: nf4::QuantConfig,
    absmax: Absmax,
    arena: Arena,
    codes: Arc<Mutex<HostCopy>>,
}

impl HostWeight {
    /// Sends the codes to the host; a weight in another format is given back as it is.
    ///
    /// # Errors
    /// [`crate::Error::OutOfHostMemory`] when the host has no memory to lock.
    pub fn send(pool: &HostPool, weight: Weight) -> Result<Result<Self, Weight>> {
        let (Weight::Nf4(blocks) | Weight::Fp4(blocks)) = weight else { return Ok(Err(weight)) };
        let BlockWeight { shape, config, packed, absmax } = blocks;
        let arena = packed.arena().clone();
        let mut codes = pool.store(packed)?;
        codes.release()?;
        Ok(Ok(Self { shape, config, absmax, arena, codes: Arc::new(Mutex::new(codes)) }))
    }

    /// (out, in).
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Begins to bring the codes to the device.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::Cuda`].
    pub fn recall(&self) -> Result<()> {
        let _scope = self.arena.scope(Owner::BaseWeights);
        self.codes().recall(&self.arena)
    }

    /// The matrix on the device, for as long as the result lives.
    ///
    /// # Errors
    /// As [`HostWeight::recall`].
    pub fn get(&self) -> Result<Weight> {
        let _scope = self.arena.scope(Owner::BaseWeights);
        let packed = self.codes().get(&self.arena)?;
        Ok(Weight::from_parts(BlockWeight { shape: self.shape, config: self.config, packed, absmax: self.absmax.clone() }))
    }

    /// Lets go of the codes on the device.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`].
    pub fn forget(&self) -> Result<()> {
        self.codes().forget()
    }

    /// Bytes that stay on the device.
    #[must_use]
    pub fn device_bytes(&self) -> usize {
        self.absmax.bytes()
    }

    fn codes(&self) -> MutexGuard<'_, HostCopy> {
        self.codes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Rng};

    #[test]
    fn a_matrix_on_the_host_is_the_same_matrix_and_takes_its_scales_alone() {
        let (arena, pool) = (Arena::new(Device::Cpu), HostPool::new(Device::Cpu));
        let weight = Weight::random(&arena, [64, 96], &nf4::QuantConfig::default(), 0.1, Rng::new(1)).unwrap();
        let values = weight.to_f32_vec().unwrap();
        let whole = arena.stats().live;
        let away = HostWeight::send(&pool, weight).unwrap().unwrap();
        assert_eq!(arena.stats().live, whole - 64 * 96 / 2);
        for _ in 0..2 {
            away.recall().unwrap();
            assert_eq!(away.get().unwrap().to_f32_vec().unwrap(), values);
            away.forget().unwrap();
            assert_eq!(arena.stats().live, whole - 64 * 96 / 2);
        }
    }
}
