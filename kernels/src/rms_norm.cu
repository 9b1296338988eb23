// Root-mean-square normalisation of rows, alone or after a residual sum, and its gradients.
//
//   inv = (mean(x²) + eps)^(−½),  y = x · inv · (offset + w)          [rows, cols], y with a pitch of ld
//   k = inv² · mean(dy · (offset + w) · x),  dx = inv · (dy · (offset + w) − x · k),  dw += Σ over rows of dy · (x · inv)
//
// Where offset = 0, x · inv is rounded to T before it is multiplied by w; elsewhere y is rounded once.
//
// Threads: blockDim.x of them share a row, which stays in registers between its sum and its result; blockDim.y rows a block at a
// time. With P = cols / (16 / sizeof(T)) packs of 16 bytes a row, and a most of M = 1024 threads (backward: 512):
//   P <= 32: block (p, 128 / p), p = P rounded up to a power of two: several rows a warp (norms of heads);
//   else:    block (t, 1), t = min(M, ceil(cols / 16) rounded up to a multiple of 32).
// Up to cols = 16 M a row fits the registers; longer ones are read twice. Where cols or ld is no multiple of a pack, or a pointer
// (w apart) is not 16-byte aligned, values go one by one; any block of whole warps is right then with blockDim.x a power of two
// up to 32, or blockDim.y = 1. No dynamic shared memory. Grid: ceil(rows / blockDim.y) blocks in x, or fewer, which then take
// rows in turn.
//
// The backward pass sums dw over the rows of each block into dw_partials [gridDim.x, cols] (null where w is frozen): take a grid
// of min(ceil(rows / blockDim.y), 4 blocks a multiprocessor) then. rms_norm_dw adds them up: block (32, 16), grid ceil(cols / 32).
//
// Bytes: forward x and y; with the residual x, a, r and y; backward dy, x and dx (twice with `add`).

#include "common/reduce.cuh"
#include "common/vec.cuh"

// Values of a row that a thread holds.
constexpr int HELD = 16;

// The sum over the threads of this row, in each of them; `turn` alternates between calls.
__device__ __forceinline__ float row_sum(float x, u32 turn) {
    __shared__ float slots[2][32];
    return blockDim.x <= 32 ? lanes_sum(x, blockDim.x) : block_sum(x, slots[turn & 1]);
}

// w may lie anywhere in a flat buffer of parameters.
template <int N>
__device__ __forceinline__ void load_weight(const float *w, bool aligned, float offset, float (&g)[N]) {
    if (aligned) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const Pack<float> four = load16(w + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) g[i + j] = offset + four.v[j];
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; ++i) g[i] = offset + w[i];
    }
}

template <typename T>
__device__ __forceinline__ float normed(float x, float inv, float g, float offset) {
    return offset == 0 ? rounded<T>(x * inv) * g : x * inv * g;
}

// One row, N values at a time, read again for its result.
template <int N, bool RESIDUAL, typename T>
__device__ __forceinline__ void looped(T *r, T *y, float *inv_rms, const T *x, const T *a, const float *w, float eps,
                                       float offset, u32 cols, bool live, u32 turn) {
    const u32 end = live ? cols : 0;
    float squares = 0;
    for (u32 c = threadIdx.x * N; c < end; c += blockDim.x * N) {
        float v[N], b[N];
        load_f32(x + c, v);
        if (RESIDUAL) load_f32(a + c, b);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (RESIDUAL) v[j] = rounded<T>(v[j] + b[j]);
            squares += v[j] * v[j];
        }
        if (RESIDUAL) store_f32(r + c, v);
    }
    const float inv = __frsqrt_rn(row_sum(squares, turn) / float(cols) + eps);
    for (u32 c = threadIdx.x * N; c < end; c += blockDim.x * N) {
        float v[N];
        load_f32(RESIDUAL ? r + c : x + c, v);
#pragma unroll
        for (int j = 0; j < N; ++j) v[j] = normed<T>(v[j], inv, offset + w[c + j], offset);
        store_f32(y + c, v);
    }
    if (live && threadIdx.x == 0) *inv_rms = inv;
}

