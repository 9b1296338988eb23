//! Values that are made again in the backward pass instead of being kept.

use nibble_tensor::{Result, Tensor};

/// How a value is made again, from what was saved anyway.
pub(crate) struct Again(Box<dyn FnOnce() -> Result<Tensor>>);

impl Again {
    pub(crate) fn new(recipe: impl FnOnce() -> Result<Tensor> + 'static) -> Self {
        Self(Box::new(recipe))
    }

    pub(crate) fn make(self) -> Result<Tensor> {
        (self.0)()
    }
}
