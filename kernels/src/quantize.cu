// Dense values to 4-bit blocks, and the blocks' scales to 8 bits: the bits of crates/nf4.
//
// quantize_T: absmax[b] = max |x| of block b; code = the level of the format nearest to x (1 / absmax), or to x / absmax where
// that reciprocal overflows; 0 in a block of zeros. Two codes a byte, the even one in the high nibble, code(0) in the last one of
// an odd length. *bad, which the caller presets to its largest value, becomes the least index of a NaN or infinity.
//
// A code is the number of thresholds below the value. Between -1 and 1 (FP4: of magnitudes) thresholds lie further apart than
// 1 / 15, so the nearest multiple of 1 / 15 leaves one to compare with, from a table in shared memory.
//
// Threads: a block takes 4096 elements, the longest block of the format. A thread holds two runs of 8, 2048 apart; the lanes of a
// block exchange their largest magnitudes, and beyond 256 elements warps do so through shared memory. Where x is not 16-byte
// aligned, or at the end, elements are read one by one.
// Launch: block 256, grid ceil(n / 4096) in x (a smaller one takes the rest in turn).
//
// Double quantisation: offset = the mean of the absmax, then codes of absmax - offset in blocks of 256 by the 8-bit `map` (256
// ascending levels): the nearest level to v (1 / absmax2), midway the even code; 0 in a block of zeros.
//   blocks <= 130560: quantize_absmax_mean, block 512, grid 1: the CPU's order of summation, bit for bit.
//   else:             quantize_absmax_sums into partials [gridDim.x], block 256, grid min(ceil(blocks / 4096), 1024); then
//                     quantize_absmax_mean_of, block 512, grid 1. Sums are in f64 here as on the CPU, in another order: the mean,
//                     rounded to f32, has the same bits unless the exact one lies within about 1e-13 of a tie.
//   quantize_absmax: block 256, a warp a nested block: grid ceil(blocks / 2048), or fewer.
// quantize_absmax_mean takes any number of blocks, with f64 sums beyond 130560; one multiprocessor reads slowly.
//
// None has dynamic shared memory. Bytes: x read, n / 2 and 4 n / block_size written; absmax read twice, a byte each written.

#include "common/blocks.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

constexpr u32 THREADS = 256;
constexpr u32 RUN = 8;
constexpr u32 RUNS = 2;
constexpr u32 TILE = THREADS * RUN * RUNS;
// Elements of a warp's runs.
constexpr u32 WARP = 32 * RUN;
constexpr u32 INFINITE = 0x7f800000;

// The code of y is the number of these that y is above.
__device__ const float NF4_THRESHOLDS[15] = {
    -0.8480964004993439f, -0.6106329262256622f,   -0.4599952697753906f, -0.33967943489551544f, -0.23460740596055984f,
    -0.13791173323988914f, -0.045525018125772476f, 0.03979014977812767f, 0.1202552504837513f,   0.2035212516784668f,
    0.2920137718319893f,  0.3893125355243683f,    0.5016634166240692f,  0.6427869200706482f,   0.8614784181118011f,
};
// The rank of |y| among the magnitudes of FP4 is the number of these that it is above.
__device__ const float FP4_THRESHOLDS[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f};
// The code of rank r, less its sign, in nibble r.
constexpr u32 FP4_CODES = 0x32547610;

// 15 y as the nearest integer in the lowest bits, plus 15.
__device__ __forceinline__ u32 bucket(float y) { return __float_as_uint(__fmaf_rn(y, 15.0f, 12582912.0f + 15.0f)) & 31; }

// For each bucket the thresholds below it, and the one within.
struct Table {
    float threshold[32];
    u32 below[32];

    __device__ __forceinline__ void fill(u32 format, u32 i) {
        const float *thresholds = format == 0 ? NF4_THRESHOLDS : FP4_THRESHOLDS;
        const u32 count = format == 0 ? 15 : 7;
        u32 less = 0;
        float within = __uint_as_float(INFINITE);
        for (u32 t = 0; t < count; ++t) {
            const u32 at = bucket(thresholds[t]);
            if (at < i) ++less;
            if (at == i) within = thresholds[t];
        }
        threshold[i] = within;
        below[i] = less;
    }

