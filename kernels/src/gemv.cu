// y = x Wᵀ + bias for a few rows of x [m, k], m <= 8, against W [n, k]: 4-bit blocks (plain or nested scales) or dense. y [m, n].
//
// W is decoded to f32 and rounded to T, as dequantize.cu does; products are summed in f32.
//
// bf16 and f16 from sm_80 on, k a multiple of 32 (dense: of 8), pointers aligned to 16 bytes: tensor cores do the sums, rows of x
// beyond m being zero. A block takes tiles of 16 rows of W (dense: 8) in turn. Its 16 warps share the columns of a tile in chunks
// of 128, and at the tile's end one of them, each in turn, adds up what they have, in the order of the warps. Codes are decoded in
// twos: entry b of a table is the pair of levels of byte b, and lies in shared memory 16 times, so that lanes never want the same
// bank. A warp's next chunk is copied to shared memory while it works, and the next tiles to the second-level cache before that.
// Dense: the next two chunks are in registers, and x too while k <= 4096.
// Else: a warp takes a row of W, and a lane 8 elements of 256 at a time, or one of 32.
//
// Launch: block 512. gemv_plain_T, gemv_nested_T: grid min(ceil(n / 16), 2 · multiprocessors) in x, 90112 bytes of dynamic shared
// memory (f32, and all on sm_75: none). gemv_dense_T: grid min(ceil(n / 8), multiprocessors), none. Other grids are right too.
//
// Bytes: W read once; x comes from the caches.

#include "common/blocks.cuh"
#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / 32;
// Rows of x at most.
constexpr u32 MOST = 8;
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

// A step of a warp: a tile, and which of the warp's chunks.
struct Step {
    u32 tile, part;

    __device__ __forceinline__ void next(u32 parts) {
        if (++part == parts) part = 0, tile += gridDim.x;
    }
};

// Adds up N values of each lane over the warps, which call it together; true for the one warp that has the sums. `turn` counts
// the calls.
template <int N>
struct Sums {
    float v[2][WARPS - 1][N][32];

    __device__ __forceinline__ bool add(float (&mine)[N], u32 turn) {
        const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, adder = turn % WARPS;
        float(*others)[N][32] = v[turn & 1];
        if (warp != adder) {
#pragma unroll
            for (int i = 0; i < N; ++i) others[warp - (warp > adder)][i][lane] = mine[i];
        }
        __syncthreads();
        if (warp != adder) return false;
        float sum[N] = {};
#pragma unroll 4
        for (u32 w = 0; w < WARPS; ++w) {
#pragma unroll
            for (int i = 0; i < N; ++i) sum[i] += w == adder ? mine[i] : others[w - (w > adder)][i][lane];
        }
#pragma unroll
        for (int i = 0; i < N; ++i) mine[i] = sum[i];
        return true;
    }
};

template <typename T>
__device__ __forceinline__ void put(T *y, const T *bias, u32 row_of_x, u32 row, float sum, u32 m, u32 n) {
    if (row_of_x < m && row < n) y[u64(row_of_x) * n + row] = from_f32<T>(sum + (bias ? to_f32(bias[row]) : 0.0f));
}

// Four times 8 elements of x for a lane, zero beyond m and k; the first of each are at column(lane, part) of the chunk.
template <typename W, typename T>
__device__ __forceinline__ void load_x(Words (&held)[4], const T *x, u32 m, u32 k, u32 chunk, u32 lane) {
#pragma unroll
    for (u32 p = 0; p < 4; ++p) {
        const u32 column = chunk + W::column(lane, p);
        held[p] = lane / 4 < m && column < k ? load_words(x + u64(lane / 4) * k + column) : Words{};
    }
}

template <typename T, typename S>
struct BlockMatrix {
    const u8 *packed;
    S scales;
    u32 shift;
    const float *levels;

    static __device__ __forceinline__ u32 column(u32 lane, u32 part) { return lane % 4 * 32 + part * 8; }
    __device__ __forceinline__ bool aligned() const { return aligned16(packed); }

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
    const T *w;

    static __device__ __forceinline__ u32 column(u32 lane, u32 part) { return part * 32 + lane % 4 * 8; }
    __device__ __forceinline__ bool aligned() const { return aligned16(w); }

    template <int N>
    __device__ __forceinline__ void get(u64 at, float (&v)[N]) const {
        load_f32(w + at, v);
    }
};

// Bytes first .. last of an array to the second-level cache, by all threads of the block.
__device__ __forceinline__ void prefetch(const void *array, u64 first, u64 last) {
    const char *bytes = reinterpret_cast<const char *>(array);
    for (u64 at = first + threadIdx.x * 32; at < last; at += THREADS * 32) asm volatile("prefetch.global.L2 [%0];" ::"l"(bytes + at));
}

