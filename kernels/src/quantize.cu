// Dense values to 4-bit blocks, and the blocks' scales to 8 bits: the bits of crates/nf4.
//
// quantize_T: absmax[b] = max |x| of block b; code = the level of the format nearest to x (1 / absmax), or to x / absmax where
// that reciprocal overflows; 0 in a block of zeros. Two codes a byte, the even one in the high nibble, code(0) in the last one of
// an odd length. *bad, which the caller presets to its largest value, becomes the least index of a NaN or infinity.
//
// A code is the number of thresholds below the value. Between -1 and 1 (FP4: of magnitudes) thresholds lie further apart than
// 1 / 15, so the nearest multiple of 1 / 15 leaves one to compare with, from a table in shared memory.
//
// Threads: a block takes 4096 elements, the longest block of the format, and a thread 16 neighbours of them; the lanes of a block
// exchange their largest magnitudes, and beyond 512 elements warps do so through shared memory. Where x is not 16-byte aligned, or
// at the end, elements are read one by one. Blocks of 64, the usual ones, have loops of their own.
// Launch: block 256, grid min(ceil(n / 4096), 4 · multiprocessors) in x, all at once: a block takes the rest in turn, and reads a tile
// ahead.
//
// Double quantisation: offset = the mean of the absmax, then codes of absmax - offset in blocks of 256 by the 8-bit `map` (256
// ascending levels): the nearest level to v (1 / absmax2), midway the even code; 0 in a block of zeros.
//   blocks <= 130560: quantize_absmax_mean, block 512, grid 1: the CPU's order of summation, bit for bit.
//   else:             quantize_T leaves the sum of the absmax of each block of threads in partials [gridDim.x] (null before), and
//                     quantize_absmax adds them up. Sums are in f64 here as on the CPU, in another order: the mean, rounded to f32,
//                     has the same bits unless the exact one lies within about 1e-13 of a tie.
//   quantize_absmax: block 256, a warp a nested block: grid ceil(blocks / 2048), or fewer. offset is read, or, with `count` partials,
//   written. absmax lies on 16 bytes, codes on 8.
//
// None has dynamic shared memory. Bytes: x read, n / 2 and 4 n / block_size written; absmax read (twice with quantize_absmax_mean), a
// byte each written.

#include "common/blocks.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

constexpr u32 THREADS = 256;
constexpr u32 RUN = 16;
constexpr u32 TILE = THREADS * RUN;
// Elements of a warp's runs.
constexpr u32 WARP = 32 * RUN;
// The block size that has loops of its own, within a warp.
constexpr u32 USUAL = 64;
constexpr u32 INFINITE = 0x7f800000;

// FP4: the code of rank r among the magnitudes, in nibble r.
constexpr u32 FP4_CODES = 0x32547610;

// 15 y as the nearest integer, plus 15, in the lowest bits of what else is MAGIC's: 2, whose unit in the last place is 2^-22. Eight times
// MAGIC is 0 in 32 bits, so that eight times a bucket is where its entry lies in the table.
constexpr u32 MAGIC = 0x40000000;
constexpr float UNIT = 1.0f / (1 << 22);
__device__ __forceinline__ u32 bucket(float y) { return __float_as_uint(__fmaf_rn(y, 15.0f * UNIT, 2.0f + 15.0f * UNIT)); }
static_assert(MAGIC * 8 == 0, "an entry's place");

// For each bucket the threshold within (or infinity), and the code of what is below it; FP4: in bits 4 to 7 of what is above, too.
struct __align__(8) Entry {
    float threshold;
    u32 codes;
};

template <int FORMAT>
__device__ __forceinline__ Entry entry(u32 i) {
    constexpr float NF4[15] = {
        -0.84809643f, -0.610632896f, -0.45999527f, -0.33967942f, -0.234607399f,
        -0.137911737f, -0.0455250181f, 0.0397901498f, 0.120255254f, 0.203521252f,
        0.292013764f, 0.389312536f, 0.501663387f, 0.64278692f, 0.861478388f,
    };
    constexpr float FP4[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f};
    float threshold = __uint_as_float(INFINITE);
    u32 rank = 0;
#pragma unroll
    for (u32 t = 0; t < (FORMAT == 0 ? 15 : 7); ++t) {
        const float here = FORMAT == 0 ? NF4[t] : FP4[t % 7];
        const u32 at = bucket(here) - MAGIC;
        if (at < i) ++rank;
        if (at == i) threshold = here;
    }
    return {threshold, FORMAT == 0 ? rank : FP4_CODES >> rank * 4 & 0xff};
}

