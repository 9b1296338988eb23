//! Blockwise 4-bit and 8-bit formats on plain slices, bit-exact with bitsandbytes.
//!
//! * [`quantize`] and [`dequantize`]: NF4 and FP4 with or without double quantisation; [`BlocksView`] decodes any run.
//! * [`quantize_dynamic`] and [`dequantize_dynamic`]: dynamic 8-bit blocks, as in 8-bit optimizers.
//! * [`int8`]: LLM.int8's row-wise weights and its matmul with outlier columns.
//! * [`bnb`]: the tensors under which bitsandbytes stores 4-bit weights.
//!
//! ```
//! use nibble_nf4::{QuantConfig, dequantize, quantize};
//!
//! let weights = [0.02f32, -0.11, 0.0, 0.07];
//! let blocks = quantize(&weights, &QuantConfig::default())?;
//! let mut back = [0f32; 4];
//! dequantize(&blocks, &mut back)?;
//! assert!(weights.iter().zip(back).all(|(w, b)| (w - b).abs() < 0.11 * 0.152));
//! # Ok::<(), nibble_nf4::Error>(())
//! ```

mod blocks;
pub mod bnb;
mod dynamic;
mod element;
mod error;
mod format;
pub mod int8;
mod mean;
mod quantize;
mod simd;
mod view;

pub use blocks::{Absmax, MAX_BLOCK, MIN_BLOCK, NESTED_BLOCK, QuantConfig, QuantizedBlocks};
pub use dynamic::{
    Codebook, DynamicBlocks, DynamicMap, dequantize_dynamic, dynamic_map_signed, dynamic_map_unsigned, nearest_code,
    quantize_dynamic,
};
pub use element::{Element, ElementType};
pub use error::{Error, Mismatch};
pub use format::{FP4, Format, NF4};
pub use quantize::{dequantize, quantize};
pub use view::{AbsmaxView, BlocksView};

/// The README's examples are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
