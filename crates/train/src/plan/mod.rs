//! What a run will take, before anything is loaded.
//!
//! The step is run on a device that only counts ([`CudaDevice::dry`](nibble_tensor::cuda::CudaDevice::dry)): the code of the real
//! one, with its allocations, on shapes alone. So the predicted peak is that of the code as it is, for any model, adapter,
//! optimizer and kind of checkpointing, and needs no formula beside it.

mod fit;
mod footprint;
mod gpu;
mod nearest;
mod place;
mod report;
mod shapes;
mod sizes;
mod speed;
mod streamed;

pub use fit::{MOST_TOKENS, largest_batch, longest, needed};
pub use footprint::{COMPONENTS, Document, Footprint, HostBytes, Setup, footprint};
pub use gpu::{GPUS, Gpu, RESERVED, find_gpu, nearest_gpu};
pub use nearest::{Nearest, nearest};
pub use place::{FEW_PAGES, Place};
pub use report::{MODES, Method, MethodPlan, Mode, Request};
pub use shapes::{NAMED_SIZES, named_size};
pub use sizes::{SizeRow, size_table};
pub use speed::tokens_per_second;
pub use streamed::{Streamed, can_stream, fewest_on_host};
