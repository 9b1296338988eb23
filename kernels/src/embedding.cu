// Rows of a table by token id: y[t] = T(scale · table[tokens[t]]), y [rows, cols] of T, table [V, cols] of U.
// Backward: dtable[v] += scale · Σ over t with tokens[t] = v of dy[t], one after another in the order of t: the CPU's bits.
//
// Forward: a block copies a row. Backward: the block of token t works where t is the first with its id: it looks for later ones
// in windows of 1024 tokens, lists them in order, and adds their rows to its columns in registers, eight read at a time. The ids are read once a token, from the
// second-level cache.
//
// Launch: block 128, grid rows in x (a smaller one takes the rest in turn), no dynamic shared memory. rows < 2^31.
//
// Bytes: forward rows · cols (sizeof(T) + sizeof(U)); backward dy once, the rows of dtable that occur twice, 4 rows² for the ids.

#include "common/vec.cuh"

constexpr u32 THREADS = 128;
// Tokens looked at together: 32 for each lane of a warp.
constexpr u32 WINDOW = 1024;

template <int N, typename T, typename U>
__device__ __forceinline__ void scaled_row(T *y, const U *x, float scale, u32 cols) {
    for (u32 c = threadIdx.x * N; c < cols; c += THREADS * N) {
        float v[N];
        load_f32(x + c, v);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] *= scale;
        store_f32(y + c, v);
    }
}

template <typename T, typename U>
__device__ __forceinline__ void forward(T *y, const U *table, const u32 *tokens, float scale, u32 rows, u32 cols) {
    constexpr int N = Pack<T>::N > Pack<U>::N ? Pack<T>::N : Pack<U>::N;
    const bool packed = cols % N == 0 && aligned16(y) && aligned16(table);
    for (u64 t = blockIdx.x; t < rows; t += gridDim.x) {
        T *to = y + t * cols;
        const U *from = table + u64(tokens[t]) * cols;
        if (packed) scaled_row<N>(to, from, scale, cols);
        else scaled_row<1>(to, from, scale, cols);
    }
}

// sums[c] += scale · dy[t][c] for the `count` tokens t of `found`, in order; some rows are read before they are added.
template <int N, typename T>
__device__ __forceinline__ void add_found(float *sums, const T *dy, const u32 *found, u32 count, float scale, u32 cols) {
    constexpr u32 TOGETHER = 8;
    for (u32 c = threadIdx.x * N; c < cols; c += THREADS * N) {
        float sum[N];
        load_f32(sums + c, sum);
        u32 i = 0;
        for (; i + TOGETHER <= count; i += TOGETHER) {
            Held<T, N> rows[TOGETHER];
#pragma unroll
            for (u32 r = 0; r < TOGETHER; ++r) rows[r].load(dy + u64(found[i + r]) * cols + c);
#pragma unroll
            for (u32 r = 0; r < TOGETHER; ++r) {
                float v[N];
                rows[r].unpack(v);
#pragma unroll
                for (int j = 0; j < N; ++j) sum[j] = __fadd_rn(sum[j], __fmul_rn(scale, v[j]));
            }
        }
        for (; i < count; ++i) {
            float v[N];
            load_f32(dy + u64(found[i]) * cols + c, v);
#pragma unroll
            for (int j = 0; j < N; ++j) sum[j] = __fadd_rn(sum[j], __fmul_rn(scale, v[j]));
        }
        store_f32(sums + c, sum);
    }
}

