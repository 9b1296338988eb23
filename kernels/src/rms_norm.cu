// Root-mean-square normalisation of rows, alone or after a residual sum, and its gradients.
//
//   inv = (mean(x²) + eps)^(−½),  y = x · inv · (offset + w)          [rows, cols], y and dx with a pitch of ld
//   k = inv² · mean(dy · (offset + w) · x),  dx = inv · (dy · (offset + w) − x · k),  dw += Σ over rows of dy · (x · inv)
//
// Where offset = 0, x · inv is rounded to T before it is multiplied by w; elsewhere y is rounded once.
//
// Threads: blockDim.x of them share a row, which stays in registers between its sum and its result; blockDim.y rows a block at a
// time. A block takes rows in turn, keeps w, and reads the next row while it sums this one.
//   cols <= 32 · (16 / sizeof(T)): block (p, 128 / p), p = the packs of 16 bytes of a row rounded up to a power of two: several
//                                  rows a warp (norms of heads);
//   else:                          block (t, 1), t = min(512, ceil(cols / 16) rounded up to a multiple of 32).
// Up to cols = 16 t (backward in f32: 8 t) a row fits the registers; longer ones are read twice. Where cols or ld is no multiple
// of a pack, or a pointer (w apart) is not 16-byte aligned, values go one by one; any block of whole warps is right then with
// blockDim.x a power of two up to 32, or blockDim.y = 1. No dynamic shared memory. Grid, in x: min(ceil(rows / blockDim.y),
// multiprocessors · 2048 / threads of a block); any is right.
//
// The backward pass sums dw over the rows of each block into dw_partials [gridDim.x, cols] (null where w is frozen): take a grid
// of min(ceil(rows / blockDim.y), multiprocessors · 512 / threads) then. rms_norm_dw adds them up: block (32, 16), grid ceil(cols
// / 32).
//
// residual_rms_norm_h is one row of the forward pass after a residual sum, and h = y Aᵀ for the A [R, cols] of adapters behind it: block
// (t, 1) as above, grid R, launched early. Each block makes the norm for itself, the first writes r and y, which may be neither x nor a:
// others still read them. cols is a multiple of a pack and at most 16 t, all but w on 16 bytes.
//
// Bytes: forward x and y; with the residual x, a, r and y; with h A beside them; backward dy, x and dx (twice with `add`).

#include "common/early.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

// Values of a row that a thread holds: forward, and backward (fewer of f32, or they would not fit the registers).
constexpr int VALUES = 16;
template <typename T>
constexpr int BACKWARD_VALUES = sizeof(T) == 4 ? 8 : 16;

// The sum over the threads of this row, in each of them; `turn` alternates between calls.
__device__ __forceinline__ float row_sum(float x, u32 turn) {
    __shared__ float slots[2][32];
    return blockDim.x <= 32 ? lanes_sum(x, blockDim.x) : block_sum(x, slots[turn & 1]);
}

// offset + w of a thread's columns. w may lie anywhere in a flat buffer of parameters.
template <int PER, int N>
__device__ __forceinline__ void load_weights(const float *w, u32 packs, float offset, float (&g)[PER][N]) {
    const bool aligned = aligned16(w);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const u32 c = threadIdx.x + i * blockDim.x;
        if (c < packs && aligned)
            load_f32(w + c * N, g[i]);
        else if (c < packs)
            for (int j = 0; j < N; ++j) g[i][j] = w[c * N + j];
#pragma unroll
        for (int j = 0; j < N; ++j) g[i][j] += offset;
    }
}

template <typename T>
__device__ __forceinline__ float normed(float x, float inv, float g, float offset) {
    return offset == 0 ? rounded<T>(x * inv) * g : x * inv * g;
}

// x, or x + a rounded to T, which stays in x; the squares of that are added to `squares`.
template <bool RESIDUAL, typename T, int N>
__device__ __forceinline__ void add_squares(float &squares, Held<T, N> &x, const Held<T, N> &a) {
    float v[N];
    x.unpack(v);
    if (RESIDUAL) {
        float b[N];
        a.unpack(b);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] += b[j];
        x.pack(v);
        x.unpack(v);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) squares += v[j] * v[j];
}

