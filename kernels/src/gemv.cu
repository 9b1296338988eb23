// y = x Wᵀ + bias for a few rows of x [m, k], m <= 8, against W [n, k]: 4-bit blocks (plain or nested scales) or dense. y [m, n].
//
// W is decoded to f32 and rounded to T, as dequantize.cu does; products are summed in f32.
//
// bf16 and f16, k a multiple of 32 (dense: of 8), pointers aligned to 16 bytes: tensor cores do the sums, x being the left matrix
// (its rows beyond m are zero). A block takes tiles of 8 rows of W in turn. Its 16 warps share the columns of a tile in chunks of
// 128, and at the tile's end one of them, each in turn, adds up what they have, in the order of the warps. A lane keeps its part
// of x in registers while k <= 4096, and loads of W run ahead by some chunks, into the next tile too. Codes are decoded in twos:
// entry b of a table is the pair of levels of byte b, and lies in shared memory 16 times, so that lanes never want the same bank.
// Else: a warp takes a row of W, and a lane 8 elements of 256 at a time, or one of 32.
//
// Launch: block 512, grid min(ceil(n / 8), multiprocessors) in x (any other is right too), no dynamic shared memory.
//
// Bytes: W read once; x comes from the caches.

#include "common/blocks.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
// Rows of x at most, and rows of W in a tile.
constexpr u32 MOST = 8;
constexpr u32 TILE = 8;
// Columns of a warp's step, and of all warps together.
constexpr u32 CHUNK = 128;
constexpr u32 STRIDE = WARPS * CHUNK;

struct __align__(16) Words {
    u32 v[4];
};

__device__ __forceinline__ Words load_words(const void *p) {
    const uint4 w = __ldg(reinterpret_cast<const uint4 *>(p));
    return {w.x, w.y, w.z, w.w};
}

// The two kinds of W. In a step a lane has 32 elements of row lane / 4: four quarters of 8 that begin at column(lane, quarter) of
// the chunk, and the same of x. `fetch` loads them, `words` gives a quarter as pairs of T. `get` is for the plain path.
template <typename T, typename S>
struct BlockMatrix {
    static constexpr int AHEAD = 4;
    static constexpr u32 MULTIPLE = 32;

    const u8 *packed;
    S scales;
    const float *code;
    u32 shift;
    // Levels of codes, and of pairs of codes.
    float *levels;
    float2 (*pairs)[16];

    struct Fetched {
        Words codes;
        typename S::Loaded scale;
    };

    static __device__ __forceinline__ u32 column(u32 lane, u32 quarter) { return lane % 4 * 32 + quarter * 8; }
    __device__ __forceinline__ bool aligned() const { return aligned16(packed); }

    __device__ __forceinline__ void prepare() const {
        constexpr u32 EACH = 256 * 16 / THREADS;
        float high[EACH];
#pragma unroll
        for (u32 i = 0; i < EACH; ++i) high[i] = code[i * (16 / EACH) + threadIdx.x / 256];
        const float low = code[threadIdx.x / 16 % 16];
#pragma unroll
        for (u32 i = 0; i < EACH; ++i) pairs[i * (256 / EACH) + threadIdx.x / 16][threadIdx.x % 16] = {high[i], low};
        if (threadIdx.x < 16) levels[threadIdx.x] = code[threadIdx.x];
    }
    __device__ __forceinline__ void fetch(Fetched &to, u64 row, u32 k, u32 chunk, u32 lane) const {
        const u32 first = chunk + lane % 4 * 32;
        const u64 at = row * k + (first < k ? first : 0);
        to.codes = load_words(packed + at / 2);
        to.scale = scales.load(at >> shift);
    }
    __device__ __forceinline__ float scale(const Fetched &from) const { return scales.value(from.scale); }
    __device__ __forceinline__ void words(u32 (&w)[4], const Fetched &from, float scale, u32 quarter) const {
        const char *mine = reinterpret_cast<const char *>(pairs);
        const u32 copy = threadIdx.x % 16 * 8, codes = from.codes.v[quarter];
#pragma unroll
        for (u32 b = 0; b < 4; ++b) {
            const u32 entry = (b == 0 ? codes << 7 : codes >> (b * 8 - 7)) & 0x7f80;
            const float2 pair = *reinterpret_cast<const float2 *>(mine + (entry | copy));
            w[b] = pack2<T>(pair.x * scale, pair.y * scale);
        }
    }
    template <int N>
    __device__ __forceinline__ void get(u64 at, float (&w)[N]) const {
        const float scale = scales.get(at >> shift);
        if constexpr (N == 8) {
            const u32 codes = *reinterpret_cast<const u32 *>(packed + at / 2);
#pragma unroll
            for (int j = 0; j < 8; ++j) w[j] = rounded<T>(levels[codes >> (j / 2 * 8 + (j % 2 == 0 ? 4 : 0)) & 15] * scale);
        } else {
            w[0] = rounded<T>(levels[packed[at / 2] >> (at % 2 == 0 ? 4 : 0) & 15] * scale);
        }
    }
};

