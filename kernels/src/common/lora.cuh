// t and dB of a low-rank adapter in one pass over dy: what lora.cu is made of.
//
// A block of WARPS warps takes 128 WARPS columns of dy, 16 of r, and a share of the rows, 16 at a time through STAGES buffers in
// shared memory. Each warp holds its 128 columns' rows of B and sums of dB in registers, all products being mma of 16 x 8 x 16
// with f32 sums; the sums of t are added up over the warps in shared memory.
#pragma once

#include "common/mma.cuh"
#include "common/vec.cuh"

// Eight values to shared memory; zeros beyond the first `valid`.
template <bool WHOLE, typename T>
__device__ __forceinline__ void copy_eight(u32 to, const T *from, i32 valid) {
    if constexpr (WHOLE) {
        copy16(to, from, valid > 0);
    } else {
        u32 word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            word[i] = 2 * i < valid ? from[2 * i].bits : 0u;
            if (2 * i + 1 < valid) word[i] |= u32(from[2 * i + 1].bits) << 16;
        }
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                     : "memory");
    }
}

// Rows of a step; bytes of a warp's share of it, and of its rows of h.
constexpr u32 DEPTH = 16, WARP_BYTES = DEPTH * 256, H_BYTES = DEPTH * 32;

template <typename T>
struct Operands {
    const T *dy, *b, *h;
    u32 rows, n, r, ld_dy, ld_h;
    bool h_whole;
};

// 16 rows of this warp's 128 columns of dy, and (one warp) of 16 columns of h, to shared memory.
template <bool WHOLE, u32 WARPS, typename T>
__device__ __forceinline__ void fetch(u32 stage, const Operands<T> &of, u64 row, u32 column, u32 rank) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 line = i * 2 + lane / 16, chunk = lane % 16;
        const u32 to = stage + warp * WARP_BYTES + line * 256 + (chunk ^ (line & 7)) * 16;
        const T *from = of.dy + (row + line) * of.ld_dy + column + chunk * 8;
        const i32 valid = row + line < of.rows ? i32(of.n) - i32(column + chunk * 8) : 0;
        copy_eight<WHOLE>(to, from, valid);
    }
    if (warp == 0) {
        const u32 line = lane / 2, chunk = lane % 2;
        const u32 to = stage + WARPS * WARP_BYTES + line * 32 + (chunk ^ (line / 4 & 1)) * 16;
        const T *from = of.h + (row + line) * of.ld_h + rank + chunk * 8;
        const i32 valid = row + line < of.rows ? i32(of.r) - i32(rank + chunk * 8) : 0;
        if (of.h_whole)
            copy_eight<true>(to, from, valid);
        else
            copy_eight<false>(to, from, valid);
    }
}