// N values at a time; a row is read again for its result.
template <int N, bool RESIDUAL, typename T>
__device__ __forceinline__ void forward_looped(T *r, T *y, float *inv_rms, const T *x, const T *a, const float *w, float eps,
                                               float offset, u32 rows, u32 cols, u32 ld) {
    u32 turn = 0;
    for (u64 first = u64(blockIdx.x) * blockDim.y; first < rows; first += u64(gridDim.x) * blockDim.y) {
        const u64 row = first + threadIdx.y, at = row * cols;
        const u32 end = row < rows ? cols : 0;
        float squares = 0;
        for (u32 c = threadIdx.x * N; c < end; c += blockDim.x * N) {
            float v[N], b[N];
            load_f32(x + at + c, v);
            if (RESIDUAL) load_f32(a + at + c, b);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                if (RESIDUAL) v[j] = rounded<T>(v[j] + b[j]);
                squares += v[j] * v[j];
            }
            if (RESIDUAL) store_f32(r + at + c, v);
        }
        const float inv = __frsqrt_rn(row_sum(squares, turn++) / float(cols) + eps);
        for (u32 c = threadIdx.x * N; c < end; c += blockDim.x * N) {
            float v[N];
            load_f32((RESIDUAL ? r : x) + at + c, v);
#pragma unroll
            for (int j = 0; j < N; ++j) v[j] = normed<T>(v[j], inv, offset + w[c + j], offset);
            store_f32(y + row * ld + c, v);
        }
        if (row < rows && threadIdx.x == 0) inv_rms[row] = inv;
    }
}

// This block's rows, held in registers: the next row is on its way while this one is summed, and w stays.
template <typename T, bool RESIDUAL>
__device__ __forceinline__ void forward_rows(T *r, T *y, float *inv_rms, const T *x, const T *a, const float *w, float eps,
                                             float offset, u32 rows, u32 cols, u32 ld) {
    constexpr int N = Pack<T>::N, PER = VALUES / N;
    const u32 packs = cols / N, stride = gridDim.x * blockDim.y;
    const float share = 1.0f / float(cols);
    float g[PER][N];
    Held<T, N> next_x[PER], next_a[PER];
    const auto load = [&](u64 row) {
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const u32 c = threadIdx.x + i * blockDim.x;
            if (row < rows && c < packs) {
                next_x[i].load(x + row * cols + c * N);
                if (RESIDUAL) next_a[i].load(a + row * cols + c * N);
            }
        }
    };
    u64 first = u64(blockIdx.x) * blockDim.y;
    load(first + threadIdx.y);
    load_weights(w, packs, offset, g);
    u32 turn = 0;
    for (; first < rows; first += stride) {
        const u64 row = first + threadIdx.y;
        const bool live = row < rows;
        Held<T, N> held[PER];
        float squares = 0;
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const u32 c = threadIdx.x + i * blockDim.x;
            if (live && c < packs) {
                held[i] = next_x[i];
                add_squares<RESIDUAL>(squares, held[i], next_a[i]);
            }
        }
        load(row + stride);
        const float inv = __frsqrt_rn(row_sum(squares, turn++) * share + eps);
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const u32 c = threadIdx.x + i * blockDim.x;
            if (live && c < packs) {
                if (RESIDUAL) held[i].store(r + row * cols + c * N);
                float v[N];
                held[i].unpack(v);
#pragma unroll
                for (int j = 0; j < N; ++j) v[j] = normed<T>(v[j], inv, g[i][j], offset);
                store_f32(y + row * ld + c * N, v);
            }
        }
        if (live && threadIdx.x == 0) inv_rms[row] = inv;
    }
}

template <typename T, bool RESIDUAL>
__device__ __forceinline__ void forward(T *r, T *y, float *inv_rms, const T *x, const T *a, const float *w, float eps,
                                        float offset, u32 rows, u32 cols, u32 ld) {
    begin_early();
    constexpr int N = Pack<T>::N;
    bool packed = cols % N == 0 && ld % N == 0 && aligned16(x) && aligned16(y);
    if (RESIDUAL) packed = packed && aligned16(a) && aligned16(r);
    if (packed && cols <= VALUES * blockDim.x)
        forward_rows<T, RESIDUAL>(r, y, inv_rms, x, a, w, eps, offset, rows, cols, ld);
    else if (packed)
        forward_looped<N, RESIDUAL>(r, y, inv_rms, x, a, w, eps, offset, rows, cols, ld);
    else
        forward_looped<1, RESIDUAL>(r, y, inv_rms, x, a, w, eps, offset, rows, cols, ld);
}