    // Thresholds below y, which is between -1 and 1; of a NaN anything.
    __device__ __forceinline__ u32 rank(float y) const {
        const u32 i = bucket(y);
        return below[i] + (y > threshold[i]);
    }
};

// x over a block's absmax, as the CPU divides.
struct Scale {
    float absmax, reciprocal;

    __device__ __forceinline__ explicit Scale(float absmax) : absmax(absmax), reciprocal(__frcp_rn(absmax)) {}
    __device__ __forceinline__ bool subnormal() const { return absmax > 0 && __float_as_uint(reciprocal) == INFINITE; }
    __device__ __forceinline__ float apply(float x) const {
        return subnormal() ? __fdiv_rn(x, absmax) : __fmul_rn(x, reciprocal);
    }
};

template <int FORMAT>
__device__ __forceinline__ u32 code(const Table &table, float y) {
    if constexpr (FORMAT == 0) return table.rank(y);
    const u32 rank = table.rank(fabsf(y));
    return (FP4_CODES >> rank * 4 & 7) | (y < 0 ? 8 : 0);
}

__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }

// The first NaN or infinity of a run that holds one: read again, to keep the run in registers everywhere else.
template <typename T>
__device__ __noinline__ void report(u64 *bad, const T *x, u64 at) {
    while (magnitude(to_f32(x[at])) < INFINITE) ++at;
    atomicMin(bad, at);
}