// Puts the code of y, in -1..1, below `codes`. `table` is the address of the entries in shared memory.
template <int FORMAT>
__device__ __forceinline__ void append(u32 &codes, u32 table, float y) {
    const float v = FORMAT == 0 ? y : fabsf(y);
    Entry found;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=f"(found.threshold), "=r"(found.codes) : "r"(bucket(v) * 8 + table));
    if constexpr (FORMAT == 0) {
        // One more where v is above: the difference's sign, in one instruction less than a comparison.
        codes = codes * 16 + (found.codes + (__float_as_uint(__fsub_rn(found.threshold, v)) >> 31));
    } else {
        if (v > found.threshold) found.codes >>= 4;
        codes = codes * 16 + (found.codes & 7);
        if (y < 0) codes += 8;
    }
}

__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }

// x over a block's absmax, as the CPU divides.
struct Scale {
    float absmax, reciprocal;

    __device__ __forceinline__ explicit Scale(float absmax) : absmax(absmax), reciprocal(__frcp_rn(absmax)) {}
    __device__ __forceinline__ bool subnormal() const { return absmax > 0 && __float_as_uint(reciprocal) == INFINITE; }
    __device__ __forceinline__ float apply(float x) const {
        return subnormal() ? __fdiv_rn(x, absmax) : __fmul_rn(x, reciprocal);
    }
    __device__ __forceinline__ void apply(float (&x)[8]) const {
        if (subnormal()) {
#pragma unroll
            for (u32 j = 0; j < 8; ++j) x[j] = __fdiv_rn(x[j], absmax);
        } else {
#pragma unroll
            for (u32 j = 0; j < 8; ++j) x[j] = __fmul_rn(x[j], reciprocal);
        }
    }
};

// A thread's values as they lie in memory, in words.
template <typename T>
struct Run {
    static constexpr u32 WORDS = RUN * sizeof(T) / 4;
    u32 words[WORDS];

    __device__ __forceinline__ void load(const T *p) {
        const uint4 *from = reinterpret_cast<const uint4 *>(p);
#pragma unroll
        for (u32 i = 0; i < WORDS; i += 4) {
            const uint4 four = from[i / 4];
            words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
        }
    }
    // The values below n, the first being number `at`; zeros for the others.
    __device__ __forceinline__ void load(const T *x, u64 at, u64 n) {
#pragma unroll
        for (u32 i = 0; i < WORDS; ++i) words[i] = 0;
#pragma unroll
        for (u32 j = 0; j < RUN; ++j) {
            if (at + j >= n) break;
            if constexpr (sizeof(T) == 2) words[j / 2] |= u32(x[at + j].bits) << j % 2 * 16;
            else words[j] = __float_as_uint(x[at + j]);
        }
    }
    __device__ __forceinline__ float get(u32 j) const {
        if constexpr (sizeof(T) == 4) return __uint_as_float(words[j]);
        else return j % 2 == 0 ? low_of<T>(words[j / 2]) : high_of<T>(words[j / 2]);
    }
    // The largest magnitude as the bits of an f32. As bits magnitudes are in order, with NaN above infinity.
    __device__ __forceinline__ u32 top() const {
        if constexpr (sizeof(T) == 2) {
            u32 most = words[0] & 0x7fff7fff;
#pragma unroll
            for (u32 i = 1; i < WORDS; ++i) most = __vmaxu2(most, words[i] & 0x7fff7fff);
            return max(__float_as_uint(low_of<T>(most)), __float_as_uint(high_of<T>(most)));
        } else {
            u32 most = 0;
#pragma unroll
            for (u32 i = 0; i < WORDS; ++i) most = max(most, words[i] & 0x7fffffff);
            return most;
        }
    }
};

// What a launch is to do, and the address of the entries in shared memory.
template <typename T>
struct Task {
    u8 *packed;
    float *absmax;
    u64 *bad;
    const T *x;
    u64 n;
    u32 block_size, table;
};

// Reciprocals of what lies between are normal, and need no care.
constexpr u32 LEAST = 0x01000000, LARGEST = 0x7e000000;

// Codes of the 8 elements from `at` on, of a block that is no ordinary one: all zeros, very small or large, or with a NaN or infinity.
template <int FORMAT, typename T>
__device__ __noinline__ u32 rare_codes(u32 table, u64 *bad, const T *x, u64 at, u64 n, float absmax) {
    const Scale scale(absmax);
    u32 codes = 0;
    for (u32 j = 0; j < 8; ++j) {
        const float v = at + j < n ? to_f32(x[at + j]) : 0.0f;
        if (magnitude(v) >= INFINITE) {
            atomicMin(bad, at + j);
            return 0;
        }
        u32 code = 0;
        if (absmax > 0 && magnitude(absmax) < INFINITE) append<FORMAT>(code, table, scale.apply(v));
        codes |= code << (j / 2 * 8 + (j % 2 == 0 ? 4 : 0));
    }
    return codes;
}