// Summed and rounded as forward_rows does it: r and y have its bits.
template <typename T>
__device__ __forceinline__ void forward_with_h(T *r, T *y, T *h, const T *x, const T *a, const float *w, const T *lora_a, float eps,
                                               float offset, u32 cols) {
    begin_early();
    constexpr int N = Pack<T>::N, PER = VALUES / N;
    const u32 packs = cols / N;
    const T *row = lora_a + u64(blockIdx.x) * cols;
    Held<T, N> held[PER], added[PER], factor[PER];
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const u32 c = threadIdx.x + i * blockDim.x;
        if (c < packs) held[i].load(x + c * N), added[i].load(a + c * N), factor[i].load(row + c * N);
    }
    float g[PER][N], squares = 0;
    load_weights(w, packs, offset, g);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        if (threadIdx.x + i * blockDim.x >= packs) break;
        add_squares<true>(squares, held[i], added[i]);
    }
    const float inv = __frsqrt_rn(row_sum(squares, 0) * (1.0f / float(cols)) + eps);
    float sum = 0;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const u32 c = threadIdx.x + i * blockDim.x;
        if (c >= packs) break;
        float v[N], f[N];
        held[i].unpack(v);
        factor[i].unpack(f);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = normed<T>(v[j], inv, g[i][j], offset);
        if (blockIdx.x == 0) held[i].store(r + c * N), store_f32(y + c * N, v);
#pragma unroll
        for (int j = 0; j < N; ++j) sum += rounded<T>(v[j]) * f[j];
    }
    sum = row_sum(sum, 1);
    if (threadIdx.x == 0) h[blockIdx.x] = from_f32<T>(sum);
}

// Sums of dw over the rows of this block: each thread has its columns in `dw`; with several rows a time, they are added up here.
template <int N, int PER>
__device__ __forceinline__ void store_partials(float *partials, const float (&dw)[PER][N], u32 packs, u32 cols) {
    float *mine = partials + u64(blockIdx.x) * cols;
    if (blockDim.y == 1) {
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const u32 c = threadIdx.x + i * blockDim.x;
#pragma unroll
            for (int j = 0; j < N; ++j)
                if (c < packs) mine[c * N + j] = dw[i][j];
        }
        return;
    }
    // Then blockDim.x · N >= cols, and 128 threads hold N values each.
    __shared__ float sums[128 * N];
#pragma unroll
    for (int j = 0; j < N; ++j) sums[(threadIdx.y * blockDim.x + threadIdx.x) * N + j] = dw[0][j];
    __syncthreads();
    for (u32 c = threadIdx.y * blockDim.x + threadIdx.x; c < cols; c += blockDim.x * blockDim.y) {
        float sum = 0;
        for (u32 y = 0; y < blockDim.y; ++y) sum += sums[y * blockDim.x * N + c];
        mine[c] = sum;
    }
}