template <typename T>
__device__ __forceinline__ void backward(float *dtable, const T *dy, const u32 *tokens, float scale, u32 rows, u32 cols) {
    constexpr int N = Pack<T>::N;
    constexpr u32 WORDS = WINDOW / 32;
    __shared__ u32 masks[WORDS], found[WINDOW];
    const bool packed = cols % N == 0 && aligned16(dtable) && aligned16(dy);
    for (u32 t = blockIdx.x; t < rows; t += gridDim.x) {
        const u32 id = tokens[t];
        int before = 0;
        for (u32 s = 0; s < t && !before; s += THREADS * 4) {
            int same = 0;
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const u32 at = s + j * THREADS + threadIdx.x;
                same |= at < t && tokens[at] == id;
            }
            before = __syncthreads_or(same);
        }
        if (before) continue;
        float *sums = dtable + u64(id) * cols;
        for (u32 first = t; first < rows; first += WINDOW) {
            constexpr u32 EACH = WINDOW / THREADS;
            bool same[EACH];
            int any = 0;
#pragma unroll
            for (u32 j = 0; j < EACH; ++j) {
                const u32 within = j * THREADS + threadIdx.x;
                same[j] = first + within < rows && tokens[first + within] == id;
                any |= same[j];
            }
            if (!__syncthreads_or(any)) continue;
            const u32 lane = threadIdx.x % 32;
#pragma unroll
            for (u32 j = 0; j < EACH; ++j) {
                const u32 lanes = __ballot_sync(0xffffffffu, same[j]);
                if (lane == 0) masks[(j * THREADS + threadIdx.x) / 32] = lanes;
            }
            __syncthreads();
            // A token's place is the number of those before it: lane l has those in words 0 to l.
            u32 count = __popc(masks[lane]);
#pragma unroll
            for (u32 step = 1; step < 32; step *= 2) {
                const u32 before_it = __shfl_up_sync(0xffffffffu, count, step);
                if (lane >= step) count += before_it;
            }
#pragma unroll
            for (u32 j = 0; j < EACH; ++j) {
                const u32 word = (j * THREADS + threadIdx.x) / 32, bits = masks[word];
                const u32 end = __shfl_sync(0xffffffffu, count, word);
                if (same[j]) found[end - __popc(bits >> lane)] = first + j * THREADS + threadIdx.x;
            }
            count = __shfl_sync(0xffffffffu, count, WORDS - 1);
            __syncthreads();
            if (packed) add_found<N>(sums, dy, found, count, scale, cols);
            else add_found<1>(sums, dy, found, count, scale, cols);
            __syncthreads();
        }
    }
}

extern "C" __global__ void __launch_bounds__(128)
    embedding_fwd_f32_f32(float *y, const float *table, const u32 *tokens, float scale, u32 rows, u32 cols) {
    forward(y, table, tokens, scale, rows, cols);
}

extern "C" __global__ void __launch_bounds__(128)
    embedding_fwd_f16_f16(f16 *y, const f16 *table, const u32 *tokens, float scale, u32 rows, u32 cols) {
    forward(y, table, tokens, scale, rows, cols);
}

extern "C" __global__ void __launch_bounds__(128)
    embedding_fwd_f32_f16(float *y, const f16 *table, const u32 *tokens, float scale, u32 rows, u32 cols) {
    forward(y, table, tokens, scale, rows, cols);
}

extern "C" __global__ void __launch_bounds__(128)
    embedding_fwd_f16_f32(f16 *y, const float *table, const u32 *tokens, float scale, u32 rows, u32 cols) {
    forward(y, table, tokens, scale, rows, cols);
}

extern "C" __global__ void __launch_bounds__(128, 8)
    embedding_bwd_f32(float *dtable, const float *dy, const u32 *tokens, float scale, u32 rows, u32 cols) {
    backward(dtable, dy, tokens, scale, rows, cols);
}

extern "C" __global__ void __launch_bounds__(128, 8)
    embedding_bwd_f16(float *dtable, const f16 *dy, const u32 *tokens, float scale, u32 rows, u32 cols) {
    backward(dtable, dy, tokens, scale, rows, cols);
}

extern "C" __global__ void __launch_bounds__(128)
    embedding_fwd_f32_bf16(float *y, const bf16 *table, const u32 *tokens, float scale, u32 rows, u32 cols) {
    forward(y, table, tokens, scale, rows, cols);
}

extern "C" __global__ void __launch_bounds__(128)
    embedding_fwd_f16_bf16(f16 *y, const bf16 *table, const u32 *tokens, float scale, u32 rows, u32 cols) {
    forward(y, table, tokens, scale, rows, cols);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(128)
    embedding_fwd_bf16_bf16(bf16 *y, const bf16 *table, const u32 *tokens, float scale, u32 rows, u32 cols) {
    forward(y, table, tokens, scale, rows, cols);
}

extern "C" __global__ void __launch_bounds__(128)
    embedding_fwd_bf16_f16(bf16 *y, const f16 *table, const u32 *tokens, float scale, u32 rows, u32 cols) {
    forward(y, table, tokens, scale, rows, cols);
}

extern "C" __global__ void __launch_bounds__(128)
    embedding_fwd_bf16_f32(bf16 *y, const float *table, const u32 *tokens, float scale, u32 rows, u32 cols) {
    forward(y, table, tokens, scale, rows, cols);
}

extern "C" __global__ void __launch_bounds__(128, 8)
    embedding_bwd_bf16(float *dtable, const bf16 *dy, const u32 *tokens, float scale, u32 rows, u32 cols) {
    backward(dtable, dy, tokens, scale, rows, cols);
}
#endif