template <typename T>
struct DenseMatrix {
    static constexpr int AHEAD = 2;
    static constexpr u32 MULTIPLE = 8;

    const T *w;

    struct Fetched {
        Words quarters[4];
    };

    static __device__ __forceinline__ u32 column(u32 lane, u32 quarter) { return quarter * 32 + lane % 4 * 8; }
    __device__ __forceinline__ bool aligned() const { return aligned16(w); }

    __device__ __forceinline__ void prepare() const {}
    __device__ __forceinline__ void fetch(Fetched &to, u64 row, u32 k, u32 chunk, u32 lane) const {
#pragma unroll
        for (u32 q = 0; q < 4; ++q) {
            const u32 first = chunk + column(lane, q);
            to.quarters[q] = load_words(w + row * k + (first < k ? first : 0));
        }
    }
    __device__ __forceinline__ float scale(const Fetched &) const { return 1.0f; }
    __device__ __forceinline__ void words(u32 (&v)[4], const Fetched &from, float, u32 quarter) const {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) v[i] = from.quarters[quarter].v[i];
    }
    template <int N>
    __device__ __forceinline__ void get(u64 at, float (&v)[N]) const {
        load_f32(w + at, v);
    }
};

// A lane's part of a chunk of x: zero beyond m and k.
template <typename W, typename T>
__device__ __forceinline__ void load_x(Words (&held)[4], const T *x, u32 m, u32 k, u32 chunk, u32 lane) {
#pragma unroll
    for (u32 q = 0; q < 4; ++q) {
        const u32 column = chunk + W::column(lane, q);
        held[q] = lane / 4 < m && column < k ? load_words(x + u64(lane / 4) * k + column) : Words{};
    }
}

// A step of a warp: a tile, and which of the warp's chunks.
struct Step {
    u32 tile, part;

    __device__ __forceinline__ void next(u32 parts) {
        if (++part == parts) part = 0, tile += gridDim.x;
    }
};

// Sums of warps but the one that adds them up, for two tiles in turn.
using Sums = float2[2][WARPS - 1][32];

// HELD: the most chunks of a tile that a warp has, whose x stay in registers (1 or 2); 0: any number, x comes from memory.
template <int HELD, typename T, typename W>
__device__ __forceinline__ void tile_products(T *y, const T *x, const W &matrix, const T *bias, Sums &sums, u32 m, u32 n, u32 k) {
    constexpr int AHEAD = W::AHEAD, TURNS = AHEAD > 2 ? AHEAD : 2;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 tiles = (n + TILE - 1) / TILE, parts = HELD ? HELD : (k + STRIDE - 1) / STRIDE;
    Step now = {blockIdx.x, 0}, ahead = now;
    typename W::Fetched ring[AHEAD];
    const auto fetch = [&](typename W::Fetched &to) {
        // Without a condition, so that nothing waits for the load: what lies beyond W is read elsewhere in it and not used.
        const u64 row = u64(ahead.tile) * TILE + lane / 4;
        matrix.fetch(to, row < n ? row : n - 1, k, ahead.part * STRIDE + warp * CHUNK, lane);
        ahead.next(parts);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) fetch(ring[i]);
    Words held[HELD ? HELD : 1][4];
    if constexpr (HELD != 0) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) load_x<W>(held[i], x, m, k, i * STRIDE + warp * CHUNK, lane);
    }
    matrix.prepare();
    __syncthreads();
    float c[2][4] = {};
    u32 turn = 0;
    while (now.tile < tiles) {
#pragma unroll
        for (int j = 0; j < TURNS; ++j) {
            if (now.tile >= tiles) break;
            const u32 chunk = now.part * STRIDE + warp * CHUNK;
            Words(&xs)[4] = held[HELD ? j % HELD : 0];
            if (chunk < k) {
                if constexpr (HELD == 0) load_x<W>(xs, x, m, k, chunk, lane);
                const float scale = matrix.scale(ring[j % AHEAD]);
#pragma unroll
                for (u32 q = 0; q < 4; ++q) {
                    u32 w[4];
                    matrix.words(w, ring[j % AHEAD], scale, q);
                    const u32 first[4] = {xs[q].v[0], 0, xs[q].v[1], 0}, second[4] = {xs[q].v[2], 0, xs[q].v[3], 0};
                    mma<T>(c[0], first, w[0], w[1]);
                    mma<T>(c[1], second, w[2], w[3]);
                }
            }
            fetch(ring[j % AHEAD]);
            if (now.part + 1 == parts) {
                // Columns 2t and 2t + 1 of the tile, for row lane / 4 of x.
                const float2 own = {c[0][0] + c[1][0], c[0][1] + c[1][1]};
                const u32 adder = turn % WARPS;
                if (warp != adder) sums[turn & 1][warp - (warp > adder)][lane] = own;
                __syncthreads();
                if (warp == adder) {
                    float2 sum = {0, 0};
#pragma unroll 8
                    for (u32 i = 0; i < WARPS; ++i) {
                        const float2 other = i == adder ? own : sums[turn & 1][i - (i > adder)][lane];
                        sum.x += other.x;
                        sum.y += other.y;
                    }
                    const u32 to = now.tile * TILE + lane % 4 * 2;
                    T *row = y + u64(lane / 4) * n;
                    if (lane / 4 < m && to < n) row[to] = from_f32<T>(sum.x + (bias ? to_f32(bias[to]) : 0.0f));
                    if (lane / 4 < m && to + 1 < n) row[to + 1] = from_f32<T>(sum.y + (bias ? to_f32(bias[to + 1]) : 0.0f));
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) c[0][i] = 0, c[1][i] = 0;
                ++turn;
            }
            now.next(parts);
        }
    }
}

