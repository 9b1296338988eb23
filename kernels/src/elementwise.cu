// Passes that do one thing to every element: casts, sums, biases, dropout, copies between pitches.
//
//   cast_T_U          y = U(x)
//   add_T             y += x
//   add_bias_T[_f32]  y += bias, row by row; the bias is of type T, or f32
//   bias_grad_T       dbias += Σ over rows of dy
//   dropout_T         y = x · factor, factor = 0 where the element's uniform number is below p, else 1 / (1 − p)
//   add_dropped_T     dx += through · factor, the same mask
//   copy_strided_T    y = x from a pitch of ld_x to one of ld_y
//   scale_T           y = T(s x), from dense f32 rows to a pitch of ld_y
//
// The mask is that of crates/tensor/src/rng.rs: element n is dropped when number n of the stream is below p. `key` (device
// memory, since it changes from step to step) is a stream's key, and the mask's stream lies below it on a path of `depth` <= 4
// indices of 16 bits in `path`, the first in the lowest bits (micro-batch, layer, linear, part).
//
// Threads: two packs of 16 bytes a thread (of T; in a cast to f32 of f32, in the others of the narrower type), blockDim.x packs
// apart; values go one by one where a size or pitch is no multiple of a pack or a pointer is not 16-byte aligned. Blocks of 256,
// no dynamic shared memory. Grid: with n elements (rows · cols) and N in a pack, ceil(n / (512 N)) blocks in x, at least 1; a
// smaller one takes them in turn. Dropout: at most 8 blocks a multiprocessor, since each derives the mask's key first.
//
// bias_grad_T: a block sums 256 columns (128 of f32) over a share of the rows. Block (32, 8), grid (ceil(cols / (32 · 16 /
// sizeof(T))), y). With y = 1 it adds to dbias (partials may be null), else it writes partials [y, cols], and bias_grad_sum adds
// them up: block (32, 16), grid ceil(cols / 32), count = y. Take y = 1 for few rows (< 64), else ceil(8 blocks a multiprocessor /
// grid.x), at most 64.
//
// copy_strided_T may be launched early.
//
// Bytes: what is read and written, once.

#include "common/early.cuh"
#include "common/reduce.cuh"
#include "common/rng.cuh"
#include "common/vec.cuh"

// f(n) for the packs of N elements below `count`, two at a time: f.load(i, n) of both comes before f.store(i, n).
template <int N, typename F>
__device__ __forceinline__ void for_packs(u64 count, F f) {
    for (u64 first = u64(blockIdx.x) * blockDim.x * 2; first < count; first += u64(gridDim.x) * blockDim.x * 2) {
        const u64 a = first + threadIdx.x, b = a + blockDim.x;
        if (a < count) f.load(0, a);
        if (b < count) f.load(1, b);
        if (a < count) f.store(0, a);
        if (b < count) f.store(1, b);
    }
}

template <int N, typename T, typename U>
struct Cast {
    U *y;
    const T *x;
    float v[2][N];

    __device__ __forceinline__ void load(int i, u64 n) { load_f32(x + n * N, v[i]); }
    __device__ __forceinline__ void store(int i, u64 n) { store_f32(y + n * N, v[i]); }
};

template <typename T, typename U>
__device__ __forceinline__ void cast(U *y, const T *x, u64 n) {
    // Accesses of 16 bytes where the result is f32: its writes count twice those of x.
    constexpr int N = sizeof(U) == 4 ? 4 : 8;
    const u64 packed = aligned16(x) && aligned16(y) ? n / N : 0;
    for_packs<N>(packed, Cast<N, T, U>{y, x});
    for_packs<1>(n - packed * N, Cast<1, T, U>{y + packed * N, x + packed * N});
}

template <int N, typename T>
struct Add {
    T *y;
    const T *x;
    float v[2][N], w[2][N];

    __device__ __forceinline__ void load(int i, u64 n) {
        load_f32(x + n * N, v[i]);
        load_f32(y + n * N, w[i]);
    }
    __device__ __forceinline__ void store(int i, u64 n) {
#pragma unroll
        for (int j = 0; j < N; ++j) w[i][j] += v[i][j];
        store_f32(y + n * N, w[i]);
    }
};

template <typename T>
__device__ __forceinline__ void add(T *y, const T *x, u64 n) {
    constexpr int N = Pack<T>::N;
    const u64 packed = aligned16(x) && aligned16(y) ? n / N : 0;
    for_packs<N>(packed, Add<N, T>{y, x});
    for_packs<1>(n - packed * N, Add<1, T>{y + packed * N, x + packed * N});
}

