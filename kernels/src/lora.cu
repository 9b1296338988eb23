// Skinny products of low-rank adapters, each one pass over a tall matrix; 16-bit types (f32 goes through the general products).
//
//   lora_down_T       h = scale · x Aᵀ                   x [rows, k], A [r, k], h [rows, r]; _copy also writes x_out = x
//   lora_t_db_T       t = scale · dy B, dB += scale · dyᵀ h  dy [rows, n], B [n, r], h and t [rows, r], dB F32 [n, r]
//   lora_da_T         dA += tᵀ x                         t [rows, r], x [rows, k], dA F32 [r, k]
//
// x, h, dy and t have pitches (ld) of their own, so that [x | h] and [dy | t] can be rows of one buffer; A, B, dA and dB are dense.
// All by mma of 16 x 8 x 16 with f32 sums, in a fixed order. Any sizes; 16-byte accesses where sizes, pitches and pointers allow.
//
// lora_down: a block takes 32 rows per group of 8 warps, and 32 columns of A's r; the warps of a group share k, 64 at a time each, and
// add their sums up in shared memory. The order of k inside a product is free, so each lane feeds the eight values of a 16-byte
// load to two products as they come. Block 256 · g (g = 1 or 2 groups); grid: ceil(r / 32) · ceil(rows / (32 g)), or any less that
// is a multiple of ceil(r / 32). No dynamic shared memory. Bytes: x (twice with the copy); A is read once a block, from L2.
//
// lora_t_db and lora_da: a block takes 512 columns of the wide matrix, 16 of r, and a share of the rows, 16 at a time through
// STAGES buffers in shared memory; each of its 4 warps keeps the sums of 128 columns in registers. With S shares,
// C = ceil(n / 512) (lora_da: of k) and P = ceil(r / 16): block 128, grid S · C · P, dynamic shared memory 58880 bytes;
// partials F32: lora_t_db [C, rows, 16 P] for t, then [S, n, 16 P] for dB; lora_da [S, r, k]. lora_t_db_sum_T adds its partials up:
// block 256, grid ceil((rows + n) · P / 64); lora_da_sum: block (32, 16), grid ceil(r · k / 32), count = S. Take S = the
// greatest at most ceil(rows / 16) with S · C · P <= 2 blocks a multiprocessor, at least 1. Bytes: dy or x, and the partials.

#include "common/mma.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

// Eight values at p of which the first `valid` are there, as they lie in memory.
template <bool WHOLE, typename T>
__device__ __forceinline__ void load8(u32 (&word)[4], const T *p, i32 valid) {
    if constexpr (WHOLE) {
        Held<T, 8> held;
        if (valid > 0) {
            held.load(p);
#pragma unroll
            for (int i = 0; i < 4; ++i) word[i] = held.word[i];
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) word[i] = 0;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            word[i] = 2 * i < valid ? p[2 * i].bits : 0u;
            if (2 * i + 1 < valid) word[i] |= u32(p[2 * i + 1].bits) << 16;
        }
    }
}

template <bool WHOLE, typename T>
__device__ __forceinline__ void store8(T *p, const u32 (&word)[4], i32 valid) {
    if constexpr (WHOLE) {
        if (valid > 0) Held<T, 8>{word[0], word[1], word[2], word[3]}.store(p);
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i)
            if (i < valid) p[i] = T{u16(word[i / 2] >> 16 * (i % 2))};
    }
}

// Eight values to shared memory; zeros beyond the first `valid`.
template <bool WHOLE, typename T>
__device__ __forceinline__ void copy_eight(u32 to, const T *from, i32 valid) {
    if constexpr (WHOLE) {
        copy16(to, from, valid > 0);
    } else {
        u32 word[4];
        load8<false>(word, from, valid);
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                     : "memory");
    }
}

