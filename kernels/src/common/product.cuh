// A product of many rows x [m, k] for Hopper, y [m, n] = x wᵀ with the weights of a layer forward, w [n, k], or y = x w with those of
// a layer backward (`TURNED` 1), w [k, n].
//
// Tiles are made as wᵀ's rows times x's: 64 columns of y are the 64 rows of an instruction, tokens its 256 columns (the other way
// round takes 2 % more energy for the same sums, and a large product is as fast as the power that a card may draw). Clusters of two
// blocks take tiles of 256 columns x 256 tokens in turn: each block 128 columns, all tokens. One thread of a block has the copy engine bring steps of 64 in k
// through a ring of buffers: its columns of w, and half of the tokens to both blocks. Two warpgroups multiply; what they leave goes to
// memory beside the first steps of their next tile.
//
// Launch: block 384, any even grid, dynamic shared memory PRODUCT_BYTES.
#pragma once

#include "common/cluster.cuh"
#include "common/early.cuh"
#include "common/mma.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"

// Columns of y and tokens of a block's tile; steps of k in a buffer; buffers; tiles along n that are taken together.
constexpr u32 TILE_N = 128, TILE_M = 256, DEPTH = 64, STAGES = 4, BAND = 8;
constexpr u32 W_BYTES = TILE_N * DEPTH * 2, X_BYTES = TILE_M * DEPTH * 2, STAGE_BYTES = W_BYTES + X_BYTES;
// 64 x 64 results on their way to memory, two a warpgroup.
constexpr u32 OUT_BYTES = 64 * 64 * 2, OUT_AT = STAGES * STAGE_BYTES, BARRIERS_AT = OUT_AT + 4 * OUT_BYTES;
constexpr u32 PRODUCT_BYTES = BARRIERS_AT + 2 * STAGES * 8;

// The tiles of a cluster, one after another: bands of BAND along n, token by token.
struct Tiles {
    u32 high, wide, next, step, m, n;

    __device__ __forceinline__ Tiles(u32 m_size, u32 n_size)
        : high((n_size + 2 * TILE_N - 1) / (2 * TILE_N)), wide((m_size + TILE_M - 1) / TILE_M), next(blockIdx.x / 2), step(gridDim.x / 2) {}

    // The first token and column of the next tile's share of this block; false after the last.
    __device__ __forceinline__ bool take() {
        if (next >= high * wide) return false;
        const u32 band = next / (BAND * wide), rows = min(BAND, high - band * BAND), rest = next - band * BAND * wide;
        n = ((band * BAND + rest % rows) * 2 + cluster_rank()) * TILE_N, m = rest / rows * TILE_M;
        next += step;
        return true;
    }
};

struct Buffers {
    u32 ring, out, full, empty;

    __device__ __forceinline__ explicit Buffers(u32 base)
        : ring(base), out(base + OUT_AT), full(base + BARRIERS_AT), empty(full + STAGES * 8) {}
    __device__ __forceinline__ u32 w(u32 stage) const { return ring + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 x(u32 stage) const { return ring + stage * STAGE_BYTES + W_BYTES; }
};

// All steps of all tiles; one thread.
template <u32 TURNED>
__device__ __forceinline__ void bring(const Buffers &buffers, Tiles tiles, const TensorMap &x, const TensorMap &w, u32 k) {
    const u32 rank = cluster_rank();
    Ring<STAGES> ring;
    while (tiles.take())
        for (u32 at = 0; at < k; at += DEPTH, ring.next()) {
            const u32 barrier = buffers.full + ring.index * 8, to = buffers.w(ring.index);
            mbarrier_wait(buffers.empty + ring.index * 8, ring.parity ^ 1);
            mbarrier_expect(barrier, STAGE_BYTES);
            if constexpr (TURNED) {
                tma_load(to, w, barrier, tiles.n, 0, at);
                tma_load(to + W_BYTES / 2, w, barrier, tiles.n + 64, 0, at);
            } else {
                tma_load(to, w, barrier, at, 0, tiles.n);
            }
            tma_load_both(buffers.x(ring.index) + rank * (X_BYTES / 2), x, barrier, at, 0, tiles.m + rank * (TILE_M / 2));
        }
}

// A tile's results on their way from a warpgroup's registers to memory: 64 tokens at a time, beside the first steps of the next tile.
template <typename T>
struct Results {
    static constexpr u32 CHUNKS = TILE_M / 64;

    u32 pair[TILE_M / 4], m, n;
    bool waiting = false;

    __device__ __forceinline__ void take(const float (&c)[TILE_M / 2], const Tiles &tiles) {
#pragma unroll
        for (u32 i = 0; i < TILE_M / 4; i++) pair[i] = pack2<T>(c[2 * i], c[2 * i + 1]);
        m = tiles.m, n = tiles.n, waiting = true;
    }

