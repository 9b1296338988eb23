// 4-bit blocks to a dense matrix: out[i] = T(code[c_i] · absmax[i / block_size]), rounded once.
//
//   absmax[b] = map[absmax_codes[b]] · absmax2[b / 256] + offset       (nested), product and sum each rounded to f32
//
// i runs over rows · cols; blocks of block_size (a power of two from 32 on) run over i too and may cross rows. Element i is in
// byte i / 2, the even one in the high nibble. out has rows of cols elements, ld apart: what lies between them is left alone.
//
// Threads: a block widens 8192 elements in a row. A thread takes runs of 16 bytes of output, 256 runs apart, so that a warp
// reads and writes whole lines; all its loads come before the first store, those of the levels after those of the codes. Where cols or ld is no multiple of such a run, or a
// pointer is not aligned to one, elements go one by one.
//
// Launch: block 256, grid ceil(rows · cols / 8192) in x (a smaller one takes the rest in turn), no dynamic shared memory. It may be
// launched early: codes, scales and levels are read before the wait.
//
// Bytes: half a byte read and sizeof(T) written an element, 4 / block_size (nested: 1 / block_size) for the scales.

#include "common/blocks.cuh"
#include "common/early.cuh"
#include "common/vec.cuh"

constexpr u32 THREADS = 256;
constexpr u32 TILE = 8192;

// N codes, N / 2 bytes, the first in the lowest byte.
template <int N>
__device__ __forceinline__ u32 load_codes(const u8 *p) {
    if constexpr (N == 8) return *reinterpret_cast<const u32 *>(p);
    else return *reinterpret_cast<const u16 *>(p);
}

// What a thread reads of a tile: RUNS runs of N codes and their scales.
template <typename T, typename S>
struct Runs {
    static constexpr int N = Pack<T>::N, RUNS = TILE / (THREADS * N);

    u32 codes[RUNS];
    typename S::Loaded scales[RUNS];

    __device__ __forceinline__ void load(const u8 *packed, const S &from, u64 start, u64 count, u32 shift) {
#pragma unroll
        for (int i = 0; i < RUNS; ++i) {
            const u64 at = start + (i * THREADS + threadIdx.x) * N;
            if (at < count) {
                codes[i] = load_codes<N>(packed + at / 2);
                scales[i] = from.load(at >> shift);
            }
        }
    }

    __device__ __forceinline__ void store(T *out, const S &from, const float *table, u64 start, u64 count, u32 cols,
                                          u32 ld) const {
        u64 at = start + threadIdx.x * N, row = 0;
        // Rows and columns from this thread's run to its next.
        u32 col = 0, rows_on = 0, cols_on = 0;
        if (ld != cols) {
            row = at >> 32 ? at / cols : u32(at) / cols;
            col = u32(at - row * cols);
            rows_on = THREADS * N / cols;
            cols_on = THREADS * N - rows_on * cols;
        }
#pragma unroll
        for (int i = 0; i < RUNS; ++i) {
            if (at >= count) break;
            const float scale = from.value(scales[i]);
            float v[N];
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] = table[codes[i] >> (j / 2 * 8 + (j % 2 == 0 ? 4 : 0)) & 15] * scale;
            store_f32(out + (ld == cols ? at : row * ld + col), v);
            at += THREADS * N;
            row += rows_on;
            const u32 left = cols - col;
            if (cols_on >= left) col = cols_on - left, ++row;
            else col += cols_on;
        }
    }
};

// Shared memory for the levels, which a block fetches while its first codes are on their way.
__device__ __forceinline__ PlainScales staged(const PlainScales &scales) { return scales; }

__device__ __forceinline__ NestedScales staged(const NestedScales &scales) {
    __shared__ float map[256];
    map[threadIdx.x] = scales.map[threadIdx.x];
    return {scales.codes, scales.absmax, map, scales.offset};
}

template <typename T, typename S>
__device__ __forceinline__ void dequantize(T *out, const u8 *packed, const S &given, const float *code, u32 rows, u32 cols,
                                           u32 ld, u32 block_size) {
    constexpr int N = Pack<T>::N;
    __shared__ float table[16];
    const u32 shift = log2_of(block_size);
    const u64 count = u64(rows) * cols;
    const bool aligned = cols % N == 0 && ld % N == 0 && aligned16(out) && aligned16(packed);
    const u64 step = u64(gridDim.x) * TILE;
    u64 start = u64(blockIdx.x) * TILE;
    Runs<T, S> runs;
    launch_dependents();
    if (aligned && start < count) runs.load(packed, given, start, count, shift);
    if (threadIdx.x < 16) table[threadIdx.x] = code[threadIdx.x];
    const S scales = staged(given);
    __syncthreads();
    wait_for_launches();
    for (; start < count; start += step) {
        if (aligned) {
            runs.store(out, scales, table, start, count, cols, ld);
            if (start + step < count) runs.load(packed, scales, start + step, count, shift);
            continue;
        }
        const u64 end = count - start < TILE ? count : start + TILE;
        for (u64 at = start + threadIdx.x; at < end; at += THREADS) {
            const u32 c = packed[at / 2] >> (at % 2 == 0 ? 4 : 0) & 15;
            const u64 row = at / cols;
            out[row * ld + (at - row * cols)] = from_f32<T>(table[c] * scales.get(at >> shift));
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
    dequantize_plain_f32(float *out, const u8 *packed, const float *absmax, const float *code, u32 rows, u32 cols, u32 ld,
                         u32 block_size) {
    dequantize(out, packed, PlainScales{absmax}, code, rows, cols, ld, block_size);
}

extern "C" __global__ void __launch_bounds__(256)
    dequantize_nested_f32(float *out, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                          const float *code, float offset, u32 rows, u32 cols, u32 ld, u32 block_size) {
    dequantize(out, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, rows, cols, ld, block_size);
}

extern "C" __global__ void __launch_bounds__(256)
    dequantize_plain_f16(f16 *out, const u8 *packed, const float *absmax, const float *code, u32 rows, u32 cols, u32 ld,
                         u32 block_size) {
    dequantize(out, packed, PlainScales{absmax}, code, rows, cols, ld, block_size);
}

extern "C" __global__ void __launch_bounds__(256)
    dequantize_nested_f16(f16 *out, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                          const float *code, float offset, u32 rows, u32 cols, u32 ld, u32 block_size) {
    dequantize(out, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, rows, cols, ld, block_size);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(256)
    dequantize_plain_bf16(bf16 *out, const u8 *packed, const float *absmax, const float *code, u32 rows, u32 cols, u32 ld,
                          u32 block_size) {
    dequantize(out, packed, PlainScales{absmax}, code, rows, cols, ld, block_size);
}

extern "C" __global__ void __launch_bounds__(256)
    dequantize_nested_bf16(bf16 *out, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                           const float *code, float offset, u32 rows, u32 cols, u32 ld, u32 block_size) {
    dequantize(out, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, rows, cols, ld, block_size);
}
#endif
