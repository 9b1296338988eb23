// The products around a gated unit on Hopper, with the unit in their ends; see common/product_gated.cuh.
//
//   product_gated_sm90     [gate | up] [m, 2 f] = x [m, k] w [2 f, k]ᵀ, the rows of gate's weight before those of up's, and
//                          y [m, f] = act(gate) · up. f is a multiple of 8.
//   product_gated_bwd_sm90 dy [m, n] = x [m, k] w [k, n] is not written but dgate = dy · up · act'(gate), dup = dy · act(gate),
//                          which may lie over gate and up; and with `again` y = act(gate) · up.
//
// act: SiLU (_silu) or GELU by tanh (_gelu_tanh). `oct` before `sm90`: by clusters of eight.
//
// Maps: boxes of 64 columns of x, of 128 rows (oct: 64); gated: w as [k, 8, 2, f / 8] in boxes of 64 x 8 x 2 x 8 (oct: 4), results in
// boxes of 32 columns, 64 rows; bwd: all other boxes have 64 columns and 64 rows. Launch: as product.cuh says; may be launched early.
// With `ahead` other than null they also widen a weight, as `job` says (common/widen.cuh).
//
// Bytes: x, w; gated: gate, up and y once; bwd: gate, up and their gradients, and y, once.
// spills: product_gated_sm90_f16_silu 24 loop bounds, between tiles
// spills: product_gated_sm90_f16_gelu_tanh 24 loop bounds, between tiles
// spills: product_gated_sm90_bf16_silu 24 loop bounds, between tiles
// spills: product_gated_sm90_bf16_gelu_tanh 24 loop bounds, between tiles
// spills: product_gated_oct_sm90_f16_silu 24 loop bounds, between tiles
// spills: product_gated_oct_sm90_f16_gelu_tanh 24 loop bounds, between tiles
// spills: product_gated_oct_sm90_bf16_silu 24 loop bounds, between tiles
// spills: product_gated_oct_sm90_bf16_gelu_tanh 24 loop bounds, between tiles
// spills: product_gated_bwd_sm90_f16_silu 24 loop bounds, between tiles
// spills: product_gated_bwd_sm90_f16_gelu_tanh 80 loop bounds, between tiles
// spills: product_gated_bwd_oct_sm90_f16_silu 24 loop bounds, between tiles
// spills: product_gated_bwd_oct_sm90_f16_gelu_tanh 80 loop bounds, between tiles
// spills: product_gated_bwd_sm90_bf16_silu 24 loop bounds, between tiles
// spills: product_gated_bwd_sm90_bf16_gelu_tanh 80 loop bounds, between tiles
// spills: product_gated_bwd_oct_sm90_bf16_silu 24 loop bounds, between tiles
// spills: product_gated_bwd_oct_sm90_bf16_gelu_tanh 80 loop bounds, between tiles