// This block's rows, as forward_rows.
template <typename T, bool WEIGHT>
__device__ __forceinline__ void backward_rows(T *dx, float *dw_partials, const T *dy, const T *x, const float *w,
                                              const float *inv_rms, float offset, u32 rows, u32 cols, u32 add, u32 ld) {
    constexpr int N = Pack<T>::N, PER = BACKWARD_VALUES<T> / N;
    const u32 packs = cols / N, stride = gridDim.x * blockDim.y;
    const float share = 1.0f / float(cols);
    float g[PER][N], dw[PER][N] = {};
    Held<T, N> next_x[PER], next_dy[PER], next_dx[PER];
    float next_inv = 0;
    const auto load = [&](u64 row) {
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const u32 c = threadIdx.x + i * blockDim.x;
            if (row < rows && c < packs) {
                next_x[i].load(x + row * cols + c * N);
                next_dy[i].load(dy + row * cols + c * N);
                if (add) next_dx[i].load(dx + row * ld + c * N);
            }
        }
        if (row < rows) next_inv = inv_rms[row];
    };
    u64 first = u64(blockIdx.x) * blockDim.y;
    load(first + threadIdx.y);
    load_weights(w, packs, offset, g);
    u32 turn = 0;
    for (; first < rows; first += stride) {
        const u64 row = first + threadIdx.y;
        const bool live = row < rows;
        const float inv = next_inv;
        Held<T, N> held_x[PER], held_dy[PER], held_dx[PER];
        float dot = 0;
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const u32 c = threadIdx.x + i * blockDim.x;
            if (live && c < packs) {
                held_x[i] = next_x[i], held_dy[i] = next_dy[i];
                if (add) held_dx[i] = next_dx[i];
                float vx[N], vdy[N];
                held_x[i].unpack(vx);
                held_dy[i].unpack(vdy);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    dot += vdy[j] * g[i][j] * vx[j];
                    if (WEIGHT) dw[i][j] += vdy[j] * (vx[j] * inv);
                }
            }
        }
        load(row + stride);
        const float k = inv * inv * (row_sum(dot, turn++) * share);
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const u32 c = threadIdx.x + i * blockDim.x;
            if (live && c < packs) {
                float vx[N], vdy[N];
                held_x[i].unpack(vx);
                held_dy[i].unpack(vdy);
#pragma unroll
                for (int j = 0; j < N; ++j) vx[j] = inv * (vdy[j] * g[i][j] - vx[j] * k);
                if (add) {
                    held_dx[i].unpack(vdy);
#pragma unroll
                    for (int j = 0; j < N; ++j) vx[j] += vdy[j];
                }
                store_f32(dx + row * ld + c * N, vx);
            }
        }
    }
    if (WEIGHT) store_partials<N, PER>(dw_partials, dw, packs, cols);
}

// N values at a time, read again for the result, and once more for dw.
template <int N, typename T>
__device__ __forceinline__ void backward_looped(T *dx, float *dw_partials, const T *dy, const T *x, const float *w,
                                                const float *inv_rms, float offset, u32 rows, u32 cols, u32 add, u32 ld) {
    const float share = 1.0f / float(cols);
    u32 turn = 0;
    for (u64 first = u64(blockIdx.x) * blockDim.y; first < rows; first += u64(gridDim.x) * blockDim.y) {
        const u64 row = first + threadIdx.y, at = row * cols;
        const u32 end = row < rows ? cols : 0;
        const float inv = row < rows ? inv_rms[row] : 0;
        float dot = 0;
        for (u32 c = threadIdx.x * N; c < end; c += blockDim.x * N) {
            float vx[N], vdy[N];
            load_f32(x + at + c, vx);
            load_f32(dy + at + c, vdy);
#pragma unroll
            for (int j = 0; j < N; ++j) dot += vdy[j] * (offset + w[c + j]) * vx[j];
        }
        const float k = inv * inv * (row_sum(dot, turn++) * share);
        for (u32 c = threadIdx.x * N; c < end; c += blockDim.x * N) {
            float vx[N], vdy[N], vdx[N];
            load_f32(x + at + c, vx);
            load_f32(dy + at + c, vdy);
            if (add) load_f32(dx + row * ld + c, vdx);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                vx[j] = inv * (vdy[j] * (offset + w[c + j]) - vx[j] * k);
                if (add) vx[j] += vdx[j];
            }
            store_f32(dx + row * ld + c, vx);
        }
    }
    if (dw_partials == nullptr) return;
    for (u32 c = threadIdx.y * blockDim.x + threadIdx.x; c < cols; c += blockDim.x * blockDim.y) {
        float sum = 0;
        for (u64 first = u64(blockIdx.x) * blockDim.y; first < rows; first += u64(gridDim.x) * blockDim.y)
            for (u64 row = first; row < first + blockDim.y && row < rows; ++row)
                sum += to_f32(dy[row * cols + c]) * (to_f32(x[row * cols + c]) * inv_rms[row]);
        dw_partials[u64(blockIdx.x) * cols + c] = sum;
    }
}