template <int FORMAT, typename T>
__device__ __forceinline__ void quantize_tiles(u8 *packed, float *absmax, u64 *bad, const T *x, u64 n, u32 block_size,
                                               const Table &table) {
    __shared__ u32 most[2][TILE / WARP];
    const u32 shift = log2_of(block_size);
    const bool vector = aligned16(x) && aligned16(packed);
    u32 turn = 0;
    for (u64 start = u64(blockIdx.x) * TILE; start < n; start += u64(gridDim.x) * TILE, ++turn) {
        float v[RUNS][RUN];
        u32 top[RUNS];
#pragma unroll
        for (u32 i = 0; i < RUNS; ++i) {
            const u64 at = start + (i * THREADS + threadIdx.x) * RUN;
            if (vector && at + RUN <= n) {
                load_f32(x + at, v[i]);
            } else {
#pragma unroll
                for (u32 j = 0; j < RUN; ++j) v[i][j] = at + j < n ? to_f32(x[at + j]) : 0.0f;
            }
        }
#pragma unroll
        for (u32 i = 0; i < RUNS; ++i) {
            top[i] = 0;
#pragma unroll
            for (u32 j = 0; j < RUN; ++j) top[i] = max(top[i], magnitude(v[i][j]));
            if (top[i] >= INFINITE) report(bad, x, start + (i * THREADS + threadIdx.x) * RUN);
            const u32 lanes = block_size < WARP ? block_size / RUN : 32;
            for (u32 step = lanes >> 1; step > 0; step >>= 1) top[i] = max(top[i], __shfl_xor_sync(0xffffffffu, top[i], step));
        }
        if (block_size > WARP) {
            u32 *mine = most[turn & 1];
            if (threadIdx.x % 32 == 0) {
#pragma unroll
                for (u32 i = 0; i < RUNS; ++i) mine[i * (THREADS / 32) + threadIdx.x / 32] = top[i];
            }
            __syncthreads();
            const u32 warps = block_size / WARP;
#pragma unroll
            for (u32 i = 0; i < RUNS; ++i) {
                const u32 first = (i * (THREADS / 32) + threadIdx.x / 32) & ~(warps - 1);
                for (u32 w = 0; w < warps; ++w) top[i] = max(top[i], mine[first + w]);
            }
        }
#pragma unroll
        for (u32 i = 0; i < RUNS; ++i) {
            const u64 at = start + (i * THREADS + threadIdx.x) * RUN;
            if (at >= n) break;
            const Scale scale(__uint_as_float(top[i]));
            if ((at & (block_size - 1)) == 0) absmax[at >> shift] = scale.absmax;
            if (scale.subnormal()) {
#pragma unroll
                for (u32 j = 0; j < RUN; ++j) v[i][j] = __fdiv_rn(v[i][j], scale.absmax);
            } else {
#pragma unroll
                for (u32 j = 0; j < RUN; ++j) v[i][j] = __fmul_rn(v[i][j], scale.reciprocal);
            }
            u32 codes = 0;
#pragma unroll
            for (u32 j = 0; j < RUN; ++j) codes |= code<FORMAT>(table, v[i][j]) << (j / 2 * 8 + (j % 2 == 0 ? 4 : 0));
            if (top[i] == 0) codes = 0;
            if (vector && at + RUN <= n) {
                *reinterpret_cast<u32 *>(packed + at / 2) = codes;
            } else {
                for (u32 j = 0; j < RUN && at + j < n; j += 2) packed[at / 2 + j / 2] = u8(codes >> j * 4);
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void quantize(u8 *packed, float *absmax, u64 *bad, const T *x, u64 n, u32 block_size, u32 format) {
    __shared__ Table table;
    if (threadIdx.x < 32) table.fill(format, threadIdx.x);
    __syncthreads();
    if (format == 0) quantize_tiles<0>(packed, absmax, bad, x, n, block_size, table);
    else quantize_tiles<1>(packed, absmax, bad, x, n, block_size, table);
}

extern "C" __global__ void __launch_bounds__(256)
    quantize_f32(u8 *packed, float *absmax, u64 *bad, const float *x, u64 n, u32 block_size, u32 format) {
    quantize(packed, absmax, bad, x, n, block_size, format);
}

extern "C" __global__ void __launch_bounds__(256)
    quantize_f16(u8 *packed, float *absmax, u64 *bad, const f16 *x, u64 n, u32 block_size, u32 format) {
    quantize(packed, absmax, bad, x, n, block_size, format);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(256)
    quantize_bf16(u8 *packed, float *absmax, u64 *bad, const bf16 *x, u64 n, u32 block_size, u32 format) {
    quantize(packed, absmax, bad, x, n, block_size, format);
}
#endif

// The mean's threads and its largest length in f32.
constexpr u32 MEAN_THREADS = 512;
constexpr u64 IN_ORDER = 512 * 255;

// What thread t of `threads` sums: four sums over strided elements (from 128 elements on, of four neighbours), then these.
__device__ __forceinline__ float thread_sum(const float *x, u32 n, u32 t, u32 threads) {
    float lanes[4] = {0, 0, 0, 0};
    if (n >= 128) {
        const u32 groups = n / 4;
        for (u32 g = t; g < groups; g += threads) {
#pragma unroll
            for (u32 j = 0; j < 4; ++j) lanes[j] = __fadd_rn(lanes[j], x[g * 4 + j]);
        }
        if (t < n % 4) lanes[0] = __fadd_rn(lanes[0], x[groups * 4 + t]);
    } else {
        for (u32 first = t; first < n; first += threads * 4) {
#pragma unroll
            for (u32 j = 0; j < 4; ++j)
                if (first + j * threads < n) lanes[j] = __fadd_rn(lanes[j], x[first + j * threads]);
        }
    }
    return __fadd_rn(__fadd_rn(__fadd_rn(lanes[0], lanes[1]), lanes[2]), lanes[3]);
}

extern "C" __global__ void __launch_bounds__(512) quantize_absmax_mean(float *offset, const float *absmax, u64 blocks) {
    __shared__ float sums[MEAN_THREADS];
    __shared__ double slots[MEAN_THREADS / 32];
    if (blocks > IN_ORDER) {
        double sum = 0;
#pragma unroll 8
        for (u64 i = threadIdx.x; i < blocks; i += MEAN_THREADS) sum += double(absmax[i]);
        sum = block_sum(sum, slots);
        if (threadIdx.x == 0) *offset = float(sum / double(blocks));
        return;
    }
    const u32 n = u32(blocks), items = n >= 128 ? n / 4 : n;
    if (n == 0) {
        if (threadIdx.x == 0) *offset = 0.0f;
        return;
    }
    u32 len = 1u << (31 - __clz(items));
    len = len < MEAN_THREADS ? len : MEAN_THREADS;
    const u32 threads = len;
    sums[threadIdx.x] = threadIdx.x < threads ? thread_sum(absmax, n, threadIdx.x, threads) : 0.0f;
    __syncthreads();
    // Halves down to a warp, then neighbours at distance 1, 2, 4, 8, 16.
    while (len > 32) {
        len /= 2;
        if (threadIdx.x < len) sums[threadIdx.x] = __fadd_rn(sums[threadIdx.x], sums[threadIdx.x + len]);
        __syncthreads();
    }
    for (u32 distance = 1; distance < len; distance *= 2) {
        if (threadIdx.x % (2 * distance) == 0 && threadIdx.x + distance < len)
            sums[threadIdx.x] = __fadd_rn(sums[threadIdx.x], sums[threadIdx.x + distance]);
        __syncthreads();
    }
    if (threadIdx.x == 0) *offset = __fmul_rn(sums[0], __fdiv_rn(1.0f, float(n)));
}

extern "C" __global__ void __launch_bounds__(256) quantize_absmax_sums(double *partials, const float *absmax, u64 blocks) {
    __shared__ double slots[THREADS / 32];
    double sum = 0;
#pragma unroll 4
    for (u64 i = u64(blockIdx.x) * THREADS + threadIdx.x; i < blocks; i += u64(gridDim.x) * THREADS) sum += double(absmax[i]);
    sum = block_sum(sum, slots);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(512)
    quantize_absmax_mean_of(float *offset, const double *partials, u32 count, u64 blocks) {
    __shared__ double slots[MEAN_THREADS / 32];
    double sum = 0;
    for (u32 i = threadIdx.x; i < count; i += MEAN_THREADS) sum += partials[i];
    sum = block_sum(sum, slots);
    if (threadIdx.x == 0) *offset = float(sum / double(blocks));
}

// The largest value below x, which is finite.
__device__ __forceinline__ float next_down(float x) {
    const i32 bits = __float_as_int(x);
    if (x == 0.0f) return __uint_as_float(0x80000001u);
    return __int_as_float(bits + (bits >> 31 | 1) * -1);
}

extern "C" __global__ void __launch_bounds__(256)
    quantize_absmax(u8 *codes, float *absmax2, const float *absmax, const float *offset, const float *map, u64 blocks) {
    // The code of a value is the number of thresholds below it: midpoints, which themselves go to the even code.
    __shared__ float thresholds[256];
    const u32 t = threadIdx.x;
    float middle = __uint_as_float(INFINITE);
    if (t < 255) {
        middle = __fmul_rn(__fadd_rn(map[t], map[t + 1]), 0.5f);
        if (t % 2 == 1) middle = next_down(middle);
    }
    thresholds[t] = middle;
    __syncthreads();
    const float mean = *offset;
    const u64 nested = (blocks + 255) / 256;
    for (u64 b = u64(blockIdx.x) * 8 + t / 32; b < nested; b += u64(gridDim.x) * 8) {
        const u64 first = b * 256 + t % 32;
        float v[8];
        u32 top = 0;
#pragma unroll
        for (u32 j = 0; j < 8; ++j) {
            const u64 at = first + j * 32;
            v[j] = at < blocks ? __fsub_rn(absmax[at], mean) : 0.0f;
            top = max(top, magnitude(v[j]));
        }
#pragma unroll
        for (u32 step = 16; step > 0; step >>= 1) top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
        const Scale scale(__uint_as_float(top));
        if (t % 32 == 0) absmax2[b] = scale.absmax;
        u32 found[8] = {};
#pragma unroll
        for (u32 j = 0; j < 8; ++j) v[j] = scale.apply(v[j]);
#pragma unroll
        for (u32 step = 128; step > 0; step >>= 1) {
#pragma unroll
            for (u32 j = 0; j < 8; ++j)
                if (v[j] > thresholds[found[j] + step - 1]) found[j] += step;
        }
#pragma unroll
        for (u32 j = 0; j < 8; ++j)
            if (first + j * 32 < blocks) codes[first + j * 32] = u8(found[j]);
    }
}
