// What the Hopper attention kernels share: copies of tiles by the copy engine, and rows of results from registers to memory.
#pragma once

#include "common/attention.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

// ROWS rows from `token` of a head into a tile [D / 64][ROWS][64].
template <int D, int ROWS>
__device__ __forceinline__ void load_box(u32 tile, const TensorMap &map, u32 barrier, u32 head, u32 token) {
#pragma unroll
    for (u32 c = 0; c < D / 64; c++) tma_load(tile + c * (ROWS * 128), map, barrier, c * 64, head, token);
}

// Rows from..to of such a tile become zeros, by the 128 threads of a warpgroup: they are another document's, and 0 times them
// must be 0. Warpgroups that share a tile each write all of its zeros and wait for their own alone: what another one writes
// under their products is the same zeros.
template <int D, int ROWS>
__device__ __forceinline__ void zero_rows(u32 tile, u32 from, u32 to) {
    for (u32 c = from * 8 + threadIdx.x % 128; c < to * 8; c += 128)
#pragma unroll
        for (u32 d = 0; d < D / 64; d++) store16_zero(tile + d * (ROWS * 128) + c * 16);
}

// Rows row and row + 8 (this thread's, below `len`) of C [64, D], times their factor, in T, to columns col0.. of a head's `cols`.
template <typename T, int D>
__device__ __forceinline__ void store_rows(T *out, u64 stride, const float (&c)[D / 2], float upper, float lower, u32 row,
                                           u32 len, u32 cols, u32 col0) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        const bool valid = row + r * 8 < len;
        const float factor = r ? lower : upper;
        T *to = out + (row + r * 8) * stride;
#pragma unroll
        for (u32 g = 0; g < D / 32; g++) {
            u32 x[4];
#pragma unroll
            for (u32 b = 0; b < 4; b++) {
                const u32 e = 16 * g + 4 * b + 2 * r;
                x[b] = pack2<T>(c[e] * factor, c[e + 1] * factor);
            }
            transpose4(x, lane);
            const u32 column = col0 + g * 32 + lane % 4 * 8;
            if (valid && column < cols) *reinterpret_cast<uint4 *>(to + column) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}

// Turns gradients of queries and keys back to before their rotary embedding, all D dimensions of a head (rope.cu): cos and sin F32
// [positions, D / 2], positions of the stream's tokens. cos null: they stay.
struct Turn {
    const u32 *positions;
    const float *cos;
    const float *sin;

    // Where the tables begin for this thread's columns of a row of C; beyond the document for its last token.
    template <int D>
    __device__ __forceinline__ u64 at(u32 begin, u32 row, u32 len) const {
        return u64(positions[begin + min(row, len - 1)]) * (D / 2) + threadIdx.x % 4 * 2;
    }
};

// Two columns of the first half of a head, and those that they are paired with.
__device__ __forceinline__ void turn_back(float *a, float *b, float2 cos, float2 sin) {
    const float first = a[0] * cos.x + b[0] * sin.x, second = a[1] * cos.y + b[1] * sin.y;
    b[0] = b[0] * cos.x - a[0] * sin.x;
    b[1] = b[1] * cos.y - a[1] * sin.y;
    a[0] = first;
    a[1] = second;
}
