// Gradients of a low-rank adapter in one pass over dy, as lora.cu, on Hopper: wider blocks, whose dB are added up in clusters of
// four, leave a third of the partial sums. n and the pitch of dy are multiples of 8, dy on 16 bytes.
//
// With C = ceil(n / 1024), P = ceil(r / 16) and S shares of the rows, a multiple of 4: lora_t_db_sm90_T: cluster of 4 (as compiled),
// block 256, grid S · C · P, dynamic shared memory 149504 bytes; partials F32: [C, rows, 16 P] for t, then [S / 4, n, 16 P] for dB,
// for lora_t_db_sum_T with blocks = C, shares = S / 4. Take S · C · P at most seven eighths of the multiprocessors: clusters are
// placed in groups of them that they need not divide.
//
// Bytes: dy, and the partial sums twice.

#include "common/lora.cuh"

template <typename T>
__device__ __forceinline__ void t_db(float *partials, const T *dy, const T *b, const T *h, u32 rows, u32 n, u32 r, u32 ld_dy,
                                     u32 ld_h) {
    const Operands<T> of = {dy, b, h, rows, n, r, ld_dy, ld_h, r % 8 == 0 && ld_h % 8 == 0 && aligned16(h)};
    products<true, 8, 4, 4>(partials, partials + u64((n + 1023) / 1024) * rows * ((r + 15) / 16 * 16), of);
}

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(256, 1)
    lora_t_db_sm90_f16(float *partials, const f16 *dy, const f16 *b, const f16 *h, u32 rows, u32 n, u32 r, u32 ld_dy, u32 ld_h) {
    t_db(partials, dy, b, h, rows, n, r, ld_dy, ld_h);
}

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(256, 1)
    lora_t_db_sm90_bf16(float *partials, const bf16 *dy, const bf16 *b, const bf16 *h, u32 rows, u32 n, u32 r, u32 ld_dy,
                        u32 ld_h) {
    t_db(partials, dy, b, h, rows, n, r, ld_dy, ld_h);
}
