//! Handles that do not keep the memory.

use std::sync::{Arc, Weak};

use super::Tensor;
use crate::{DType, Shape, arena::Block};

/// A tensor without gaps, as long as somebody else holds its memory.
#[derive(Clone, Debug)]
pub(crate) struct WeakTensor {
    block: Weak<Block>,
    dtype: DType,
    shape: Shape,
    offset: usize,
}

impl WeakTensor {
    /// The tensor, if its memory is still held.
    pub(crate) fn get(&self) -> Option<Tensor> {
        let &Self { dtype, shape, offset, .. } = self;
        Some(Tensor { block: self.block.upgrade()?, dtype, shape, offset, gap: 0, room: 0 })
    }
}

impl WeakTensor {
    /// Whether its memory is still held.
    pub(crate) fn is_held(&self) -> bool {
        self.block.strong_count() > 0
    }

    /// Whether both are the same elements in the same memory, held or not.
    pub(crate) fn is_same_memory(&self, other: &Self) -> bool {
        self.block.ptr_eq(&other.block) && (self.dtype, self.shape, self.offset) == (other.dtype, other.shape, other.offset)
    }
}

impl Tensor {
    /// Another handle that does not keep the memory; none with gaps between the rows.
    pub(crate) fn weak(&self) -> Option<WeakTensor> {
        let &Self { dtype, shape, offset, gap, .. } = self;
        (gap == 0).then(|| WeakTensor { block: Arc::downgrade(&self.block), dtype, shape, offset })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Arena, Device};

    #[test]
    fn memory_that_nobody_holds_is_gone() {
        let arena = Arena::new(Device::Cpu);
        let tensor = Tensor::from_slice(&arena, &[1.0f32, 2.0, 3.0, 4.0], [2, 2]).unwrap();
        let row = tensor.rows(1, 1).unwrap().weak().unwrap();
        assert_eq!(row.get().unwrap().to_vec::<f32>().unwrap(), [3.0, 4.0]);
        let [same, other] = [1, 0].map(|i| tensor.rows(i, 1).unwrap().weak().unwrap());
        assert!(row.is_held() && row.is_same_memory(&same) && !row.is_same_memory(&other));
        drop(tensor);
        assert!(row.get().is_none() && !row.is_held() && arena.stats().live == 0);
    }
}
