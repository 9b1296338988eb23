//! CUDA sources and the images compiled from them.