template <typename T, bool RESIDUAL>
__device__ __forceinline__ void forward(T *r, T *y, float *inv_rms, const T *x, const T *a, const float *w, float eps,
                                        float offset, u32 rows, u32 cols, u32 ld) {
    constexpr int N = Pack<T>::N, PER = HELD / N;
    const u32 packs = cols / N;
    bool packed = cols % N == 0 && ld % N == 0 && aligned16(x) && aligned16(y);
    if (RESIDUAL) packed = packed && aligned16(a) && aligned16(r);
    const bool held_whole = packed && packs <= PER * blockDim.x;
    const bool w_aligned = aligned16(w);
    const float share = 1.0f / float(cols);
    u32 turn = 0;
    for (u64 first = u64(blockIdx.x) * blockDim.y; first < rows; first += u64(gridDim.x) * blockDim.y) {
        const u64 row = first + threadIdx.y;
        const bool live = row < rows;
        const T *x_row = x + row * cols, *a_row = RESIDUAL ? a + row * cols : nullptr;
        T *r_row = RESIDUAL ? r + row * cols : nullptr, *y_row = y + row * ld;
        if (held_whole) {
            Pack<T> held[PER], added[PER];
#pragma unroll
            for (int i = 0; i < PER; ++i) {
                const u32 c = threadIdx.x + i * blockDim.x;
                if (live && c < packs) {
                    held[i] = load16(x_row + c * N);
                    if (RESIDUAL) added[i] = load16(a_row + c * N);
                }
            }
            float squares = 0;
#pragma unroll
            for (int i = 0; i < PER; ++i) {
                const u32 c = threadIdx.x + i * blockDim.x;
                if (live && c < packs) {
                    float v[N];
                    unpack(held[i], v);
                    if (RESIDUAL) {
                        float b[N];
                        unpack(added[i], b);
#pragma unroll
                        for (int j = 0; j < N; ++j) v[j] += b[j];
                        held[i] = pack(v, T{});
                        store16(r_row + c * N, held[i]);
                        unpack(held[i], v);
                    }
#pragma unroll
                    for (int j = 0; j < N; ++j) squares += v[j] * v[j];
                }
            }
            const float inv = __frsqrt_rn(row_sum(squares, turn++) * share + eps);
#pragma unroll
            for (int i = 0; i < PER; ++i) {
                const u32 c = threadIdx.x + i * blockDim.x;
                if (live && c < packs) {
                    float v[N], g[N];
                    unpack(held[i], v);
                    load_weight(w + c * N, w_aligned, offset, g);
#pragma unroll
                    for (int j = 0; j < N; ++j) v[j] = normed<T>(v[j], inv, g[j], offset);
                    store16(y_row + c * N, pack(v, T{}));
                }
            }
            if (live && threadIdx.x == 0) inv_rms[row] = inv;
        } else if (packed) {
            looped<N, RESIDUAL>(r_row, y_row, inv_rms + row, x_row, a_row, w, eps, offset, cols, live, turn++);
        } else {
            looped<1, RESIDUAL>(r_row, y_row, inv_rms + row, x_row, a_row, w, eps, offset, cols, live, turn++);
        }
    }
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

template <typename T, bool WEIGHT>
__device__ __forceinline__ void backward_rows(T *dx, float *dw_partials, const T *dy, const T *x, const float *w,
                                              const float *inv_rms, float offset, u32 rows, u32 cols, u32 add) {
    constexpr int N = Pack<T>::N, PER = HELD / N;
    const u32 packs = cols / N;
    const bool w_aligned = aligned16(w);
    const float share = 1.0f / float(cols);
    float dw[PER][N] = {};
    u32 turn = 0;
    for (u64 first = u64(blockIdx.x) * blockDim.y; first < rows; first += u64(gridDim.x) * blockDim.y) {
        const u64 row = first + threadIdx.y;
        const bool live = row < rows;
        const float inv = live ? inv_rms[row] : 0;
        Pack<T> held_x[PER], held_dy[PER], held_dx[PER];
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const u32 c = threadIdx.x + i * blockDim.x;
            if (live && c < packs) {
                held_x[i] = load16(x + row * cols + c * N);
                held_dy[i] = load16(dy + row * cols + c * N);
                if (add) held_dx[i] = load16(dx + row * cols + c * N);
            }
        }
        float dot = 0;
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const u32 c = threadIdx.x + i * blockDim.x;
            if (live && c < packs) {
                float vx[N], vdy[N], g[N];
                unpack(held_x[i], vx);
                unpack(held_dy[i], vdy);
                load_weight(w + c * N, w_aligned, offset, g);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    dot += vdy[j] * g[j] * vx[j];
                    if (WEIGHT) dw[i][j] += vdy[j] * (vx[j] * inv);
                }
            }
        }
        const float k = inv * inv * (row_sum(dot, turn++) * share);
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const u32 c = threadIdx.x + i * blockDim.x;
            if (live && c < packs) {
                float vx[N], vdy[N], g[N];
                unpack(held_x[i], vx);
                unpack(held_dy[i], vdy);
                load_weight(w + c * N, w_aligned, offset, g);
#pragma unroll
                for (int j = 0; j < N; ++j) vx[j] = inv * (vdy[j] * g[j] - vx[j] * k);
                if (add) {
                    unpack(held_dx[i], vdy);
#pragma unroll
                    for (int j = 0; j < N; ++j) vx[j] += vdy[j];
                }
                store16(dx + row * cols + c * N, pack(vx, T{}));
            }
        }
    }
    if (WEIGHT) store_partials<N, PER>(dw_partials, dw, packs, cols);
}