// 32 rows, and 8 · TILES columns of h at `column`. `sums` holds the sums of half of a group's warps.
template <bool WHOLE, bool COPY, int TILES, typename T>
__device__ __forceinline__ void down(float (*sums)[32], T *h, T *x_out, const T *x, const T *a, float scale, u32 rows, u32 k,
                                     u32 r, u32 ld_h, u32 ld_out, u32 ld_x, u64 row, u32 column) {
    const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 group = threadIdx.x / 256, share = threadIdx.x / 32 % 8;
    float c[2][TILES][4] = {};
#pragma unroll 2
    for (u32 at = share * 64; at < k; at += 512) {
        // Two chunks of 32 columns, of which this lane has eight.
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 first = at + half * 32 + t * 8;
            const i32 valid = i32(k) - i32(first);
            u32 right[TILES][4], left[2][2][4];
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const u64 n = row + m * 16 + i * 8 + g;
                    load8<WHOLE>(left[m][i], x + n * ld_x + first, n < rows ? valid : 0);
                    if (COPY && column == 0) store8<WHOLE>(x_out + n * ld_out + first, left[m][i], n < rows ? valid : 0);
                }
#pragma unroll
            for (int j = 0; j < TILES; ++j) {
                const u32 n = column + j * 8 + g;
                load8<WHOLE>(right[j], a + u64(n) * k + first, n < r ? valid : 0);
            }
#pragma unroll
            for (int m = 0; m < 2; ++m)
#pragma unroll
                for (int i = 0; i < 4; i += 2) {
                    const u32 four[4] = {left[m][0][i], left[m][1][i], left[m][0][i + 1], left[m][1][i + 1]};
#pragma unroll
                    for (int j = 0; j < TILES; ++j) mma<T>(c[m][j], four, right[j][i], right[j][i + 1]);
                }
        }
    }
    // By halves: the upper warps leave their sums, the lower ones add them to theirs.
#pragma unroll
    for (u32 upper = 4; upper > 0; upper /= 2) {
        float(*slot)[32] = sums + (group * 4 + share % upper) * 8 * TILES;
        __syncthreads();
        if (share >= upper && share < 2 * upper)
#pragma unroll
            for (int i = 0; i < 8 * TILES; ++i) slot[i][lane] = c[i / (4 * TILES)][i / 4 % TILES][i % 4];
        __syncthreads();
        if (share < upper)
#pragma unroll
            for (int i = 0; i < 8 * TILES; ++i) c[i / (4 * TILES)][i / 4 % TILES][i % 4] += slot[i][lane];
    }
    if (share != 0) return;
#pragma unroll
    for (int i = 0; i < 8 * TILES; ++i) {
        const u64 n = row + i / (4 * TILES) * 16 + i % 4 / 2 * 8 + g;
        const u32 q = column + i / 4 % TILES * 8 + t * 2 + i % 2;
        if (n < rows && q < r) h[n * ld_h + q] = from_f32<T>(scale * c[i / (4 * TILES)][i / 4 % TILES][i % 4]);
    }
}

template <bool WHOLE, bool COPY, typename T>
__device__ __forceinline__ void down_rows(T *h, T *x_out, const T *x, const T *a, float scale, u32 rows, u32 k, u32 r, u32 ld_h,
                                          u32 ld_out, u32 ld_x) {
    __shared__ float sums[8 * 8 * 6][32];
    const u32 passes = (r + 47) / 48, tiles = (r + 16 * passes - 1) / (16 * passes);
    const u32 column = blockIdx.x % passes * tiles * 16, height = blockDim.x / 256 * 32;
    const u64 stride = u64(gridDim.x / passes) * height;
    for (u64 row = blockIdx.x / passes * height; row < rows; row += stride) {
        const u64 at = row + threadIdx.x / 256 * 32;
        if (tiles == 1)
            down<WHOLE, COPY, 2>(sums, h, x_out, x, a, scale, rows, k, r, ld_h, ld_out, ld_x, at, column);
        else if (tiles == 2)
            down<WHOLE, COPY, 4>(sums, h, x_out, x, a, scale, rows, k, r, ld_h, ld_out, ld_x, at, column);
        else
            down<WHOLE, COPY, 6>(sums, h, x_out, x, a, scale, rows, k, r, ld_h, ld_out, ld_x, at, column);
    }
}

template <bool COPY, typename T>
__device__ __forceinline__ void down_any(T *h, T *x_out, const T *x, const T *a, float scale, u32 rows, u32 k, u32 r, u32 ld_h,
                                         u32 ld_out, u32 ld_x) {
    if (k % 8 == 0 && ld_x % 8 == 0 && ld_out % 8 == 0 && aligned16(x) && aligned16(a) && aligned16(x_out))
        down_rows<true, COPY>(h, x_out, x, a, scale, rows, k, r, ld_h, ld_out, ld_x);
    else
        down_rows<false, COPY>(h, x_out, x, a, scale, rows, k, r, ld_h, ld_out, ld_x);
}