template <typename T>
__device__ __forceinline__ void backward(T *dx, float *dw_partials, const T *dy, const T *x, const float *w,
                                         const float *inv_rms, float offset, u32 rows, u32 cols, u32 add, u32 ld) {
    constexpr int N = Pack<T>::N;
    if (cols % N != 0 || ld % N != 0 || !aligned16(dx) || !aligned16(dy) || !aligned16(x)) {
        backward_looped<1>(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add, ld);
    } else if (cols > BACKWARD_VALUES<T> * blockDim.x) {
        backward_looped<N>(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add, ld);
    } else if (dw_partials == nullptr) {
        backward_rows<T, false>(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add, ld);
    } else {
        backward_rows<T, true>(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add, ld);
    }
}

extern "C" __global__ void __launch_bounds__(512, 1)
    rms_norm_fwd_f32(float *y, float *inv_rms, const float *x, const float *w, float eps, float offset, u32 rows, u32 cols,
                     u32 ld) {
    forward<float, false>(nullptr, y, inv_rms, x, nullptr, w, eps, offset, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    residual_rms_norm_h_f16(f16 *r, f16 *y, f16 *h, const f16 *x, const f16 *a, const float *w, const f16 *lora_a, float eps, float offset,
                           u32 cols) {
    forward_with_h(r, y, h, x, a, w, lora_a, eps, offset, cols);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    rms_norm_fwd_f16(f16 *y, float *inv_rms, const f16 *x, const float *w, float eps, float offset, u32 rows, u32 cols,
                     u32 ld) {
    forward<f16, false>(nullptr, y, inv_rms, x, nullptr, w, eps, offset, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    residual_rms_norm_fwd_f32(float *r, float *y, float *inv_rms, const float *x, const float *a, const float *w, float eps,
                              float offset, u32 rows, u32 cols, u32 ld) {
    forward<float, true>(r, y, inv_rms, x, a, w, eps, offset, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    residual_rms_norm_fwd_f16(f16 *r, f16 *y, float *inv_rms, const f16 *x, const f16 *a, const float *w, float eps,
                              float offset, u32 rows, u32 cols, u32 ld) {
    forward<f16, true>(r, y, inv_rms, x, a, w, eps, offset, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    rms_norm_bwd_f32(float *dx, float *dw_partials, const float *dy, const float *x, const float *w, const float *inv_rms,
                     float offset, u32 rows, u32 cols, u32 add, u32 ld) {
    backward(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add, ld);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    rms_norm_bwd_f16(f16 *dx, float *dw_partials, const f16 *dy, const f16 *x, const float *w, const float *inv_rms,
                     float offset, u32 rows, u32 cols, u32 add, u32 ld) {
    backward(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add, ld);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(512, 1)
    residual_rms_norm_h_bf16(bf16 *r, bf16 *y, bf16 *h, const bf16 *x, const bf16 *a, const float *w, const bf16 *lora_a, float eps, float offset,
                           u32 cols) {
    forward_with_h(r, y, h, x, a, w, lora_a, eps, offset, cols);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    rms_norm_fwd_bf16(bf16 *y, float *inv_rms, const bf16 *x, const float *w, float eps, float offset, u32 rows, u32 cols,
                      u32 ld) {
    forward<bf16, false>(nullptr, y, inv_rms, x, nullptr, w, eps, offset, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    residual_rms_norm_fwd_bf16(bf16 *r, bf16 *y, float *inv_rms, const bf16 *x, const bf16 *a, const float *w, float eps,
                               float offset, u32 rows, u32 cols, u32 ld) {
    forward<bf16, true>(r, y, inv_rms, x, a, w, eps, offset, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    rms_norm_bwd_bf16(bf16 *dx, float *dw_partials, const bf16 *dy, const bf16 *x, const float *w, const float *inv_rms,
                      float offset, u32 rows, u32 cols, u32 add, u32 ld) {
    backward(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add, ld);
}
#endif

extern "C" __global__ void __launch_bounds__(512) rms_norm_dw(float *dw, const float *dw_partials, u32 partials, u32 cols) {
    add_rows(dw, dw_partials, partials, cols);
}
