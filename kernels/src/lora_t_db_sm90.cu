// Gradients of low-rank adapters in one pass over dy, as lora.cu, on Hopper, for up to three layers that share an input (q, k and v;
// gate and up; one alone):
//
//   t = s dy B,  dB += s dyᵀ h       dy [rows, n] with a pitch of ld, B [n, r]; h and t [rows, first .. first + r] of one matrix each
//
// r is 8 or 16, n, ld, first and the pitches of h and t multiples of 8, first + r at most 64, dy, B, h, t and dB on 16 bytes; n = 0 where
// there is no such layer.
//
// Tensor maps (16-bit, dims (columns, 1, rows), 128-byte swizzle, zeros outside), boxes (64, 1, 64): the dy, and h of all.
//
// With U = Σ ceil(n / 128) units, W units a block (4 to 8), C = ceil(U / W) and S shares of the rows, a multiple of 2:
// lora_t_db_sm90_T (units = W): cluster of 2 (as compiled), block 288, grid S · C, dynamic shared memory 188560 bytes; partials F32: for
// each block and each part that it has columns of [rows, 16] (t), then [S / 2, 128 U, 16] (dB). lora_t_db_sum_sm90_T adds them up in a
// fixed order (units = W, shares = S / 2): block 256, grid ceil((4 · rows · parts up to 32 + 2048 U) / 256). Both may be launched early: B is read before
// the wait.
//
// Bytes: dy, and the partial sums twice.

#include "common/lora_parts.cuh"

#define PART(I) \
    { \
        &dy##I, b##I, n##I, r##I, first##I \
    }
#define GRADIENT(I) \
    { \
        db##I, scale##I, n##I, r##I, first##I \
    }

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(288, 1)
    lora_t_db_sm90_f16(float *partials, const __grid_constant__ TensorMap dy0, const __grid_constant__ TensorMap dy1,
                       const __grid_constant__ TensorMap dy2, const f16 *b0, const f16 *b1, const f16 *b2,
                       const __grid_constant__ TensorMap h, u32 n0, u32 n1, u32 n2, u32 r0, u32 r1, u32 r2, u32 first0, u32 first1,
                       u32 first2, u32 rows, u32 units) {
    const Part<f16> parts[PARTS] = {PART(0), PART(1), PART(2)};
    parts_t_db<f16, 7, 2>(partials, parts, h, rows, units);
}

extern "C" __global__ void __launch_bounds__(256)
    lora_t_db_sum_sm90_f16(f16 *t, float *db0, float *db1, float *db2, const float *partials, float scale0, float scale1,
                           float scale2, u32 n0, u32 n1, u32 n2, u32 r0, u32 r1, u32 r2, u32 first0, u32 first1, u32 first2,
                           u32 rows, u32 ld_t, u32 units, u32 shares) {
    const Gradient parts[PARTS] = {GRADIENT(0), GRADIENT(1), GRADIENT(2)};
    parts_sum(t, partials, parts, rows, ld_t, units, shares);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(288, 1)
    lora_t_db_sm90_bf16(float *partials, const __grid_constant__ TensorMap dy0, const __grid_constant__ TensorMap dy1,
                       const __grid_constant__ TensorMap dy2, const bf16 *b0, const bf16 *b1, const bf16 *b2,
                       const __grid_constant__ TensorMap h, u32 n0, u32 n1, u32 n2, u32 r0, u32 r1, u32 r2, u32 first0, u32 first1,
                       u32 first2, u32 rows, u32 units) {
    const Part<bf16> parts[PARTS] = {PART(0), PART(1), PART(2)};
    parts_t_db<bf16, 7, 2>(partials, parts, h, rows, units);
}

extern "C" __global__ void __launch_bounds__(256)
    lora_t_db_sum_sm90_bf16(bf16 *t, float *db0, float *db1, float *db2, const float *partials, float scale0, float scale1,
                            float scale2, u32 n0, u32 n1, u32 n2, u32 r0, u32 r1, u32 r2, u32 first0, u32 first1, u32 first2,
                            u32 rows, u32 ld_t, u32 units, u32 shares) {
    const Gradient parts[PARTS] = {GRADIENT(0), GRADIENT(1), GRADIENT(2)};
    parts_sum(t, partials, parts, rows, ld_t, units, shares);
}
