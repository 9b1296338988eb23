//! Where CUDA sources and the images compiled from them will live; the CPU needs none.

#![forbid(unsafe_code)]