// A thread's part of a tile. BLOCK: the block size, or 0 for the task's. WHOLE: no element lies beyond n, and all is aligned.
template <int FORMAT, u32 BLOCK, bool WHOLE, typename T>
__device__ __forceinline__ void quantize_run(const Task<T> &task, u32 tile, const Run<T> &run, u32 *tops, double &sum) {
    const u32 block_size = BLOCK ? BLOCK : task.block_size, lanes = block_size / RUN, at = threadIdx.x * RUN;
    const u64 start = u64(tile) * TILE;
    u32 top = run.top();
#pragma unroll
    for (u32 step = 1; step < 32; step *= 2)
        if (step < lanes) top = max(top, __shfl_xor_sync(0xffffffffu, top, step));
    if constexpr (BLOCK == 0) {
        if (lanes > 32) {
            if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
            __syncthreads();
            const u32 warps = block_size / WARP, from = threadIdx.x / 32 & ~(warps - 1);
#pragma unroll 1
            for (u32 w = 0; w < warps; ++w) top = max(top, tops[from + w]);
        }
    }
    if (!WHOLE && start + at >= task.n) return;
    const float absmax = __uint_as_float(top);
    if ((at & (block_size - 1)) == 0) {
        const u32 log2 = log2_of(block_size);
        (task.absmax + (at >> log2))[start >> log2] = absmax;
        sum += double(absmax);
    }
    u32 codes[RUN / 8] = {};
    if (top - LEAST < LARGEST - LEAST) {
        // 1 / absmax, correctly rounded.
        float reciprocal;
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(absmax));
        reciprocal = __fmaf_rn(reciprocal, -__fmaf_rn(absmax, reciprocal, -1.0f), reciprocal);
        // From the last nibble on: those of a byte are the other way round.
#pragma unroll
        for (u32 j = RUN; j-- > 0;) append<FORMAT>(codes[j / 8], task.table, __fmul_rn(run.get(j ^ 1), reciprocal));
    } else {
#pragma unroll
        for (u32 i = 0; i < RUN / 8; ++i) codes[i] = rare_codes<FORMAT>(task.table, task.bad, task.x, start + at + i * 8, task.n, absmax);
    }
    if constexpr (WHOLE) {
        *reinterpret_cast<uint2 *>(task.packed + at / 2 + start / 2) = {codes[0], codes[1]};
    } else {
#pragma unroll
        for (u32 j = 0; j < RUN; j += 2)
            if (start + at + j < task.n) task.packed[(start + at + j) / 2] = u8(codes[j / 8] >> j % 8 * 4);
    }
}

using Tops = u32[2][THREADS / 32];

// The whole tiles from `tile` on, of which the first is in `next`: what is left to do begins at the tile that is returned.
template <int FORMAT, u32 BLOCK, typename T>
__device__ __forceinline__ u32 quantize_whole(const Task<T> &task, u32 tile, u32 whole, Run<T> &next, Tops &tops, double &sum) {
    for (u32 turn = 0; tile < whole; ++turn) {
        const u32 now = tile;
        const Run<T> run = next;
        tile += gridDim.x;
        if (tile < whole) next.load(task.x + threadIdx.x * RUN + u64(tile) * TILE);
        quantize_run<FORMAT, BLOCK, true>(task, now, run, tops[turn & 1], sum);
    }
    return tile;
}