// N values at a time, read again for the result, and once more for dw.
template <int N, typename T>
__device__ __forceinline__ void backward_looped(T *dx, float *dw_partials, const T *dy, const T *x, const float *w,
                                                const float *inv_rms, float offset, u32 rows, u32 cols, u32 add) {
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
            if (add) load_f32(dx + at + c, vdx);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                vx[j] = inv * (vdy[j] * (offset + w[c + j]) - vx[j] * k);
                if (add) vx[j] += vdx[j];
            }
            store_f32(dx + at + c, vx);
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
                                         const float *inv_rms, float offset, u32 rows, u32 cols, u32 add) {
    constexpr int N = Pack<T>::N;
    if (cols % N != 0 || !aligned16(dx) || !aligned16(dy) || !aligned16(x)) {
        backward_looped<1>(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add);
    } else if (cols > HELD * blockDim.x) {
        backward_looped<N>(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add);
    } else if (dw_partials == nullptr) {
        backward_rows<T, false>(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add);
    } else {
        backward_rows<T, true>(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add);
    }
}

extern "C" __global__ void __launch_bounds__(1024)
    rms_norm_fwd_f32(float *y, float *inv_rms, const float *x, const float *w, float eps, float offset, u32 rows, u32 cols,
                     u32 ld) {
    forward<float, false>(nullptr, y, inv_rms, x, nullptr, w, eps, offset, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(1024)
    rms_norm_fwd_f16(f16 *y, float *inv_rms, const f16 *x, const float *w, float eps, float offset, u32 rows, u32 cols,
                     u32 ld) {
    forward<f16, false>(nullptr, y, inv_rms, x, nullptr, w, eps, offset, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(1024)
    residual_rms_norm_fwd_f32(float *r, float *y, float *inv_rms, const float *x, const float *a, const float *w, float eps,
                              float offset, u32 rows, u32 cols, u32 ld) {
    forward<float, true>(r, y, inv_rms, x, a, w, eps, offset, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(1024)
    residual_rms_norm_fwd_f16(f16 *r, f16 *y, float *inv_rms, const f16 *x, const f16 *a, const float *w, float eps,
                              float offset, u32 rows, u32 cols, u32 ld) {
    forward<f16, true>(r, y, inv_rms, x, a, w, eps, offset, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    rms_norm_bwd_f32(float *dx, float *dw_partials, const float *dy, const float *x, const float *w, const float *inv_rms,
                     float offset, u32 rows, u32 cols, u32 add) {
    backward(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    rms_norm_bwd_f16(f16 *dx, float *dw_partials, const f16 *dy, const f16 *x, const float *w, const float *inv_rms,
                     float offset, u32 rows, u32 cols, u32 add) {
    backward(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(1024)
    rms_norm_fwd_bf16(bf16 *y, float *inv_rms, const bf16 *x, const float *w, float eps, float offset, u32 rows, u32 cols,
                      u32 ld) {
    forward<bf16, false>(nullptr, y, inv_rms, x, nullptr, w, eps, offset, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(1024)
    residual_rms_norm_fwd_bf16(bf16 *r, bf16 *y, float *inv_rms, const bf16 *x, const bf16 *a, const float *w, float eps,
                               float offset, u32 rows, u32 cols, u32 ld) {
    forward<bf16, true>(r, y, inv_rms, x, a, w, eps, offset, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(512, 1)
    rms_norm_bwd_bf16(bf16 *dx, float *dw_partials, const bf16 *dy, const bf16 *x, const float *w, const float *inv_rms,
                      float offset, u32 rows, u32 cols, u32 add) {
    backward(dx, dw_partials, dy, x, w, inv_rms, offset, rows, cols, add);
}
#endif

extern "C" __global__ void __launch_bounds__(512) rms_norm_dw(float *dw, const float *dw_partials, u32 partials, u32 cols) {
    add_rows(dw, dw_partials, partials, cols);
}