// How a lane's scale gets to its place in shared memory (4 bytes there) and from it.
struct PlainCopy {
    PlainScales scales;

    __device__ __forceinline__ void start(u32 to, u64 block) { copy4(to, scales.absmax + block, true); }
    __device__ __forceinline__ float value(const u32 *from, const float *) const { return __uint_as_float(*from); }
    __device__ __forceinline__ void prefetch_blocks(u64 first, u64 last) const { prefetch(scales.absmax, first * 4, last * 4); }
};

struct NestedCopy {
    NestedScales scales;
    u32 byte;
    float absmax;

    // The four codes that the block's is among.
    __device__ __forceinline__ void start(u32 to, u64 block) {
        copy4(to, scales.codes + (block & ~u64(3)), true);
        byte = u32(block) & 3;
        absmax = scales.absmax[block >> 8];
    }
    __device__ __forceinline__ float value(const u32 *from, const float *map) const {
        return __fadd_rn(__fmul_rn(map[*from >> byte * 8 & 255], absmax), scales.offset);
    }
    __device__ __forceinline__ void prefetch_blocks(u64 first, u64 last) const { prefetch(scales.codes, first, last); }
};

__device__ __forceinline__ PlainCopy copy_of(const PlainScales &scales) { return {scales}; }
__device__ __forceinline__ NestedCopy copy_of(const NestedScales &scales) { return {scales, 0, 0}; }
__device__ __forceinline__ const float *map_of(const PlainScales &) { return nullptr; }
__device__ __forceinline__ const float *map_of(const NestedScales &scales) { return scales.map; }

// Dynamic shared memory of the kernels of 4-bit blocks.
struct __align__(128) Shared {
    float2 pairs[256][16];
    float map[256];
    Sums<4> sums;
    // Two steps: a lane's codes and scales of its two rows.
    Words codes[2][WARPS][2][32];
    u32 scales[2][WARPS][2][32];
};
static_assert(sizeof(Shared) == 90112, "as said above");

// A lane has 32 elements of rows lane / 4 and lane / 4 + 8 of a tile in each step.
template <typename T, typename S>
__device__ __forceinline__ void block_tiles(T *y, const T *x, const BlockMatrix<T, S> &matrix, const float *code, const T *bias,
                                            u32 m, u32 n, u32 k) {
    // Bytes of W that are on their way to the second-level cache for a block.
    constexpr u32 AHEAD = 32 << 10, TILE = 16;
    extern __shared__ __align__(128) char dynamic[];
    Shared &shared = *reinterpret_cast<Shared *>(dynamic);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 tiles = (n + TILE - 1) / TILE, parts = (k + STRIDE - 1) / STRIDE;
    const u64 tile_size = u64(TILE) * k, size = u64(n) * k;
    Step now = {blockIdx.x, 0}, ahead = now;
    auto upper = copy_of(matrix.scales), lower = upper;
    const auto fetch = [&](u32 slot) {
        // What lies beyond W is read elsewhere in it and not used.
        const u32 first = ahead.part * STRIDE + warp * CHUNK + lane % 4 * 32, column = first < k ? first : 0;
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            const u64 row = u64(ahead.tile) * TILE + lane / 4 + r * 8;
            const u64 at = (row < n ? row : 0) * k + column;
            copy16(shared_address(&shared.codes[slot][warp][r][lane]), matrix.packed + at / 2, true);
            (r == 0 ? upper : lower).start(shared_address(&shared.scales[slot][warp][r][lane]), at >> matrix.shift);
        }
        copy_commit();
        ahead.next(parts);
    };
    const auto prefetch_tile = [&](u64 tile) {
        const u64 first = tile * tile_size, last = first + tile_size < size ? first + tile_size : size;
        if (first >= size) return;
        prefetch(matrix.packed, first / 2, last / 2);
        upper.prefetch_blocks(first >> matrix.shift, (last + (1u << matrix.shift) - 1) >> matrix.shift);
    };
    fetch(0);
    const u32 distance = 1 + u32(AHEAD / (tile_size / 2));
    for (u32 i = 0; i < distance; ++i) prefetch_tile(blockIdx.x + u64(i) * gridDim.x);
    // The table: a thread's entries differ in the high nibble alone.
    constexpr u32 EACH = 256 * 16 / THREADS;
    float high[EACH];
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) high[i] = code[i * (16 / EACH) + threadIdx.x / 256];
    const float low = code[threadIdx.x / 16 % 16];