template <int FORMAT, typename T>
__device__ __forceinline__ void quantize_tiles(Task<T> task, double *partials) {
    __shared__ Entry entries[32];
    __shared__ double slots[THREADS / 32];
    __shared__ Tops tops;
    const u32 tiles = u32((task.n + TILE - 1) / TILE), whole = aligned16(task.x) && aligned16(task.packed) ? u32(task.n / TILE) : 0;
    // By way of a shuffle, or the compiler works the address out anew for each use.
    task.table = __shfl_sync(0xffffffffu, u32(__cvta_generic_to_shared(entries)), 0);
    u32 tile = blockIdx.x;
    Run<T> run;
    if (tile < whole) run.load(task.x + u64(tile) * TILE + threadIdx.x * RUN);
    if (threadIdx.x < 32) entries[threadIdx.x] = entry<FORMAT>(threadIdx.x);
    __syncthreads();
    double sum = 0;
    if (task.block_size == USUAL) tile = quantize_whole<FORMAT, USUAL>(task, tile, whole, run, tops, sum);
    else tile = quantize_whole<FORMAT, 0>(task, tile, whole, run, tops, sum);
    __syncthreads();
    for (u32 turn = 0; tile < tiles; tile += gridDim.x, ++turn) {
        run.load(task.x, u64(tile) * TILE + threadIdx.x * RUN, task.n);
        quantize_run<FORMAT, 0, false>(task, tile, run, tops[turn & 1], sum);
    }
    if (!partials) return;
    sum = block_sum(sum, slots);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

template <typename T>
__device__ __forceinline__ void quantize(u8 *packed, float *absmax, u64 *bad, double *partials, const T *x, u64 n, u32 block_size,
                                         u32 format) {
    const Task<T> task{packed, absmax, bad, x, n, block_size, 0};
    if (format == 0) quantize_tiles<0>(task, partials);
    else quantize_tiles<1>(task, partials);
}

// Launched four a multiprocessor; the 16-bit ones ask for five, which holds them to 48 registers: 3 % faster.
extern "C" __global__ void __launch_bounds__(256, 4)
    quantize_f32(u8 *packed, float *absmax, u64 *bad, double *partials, const float *x, u64 n, u32 block_size, u32 format) {
    quantize(packed, absmax, bad, partials, x, n, block_size, format);
}

extern "C" __global__ void __launch_bounds__(256, 5)
    quantize_f16(u8 *packed, float *absmax, u64 *bad, double *partials, const f16 *x, u64 n, u32 block_size, u32 format) {
    quantize(packed, absmax, bad, partials, x, n, block_size, format);
}

extern "C" __global__ void __launch_bounds__(256, 5)
    quantize_bf16(u8 *packed, float *absmax, u64 *bad, double *partials, const bf16 *x, u64 n, u32 block_size, u32 format) {
    quantize(packed, absmax, bad, partials, x, n, block_size, format);
}

constexpr u32 MEAN_THREADS = 512;

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

// The largest value below x, which is finite.
__device__ __forceinline__ float next_down(float x) {
    const i32 bits = __float_as_int(x);
    if (x == 0.0f) return __uint_as_float(0x80000001u);
    return __int_as_float(bits + (bits >> 31 | 1) * -1);
}

// The lowest bytes of four words.
__device__ __forceinline__ u32 bytes(u32 a, u32 b, u32 c, u32 d) {
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

extern "C" __global__ void __launch_bounds__(256)
    quantize_absmax(u8 *codes, float *absmax2, float *offset, const float *absmax, const double *partials, const float *map,
                    u64 blocks, u32 count) {
    // The code of a value is the number of thresholds below it: midpoints, which themselves go to the even code. They lie as a tree
    // does, the children of node k being 2 k and 2 k + 1, so that in the first levels each node has a bank of its own.
    __shared__ float thresholds[256];
    const u32 t = threadIdx.x;
    if (t > 0) {
        const u32 level = log2_of(t), i = ((t << 1 | 1) << (7 - level)) - 257;
        const float middle = __fmul_rn(__fadd_rn(map[i], map[i + 1]), 0.5f);
        thresholds[t] = i % 2 == 1 ? next_down(middle) : middle;
    }
    __syncthreads();
    float mean = 0.0f;
    if (count == 0) {
        mean = *offset;
    } else {
        __shared__ double slots[THREADS / 32];
        double sum = 0;
        for (u32 i = t; i < count; i += THREADS) sum += partials[i];
        mean = float(block_sum(sum, slots) / double(blocks));
        if (blockIdx.x == 0 && t == 0) *offset = mean;
    }
    const u64 nested = (blocks + 255) / 256;
    for (u64 b = u64(blockIdx.x) * 8 + t / 32; b < nested; b += u64(gridDim.x) * 8) {
        const u64 first = b * 256 + t % 32 * 8;
        const bool whole = first + 8 <= blocks;
        float v[8];
        if (whole) {
            load_f32<8>(absmax + first, v);
        } else {
#pragma unroll
            for (u32 j = 0; j < 8; ++j) v[j] = first + j < blocks ? absmax[first + j] : mean;
        }
        u32 top = 0;
#pragma unroll
        for (u32 j = 0; j < 8; ++j) v[j] = __fsub_rn(v[j], mean), top = max(top, magnitude(v[j]));
        const Scale scale(__uint_as_float(warp_max(top)));
        if (t % 32 == 0) absmax2[b] = scale.absmax;
        // In a block of zeros 0 / 0 is a NaN without a sign, as all that the device makes: above no threshold, as on the CPU.
        scale.apply(v);
        u32 node[8];
#pragma unroll
        for (u32 j = 0; j < 8; ++j) node[j] = 1;
#pragma unroll
        for (u32 level = 0; level < 8; ++level) {
#pragma unroll
            for (u32 j = 0; j < 8; ++j) node[j] = node[j] * 2 + (__float_as_uint(__fsub_rn(thresholds[node[j]], v[j])) >> 31);
        }
        if (whole) {
            *reinterpret_cast<uint2 *>(codes + first) = {bytes(node[0], node[1], node[2], node[3]), bytes(node[4], node[5], node[6], node[7])};
        } else {
#pragma unroll
            for (u32 j = 0; j < 8; ++j)
                if (first + j < blocks) codes[first + j] = u8(node[j]);
        }
    }
}