// Rows and columns of a block's share of a wide matrix at a time, and buffers of them.
constexpr u32 DEPTH = 16, WIDTH = 512, STAGES = 3;
constexpr u32 WIDE_BYTES = DEPTH * WIDTH * 2, STAGE_BYTES = WIDE_BYTES + DEPTH * 16 * 2;

// A thin matrix [rows, r] beside a wide one [rows, n].
template <typename T>
struct Operands {
    const T *wide;
    const T *thin;
    u32 rows, n, r, ld_wide, ld_thin;
    bool thin_whole;
};

// The step's 16 rows of this warp's 128 columns, and (one warp) of 16 columns of the thin matrix, to shared memory.
template <bool WHOLE, typename T>
__device__ __forceinline__ void fetch(u32 stage, const Operands<T> &of, u64 row, u32 column, u32 thin_column) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 line = i * 2 + lane / 16, chunk = lane % 16;
        const u32 to = stage + warp * (WIDE_BYTES / 4) + line * 256 + (chunk ^ (line & 7)) * 16;
        const T *from = of.wide + (row + line) * of.ld_wide + column + chunk * 8;
        const i32 valid = row + line < of.rows ? i32(of.n) - i32(column + chunk * 8) : 0;
        copy_eight<WHOLE>(to, from, valid);
    }
    if (warp == 0) {
        const u32 line = lane / 2, chunk = lane % 2;
        const u32 to = stage + WIDE_BYTES + line * 32 + (chunk ^ (line / 4 & 1)) * 16;
        const T *from = of.thin + (row + line) * of.ld_thin + thin_column + chunk * 8;
        const i32 valid = row + line < of.rows ? i32(of.r) - i32(thin_column + chunk * 8) : 0;
        if (of.thin_whole)
            copy_eight<true>(to, from, valid);
        else
            copy_eight<false>(to, from, valid);
    }
}

struct __align__(8) Two {
    float v[2];
};