#pragma unroll
    for (u32 i = 0; i < EACH; ++i) shared.pairs[i * (256 / EACH) + threadIdx.x / 16][threadIdx.x % 16] = {high[i], low};
    if (map_of(matrix.scales) && threadIdx.x < 256) shared.map[threadIdx.x] = map_of(matrix.scales)[threadIdx.x];
    __syncthreads();
    const char *pairs = reinterpret_cast<const char *>(shared.pairs);
    u32 copy = threadIdx.x % 16 * 8, turn = 0;
    asm volatile("" : "+r"(copy));
    float c[2][4] = {};
    for (u32 slot = 0; now.tile < tiles; slot ^= 1) {
        if (now.part == 0) prefetch_tile(now.tile + u64(distance) * gridDim.x);
        copy_wait<0>();
        const Words codes[2] = {shared.codes[slot][warp][0][lane], shared.codes[slot][warp][1][lane]};
        const float scale[2] = {upper.value(&shared.scales[slot][warp][0][lane], shared.map),
                                lower.value(&shared.scales[slot][warp][1][lane], shared.map)};
        fetch(slot ^ 1);
        const u32 chunk = now.part * STRIDE + warp * CHUNK;
        if (chunk < k) {
            Words xs[4];
            load_x<BlockMatrix<T, S>>(xs, x, m, k, chunk, lane);
#pragma unroll
            for (u32 p = 0; p < 4; ++p) {
                u32 w[4][2];
#pragma unroll
                for (u32 b = 0; b < 4; ++b) {
#pragma unroll
                    for (u32 r = 0; r < 2; ++r) {
                        const u32 four = codes[r].v[p], entry = (b == 0 ? four << 7 : four >> (b * 8 - 7)) & 0x7f80;
                        const float2 pair = *reinterpret_cast<const float2 *>(pairs + (entry | copy));
                        w[b][r] = pack2<T>(pair.x * scale[r], pair.y * scale[r]);
                    }
                }
                const u32 first[4] = {w[0][0], w[0][1], w[1][0], w[1][1]}, second[4] = {w[2][0], w[2][1], w[3][0], w[3][1]};
                mma<T>(c[0], first, xs[p].v[0], xs[p].v[1]);
                mma<T>(c[1], second, xs[p].v[2], xs[p].v[3]);
            }
        }
        if (now.part + 1 == parts) {
            // Rows lane / 4 and lane / 4 + 8 of the tile, for rows 2t and 2t + 1 of x.
            float v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) v[i] = c[0][i] + c[1][i], c[0][i] = c[1][i] = 0;
            if (shared.sums.add(v, turn++)) {
#pragma unroll
                for (u32 i = 0; i < 4; ++i) put(y, bias, lane % 4 * 2 + i % 2, now.tile * TILE + lane / 4 + i / 2 * 8, v[i], m, n);
            }
        }
        now.next(parts);
    }
    copy_wait<0>();
}