#include "common/product_gated.cuh"

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    product_gated_sm90_f16_silu(const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up,
                                const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                                const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, f16 *ahead,
                                const __grid_constant__ Widen job) {
    Gated<f16, SILU> ends(gate, up, y);
    product<f16, Lies::PAIRED, Two>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    product_gated_bwd_sm90_f16_silu(const __grid_constant__ TensorMap dgate, const __grid_constant__ TensorMap dup,
                                    const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap gate,
                                    const __grid_constant__ TensorMap up, const __grid_constant__ TensorMap x,
                                    const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, u32 again,
                                    f16 *ahead, const __grid_constant__ Widen job) {
    GatedGradients<f16, SILU> ends(dgate, dup, y, gate, up, again);
    product<f16, Lies::TURNED, Two>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    product_gated_sm90_f16_gelu_tanh(const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up,
                                     const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                                     const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k,
                                     f16 *ahead, const __grid_constant__ Widen job) {
    Gated<f16, GELU_TANH> ends(gate, up, y);
    product<f16, Lies::PAIRED, Two>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    product_gated_bwd_sm90_f16_gelu_tanh(const __grid_constant__ TensorMap dgate, const __grid_constant__ TensorMap dup,
                                         const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap gate,
                                         const __grid_constant__ TensorMap up, const __grid_constant__ TensorMap x,
                                         const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k,
                                         u32 again, f16 *ahead, const __grid_constant__ Widen job) {
    GatedGradients<f16, GELU_TANH> ends(dgate, dup, y, gate, up, again);
    product<f16, Lies::TURNED, Two>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    product_gated_sm90_bf16_silu(const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up,
                                 const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                                 const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, bf16 *ahead,
                                 const __grid_constant__ Widen job) {
    Gated<bf16, SILU> ends(gate, up, y);
    product<bf16, Lies::PAIRED, Two>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    product_gated_bwd_sm90_bf16_silu(const __grid_constant__ TensorMap dgate, const __grid_constant__ TensorMap dup,
                                     const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap gate,
                                     const __grid_constant__ TensorMap up, const __grid_constant__ TensorMap x,
                                     const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, u32 again,
                                     bf16 *ahead, const __grid_constant__ Widen job) {
    GatedGradients<bf16, SILU> ends(dgate, dup, y, gate, up, again);
    product<bf16, Lies::TURNED, Two>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    product_gated_sm90_bf16_gelu_tanh(const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up,
                                      const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                                      const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k,
                                      bf16 *ahead, const __grid_constant__ Widen job) {
    Gated<bf16, GELU_TANH> ends(gate, up, y);
    product<bf16, Lies::PAIRED, Two>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    product_gated_bwd_sm90_bf16_gelu_tanh(const __grid_constant__ TensorMap dgate, const __grid_constant__ TensorMap dup,
                                          const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap gate,
                                          const __grid_constant__ TensorMap up, const __grid_constant__ TensorMap x,
                                          const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k,
                                          u32 again, bf16 *ahead, const __grid_constant__ Widen job) {
    GatedGradients<bf16, GELU_TANH> ends(dgate, dup, y, gate, up, again);
    product<bf16, Lies::TURNED, Two>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(384, 1)
    product_gated_oct_sm90_f16_silu(const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up,
                                    const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                                    const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k, f16 *ahead,
                                    const __grid_constant__ Widen job) {
    Gated<f16, SILU> ends(gate, up, y);
    product<f16, Lies::PAIRED, Eight>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(384, 1)
    product_gated_bwd_oct_sm90_f16_silu(const __grid_constant__ TensorMap dgate, const __grid_constant__ TensorMap dup,
                                        const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap gate,
                                        const __grid_constant__ TensorMap up, const __grid_constant__ TensorMap x,
                                        const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k,
                                        u32 again, f16 *ahead, const __grid_constant__ Widen job) {
    GatedGradients<f16, SILU> ends(dgate, dup, y, gate, up, again);
    product<f16, Lies::TURNED, Eight>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(384, 1)
    product_gated_oct_sm90_f16_gelu_tanh(const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up,
                                         const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                                         const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k,
                                         f16 *ahead, const __grid_constant__ Widen job) {
    Gated<f16, GELU_TANH> ends(gate, up, y);
    product<f16, Lies::PAIRED, Eight>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(384, 1)
    product_gated_bwd_oct_sm90_f16_gelu_tanh(const __grid_constant__ TensorMap dgate, const __grid_constant__ TensorMap dup,
                                             const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap gate,
                                             const __grid_constant__ TensorMap up, const __grid_constant__ TensorMap x,
                                             const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k,
                                             u32 again, f16 *ahead, const __grid_constant__ Widen job) {
    GatedGradients<f16, GELU_TANH> ends(dgate, dup, y, gate, up, again);
    product<f16, Lies::TURNED, Eight>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(384, 1)
    product_gated_oct_sm90_bf16_silu(const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up,
                                     const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                                     const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k,
                                     bf16 *ahead, const __grid_constant__ Widen job) {
    Gated<bf16, SILU> ends(gate, up, y);
    product<bf16, Lies::PAIRED, Eight>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(384, 1)
    product_gated_bwd_oct_sm90_bf16_silu(const __grid_constant__ TensorMap dgate, const __grid_constant__ TensorMap dup,
                                         const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap gate,
                                         const __grid_constant__ TensorMap up, const __grid_constant__ TensorMap x,
                                         const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k,
                                         u32 again, bf16 *ahead, const __grid_constant__ Widen job) {
    GatedGradients<bf16, SILU> ends(dgate, dup, y, gate, up, again);
    product<bf16, Lies::TURNED, Eight>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(384, 1)
    product_gated_oct_sm90_bf16_gelu_tanh(const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up,
                                          const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap x,
                                          const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k,
                                          bf16 *ahead, const __grid_constant__ Widen job) {
    Gated<bf16, GELU_TANH> ends(gate, up, y);
    product<bf16, Lies::PAIRED, Eight>(ends, x, w, share, k, {ahead, job});
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(384, 1)
    product_gated_bwd_oct_sm90_bf16_gelu_tanh(const __grid_constant__ TensorMap dgate, const __grid_constant__ TensorMap dup,
                                              const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap gate,
                                              const __grid_constant__ TensorMap up, const __grid_constant__ TensorMap x,
                                              const __grid_constant__ TensorMap w, const __grid_constant__ Share share, u32 k,
                                              u32 again, bf16 *ahead, const __grid_constant__ Widen job) {
    GatedGradients<bf16, GELU_TANH> ends(dgate, dup, y, gate, up, again);
    product<bf16, Lies::TURNED, Eight>(ends, x, w, share, k, {ahead, job});
}