// Row and column of a pack, of `per_row` packs a row.
struct Place {
    u64 row;
    u32 column;

    __device__ __forceinline__ Place(u64 n, u32 per_row) {
        row = n >> 32 ? n / per_row : u32(n) / per_row;
        column = u32(n - row * per_row);
    }
};

template <int N, typename T, typename B>
struct AddBias {
    T *y;
    const B *bias;
    u32 per_row;
    float v[2][N], w[2][N];

    __device__ __forceinline__ void load(int i, u64 n) {
        load_f32(y + n * N, v[i]);
        load_f32(bias + Place(n, per_row).column * N, w[i]);
    }
    __device__ __forceinline__ void store(int i, u64 n) {
#pragma unroll
        for (int j = 0; j < N; ++j) v[i][j] += w[i][j];
        store_f32(y + n * N, v[i]);
    }
};

template <typename T, typename B>
__device__ __forceinline__ void add_bias(T *y, const B *bias, u32 rows, u32 cols) {
    constexpr int N = Pack<T>::N;
    if (cols % N == 0 && aligned16(y) && aligned16(bias))
        for_packs<N>(u64(rows) * (cols / N), AddBias<N, T, B>{y, bias, cols / N});
    else
        for_packs<1>(u64(rows) * cols, AddBias<1, T, B>{y, bias, cols});
}

// Columns N · (32 · blockIdx.x + threadIdx.x) and on, over the rows of this block's share.
template <int N, typename T>
__device__ __forceinline__ void bias_columns(float *dbias, float *partials, const T *dy, u32 rows, u32 cols, u32 first) {
    __shared__ float sums[8][32 * N + 1];
    const u32 c = first + threadIdx.x * N;
    float sum[N] = {};
    if (c < cols) {
#pragma unroll 4
        for (u32 r = blockIdx.y * 8 + threadIdx.y; r < rows; r += gridDim.y * 8) {
            float v[N];
            load_f32(dy + u64(r) * cols + c, v);
#pragma unroll
            for (int j = 0; j < N; ++j) sum[j] += v[j];
        }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < N; ++j) sums[threadIdx.y][threadIdx.x * N + j] = sum[j];
    __syncthreads();
    for (u32 i = threadIdx.y * 32 + threadIdx.x; i < 32 * N && first + i < cols; i += 256) {
        float total = 0;
        for (u32 y = 0; y < 8; ++y) total += sums[y][i];
        if (gridDim.y == 1)
            dbias[first + i] += total;
        else
            partials[u64(blockIdx.y) * cols + first + i] = total;
    }
}

template <typename T>
__device__ __forceinline__ void bias_grad(float *dbias, float *partials, const T *dy, u32 rows, u32 cols) {
    constexpr int N = Pack<T>::N;
    const u32 first = blockIdx.x * 32 * N;
    if (cols % N == 0 && aligned16(dy))
        bias_columns<N>(dbias, partials, dy, rows, cols, first);
    else
        for (u32 i = 0; i < N; ++i) bias_columns<1>(dbias, partials, dy, rows, cols, first + 32 * i);
}

template <bool ADD, int N, typename T>
struct Drop {
    T *y;
    const T *x;
    u64 key;    // of the mask's stream
    u32 limit;  // dropped below this, of 2^24
    float keep;
    u64 offset;  // number of the first element
    float v[2][N], w[2][N];

    __device__ __forceinline__ void load(int i, u64 n) {
        load_f32(x + n * N, v[i]);
        if (ADD) load_f32(y + n * N, w[i]);
    }
    __device__ __forceinline__ void store(int i, u64 n) {
        u64 counter = key + (offset + n * N + 1) * GOLDEN;
#pragma unroll
        for (int j = 0; j < N; ++j, counter += GOLDEN) {
            const float dropped = v[i][j] * (uniform24(counter) < limit ? 0.0f : keep);
            w[i][j] = ADD ? w[i][j] + dropped : dropped;
        }
        store_f32(y + n * N, w[i]);
    }
};

