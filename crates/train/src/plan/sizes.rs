//! Models of the usual sizes against GPUs of the usual sizes.

use nibble_model::{Checkpointing, LoadOptions};

use super::{Footprint, Gpu, Method, NAMED_SIZES, RESERVED, Request, fit, named_size};
use crate::Result;

/// What the methods need of a model of one size, with one document of a length and full checkpointing.
#[derive(Clone, Debug)]
pub struct SizeRow {
    /// The size, such as `7B`.
    pub name: &'static str,
    /// By [`Method::ALL`].
    pub needed: [Footprint; 3],
}

impl SizeRow {
    /// The bytes of memory that a GPU must have for a method.
    #[must_use]
    pub fn memory(&self, method: Method) -> usize {
        self.needed[method as usize].device + RESERVED
    }

    /// The method that trains the most within `memory` bytes; nothing when none fits.
    #[must_use]
    pub fn choice(&self, memory: usize) -> Option<Method> {
        Method::ALL.into_iter().rev().find(|&method| self.memory(method) <= memory)
    }
}

/// Every size of [`NAMED_SIZES`], with one document of `length` tokens.
///
/// # Errors
/// None, unless the code is broken.
pub fn size_table(load: LoadOptions, length: usize) -> Result<Vec<SizeRow>> {
    let request = Request { length, ..Request::new(load) };
    let gpu = Gpu::of_memory(24 << 30);
    let mut rows = Vec::new();
    for name in NAMED_SIZES {
        let Some(model) = named_size(name)? else { continue };
        let needed = |method| fit::needed(&model, &gpu, &request.setup(method, Checkpointing::Full));
        let [qlora, lora, full] = Method::ALL;
        rows.push(SizeRow { name, needed: [needed(qlora)?, needed(lora)?, needed(full)?] });
    }
    Ok(rows)
}
