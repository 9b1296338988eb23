// Gradients of a low-rank adapter beside a linear layer, in one pass over dy:
//
//   t = scale · dy B,  dB += scale · dyᵀ h        dy [rows, n], B [n, r], h and t [rows, r], dB F32 [n, r]
//
// dy, h and t have pitches (ld) of their own, so that [x | h] and [dy | t] can be rows of one buffer; B and dB are dense. 16-bit
// types: f32 goes through the general products, and so do x Aᵀ and tᵀ x, which cuBLAS does at the speed of reading x. Beyond
// r = 16 dy is read once for each 16 columns, and two general products are as fast.
//
// Blocks (common/lora.cuh) leave partial sums, which lora_t_db_sum adds up in a fixed order. Any sizes; 16-byte accesses where
// sizes, pitches and pointers allow.
//
// With C = ceil(n / 512), P = ceil(r / 16) and S shares of the rows: lora_t_db_T: block 128, grid S · C · P, dynamic shared
// memory 58880 bytes; partials F32: [C, rows, 16 P] for t, then [S, n, 16 P] for dB. lora_t_db_sum_T (blocks = C, shares = S):
// block 256, grid ceil((rows + n) · P / 16). Take S = the greatest at most ceil(rows / 16) with S · C · P <= 2 blocks a
// multiprocessor, at least 1. On Hopper lora_t_db_sm90.cu serves ranks of 8 and 16.
//
// Bytes: dy, and the partial sums twice.

#include "common/lora.cuh"

template <typename T>
__device__ __forceinline__ void t_db(float *partials, const T *dy, const T *b, const T *h, u32 rows, u32 n, u32 r, u32 ld_dy,
                                     u32 ld_h) {
    const Operands<T> of = {dy, b, h, rows, n, r, ld_dy, ld_h, r % 8 == 0 && ld_h % 8 == 0 && aligned16(h)};
    float *db_partials = partials + u64((n + 511) / 512) * rows * ((r + 15) / 16 * 16);
    if (n % 8 == 0 && ld_dy % 8 == 0 && aligned16(dy))
        products<true, 4, 3>(partials, db_partials, of);
    else
        products<false, 4, 3>(partials, db_partials, of);
}

// Σ of `count` partial sums, `stride` apart, in their order.
__device__ __forceinline__ float sum_of(const float *partials, u32 count, u64 stride) {
    constexpr u32 BATCH = 16;
    float sum = 0;
    for (u32 first = 0; first < count; first += BATCH) {
        float batch[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) batch[i] = first + i < count ? partials[(first + i) * stride] : 0.0f;
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) sum += batch[i];
    }
    return sum;
}

template <typename T>
__device__ __forceinline__ void t_db_sum(T *t, float *db, const float *partials, float scale, u32 rows, u32 n, u32 r, u32 ld_t,
                                         u32 blocks, u32 shares) {
    const u32 pitch = (r + 15) / 16 * 16;
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x, row = i / pitch, size = u64(rows) * pitch;
    const u32 q = u32(i - row * pitch);
    if (q >= r) return;
    if (row < rows)
        t[row * ld_t + q] = from_f32<T>(scale * sum_of(partials + i, blocks, size));
    else if (row - rows < n)
        db[(row - rows) * r + q] += scale * sum_of(partials + blocks * size + (i - size), shares, u64(n) * pitch);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    lora_t_db_f16(float *partials, const f16 *dy, const f16 *b, const f16 *h, u32 rows, u32 n, u32 r, u32 ld_dy, u32 ld_h) {
    t_db(partials, dy, b, h, rows, n, r, ld_dy, ld_h);
}

extern "C" __global__ void __launch_bounds__(256)
    lora_t_db_sum_f16(f16 *t, float *db, const float *partials, float scale, u32 rows, u32 n, u32 r, u32 ld_t, u32 blocks,
                      u32 shares) {
    t_db_sum(t, db, partials, scale, rows, n, r, ld_t, blocks, shares);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(128, 2)
    lora_t_db_bf16(float *partials, const bf16 *dy, const bf16 *b, const bf16 *h, u32 rows, u32 n, u32 r, u32 ld_dy, u32 ld_h) {
    t_db(partials, dy, b, h, rows, n, r, ld_dy, ld_h);
}

extern "C" __global__ void __launch_bounds__(256)
    lora_t_db_sum_bf16(bf16 *t, float *db, const float *partials, float scale, u32 rows, u32 n, u32 r, u32 ld_t, u32 blocks,
                      u32 shares) {
    t_db_sum(t, db, partials, scale, rows, n, r, ld_t, blocks, shares);
}
#endif