// WITH_T: t partials too, and the products' columns as rows (dB); else as columns (dA).
template <bool WITH_T, bool WHOLE, typename T>
__device__ __forceinline__ void wide_products(float *t_partials, float *partials, const Operands<T> &of, const T *b) {
    extern __shared__ __align__(16) u8 memory[];
    float(*t_slots)[8][32] = reinterpret_cast<float(*)[8][32]>(memory + STAGES * STAGE_BYTES);
    const u32 base = shared_address(memory), warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 passes = (of.r + 15) / 16, blocks = (of.n + WIDTH - 1) / WIDTH, pitch = passes * 16;
    const u32 thin_column = blockIdx.x % passes * 16, block = blockIdx.x / passes % blocks;
    const u32 share = blockIdx.x / (passes * blocks), shares = gridDim.x / (passes * blocks);
    const u32 column = block * WIDTH + warp * 128;
    const u32 steps = (of.rows + DEPTH - 1) / DEPTH, each = (steps + shares - 1) / shares;
    const u32 begin = min(share * each, steps), end = min(begin + each, steps);

    // B of this warp's columns.
    u32 right[8][2][2];
    if (WITH_T) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            const u32 n = column + i / 4 * 16 + i % 2 * 8 + t * 2, q = thin_column + i / 2 % 2 * 8 + g;
            u32 word = n < of.n && q < of.r ? b[u64(n) * of.r + q].bits : 0u;
            if (n + 1 < of.n && q < of.r) word |= u32(b[u64(n + 1) * of.r + q].bits) << 16;
            right[i / 4][i / 2 % 2][i % 2] = word;
        }
    }
    // The t of a step, once all warps have left theirs: this thread has two values of it.
    const auto add_up = [&](u32 step) {
        float sum[2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
            for (int w = 0; w < 4; ++w) sum[i] += t_slots[step % 2 * 4 + w][warp * 2 + i][lane];
        const u64 row = u64(step) * DEPTH + warp % 2 * 8 + g;
        if (row < of.rows) {
            float *to = t_partials + (u64(block) * of.rows + row) * pitch + thin_column + warp / 2 * 8 + t * 2;
            *reinterpret_cast<Two *>(to) = {sum[0], sum[1]};
        }
    };
    float c[8][2][4] = {};
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; ++i) {
        if (begin + i < end) fetch<WHOLE>(base + i * STAGE_BYTES, of, u64(begin + i) * DEPTH, column, thin_column);
        copy_commit();
    }
    u32 stage = 0, free_stage = STAGES - 1;
    for (u32 step = begin; step < end; ++step) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < end)
            fetch<WHOLE>(base + free_stage * STAGE_BYTES, of, u64(step + STAGES - 1) * DEPTH, column, thin_column);
        copy_commit();
        if (WITH_T && step > begin) add_up(step - 1);

        const u32 at = base + stage * STAGE_BYTES, tile = at + warp * (WIDE_BYTES / 4);
        u32 thin[4];
        {
            // Transposed: (columns 0..8, rows 0..8), (8..16, 0..8), (0..8, 8..16), (8..16, 8..16).
            const u32 line = lane / 16 * 8 + lane % 8, chunk = lane / 8 % 2;
            load_matrices_transposed(thin, at + WIDE_BYTES + line * 32 + (chunk ^ (line / 4 & 1)) * 16);
        }
        float ct[2][4] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const u32 line = lane & 15, chunk = i * 2 + lane / 16;
            const u32 address = tile + line * 256 + (chunk ^ (line & 7)) * 16;
            if (WITH_T) {
                u32 left[4];
                load_matrices(left, address);
                mma<T>(ct[0], left, right[i][0][0], right[i][0][1]);
                mma<T>(ct[1], left, right[i][1][0], right[i][1][1]);
            }
            // Transposed: (columns 0..8, rows 0..8), (0..8, 8..16), (8..16, 0..8), (8..16, 8..16).
            u32 turned[4];
            load_matrices_transposed(turned, address);
            if (WITH_T) {
                const u32 left[4] = {turned[0], turned[2], turned[1], turned[3]};
                mma<T>(c[i][0], left, thin[0], thin[2]);
                mma<T>(c[i][1], left, thin[1], thin[3]);
            } else {
                mma<T>(c[i][0], thin, turned[0], turned[1]);
                mma<T>(c[i][1], thin, turned[2], turned[3]);
            }
        }
        if (WITH_T) {
#pragma unroll
            for (int i = 0; i < 8; ++i) t_slots[step % 2 * 4 + warp][i][lane] = ct[i / 4][i % 4];
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        free_stage = free_stage + 1 == STAGES ? 0 : free_stage + 1;
    }
    if (WITH_T) {
        __syncthreads();
        if (begin < end) add_up(end - 1);
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        const u32 part = i / 8, j = i / 4 % 2, lower = i % 4 / 2;
        const float value = c[part][j][i % 4];
        if (WITH_T) {
            const u32 n = column + part * 16 + lower * 8 + g, q = thin_column + j * 8 + t * 2 + i % 2;
            if (n < of.n) partials[(u64(share) * of.n + n) * pitch + q] = value;
        } else {
            const u32 n = column + part * 16 + j * 8 + t * 2 + i % 2, q = thin_column + lower * 8 + g;
            if (n < of.n && q < of.r) partials[(u64(share) * of.r + q) * of.n + n] = value;
        }
    }
}

template <bool WITH_T, typename T>
__device__ __forceinline__ void wide_any(float *t_partials, float *partials, const T *wide, const T *thin, const T *b, u32 rows,
                                         u32 n, u32 r, u32 ld_wide, u32 ld_thin) {
    const Operands<T> of = {wide, thin, rows, n, r, ld_wide, ld_thin, r % 8 == 0 && ld_thin % 8 == 0 && aligned16(thin)};
    if (n % 8 == 0 && ld_wide % 8 == 0 && aligned16(wide))
        wide_products<WITH_T, true>(t_partials, partials, of, b);
    else
        wide_products<WITH_T, false>(t_partials, partials, of, b);
}

template <typename T>
__device__ __forceinline__ void t_db(float *partials, const T *dy, const T *b, const T *h, u32 rows, u32 n, u32 r, u32 ld_dy,
                                     u32 ld_h) {
    const u64 before = u64((n + WIDTH - 1) / WIDTH) * rows * ((r + 15) / 16 * 16);
    wide_any<true>(partials, partials + before, dy, h, b, rows, n, r, ld_dy, ld_h);
}

// Four values of each of `count` partial sums, `stride` apart.
__device__ __forceinline__ Pack<float> sum_of(const float *partials, u32 count, u64 stride) {
    Pack<float> sum = {};
#pragma unroll 8
    for (u32 i = 0; i < count; ++i) {
        const Pack<float> one = load16(partials + i * stride);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum.v[j] += one.v[j];
    }
    return sum;
}