template <bool ADD, typename T>
__device__ __forceinline__ void dropout(T *y, const T *x, const u64 *key, u64 path, u32 depth, float p, u64 n) {
    constexpr int N = Pack<T>::N;
    const u64 stream = path_key(*key, path, depth);
    // k / 2^24 < p where k < p · 2^24, which is exact.
    const u32 limit = u32(ceilf(p * 16777216.0f));
    const float keep = 1.0f / (1.0f - p);
    const u64 packed = aligned16(x) && aligned16(y) ? n / N : 0;
    for_packs<N>(packed, Drop<ADD, N, T>{y, x, stream, limit, keep, 0});
    for_packs<1>(n - packed * N, Drop<ADD, 1, T>{y + packed * N, x + packed * N, stream, limit, keep, packed * N});
}

template <int N, typename T>
struct CopyStrided {
    T *y;
    const T *x;
    u32 per_row, ld_y, ld_x;
    Held<T, N> v[2];

    __device__ __forceinline__ void load(int i, u64 n) {
        const Place at(n, per_row);
        v[i].load(x + at.row * ld_x + at.column * N);
    }
    __device__ __forceinline__ void store(int i, u64 n) {
        const Place at(n, per_row);
        v[i].store(y + at.row * ld_y + at.column * N);
    }
};

template <typename T>
__device__ __forceinline__ void copy_strided(T *y, const T *x, u32 rows, u32 cols, u32 ld_y, u32 ld_x) {
    constexpr int N = Pack<T>::N;
    begin_early();
    if (cols % N == 0 && ld_y % N == 0 && ld_x % N == 0 && aligned16(y) && aligned16(x))
        for_packs<N>(u64(rows) * (cols / N), CopyStrided<N, T>{y, x, cols / N, ld_y, ld_x});
    else
        for_packs<1>(u64(rows) * cols, CopyStrided<1, T>{y, x, cols, ld_y, ld_x});
}

template <int N, typename T>
struct Scale {
    T *y;
    const float *x;
    float s;
    u32 per_row, ld_y;
    float v[2][N];

    __device__ __forceinline__ void load(int i, u64 n) { load_f32(x + n * N, v[i]); }
    __device__ __forceinline__ void store(int i, u64 n) {
        const Place at(n, per_row);
#pragma unroll
        for (int j = 0; j < N; ++j) v[i][j] *= s;
        store_f32(y + at.row * ld_y + at.column * N, v[i]);
    }
};

template <typename T>
__device__ __forceinline__ void scale(T *y, const float *x, float s, u32 rows, u32 cols, u32 ld_y) {
    constexpr int N = Pack<T>::N;
    if (cols % N == 0 && ld_y % N == 0 && aligned16(y) && aligned16(x))
        for_packs<N>(u64(rows) * (cols / N), Scale<N, T>{y, x, s, cols / N, ld_y});
    else
        for_packs<1>(u64(rows) * cols, Scale<1, T>{y, x, s, cols, ld_y});
}

extern "C" __global__ void __launch_bounds__(256) cast_f32_f16(f16 *y, const float *x, u64 n) {
    cast(y, x, n);
}

extern "C" __global__ void __launch_bounds__(256) cast_f16_f32(float *y, const f16 *x, u64 n) {
    cast(y, x, n);
}

extern "C" __global__ void __launch_bounds__(256) add_f32(float *y, const float *x, u64 n) {
    add(y, x, n);
}

extern "C" __global__ void __launch_bounds__(256) add_bias_f32(float *y, const float *bias, u32 rows, u32 cols) {
    add_bias(y, bias, rows, cols);
}

extern "C" __global__ void __launch_bounds__(256)
    bias_grad_f32(float *dbias, float *partials, const float *dy, u32 rows, u32 cols) {
    bias_grad(dbias, partials, dy, rows, cols);
}

extern "C" __global__ void __launch_bounds__(256)
    dropout_f32(float *y, const float *x, const u64 *key, u64 path, u32 depth, float p, u64 n) {
    dropout<false>(y, x, key, path, depth, p, n);
}

extern "C" __global__ void __launch_bounds__(256)
    add_dropped_f32(float *dx, const float *through, const u64 *key, u64 path, u32 depth, float p, u64 n) {
    dropout<true>(dx, through, key, path, depth, p, n);
}

extern "C" __global__ void __launch_bounds__(256)
    copy_strided_f32(float *y, const float *x, u32 rows, u32 cols, u32 ld_y, u32 ld_x) {
    copy_strided(y, x, rows, cols, ld_y, ld_x);
}

extern "C" __global__ void __launch_bounds__(256) scale_f32(float *y, const float *x, float s, u32 rows, u32 cols, u32 ld_y) {
    scale(y, x, s, rows, cols, ld_y);
}

