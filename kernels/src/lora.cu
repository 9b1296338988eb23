// Gradients of a low-rank adapter beside a linear layer, in one pass over dy:
//
//   t = scale · dy B,  dB += scale · dyᵀ h        dy [rows, n], B [n, r], h and t [rows, r], dB F32 [n, r]
//
// dy, h and t have pitches (ld) of their own, so that [x | h] and [dy | t] can be rows of one buffer; B and dB are dense. 16-bit
// types: f32 goes through the general products, and so do x Aᵀ and tᵀ x, which cuBLAS does at the speed of reading x. Beyond
// r = 16 dy is read once for each 16 columns, and two general products are as fast.
//
// A block takes 512 columns of dy, 16 of r, and a share of the rows, 16 at a time through STAGES buffers in shared memory. Each
// of its 4 warps holds its 128 columns' rows of B and sums of dB in registers, all products being mma of 16 x 8 x 16 with f32
// sums; the sums of t are added up over the warps in shared memory. Both leave partial sums, which lora_t_db_sum adds up in a
// fixed order. Any sizes; 16-byte accesses where sizes, pitches and pointers allow.
//
// With C = ceil(n / 512), P = ceil(r / 16) and S shares of the rows: lora_t_db_T: block 128, grid S · C · P, dynamic shared
// memory 58880 bytes; partials F32: [C, rows, 16 P] for t, then [S, n, 16 P] for dB. lora_t_db_sum_T: block 256, grid ceil((rows
// + n) · P / 16). Take S = the greatest at most ceil(rows / 16) with S · C · P <= 2 blocks a multiprocessor, at least 1.
//
// Bytes: dy, and the partial sums twice.

#include "common/mma.cuh"
#include "common/vec.cuh"

// Eight values to shared memory; zeros beyond the first `valid`.
template <bool WHOLE, typename T>
__device__ __forceinline__ void copy_eight(u32 to, const T *from, i32 valid) {
    if constexpr (WHOLE) {
        copy16(to, from, valid > 0);
    } else {
        u32 word[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            word[i] = 2 * i < valid ? from[2 * i].bits : 0u;
            if (2 * i + 1 < valid) word[i] |= u32(from[2 * i + 1].bits) << 16;
        }
        asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                     : "memory");
    }
}

// Rows and columns of a block's share of a wide matrix at a time, and buffers of them.
constexpr u32 DEPTH = 16, WIDTH = 512, STAGES = 3;
constexpr u32 DY_BYTES = DEPTH * WIDTH * 2, STAGE_BYTES = DY_BYTES + DEPTH * 16 * 2;

template <typename T>
struct Operands {
    const T *dy, *b, *h;
    u32 rows, n, r, ld_dy, ld_h;
    bool h_whole;
};

// 16 rows of this warp's 128 columns of dy, and (one warp) of 16 columns of h, to shared memory.
template <bool WHOLE, typename T>
__device__ __forceinline__ void fetch(u32 stage, const Operands<T> &of, u64 row, u32 column, u32 rank) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const u32 line = i * 2 + lane / 16, chunk = lane % 16;
        const u32 to = stage + warp * (DY_BYTES / 4) + line * 256 + (chunk ^ (line & 7)) * 16;
        const T *from = of.dy + (row + line) * of.ld_dy + column + chunk * 8;
        const i32 valid = row + line < of.rows ? i32(of.n) - i32(column + chunk * 8) : 0;
        copy_eight<WHOLE>(to, from, valid);
    }
    if (warp == 0) {
        const u32 line = lane / 2, chunk = lane % 2;
        const u32 to = stage + DY_BYTES + line * 32 + (chunk ^ (line / 4 & 1)) * 16;
        const T *from = of.h + (row + line) * of.ld_h + rank + chunk * 8;
        const i32 valid = row + line < of.rows ? i32(of.r) - i32(rank + chunk * 8) : 0;
        if (of.h_whole)
            copy_eight<true>(to, from, valid);
        else
            copy_eight<false>(to, from, valid);
    }
}

struct __align__(8) Two {
    float v[2];
};

template <bool WHOLE, typename T>
__device__ __forceinline__ void products(float *t_partials, float *db_partials, const Operands<T> &of) {
    extern __shared__ __align__(16) u8 memory[];
    float(*t_slots)[8][32] = reinterpret_cast<float(*)[8][32]>(memory + STAGES * STAGE_BYTES);
    const u32 base = shared_address(memory), warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const u32 passes = (of.r + 15) / 16, blocks = (of.n + WIDTH - 1) / WIDTH, pitch = passes * 16;
    const u32 rank = blockIdx.x % passes * 16, block = blockIdx.x / passes % blocks;
    const u32 share = blockIdx.x / (passes * blocks), shares = gridDim.x / (passes * blocks);
    const u32 column = block * WIDTH + warp * 128;
    const u32 steps = (of.rows + DEPTH - 1) / DEPTH, each = (steps + shares - 1) / shares;
    const u32 begin = min(share * each, steps), end = min(begin + each, steps);

    // B of this warp's columns.
    u32 right[8][2][2];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const u32 n = column + i / 4 * 16 + i % 2 * 8 + t * 2, q = rank + i / 2 % 2 * 8 + g;
        u32 word = n < of.n && q < of.r ? of.b[u64(n) * of.r + q].bits : 0u;
        if (n + 1 < of.n && q < of.r) word |= u32(of.b[u64(n + 1) * of.r + q].bits) << 16;
        right[i / 4][i / 2 % 2][i % 2] = word;
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
            float *to = t_partials + (u64(block) * of.rows + row) * pitch + rank + warp / 2 * 8 + t * 2;
            *reinterpret_cast<Two *>(to) = {sum[0], sum[1]};
        }
    };
    float c[8][2][4] = {};
