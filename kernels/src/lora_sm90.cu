// The products of a low-rank adapter that read the layer's input x [rows, k], on Hopper:
//
//   h = x Aᵀ        A [r, k], h [rows, r]; h goes to two places (`beside` may be null)
//   dA += tᵀ x      t [rows, r], dA F32 [r, k]
//
// r is at most 64 and, like k, a multiple of 8: A, t and dA of several adapters side by side are one matrix each.
//
// One thread of the last warp has the copy engine bring tiles of x [64 rows, 64 columns] (for dA 128 columns) and of A (t) through a ring
// of buffers; warpgroups multiply 64 rows (columns) each by wgmma, with f32 sums. The reduction, over k (rows), is dealt to the blocks of a
// cluster tile by tile in turn, so that what they read at a time lies side by side; they leave their sums in shared memory, and each
// adds up its share of the results, in the order of the blocks: results repeat bit for bit.
//
// Tensor maps (16-bit, dims (columns, 1, rows), 128-byte swizzle, zeros outside), boxes: x (64, 1, 64), A (64, 1, N); t for
// N = 64 the same as x, for N = 32 (32, 1, 64) and a 64-byte swizzle. N is the least of 32 and 64 from r on.
//
// Launch: lora_h_sm90_T_rN: cluster of 2 (as compiled), block 160, grid 2 ceil(rows / 64), shared bytes 98432;
// lora_da_sm90_T_rN_splitS: cluster of S, block 288, grid S ceil(k / 128), shared bytes 3 (16384 + 128 N) + 48. h may be
// launched early; dA is faster alone.
//
// Bytes: x once; A (t) once for each 64 rows (128 columns) of x, from L2; h twice, dA read and written.

#include "common/cluster.cuh"
#include "common/early.cuh"
#include "common/mma.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"

// Blocks of a cluster for h; buffers of a block for dA: three blocks a multiprocessor.
constexpr u32 H_SPLIT = 2, DA_STAGES = 3, LINE = 128;

// Buffers of `BYTES` in a ring, with their barriers behind them, which `WARPS` warps read.
template <u32 BYTES, u32 STAGES, u32 WARPS>
struct Buffers {
    u32 base;
    __device__ u32 at(u32 stage) const { return base + stage * BYTES; }
    __device__ u32 full(u32 stage) const { return base + STAGES * BYTES + stage * 8; }
    __device__ u32 empty(u32 stage) const { return full(STAGES + stage); }

    // Also lets the next launch begin, and waits for those before, where the kernel is launched early (h).
    __device__ __forceinline__ void init(const TensorMap &x, const TensorMap &other) const {
        if (threadIdx.x == 0) {
            tma_prefetch(x);
            tma_prefetch(other);
            for (u32 stage = 0; stage < STAGES; stage++) {
                mbarrier_init(full(stage), 1);
                mbarrier_init(empty(stage), WARPS);
            }
            mbarrier_init_fence();
        }
        launch_dependents();
        __syncthreads();
        wait_for_launches();
    }
};

// Runs `load` (one thread) and `multiply` (the warpgroups) over this block's share of the tiles. After it the buffers are free.
template <u32 SPLIT, u32 BYTES, u32 STAGES, u32 WARPS, typename Load, typename Multiply>
__device__ __forceinline__ void stream(const Buffers<BYTES, STAGES, WARPS> &buffers, u32 tiles, Load load, Multiply multiply) {
    Ring<STAGES> ring;
    if (threadIdx.x == 32 * WARPS) {
        for (u32 tile = cluster_rank(); tile < tiles; tile += SPLIT, ring.next()) {
            mbarrier_wait(buffers.empty(ring.index), ring.parity ^ 1);
            mbarrier_expect(buffers.full(ring.index), BYTES);
            load(tile, buffers.at(ring.index), buffers.full(ring.index));
        }
    } else if (threadIdx.x < 32 * WARPS) {
        for (u32 tile = cluster_rank(); tile < tiles; tile += SPLIT, ring.next()) {
            mbarrier_wait(buffers.full(ring.index), ring.parity);
            multiply(buffers.at(ring.index));
            if (threadIdx.x % 32 == 0) mbarrier_arrive(buffers.empty(ring.index));
        }
    }
    __syncwarp();
    __syncthreads();
}

// Buffers of a block for h: 96 KiB, so that a multiprocessor has two blocks.
template <u32 N>
constexpr u32 H_STAGES = N == 32 ? 8 : 6;