template <typename T>
__device__ __forceinline__ void t_db_sum(T *t, float *db, const float *partials, float scale, u32 rows, u32 n, u32 r, u32 ld_t,
                                         u32 shares) {
    const u32 fours = (r + 15) / 16 * 4, blocks = (n + WIDTH - 1) / WIDTH;
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x, row = i / fours, size = u64(rows) * fours * 4;
    const u32 q = u32(i - row * fours) * 4;
    if (row < rows) {
        const Pack<float> sum = sum_of(partials + row * fours * 4 + q, blocks, size);
        for (u32 j = 0; j < 4 && q + j < r; ++j) t[row * ld_t + q + j] = from_f32<T>(scale * sum.v[j]);
    } else if (row - rows < n) {
        const u64 line = row - rows;
        const Pack<float> sum = sum_of(partials + blocks * size + line * fours * 4 + q, shares, u64(n) * fours * 4);
        for (u32 j = 0; j < 4 && q + j < r; ++j) db[line * r + q + j] += scale * sum.v[j];
    }
}

extern "C" __global__ void __launch_bounds__(512, 1)
    lora_down_f16(f16 *h, const f16 *x, const f16 *a, float scale, u32 rows, u32 k, u32 r, u32 ld_h, u32 ld_x) {
    down_any<false, f16>(h, nullptr, x, a, scale, rows, k, r, ld_h, 0, ld_x);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    lora_down_copy_f16(f16 *h, f16 *x_out, const f16 *x, const f16 *a, float scale, u32 rows, u32 k, u32 r, u32 ld_h, u32 ld_out,
                       u32 ld_x) {
    down_any<true, f16>(h, x_out, x, a, scale, rows, k, r, ld_h, ld_out, ld_x);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    lora_t_db_f16(float *partials, const f16 *dy, const f16 *b, const f16 *h, u32 rows, u32 n, u32 r, u32 ld_dy, u32 ld_h) {
    t_db(partials, dy, b, h, rows, n, r, ld_dy, ld_h);
}

extern "C" __global__ void __launch_bounds__(256)
    lora_t_db_sum_f16(f16 *t, float *db, const float *partials, float scale, u32 rows, u32 n, u32 r, u32 ld_t, u32 shares) {
    t_db_sum(t, db, partials, scale, rows, n, r, ld_t, shares);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    lora_da_f16(float *partials, const f16 *t, const f16 *x, u32 rows, u32 k, u32 r, u32 ld_t, u32 ld_x) {
    wide_any<false, f16>(nullptr, partials, x, t, nullptr, rows, k, r, ld_x, ld_t);
}

extern "C" __global__ void __launch_bounds__(512) lora_da_sum(float *da, const float *partials, u32 shares, u32 count) {
    add_rows(da, partials, shares, count);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(512, 1)
    lora_down_bf16(bf16 *h, const bf16 *x, const bf16 *a, float scale, u32 rows, u32 k, u32 r, u32 ld_h, u32 ld_x) {
    down_any<false, bf16>(h, nullptr, x, a, scale, rows, k, r, ld_h, 0, ld_x);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    lora_down_copy_bf16(bf16 *h, bf16 *x_out, const bf16 *x, const bf16 *a, float scale, u32 rows, u32 k, u32 r, u32 ld_h, u32 ld_out,
                       u32 ld_x) {
    down_any<true, bf16>(h, x_out, x, a, scale, rows, k, r, ld_h, ld_out, ld_x);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    lora_t_db_bf16(float *partials, const bf16 *dy, const bf16 *b, const bf16 *h, u32 rows, u32 n, u32 r, u32 ld_dy, u32 ld_h) {
    t_db(partials, dy, b, h, rows, n, r, ld_dy, ld_h);
}

extern "C" __global__ void __launch_bounds__(256)
    lora_t_db_sum_bf16(bf16 *t, float *db, const float *partials, float scale, u32 rows, u32 n, u32 r, u32 ld_t, u32 shares) {
    t_db_sum(t, db, partials, scale, rows, n, r, ld_t, shares);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    lora_da_bf16(float *partials, const bf16 *t, const bf16 *x, u32 rows, u32 k, u32 r, u32 ld_t, u32 ld_x) {
    wide_any<false, bf16>(nullptr, partials, x, t, nullptr, rows, k, r, ld_x, ld_t);
}
#endif