// Partials: t [blocks of columns, rows, pitch], dB [shares, n, pitch], pitch = r rounded up to 16.
template <bool WHOLE, u32 WARPS, u32 STAGES, typename T>
__device__ __forceinline__ void products(float *t_partials, float *db_partials, const Operands<T> &of) {
    constexpr u32 WIDTH = WARPS * 128, STAGE_BYTES = WARPS * WARP_BYTES + H_BYTES;
    extern __shared__ __align__(16) u8 memory[];
    float(*t_slots)[8][32] = reinterpret_cast<float(*)[8][32]>(memory + STAGES * STAGE_BYTES);
    const u32 base = shared_address(memory), warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 passes = (of.r + 15) / 16, blocks = (of.n + WIDTH - 1) / WIDTH, pitch = passes * 16;
    const u32 rank = blockIdx.x % passes * 16, block = blockIdx.x / passes % blocks;
    const u32 share = blockIdx.x / (passes * blocks), shares = gridDim.x / (passes * blocks);
    const u32 column = block * WIDTH + warp * 128;
    const u32 steps = (of.rows + DEPTH - 1) / DEPTH, each = (steps + shares - 1) / shares;
    const u32 begin = min(share * each, steps), end = min(begin + each, steps);

    // The t of a step, once all warps have left theirs: each thread of four warps has two values of it.
    const auto add_up = [&](u32 step) {
        if (warp >= 4) return;
        float sum[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (u32 w = 0; w < WARPS; ++w) sum[i] += t_slots[step % 2 * WARPS + w][warp * 2 + i][lane];
        const u64 row = u64(step) * DEPTH + warp % 2 * 8 + g;
        if (row < of.rows) {
            float *to = t_partials + (u64(block) * of.rows + row) * pitch + rank + warp / 2 * 8 + t * 2;
            *reinterpret_cast<float2 *>(to) = make_float2(sum[0], sum[1]);
        }
    };
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; ++i) {
        if (begin + i < end) fetch<WHOLE, WARPS>(base + i * STAGE_BYTES, of, u64(begin + i) * DEPTH, column, rank);
        copy_commit();
    }
    // B of this warp's columns.
    u32 right[8][2][2];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const u32 n = column + i / 4 * 16 + i % 2 * 8 + t * 2, q = rank + i / 2 % 2 * 8 + g;
        u32 word = n < of.n && q < of.r ? of.b[u64(n) * of.r + q].bits : 0u;
        if (n + 1 < of.n && q < of.r) word |= u32(of.b[u64(n + 1) * of.r + q].bits) << 16;
        right[i / 4][i / 2 % 2][i % 2] = word;
    }
    float c[8][2][4] = {};
    u32 stage = 0, free_stage = STAGES - 1;
    for (u32 step = begin; step < end; ++step) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < end)
            fetch<WHOLE, WARPS>(base + free_stage * STAGE_BYTES, of, u64(step + STAGES - 1) * DEPTH, column, rank);
        copy_commit();
        if (step > begin) add_up(step - 1);

        const u32 at = base + stage * STAGE_BYTES, tile = at + warp * WARP_BYTES;
        u32 thin[4];
        {
            // Transposed: (columns 0..8, rows 0..8), (8..16, 0..8), (0..8, 8..16), (8..16, 8..16).
            const u32 line = lane / 16 * 8 + lane % 8, chunk = lane / 8 % 2;
            load_matrices_transposed(thin, at + WARPS * WARP_BYTES + line * 32 + (chunk ^ (line / 4 & 1)) * 16);
        }
        float ct[2][4] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const u32 line = lane & 15, chunk = i * 2 + lane / 16;
            const u32 address = tile + line * 256 + (chunk ^ (line & 7)) * 16;
            u32 left[4];
            load_matrices(left, address);
            mma<T>(ct[0], left, right[i][0][0], right[i][0][1]);
            mma<T>(ct[1], left, right[i][1][0], right[i][1][1]);
            // Transposed: (columns 0..8, rows 0..8), (0..8, 8..16), (8..16, 0..8), (8..16, 8..16).
            u32 turned[4];
            load_matrices_transposed(turned, address);
            const u32 top[4] = {turned[0], turned[2], turned[1], turned[3]};
            mma<T>(c[i][0], top, thin[0], thin[2]);
            mma<T>(c[i][1], top, thin[1], thin[3]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) t_slots[step % 2 * WARPS + warp][i][lane] = ct[i / 4][i % 4];
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        free_stage = free_stage + 1 == STAGES ? 0 : free_stage + 1;
    }
    __syncthreads();
    if (begin < end) add_up(end - 1);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const u32 n = column + i / 4 * 16 + i % 2 * 8 + g, q = rank + i / 2 % 2 * 8 + t * 2;
        float *to = db_partials + (u64(share) * of.n + n) * pitch + q;
        if (n < of.n) *reinterpret_cast<float2 *>(to) = make_float2(c[i / 4][i / 2 % 2][i % 2 * 2], c[i / 4][i / 2 % 2][i % 2 * 2 + 1]);
    }
}