    // Tokens 64 j on, through buffer j % 2 of the warpgroup's own.
    __device__ __forceinline__ void leave(const TensorMap &y, u32 out, u32 j) const {
        const u32 group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const u32 buffer = out + (group * 2 + j % 2) * OUT_BYTES;
        if (threadIdx.x % 128 == 0) bulk_wait_read<1>();
        barrier_sync(1 + group, 128);
#pragma unroll
        for (u32 g = 0; g < 4; g++) {
            const u32 *x = pair + j * 16 + g * 4, token = g * 16 + lane / 16 * 8 + lane % 8, pack = warp * 2 + lane / 8 % 2;
            store_matrices_transposed(buffer + token * 128 + (pack ^ token % 8) * 16, x[0], x[1], x[2], x[3]);
        }
        fence_async();
        barrier_sync(1 + group, 128);
        if (threadIdx.x % 128 == 0) {
            tma_store(y, buffer, n + group * 64, 0, m + j * 64);
            bulk_commit();
        }
    }
};

// The sums of a warpgroup's tiles, from the buffers.
template <typename T, u32 TURNED>
struct Multiplier {
    const Buffers &buffers;
    Ring<STAGES> ring;
    u32 before;  // the buffer of the step before

    // A tile; `beside(j)` is done while the step numbered j is under way.
    template <u32 COUNT, typename F>
    __device__ __forceinline__ void run(float (&c)[TILE_M / 2], u32 k, F beside) {
        const u32 steps = k / DEPTH, rest = (k % DEPTH + 15) / 16;
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) {
            if (i < steps) step(c, DEPTH / 16, i > 0);
            beside(i);
        }
#pragma unroll 1
        for (u32 i = COUNT; i < steps; i++) step(c, DEPTH / 16, true);
        if (rest) step(c, rest, steps > 0);
        wgmma_wait<0>();
        hold(c);
        release();
    }

    __device__ __forceinline__ void release() const {
        if (threadIdx.x % 32 < 2) mbarrier_arrive_at(buffers.empty + before * 8, threadIdx.x % 32);
    }

    // `deep` products of 16 in k, left under way; those of the step before are done.
    __device__ __forceinline__ void step(float (&c)[TILE_M / 2], u32 deep, bool add) {
        const u32 w = buffers.w(ring.index) + threadIdx.x / 128 * (W_BYTES / 2), x = buffers.x(ring.index);
        mbarrier_wait(buffers.full + ring.index * 8, ring.parity);
        hold(c);
        wgmma_fence();
#pragma unroll
        for (u32 kk = 0; kk < DEPTH / 16; kk++) {
            if (kk >= deep) break;
            const u64 left = TURNED ? mn_major(w + kk * 2048, 0) : k_major(w + kk * 32);
            wgmma<T, TURNED, 0>(c, left, k_major(x + kk * 32), add || kk > 0);
        }
        wgmma_commit();
        hold(c);
        wgmma_wait<1>();
        if (add) release();
        before = ring.index;
        ring.next();
    }
};

template <typename T, u32 TURNED>
__device__ __forceinline__ void product(const TensorMap &y, const TensorMap &x, const TensorMap &w, u32 m, u32 n, u32 k) {
    extern __shared__ __align__(1024) u8 memory[];
    const Buffers buffers(shared_address(memory));
    if (threadIdx.x == 0) {
        tma_prefetch(x), tma_prefetch(w), tma_prefetch(y);
        for (u32 i = 0; i < STAGES; i++) mbarrier_init(buffers.full + i * 8, 1), mbarrier_init(buffers.empty + i * 8, 16);
        mbarrier_init_fence();
    }
    __syncwarp();
    cluster_sync();
    begin_early();
    Tiles tiles(m, n);
    if (threadIdx.x >= 256) {
        registers_fewer<24>();
        if (threadIdx.x == 256) bring<TURNED>(buffers, tiles, x, w, k);
    } else {
        registers_more<240>();
        Multiplier<T, TURNED> multiplier = {buffers, {}, 0};
        Results<T> results;
        float c[TILE_M / 2];
        const auto leave = [&](u32 j) {
            if (results.waiting) results.leave(y, buffers.out, j);
        };
        while (tiles.take()) {
            multiplier.template run<Results<T>::CHUNKS>(c, k, leave);
            results.take(c, tiles);
        }
#pragma unroll
        for (u32 j = 0; j < Results<T>::CHUNKS; j++) leave(j);
        if (threadIdx.x % 128 == 0) bulk_wait();
    }
    __syncwarp();
    cluster_sync();
}