// A warp takes a row of W, N elements a lane at a time.
template <int N, typename T, typename W>
__device__ __forceinline__ void row_products(T *y, const T *x, const W &matrix, const T *bias, u32 m, u32 n, u32 k) {
    for (u64 row = u64(blockIdx.x) * WARPS + threadIdx.x / 32; row < n; row += u64(gridDim.x) * WARPS) {
        float sum[MOST] = {};
        for (u32 c = threadIdx.x % 32 * N; c < k; c += 32 * N) {
            float w[N];
            matrix.get(row * k + c, w);
#pragma unroll
            for (u32 i = 0; i < MOST; ++i) {
                if (i >= m) break;
                float v[N];
                load_f32(x + u64(i) * k + c, v);
#pragma unroll
                for (int j = 0; j < N; ++j) sum[i] += w[j] * v[j];
            }
        }
#pragma unroll
        for (u32 i = 0; i < MOST; ++i) {
            if (i >= m) break;
            sum[i] = lanes_sum(sum[i]);
            if (threadIdx.x % 32 == 0) y[u64(i) * n + row] = from_f32<T>(sum[i] + (bias ? to_f32(bias[row]) : 0.0f));
        }
    }
}

template <typename T, typename W>
__device__ __forceinline__ void gemv(T *y, const T *x, const W &matrix, const T *bias, u32 m, u32 n, u32 k) {
    const bool aligned = aligned16(x) && matrix.aligned();
    if constexpr (sizeof(T) == 2) {
        __shared__ Sums sums;
        if (aligned && k % W::MULTIPLE == 0) {
            if (k <= STRIDE) tile_products<1>(y, x, matrix, bias, sums, m, n, k);
            else if (k <= 2 * STRIDE) tile_products<2>(y, x, matrix, bias, sums, m, n, k);
            else tile_products<0>(y, x, matrix, bias, sums, m, n, k);
            return;
        }
    }
    matrix.prepare();
    __syncthreads();
    if (aligned && k % 8 == 0) row_products<8>(y, x, matrix, bias, m, n, k);
    else row_products<1>(y, x, matrix, bias, m, n, k);
}

template <typename T, typename S>
__device__ __forceinline__ void gemv_blocks(T *y, const T *x, const u8 *packed, const S &scales, const float *code, const T *bias,
                                            u32 m, u32 n, u32 k, u32 block_size) {
    __shared__ float levels[16];
    __shared__ __align__(128) float2 pairs[256][16];
    gemv(y, x, BlockMatrix<T, S>{packed, scales, code, log2_of(block_size), levels, pairs}, bias, m, n, k);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_plain_f32(float *y, const float *x, const u8 *packed, const float *absmax, const float *code, const float *bias, u32 m,
                   u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, PlainScales{absmax}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_nested_f32(float *y, const float *x, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                    const float *code, const float *bias, float offset, u32 m, u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_dense_f32(float *y, const float *x, const float *w, const float *bias, u32 m, u32 n, u32 k) {
    gemv(y, x, DenseMatrix<float>{w}, bias, m, n, k);
}

extern "C" __global__ void __launch_bounds__(512)
    gemv_plain_f16(f16 *y, const f16 *x, const u8 *packed, const float *absmax, const float *code, const f16 *bias, u32 m,
                   u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, PlainScales{absmax}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512)
    gemv_nested_f16(f16 *y, const f16 *x, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                    const float *code, const f16 *bias, float offset, u32 m, u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512)
    gemv_dense_f16(f16 *y, const f16 *x, const f16 *w, const f16 *bias, u32 m, u32 n, u32 k) {
    gemv(y, x, DenseMatrix<f16>{w}, bias, m, n, k);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(512)
    gemv_plain_bf16(bf16 *y, const bf16 *x, const u8 *packed, const float *absmax, const float *code, const bf16 *bias, u32 m,
                   u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, PlainScales{absmax}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512)
    gemv_nested_bf16(bf16 *y, const bf16 *x, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                    const float *code, const bf16 *bias, float offset, u32 m, u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512)
    gemv_dense_bf16(bf16 *y, const bf16 *x, const bf16 *w, const bf16 *bias, u32 m, u32 n, u32 k) {
    gemv(y, x, DenseMatrix<bf16>{w}, bias, m, n, k);
}
#endif
