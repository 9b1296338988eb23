// Products of linear layers over many tokens on Hopper, rounded once; see common/product.cuh.
//
//   product_sm90         y [m, n] = x [m, k] w [n, k]ᵀ
//   product_turned_sm90  y [m, n] = x [m, k] w [k, n]
//
// `oct` before `sm90`: by clusters of eight. Maps: boxes of 64 columns; of 128 rows of x (oct: 64), 128 rows of w (oct, and turned: 64) and
// 64 rows of y. Launch: as product.cuh says; may be launched early. With `ahead` other than null it also widens a weight, as `job` says
// (common/widen.cuh).
//
// Flops: 2 m n k. Bytes: x, w and y once, more of x and w than the second-level cache keeps.
// spills: product_sm90_f16 24 loop bounds, between tiles
// spills: product_oct_sm90_f16 32 loop bounds, between tiles
// spills: product_turned_sm90_f16 24 loop bounds, between tiles
// spills: product_turned_oct_sm90_f16 32 loop bounds, between tiles
// spills: product_sm90_bf16 24 loop bounds, between tiles
// spills: product_oct_sm90_bf16 32 loop bounds, between tiles
// spills: product_turned_sm90_bf16 24 loop bounds, between tiles
// spills: product_turned_oct_sm90_bf16 32 loop bounds, between tiles
#include "common/product.cuh"

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    product_sm90_f16(const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                     const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, f16 *ahead,
                     const __grid_constant__ Widen job) {
    Plain<f16> ends(y);
    product<f16, Lies::ROWS, Two>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    product_turned_sm90_f16(const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                            const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, f16 *ahead,
                            const __grid_constant__ Widen job) {
    Plain<f16> ends(y);
    product<f16, Lies::TURNED, Two>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    product_sm90_bf16(const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                      const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, bf16 *ahead,
                      const __grid_constant__ Widen job) {
    Plain<bf16> ends(y);
    product<bf16, Lies::ROWS, Two>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    product_turned_sm90_bf16(const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                             const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, bf16 *ahead,
                             const __grid_constant__ Widen job) {
    Plain<bf16> ends(y);
    product<bf16, Lies::TURNED, Two>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(384, 1)
    product_oct_sm90_f16(const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                         const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, f16 *ahead,
                         const __grid_constant__ Widen job) {
    Plain<f16> ends(y);
    product<f16, Lies::ROWS, Eight>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(384, 1)
    product_turned_oct_sm90_f16(const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                                const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, f16 *ahead,
                                const __grid_constant__ Widen job) {
    Plain<f16> ends(y);
    product<f16, Lies::TURNED, Eight>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(384, 1)
    product_oct_sm90_bf16(const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                          const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, bf16 *ahead,
                          const __grid_constant__ Widen job) {
    Plain<bf16> ends(y);
    product<bf16, Lies::ROWS, Eight>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(384, 1)
    product_turned_oct_sm90_bf16(const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                                 const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, bf16 *ahead,
                                 const __grid_constant__ Widen job) {
    Plain<bf16> ends(y);
    product<bf16, Lies::TURNED, Eight>(ends, x, w, share, k, {ahead, job});
}