#pragma unroll
    for (u32 i = 0; i < STAGES - 1; ++i) {
        if (begin + i < end) fetch<WHOLE>(base + i * STAGE_BYTES, of, u64(begin + i) * DEPTH, column, rank);
        copy_commit();
    }
    u32 stage = 0, free_stage = STAGES - 1;
    for (u32 step = begin; step < end; ++step) {
        copy_wait<STAGES - 2>();
        __syncthreads();
        if (step + STAGES - 1 < end)
            fetch<WHOLE>(base + free_stage * STAGE_BYTES, of, u64(step + STAGES - 1) * DEPTH, column, rank);
        copy_commit();
        if (step > begin) add_up(step - 1);

        const u32 at = base + stage * STAGE_BYTES, tile = at + warp * (DY_BYTES / 4);
        u32 thin[4];
        {
            // Transposed: (columns 0..8, rows 0..8), (8..16, 0..8), (0..8, 8..16), (8..16, 8..16).
            const u32 line = lane / 16 * 8 + lane % 8, chunk = lane / 8 % 2;
            load_matrices_transposed(thin, at + DY_BYTES + line * 32 + (chunk ^ (line / 4 & 1)) * 16);
        }
        float ct[2][4] = {};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const u32 line = lane & 15, chunk = i * 2 + lane / 16;
            const u32 address = tile + line * 256 + (chunk ^ (line & 7)) * 16;
            u32 left[4];
            load_matrices(left, address);
            mma<T>(ct[0], left, right[i][0][0], right[i][0][1]);
            mma<T>(ct[1], left, right[i][1][0], right[i][1][1]);
            // Transposed: (columns 0..8, rows 0..8), (0..8, 8..16), (8..16, 0..8), (8..16, 8..16).
            u32 turned[4];
            load_matrices_transposed(turned, address);
            const u32 top[4] = {turned[0], turned[2], turned[1], turned[3]};
            mma<T>(c[i][0], top, thin[0], thin[2]);
            mma<T>(c[i][1], top, thin[1], thin[3]);
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) t_slots[step % 2 * 4 + warp][i][lane] = ct[i / 4][i % 4];
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        free_stage = free_stage + 1 == STAGES ? 0 : free_stage + 1;
    }
    __syncthreads();
    if (begin < end) add_up(end - 1);
#pragma unroll
    for (int i = 0; i < 64; ++i) {
        const u32 n = column + i / 8 * 16 + i % 4 / 2 * 8 + g, q = rank + i / 4 % 2 * 8 + t * 2 + i % 2;
        if (n < of.n) db_partials[(u64(share) * of.n + n) * pitch + q] = c[i / 8][i / 4 % 2][i % 4];
    }
}

template <typename T>
__device__ __forceinline__ void t_db(float *partials, const T *dy, const T *b, const T *h, u32 rows, u32 n, u32 r, u32 ld_dy,
                                     u32 ld_h) {
    const Operands<T> of = {dy, b, h, rows, n, r, ld_dy, ld_h, r % 8 == 0 && ld_h % 8 == 0 && aligned16(h)};
    float *db_partials = partials + u64((n + WIDTH - 1) / WIDTH) * rows * ((r + 15) / 16 * 16);
    if (n % 8 == 0 && ld_dy % 8 == 0 && aligned16(dy))
        products<true>(partials, db_partials, of);
    else
        products<false>(partials, db_partials, of);
}

// Σ of `count` partial sums, `stride` apart, in their order.
__device__ __forceinline__ float sum_of(const float *partials, u32 count, u64 stride) {
    constexpr u32 BATCH = 16;
    float sum = 0;
    for (u32 first = 0; first < count; first += BATCH) {
        float batch[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) batch[i] = first + i < count ? partials[(first + i) * stride] : 0.0f;
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) sum += batch[i];
    }
    return sum;
}

template <typename T>
__device__ __forceinline__ void t_db_sum(T *t, float *db, const float *partials, float scale, u32 rows, u32 n, u32 r, u32 ld_t,
                                         u32 shares) {
    const u32 pitch = (r + 15) / 16 * 16, blocks = (n + WIDTH - 1) / WIDTH;
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x, row = i / pitch, size = u64(rows) * pitch;
    const u32 q = u32(i - row * pitch);
    if (q >= r) return;
    if (row < rows)
        t[row * ld_t + q] = from_f32<T>(scale * sum_of(partials + i, blocks, size));
    else if (row - rows < n)
        db[(row - rows) * r + q] += scale * sum_of(partials + blocks * size + (i - size), shares, u64(n) * pitch);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    lora_t_db_f16(float *partials, const f16 *dy, const f16 *b, const f16 *h, u32 rows, u32 n, u32 r, u32 ld_dy, u32 ld_h) {
    t_db(partials, dy, b, h, rows, n, r, ld_dy, ld_h);
}

extern "C" __global__ void __launch_bounds__(256)
    lora_t_db_sum_f16(f16 *t, float *db, const float *partials, float scale, u32 rows, u32 n, u32 r, u32 ld_t, u32 shares) {
    t_db_sum(t, db, partials, scale, rows, n, r, ld_t, shares);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(128, 2)
    lora_t_db_bf16(float *partials, const bf16 *dy, const bf16 *b, const bf16 *h, u32 rows, u32 n, u32 r, u32 ld_dy, u32 ld_h) {
    t_db(partials, dy, b, h, rows, n, r, ld_dy, ld_h);
}

extern "C" __global__ void __launch_bounds__(256)
    lora_t_db_sum_bf16(bf16 *t, float *db, const float *partials, float scale, u32 rows, u32 n, u32 r, u32 ld_t, u32 shares) {
    t_db_sum(t, db, partials, scale, rows, n, r, ld_t, shares);
}
#endif
