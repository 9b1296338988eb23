// y = x Wᵀ + bias for a few rows of x [m, k], m <= 8, against W [n, k]: 4-bit blocks (plain or nested scales) or dense. y [m, n].
//
// W is decoded to f32 and rounded to T, as dequantize.cu does; products are summed in f32.
//
// bf16 and f16, k a multiple of 32 (dense: of 8), pointers aligned to 16 bytes: tensor cores do the sums, W being the left matrix
// and x the right one (its rows beyond m are zero). A block takes tiles of 16 rows of W in turn. Its 16 warps share the columns of
// a tile in chunks, and at the tile's end one of them, each in turn, adds up what they have, in the order of the warps. A lane
// keeps its part of x in registers while k is small enough. Loads of W run ahead by two chunks in registers and by some tiles
// into the second-level cache. Codes are decoded in twos: entry b of a table is the pair of levels of byte b, and lies in shared
// memory 16 times, so that lanes never want the same bank.
// Else: a warp takes a row of W, and a lane 8 elements of 256 at a time, or one of 32.
//
// Launch: block 512, grid min(ceil(n / 16), multiprocessors) in x (any other is right too), no dynamic shared memory.
//
// Bytes: W read once; x comes from the caches.
//
// spills: gemv_plain_f16 32 x and two steps of W in 128 registers, on sm_120a
// spills: gemv_plain_bf16 32 as gemv_plain_f16
// spills: gemv_nested_f16 32 as gemv_plain_f16, and 16 on sm_75 to sm_90a
// spills: gemv_nested_bf16 32 as gemv_nested_f16

#include "common/blocks.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
// Rows of x at most, and rows of W in a tile.
constexpr u32 MOST = 8;
constexpr u32 TILE = 16;
// Bytes of W that are on their way to the second-level cache.
constexpr u32 AHEAD_BYTES = 64 << 10;

struct __align__(16) Words {
    u32 v[4];
};

__device__ __forceinline__ Words load_words(const void *p) {
    const uint4 w = __ldg(reinterpret_cast<const uint4 *>(p));
    return {w.x, w.y, w.z, w.w};
}

// Bytes first .. last of an array to the second-level cache, by all threads of the block.
__device__ __forceinline__ void prefetch(const void *array, u64 first, u64 last) {
    const char *bytes = reinterpret_cast<const char *>(array);
    for (u64 at = first + threadIdx.x * 32; at < last; at += THREADS * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(bytes + at));
}

__device__ __forceinline__ void prefetch_scales(const PlainScales &scales, u64 first, u64 last) {
    prefetch(scales.absmax, first * 4, last * 4);
}

__device__ __forceinline__ void prefetch_scales(const NestedScales &scales, u64 first, u64 last) {
    prefetch(scales.codes, first, last);
}

// The two kinds of W. In a step a lane has PARTS times 8 elements of rows lane / 4 and lane / 4 + 8 of a tile, which begin at
// column(lane, part) of the warp's chunk, and the same of x. `fetch` loads them, `words` gives a part as pairs of T. `get` is for
// the plain path.
template <typename T, typename S>
struct BlockMatrix {
    static constexpr u32 PARTS = 4, MULTIPLE = 32;

    const u8 *packed;
    S scales;
    const float *code;
    u32 shift;
    // Levels of codes, and of pairs of codes.
    float *levels;
    float2 (*pairs)[16];

    struct Fetched {
        Words codes[2];
        typename S::Loaded scales[2];
    };