template <typename T, u32 N>
__device__ __forceinline__ void input_product(T *h, T *beside, const TensorMap &x, const TensorMap &a, u32 rows, u32 k, u32 r,
                                              u32 ld_h, u32 ld_beside) {
    extern __shared__ __align__(1024) u8 memory[];
    constexpr u32 X_BYTES = 64 * LINE, PITCH = N + 8, SPLIT = H_SPLIT, EACH = 64 / SPLIT;
    const Buffers<X_BYTES + N * LINE, H_STAGES<N>, 4> buffers = {shared_address(memory)};
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 first = blockIdx.x / SPLIT * 64;
    buffers.init(x, a);
    float c[N / 2] = {};
    stream<SPLIT>(
        buffers, (k + 63) / 64,
        [&](u32 tile, u32 to, u32 barrier) {
            tma_load(to, x, barrier, tile * 64, 0, first);
            tma_load(to + X_BYTES, a, barrier, tile * 64, 0, 0);
        },
        [&](u32 at) {
            hold(c);
            wgmma_fence();
#pragma unroll
            for (u32 kk = 0; kk < 4; kk++)
                wgmma<T, 0, 0>(c, k_major(at + kk * 32), k_major(at + X_BYTES + kk * 32), 1);
            wgmma_commit();
            wgmma_wait<0>();
            hold(c);
        });
    float *sums = reinterpret_cast<float *>(memory);
    if (warp < 4) {
        float *to = sums + (warp * 16 + lane / 4) * PITCH + lane % 4 * 2;
#pragma unroll
        for (u32 j = 0; j < N / 2; j += 4) {
            *reinterpret_cast<float2 *>(to + 2 * j) = make_float2(c[j], c[j + 1]);
            *reinterpret_cast<float2 *>(to + 8 * PITCH + 2 * j) = make_float2(c[j + 2], c[j + 3]);
        }
    }
    cluster_sync();
    for (u32 i = threadIdx.x; i < EACH * (N / 4); i += blockDim.x) {
        const u32 row = cluster_rank() * EACH + i / (N / 4), q = i % (N / 4) * 4;
        if (first + row >= rows || q >= r) continue;
        const float4 sum = cluster_sum<SPLIT>(buffers.base + (row * PITCH + q) * 4);
        const uint2 packed = make_uint2(pack2<T>(sum.x, sum.y), pack2<T>(sum.z, sum.w));
        *reinterpret_cast<uint2 *>(h + u64(first + row) * ld_h + q) = packed;
        if (beside) *reinterpret_cast<uint2 *>(beside + u64(first + row) * ld_beside + q) = packed;
    }
    __syncwarp();
    cluster_sync();
}

