// 4-bit blocks to a dense matrix: out[i] = T(code[c_i] · absmax[i / block_size]), rounded once.
//
//   absmax[b] = map[absmax_codes[b]] · absmax2[b / 256] + offset       (nested), product and sum each rounded to f32
//
// i runs over rows · cols; blocks of block_size (a power of two from 32 on) run over i too and may cross rows. Element i is in
// byte i / 2, the even one in the high nibble. out has rows of cols elements, ld apart: what lies between them is left alone.
//
// Threads: a block widens 8192 elements in a row. A thread takes runs of 16 bytes of output, 256 runs apart, so that a warp
// reads and writes whole lines; all its loads come before the first store. Where cols or ld is no multiple of such a run, or a
// pointer is not aligned to one, elements go one by one.
//
// Launch: block 256, grid ceil(rows · cols / 8192) in x (a smaller one takes the rest in turn), no dynamic shared memory.
//
// Bytes: half a byte read and sizeof(T) written an element, 4 / block_size (nested: 1 / block_size) for the scales.

#include "common/blocks.cuh"
#include "common/vec.cuh"

constexpr u32 THREADS = 256;
constexpr u32 TILE = 8192;

// N codes, N / 2 bytes, the first in the lowest byte.
template <int N>
__device__ __forceinline__ u32 load_codes(const u8 *p) {
    if constexpr (N == 8) return *reinterpret_cast<const u32 *>(p);
    else return *reinterpret_cast<const u16 *>(p);
}

// Runs of N elements of the tile from `start` on.
template <typename T, typename S>
__device__ __forceinline__ void widen_runs(T *__restrict__ out, const u8 *__restrict__ packed, const S &scales,
                                           const float *table, u64 start, u64 count, u32 cols, u32 ld, u32 shift) {
    constexpr int N = Pack<T>::N, RUNS = TILE / (THREADS * N);
    u64 row = 0;
    u32 col = 0;
    if (ld != cols) {
        row = start >> 32 ? start / cols : u32(start) / cols;
        col = u32(start - row * cols);
    }
    u32 codes[RUNS];
    float scale[RUNS];
#pragma unroll
    for (int i = 0; i < RUNS; ++i) {
        const u64 at = start + (i * THREADS + threadIdx.x) * N;
        if (at < count) {
            codes[i] = load_codes<N>(packed + at / 2);
            scale[i] = scales.get(at >> shift);
        }
    }
#pragma unroll
    for (int i = 0; i < RUNS; ++i) {
        const u32 within = (i * THREADS + threadIdx.x) * N;
        if (start + within >= count) break;
        float v[N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const u32 bit = j / 2 * 8 + (j % 2 == 0 ? 4 : 0);
            v[j] = table[codes[i] >> bit & 15] * scale[i];
        }
        T *to = out + start + within;
        if (ld != cols) {
            // A tile may hold several rows; sums of two u32 below 2^32 + 2^13 need the wider type.
            const u64 column = u64(col) + within;
            const u64 rows = column >> 32 ? column / cols : u32(column) / cols;
            to = out + (row + rows) * ld + (column - rows * cols);
        }
        store16(to, pack(v, T{}));
    }
}

template <typename T, typename S>
__device__ __forceinline__ void dequantize(T *out, const u8 *packed, const S &scales, const float *code, u32 rows, u32 cols,
                                           u32 ld, u32 block_size) {
    constexpr int N = Pack<T>::N;
    __shared__ float table[16];
    if (threadIdx.x < 16) table[threadIdx.x] = code[threadIdx.x];
    __syncthreads();
    const u32 shift = log2_of(block_size);
    const u64 count = u64(rows) * cols;
    const bool runs = cols % N == 0 && ld % N == 0 && aligned16(out) && aligned16(packed);
    for (u64 start = u64(blockIdx.x) * TILE; start < count; start += u64(gridDim.x) * TILE) {
        if (runs) {
            widen_runs(out, packed, scales, table, start, count, cols, ld, shift);
        } else {
            const u64 end = count - start < TILE ? count : start + TILE;
            for (u64 at = start + threadIdx.x; at < end; at += THREADS) {
                const u32 c = packed[at / 2] >> (at % 2 == 0 ? 4 : 0) & 15;
                const u64 row = at / cols;
                out[row * ld + (at - row * cols)] = from_f32<T>(table[c] * scales.get(at >> shift));
            }
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