extern "C" __global__ void __launch_bounds__(256) add_f16(f16 *y, const f16 *x, u64 n) {
    add(y, x, n);
}

extern "C" __global__ void __launch_bounds__(256) add_bias_f16(f16 *y, const f16 *bias, u32 rows, u32 cols) {
    add_bias(y, bias, rows, cols);
}

extern "C" __global__ void __launch_bounds__(256) add_bias_f16_f32(f16 *y, const float *bias, u32 rows, u32 cols) {
    add_bias(y, bias, rows, cols);
}

extern "C" __global__ void __launch_bounds__(256)
    bias_grad_f16(float *dbias, float *partials, const f16 *dy, u32 rows, u32 cols) {
    bias_grad(dbias, partials, dy, rows, cols);
}

extern "C" __global__ void __launch_bounds__(256)
    dropout_f16(f16 *y, const f16 *x, const u64 *key, u64 path, u32 depth, float p, u64 n) {
    dropout<false>(y, x, key, path, depth, p, n);
}

extern "C" __global__ void __launch_bounds__(256)
    add_dropped_f16(f16 *dx, const f16 *through, const u64 *key, u64 path, u32 depth, float p, u64 n) {
    dropout<true>(dx, through, key, path, depth, p, n);
}

extern "C" __global__ void __launch_bounds__(256) copy_strided_f16(f16 *y, const f16 *x, u32 rows, u32 cols, u32 ld_y, u32 ld_x) {
    copy_strided(y, x, rows, cols, ld_y, ld_x);
}

extern "C" __global__ void __launch_bounds__(256) scale_f16(f16 *y, const float *x, float s, u32 rows, u32 cols, u32 ld_y) {
    scale(y, x, s, rows, cols, ld_y);
}

extern "C" __global__ void __launch_bounds__(512) bias_grad_sum(float *dbias, const float *partials, u32 count, u32 cols) {
    add_rows(dbias, partials, count, cols);
}

extern "C" __global__ void __launch_bounds__(256) cast_bf16_f32(float *y, const bf16 *x, u64 n) {
    cast(y, x, n);
}

extern "C" __global__ void __launch_bounds__(256) cast_bf16_f16(f16 *y, const bf16 *x, u64 n) {
    cast(y, x, n);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(256) cast_f32_bf16(bf16 *y, const float *x, u64 n) {
    cast(y, x, n);
}

extern "C" __global__ void __launch_bounds__(256) cast_f16_bf16(bf16 *y, const f16 *x, u64 n) {
    cast(y, x, n);
}

extern "C" __global__ void __launch_bounds__(256) add_bf16(bf16 *y, const bf16 *x, u64 n) {
    add(y, x, n);
}

extern "C" __global__ void __launch_bounds__(256) add_bias_bf16(bf16 *y, const bf16 *bias, u32 rows, u32 cols) {
    add_bias(y, bias, rows, cols);
}

extern "C" __global__ void __launch_bounds__(256) add_bias_bf16_f32(bf16 *y, const float *bias, u32 rows, u32 cols) {
    add_bias(y, bias, rows, cols);
}

extern "C" __global__ void __launch_bounds__(256)
    bias_grad_bf16(float *dbias, float *partials, const bf16 *dy, u32 rows, u32 cols) {
    bias_grad(dbias, partials, dy, rows, cols);
}

extern "C" __global__ void __launch_bounds__(256)
    dropout_bf16(bf16 *y, const bf16 *x, const u64 *key, u64 path, u32 depth, float p, u64 n) {
    dropout<false>(y, x, key, path, depth, p, n);
}

extern "C" __global__ void __launch_bounds__(256)
    add_dropped_bf16(bf16 *dx, const bf16 *through, const u64 *key, u64 path, u32 depth, float p, u64 n) {
    dropout<true>(dx, through, key, path, depth, p, n);
}

extern "C" __global__ void __launch_bounds__(256)
    copy_strided_bf16(bf16 *y, const bf16 *x, u32 rows, u32 cols, u32 ld_y, u32 ld_x) {
    copy_strided(y, x, rows, cols, ld_y, ld_x);
}

extern "C" __global__ void __launch_bounds__(256) scale_bf16(bf16 *y, const float *x, float s, u32 rows, u32 cols, u32 ld_y) {
    scale(y, x, s, rows, cols, ld_y);
}
#endif