    static __device__ __forceinline__ u32 column(u32 lane, u32 part) { return lane % 4 * 32 + part * 8; }
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
    // Elements first .. last.
    __device__ __forceinline__ void prefetch_elements(u64 first, u64 last) const {
        prefetch(packed, first / 2, last / 2);
        prefetch_scales(scales, first >> shift, (last + (1u << shift) - 1) >> shift);
    }
    __device__ __forceinline__ void fetch(Fetched &to, const u64 (&rows)[2], u32 k, u32 chunk, u32 lane) const {
        const u32 first = chunk + lane % 4 * 32, column = first < k ? first : 0;
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            const u64 at = rows[r] + column;
            to.codes[r] = load_words(packed + at / 2);
            to.scales[r] = scales.load(at >> shift);
        }
    }
    __device__ __forceinline__ float scale(const Fetched &from, u32 r) const { return scales.value(from.scales[r]); }
    // `copy` is the lane's place in an entry.
    __device__ __forceinline__ void words(u32 (&w)[4], const Fetched &from, u32 r, float scale, u32 part, u32 copy) const {
        const char *mine = reinterpret_cast<const char *>(pairs);
        const u32 codes = from.codes[r].v[part];
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
    static constexpr u32 PARTS = 2, MULTIPLE = 8;

    const T *w;

    struct Fetched {
        Words parts[2][PARTS];
    };

    static __device__ __forceinline__ u32 column(u32 lane, u32 part) { return part * 32 + lane % 4 * 8; }
    __device__ __forceinline__ bool aligned() const { return aligned16(w); }

    __device__ __forceinline__ void prepare() const {}
    __device__ __forceinline__ void prefetch_elements(u64 first, u64 last) const { prefetch(w, first * sizeof(T), last * sizeof(T)); }
    __device__ __forceinline__ void fetch(Fetched &to, const u64 (&rows)[2], u32 k, u32 chunk, u32 lane) const {
#pragma unroll
        for (u32 p = 0; p < PARTS; ++p) {
            const u32 first = chunk + column(lane, p), at = first < k ? first : 0;
#pragma unroll
            for (u32 r = 0; r < 2; ++r) to.parts[r][p] = load_words(w + rows[r] + at);
        }
    }
    __device__ __forceinline__ float scale(const Fetched &, u32) const { return 1.0f; }
    __device__ __forceinline__ void words(u32 (&v)[4], const Fetched &from, u32 r, float, u32 part, u32) const {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) v[i] = from.parts[r][part].v[i];
    }
    template <int N>
    __device__ __forceinline__ void get(u64 at, float (&v)[N]) const {
        load_f32(w + at, v);
    }
};

// A lane's part of a chunk of x: zero beyond m and k.
template <typename W, typename T>
__device__ __forceinline__ void load_x(Words (&held)[W::PARTS], const T *x, u32 m, u32 k, u32 chunk, u32 lane) {
#pragma unroll
    for (u32 p = 0; p < W::PARTS; ++p) {
        const u32 column = chunk + W::column(lane, p);
        held[p] = lane / 4 < m && column < k ? load_words(x + u64(lane / 4) * k + column) : Words{};
    }
}

// A step of a warp: a tile, and which of the warp's chunks.
struct Step {
    u32 tile, chunk;

    __device__ __forceinline__ void next(u32 chunks) {
        if (++chunk == chunks) chunk = 0, tile += gridDim.x;
    }
};

// Sums of warps but the one that adds them up, for two tiles in turn.
using Sums = float4[2][WARPS - 1][32];