// t in tiles of 64 rows and N columns.
template <typename T, u32 N, u32 SPLIT>
__device__ __forceinline__ void input_gradient(float *da, const TensorMap &x, const TensorMap &t, u32 rows, u32 k, u32 r) {
    extern __shared__ __align__(1024) u8 memory[];
    constexpr u32 TILE = 64 * LINE, T_ROW = N * 2, PITCH = 132, EACH = 128 / SPLIT;
    const Buffers<2 * TILE + 64 * T_ROW, DA_STAGES, 8> buffers = {shared_address(memory)};
    const u32 group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const u32 first = blockIdx.x / SPLIT * 128;
    buffers.init(x, t);
    float c[N / 2] = {};
    stream<SPLIT>(
        buffers, (rows + 63) / 64,
        [&](u32 tile, u32 to, u32 barrier) {
            tma_load(to, x, barrier, first, 0, tile * 64);
            tma_load(to + TILE, x, barrier, first + 64, 0, tile * 64);
            tma_load(to + 2 * TILE, t, barrier, 0, 0, tile * 64);
        },
        [&](u32 at) {
            hold(c);
            wgmma_fence();
#pragma unroll
            for (u32 kk = 0; kk < 4; kk++) {
                const u32 thin = at + 2 * TILE + kk * 16 * T_ROW;
                wgmma<T, 1, 1>(c, mn_major(at + group * TILE + kk * 2048, 0), N == 32 ? mn_major_32(thin) : mn_major(thin, 0), 1);
            }
            wgmma_commit();
            wgmma_wait<0>();
            hold(c);
        });
    // Columns of x beside each other, for rows of dA.
    float *sums = reinterpret_cast<float *>(memory);
    if (group < 2) {
        float *to = sums + lane % 4 * 2 * PITCH + group * 64 + warp * 16 + lane / 4;
#pragma unroll
        for (u32 j = 0; j < N / 2; j++) to[(j / 4 * 8 + j % 2) * PITCH + j / 2 % 2 * 8] = c[j];
    }
    cluster_sync();
    for (u32 i = threadIdx.x; i < r * (EACH / 4); i += blockDim.x) {
        const u32 q = i / (EACH / 4), at = cluster_rank() * EACH + i % (EACH / 4) * 4, column = first + at;
        if (column >= k) continue;
        const float4 sum = cluster_sum<SPLIT>(buffers.base + (q * PITCH + at) * 4);
        float *to = da + u64(q) * k + column;
        to[0] += sum.x, to[1] += sum.y, to[2] += sum.z, to[3] += sum.w;
    }
    __syncwarp();
    cluster_sync();
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(160, 2)
    lora_h_sm90_f16_r32(f16 *h, f16 *beside, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap a, u32 rows,
                      u32 k, u32 r, u32 ld_h, u32 ld_beside) {
    input_product<f16, 32>(h, beside, x, a, rows, k, r, ld_h, ld_beside);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(160, 2)
    lora_h_sm90_f16_r64(f16 *h, f16 *beside, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap a, u32 rows,
                      u32 k, u32 r, u32 ld_h, u32 ld_beside) {
    input_product<f16, 64>(h, beside, x, a, rows, k, r, ld_h, ld_beside);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(288, 3) lora_da_sm90_f16_r32_split2(
    float *da, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap t, u32 rows, u32 k, u32 r) {
    input_gradient<f16, 32, 2>(da, x, t, rows, k, r);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(288, 3) lora_da_sm90_f16_r64_split2(
    float *da, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap t, u32 rows, u32 k, u32 r) {
    input_gradient<f16, 64, 2>(da, x, t, rows, k, r);
}

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(288, 3) lora_da_sm90_f16_r32_split4(
    float *da, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap t, u32 rows, u32 k, u32 r) {
    input_gradient<f16, 32, 4>(da, x, t, rows, k, r);
}

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(288, 3) lora_da_sm90_f16_r64_split4(
    float *da, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap t, u32 rows, u32 k, u32 r) {
    input_gradient<f16, 64, 4>(da, x, t, rows, k, r);
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(288, 3) lora_da_sm90_f16_r32_split8(
    float *da, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap t, u32 rows, u32 k, u32 r) {
    input_gradient<f16, 32, 8>(da, x, t, rows, k, r);
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(288, 3) lora_da_sm90_f16_r64_split8(
    float *da, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap t, u32 rows, u32 k, u32 r) {
    input_gradient<f16, 64, 8>(da, x, t, rows, k, r);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(160, 2)
    lora_h_sm90_bf16_r32(bf16 *h, bf16 *beside, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap a, u32 rows,
                      u32 k, u32 r, u32 ld_h, u32 ld_beside) {
    input_product<bf16, 32>(h, beside, x, a, rows, k, r, ld_h, ld_beside);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(160, 2)
    lora_h_sm90_bf16_r64(bf16 *h, bf16 *beside, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap a, u32 rows,
                      u32 k, u32 r, u32 ld_h, u32 ld_beside) {
    input_product<bf16, 64>(h, beside, x, a, rows, k, r, ld_h, ld_beside);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(288, 3) lora_da_sm90_bf16_r32_split2(
    float *da, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap t, u32 rows, u32 k, u32 r) {
    input_gradient<bf16, 32, 2>(da, x, t, rows, k, r);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(288, 3) lora_da_sm90_bf16_r64_split2(
    float *da, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap t, u32 rows, u32 k, u32 r) {
    input_gradient<bf16, 64, 2>(da, x, t, rows, k, r);
}

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(288, 3) lora_da_sm90_bf16_r32_split4(
    float *da, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap t, u32 rows, u32 k, u32 r) {
    input_gradient<bf16, 32, 4>(da, x, t, rows, k, r);
}

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(288, 3) lora_da_sm90_bf16_r64_split4(
    float *da, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap t, u32 rows, u32 k, u32 r) {
    input_gradient<bf16, 64, 4>(da, x, t, rows, k, r);
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(288, 3) lora_da_sm90_bf16_r32_split8(
    float *da, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap t, u32 rows, u32 k, u32 r) {
    input_gradient<bf16, 32, 8>(da, x, t, rows, k, r);
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(288, 3) lora_da_sm90_bf16_r64_split8(
    float *da, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap t, u32 rows, u32 k, u32 r) {
    input_gradient<bf16, 64, 8>(da, x, t, rows, k, r);
}