// A lane has 32 elements of row lane / 4 of a tile in each step; x is the left matrix. HELD: the most chunks of a tile that a
// warp has, whose x stay in registers; 0: any number, x comes from memory.
template <int HELD, typename T>
__device__ __forceinline__ void dense_tiles(T *y, const T *x, const T *w, const T *bias, Sums<2> &sums, u32 m, u32 n, u32 k) {
    constexpr u32 TILE = 8, AHEAD = 2;
    using Matrix = DenseMatrix<T>;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 tiles = (n + TILE - 1) / TILE, parts = HELD ? HELD : (k + STRIDE - 1) / STRIDE;
    Step now = {blockIdx.x, 0}, ahead = now;
    Words ring[AHEAD][4];
    const auto fetch = [&](Words(&to)[4]) {
        // Without a condition, so that nothing waits for the load: what lies beyond W is read elsewhere in it and not used.
        const u64 row = u64(ahead.tile) * TILE + lane / 4;
        const T *from = w + (row < n ? row : n - 1) * k;
#pragma unroll
        for (u32 p = 0; p < 4; ++p) {
            const u32 first = ahead.part * STRIDE + warp * CHUNK + Matrix::column(lane, p);
            to[p] = load_words(from + (first < k ? first : 0));
        }
        ahead.next(parts);
    };
#pragma unroll
    for (u32 i = 0; i < AHEAD; ++i) fetch(ring[i]);
    Words held[HELD ? HELD : 1][4];
    if constexpr (HELD != 0) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) load_x<Matrix>(held[i], x, m, k, i * STRIDE + warp * CHUNK, lane);
    }
    float c[2][4] = {};
    u32 turn = 0;
    while (now.tile < tiles) {
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) {
            if (now.tile >= tiles) break;
            const u32 chunk = now.part * STRIDE + warp * CHUNK;
            Words(&xs)[4] = held[HELD ? j % (HELD ? HELD : 1) : 0];
            if (chunk < k) {
                if constexpr (HELD == 0) load_x<Matrix>(xs, x, m, k, chunk, lane);
#pragma unroll
                for (u32 p = 0; p < 4; ++p) {
                    const u32 first[4] = {xs[p].v[0], 0, xs[p].v[1], 0}, second[4] = {xs[p].v[2], 0, xs[p].v[3], 0};
                    mma<T>(c[0], first, ring[j][p].v[0], ring[j][p].v[1]);
                    mma<T>(c[1], second, ring[j][p].v[2], ring[j][p].v[3]);
                }
            }
            fetch(ring[j]);
            if (now.part + 1 == parts) {
                // Rows 2t and 2t + 1 of the tile, for row lane / 4 of x.
                float v[2] = {c[0][0] + c[1][0], c[0][1] + c[1][1]};
#pragma unroll
                for (int i = 0; i < 4; ++i) c[0][i] = c[1][i] = 0;
                if (sums.add(v, turn++)) {
#pragma unroll
                    for (u32 i = 0; i < 2; ++i) put(y, bias, lane / 4, now.tile * TILE + lane % 4 * 2 + i, v[i], m, n);
                }
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
__device__ __forceinline__ void rows(T *y, const T *x, const W &matrix, const T *bias, u32 m, u32 n, u32 k) {
    if (k % 8 == 0 && aligned16(x) && matrix.aligned()) row_products<8>(y, x, matrix, bias, m, n, k);
    else row_products<1>(y, x, matrix, bias, m, n, k);
}

template <typename T, typename S>
__device__ __forceinline__ void gemv_blocks(T *y, const T *x, const u8 *packed, const S &scales, const float *code, const T *bias,
                                            u32 m, u32 n, u32 k, u32 block_size) {
    __shared__ float levels[16];
    const BlockMatrix<T, S> matrix = {packed, scales, log2_of(block_size), levels};
#if HAS_BF16
    if constexpr (sizeof(T) == 2) {
        if (k % 32 == 0 && aligned16(x) && aligned16(packed) && scales.aligned()) {
            block_tiles(y, x, matrix, code, bias, m, n, k);
            return;
        }
    }
#endif
    if (threadIdx.x < 16) levels[threadIdx.x] = code[threadIdx.x];
    __syncthreads();
    rows(y, x, matrix, bias, m, n, k);
}

template <typename T>
__device__ __forceinline__ void gemv_dense(T *y, const T *x, const T *w, const T *bias, u32 m, u32 n, u32 k) {
#if HAS_BF16
    if constexpr (sizeof(T) == 2) {
        __shared__ Sums<2> sums;
        if (k % 8 == 0 && aligned16(x) && aligned16(w)) {
            if (k <= STRIDE) dense_tiles<1>(y, x, w, bias, sums, m, n, k);
            else if (k <= 2 * STRIDE) dense_tiles<2>(y, x, w, bias, sums, m, n, k);
            else dense_tiles<0>(y, x, w, bias, sums, m, n, k);
            return;
        }
    }
#endif
    rows(y, x, DenseMatrix<T>{w}, bias, m, n, k);
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
    gemv_dense(y, x, w, bias, m, n, k);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_plain_f16(f16 *y, const f16 *x, const u8 *packed, const float *absmax, const float *code, const f16 *bias, u32 m,
                   u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, PlainScales{absmax}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_nested_f16(f16 *y, const f16 *x, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                    const float *code, const f16 *bias, float offset, u32 m, u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512)
    gemv_dense_f16(f16 *y, const f16 *x, const f16 *w, const f16 *bias, u32 m, u32 n, u32 k) {
    gemv_dense(y, x, w, bias, m, n, k);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_plain_bf16(bf16 *y, const bf16 *x, const u8 *packed, const float *absmax, const float *code, const bf16 *bias, u32 m,
                   u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, PlainScales{absmax}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512, 2)
    gemv_nested_bf16(bf16 *y, const bf16 *x, const u8 *packed, const u8 *absmax_codes, const float *absmax2, const float *map,
                    const float *code, const bf16 *bias, float offset, u32 m, u32 n, u32 k, u32 block_size) {
    gemv_blocks(y, x, packed, NestedScales{absmax_codes, absmax2, map, offset}, code, bias, m, n, k, block_size);
}

extern "C" __global__ void __launch_bounds__(512)
    gemv_dense_bf16(bf16 *y, const bf16 *x, const bf16 *w, const bf16 *bias, u32 m, u32 n, u32 k) {
    gemv_dense(y, x, w, bias, m, n, k);
}
#endif