// HELD: the most chunks of a tile that a warp has, whose x stay in registers; 0: any number, x comes from memory.
template <int HELD, typename T, typename W>
__device__ __forceinline__ void tile_products(T *y, const T *x, const W &matrix, const T *bias, Sums &sums, u32 m, u32 n, u32 k) {
    constexpr u32 CHUNK = W::PARTS * 32, STRIDE = WARPS * CHUNK;
    constexpr int AHEAD = 2, TURNS = HELD > AHEAD ? HELD : AHEAD;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 tiles = (n + TILE - 1) / TILE, chunks = HELD ? HELD : (k + STRIDE - 1) / STRIDE;
    const u64 tile_size = u64(TILE) * k, size = u64(n) * k;
    Step now = {blockIdx.x, 0}, ahead = now;
    typename W::Fetched ring[AHEAD];
    const auto fetch = [&](typename W::Fetched &to) {
        // Without a condition, so that nothing waits for the load: what lies beyond W is read elsewhere in it and not used.
        const u64 first = u64(ahead.tile) * TILE + lane / 4, second = first + 8;
        const u64 rows[2] = {(first < n ? first : 0) * k, (second < n ? second : 0) * k};
        matrix.fetch(to, rows, k, ahead.chunk * STRIDE + warp * CHUNK, lane);
        ahead.next(chunks);
    };
    const auto prefetch_tile = [&](u64 tile) {
        const u64 first = tile * tile_size, last = first + tile_size;
        if (first < size) matrix.prefetch_elements(first, last < size ? last : size);
    };
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) fetch(ring[i]);
    const u32 distance = 1 + u32(AHEAD_BYTES / (tile_size * (W::PARTS == 4 ? 1 : 4) / 2));
    for (u32 i = 0; i < distance; ++i) prefetch_tile(blockIdx.x + u64(i) * gridDim.x);
    Words held[HELD ? HELD : 1][W::PARTS];
    if constexpr (HELD != 0) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) load_x<W>(held[i], x, m, k, i * STRIDE + warp * CHUNK, lane);
    }
    matrix.prepare();
    __syncthreads();
    u32 copy = threadIdx.x % 16 * 8, turn = 0;
    asm volatile("" : "+r"(copy));
    float c[2][4] = {};
    while (now.tile < tiles) {
#pragma unroll
        for (int j = 0; j < TURNS; ++j) {
            if (now.tile >= tiles) break;
            if (now.chunk == 0) prefetch_tile(now.tile + u64(distance) * gridDim.x);
            const u32 chunk = now.chunk * STRIDE + warp * CHUNK;
            Words(&xs)[W::PARTS] = held[HELD ? j % HELD : 0];
            if (chunk < k) {
                if constexpr (HELD == 0) load_x<W>(xs, x, m, k, chunk, lane);
                const typename W::Fetched &from = ring[j % AHEAD];
                const float upper = matrix.scale(from, 0), lower = matrix.scale(from, 1);
#pragma unroll
                for (u32 p = 0; p < W::PARTS; ++p) {
                    u32 a[4], b[4];
                    matrix.words(a, from, 0, upper, p, copy);
                    matrix.words(b, from, 1, lower, p, copy);
                    const u32 first[4] = {a[0], b[0], a[1], b[1]}, second[4] = {a[2], b[2], a[3], b[3]};
                    mma<T>(c[0], first, xs[p].v[0], xs[p].v[1]);
                    mma<T>(c[1], second, xs[p].v[2], xs[p].v[3]);
                }
            }
            fetch(ring[j % AHEAD]);
            if (now.chunk + 1 == chunks) {
                // Rows lane / 4 (x and y) and lane / 4 + 8 (z and w) of the tile, for rows 2t and 2t + 1 of x.
                float v[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) v[i] = c[0][i] + c[1][i], c[0][i] = c[1][i] = 0;
                const u32 adder = turn % WARPS;
                if (warp != adder) sums[turn & 1][warp - (warp > adder)][lane] = {v[0], v[1], v[2], v[3]};
                __syncthreads();
                if (warp == adder) {
                    float4 sum = {0, 0, 0, 0};
#pragma unroll 2
                    for (u32 i = 0; i < WARPS; ++i) {
                        float4 other = {v[0], v[1], v[2], v[3]};
                        if (i != adder) other = sums[turn & 1][i - (i > adder)][lane];
                        sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
                    }
                    const float all[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) {
                        const u32 row = now.tile * TILE + lane / 4 + i / 2 * 8, of_x = lane % 4 * 2 + i % 2;
                        if (row < n && of_x < m) y[u64(of_x) * n + row] = from_f32<T>(all[i] + (bias ? to_f32(bias[row]) : 0.0f));
                    }
                }
                ++turn;
            }
            now.next(chunks);
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
        constexpr u32 STRIDE = WARPS * W::PARTS * 32, SMALL = 8 / W::PARTS, LARGE = 4;
        if (aligned && k % W::MULTIPLE == 0) {
            if (k <= SMALL * STRIDE) tile_products<SMALL>(y, x, matrix, bias, sums, m, n, k);
            else if (W::PARTS == 4 && k <= LARGE * STRIDE) tile_products<LARGE>(y, x, matrix, bias, sums, m, n, k);
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
