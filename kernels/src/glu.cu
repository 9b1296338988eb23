// Gated linear unit y = act(gate) · up and its gradients dgate = dy · up · act'(gate), dup = dy · act(gate), beside which y is made again
// where it is asked for.
//
// activation: 0 SiLU, 1 GELU by tanh, 2 GELU (the formulas of crates/tensor/src/ops/glu.rs).
//
// gate, up [rows, cols] with a pitch of ld_in >= cols, y with one of ld. Backward: gate, up, dgate and dup with a pitch of ld, dy
// dense. dgate may be dy or gate, dup may be up (or dy), of one pitch, y (dense, or null) may be dy: a thread reads all its values before it
// writes one.
//
// Threads: a pack of 16 bytes of each operand a thread (backward two, blockDim.x packs apart). Blocks of 256; grid: with n = rows · cols
// and P = n / (16 / sizeof(T)), ceil(P / 256) blocks in x (backward ceil(P / 512)), at least 1; a smaller grid takes them in turn. No
// shared memory. Where cols or a pitch is no multiple of a pack, or a pointer is not 16-byte aligned, values go one by one.
//
// Forward may be launched early, and must be told: waiting costs each block of a large launch a tenth of its time.
//
// Bytes: forward gate, up and y; backward dy, gate, up, dgate and dup, and y.

#include "common/early.cuh"
#include "common/vec.cuh"

enum Activation : u32 { SILU = 0, GELU_TANH = 1, GELU = 2 };

struct Act {
    float value;
    float slope;
};

// Within a few units in the last place; infinite beyond f32's range, as the division by it then gives 0.
__device__ __forceinline__ float exp_f32(float x) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504088896f));
    return y;
}

__device__ __forceinline__ float reciprocal(float x) {
    float y;
    asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Φ(x), as the CPU computes it.
__device__ __forceinline__ float normal_cdf(float x) {
    const float z = fabsf(x) * 0.70710678118654752f;
    const float t = reciprocal(1.0f + 0.5f * z);
    float p = 1.4879116e-1f;
    p = p * t - 7.0184727e-1f;
    p = p * t + 1.2061695f;
    p = p * t - 7.6198419e-1f;
    p = p * t - 2.5994683e-2f;
    p = p * t - 2.751209e-2f;
    p = p * t + 4.4362343e-2f;
    p = p * t + 3.8460637e-1f;
    p = p * t + 9.988684e-1f;
    p = p * t - 1.2654595f;
    const float tail = 0.5f * (t * exp_f32(p - z * z));
    return x < 0 ? tail : 1.0f - tail;
}

template <u32 ACTIVATION>
__device__ __forceinline__ Act activate(float x) {
    if constexpr (ACTIVATION == SILU) {
        const float s = reciprocal(1.0f + exp_f32(-x));
        return {x * s, s + x * s * (1.0f - s)};
    } else if constexpr (ACTIVATION == GELU_TANH) {
        constexpr float TWICE_ROOT = 1.595769f;  // 2 √(2/π)
        const float square = x * x;
        const float s = reciprocal(1.0f + exp_f32(-TWICE_ROOT * x * (1.0f + 0.044715f * square)));
        return {x * s, s + x * s * (1.0f - s) * (TWICE_ROOT * (1.0f + 0.134145f * square))};
    } else {
        const float cdf = normal_cdf(x);
        return {x * cdf, cdf + x * (0.3989423f * exp_f32(-0.5f * x * x))};
    }
}

// Where pack n of a matrix with `per_row` packs a row and a pitch of ld begins.
template <int N>
__device__ __forceinline__ u64 place_of(u64 n, u64 count, u32 per_row, u32 ld) {
    if (ld == per_row * N) return n * N;
    const u64 row = count >> 32 ? n / per_row : u32(n) / per_row;
    return row * ld + (n - row * per_row) * N;
}

// Groups of N values, one a thread at a time.
template <u32 ACTIVATION, int N, typename T>
__device__ __forceinline__ void forward_packs(T *y, const T *gate, const T *up, u64 count, u32 per_row, u32 ld, u32 ld_in) {
    for (u64 n = u64(blockIdx.x) * blockDim.x + threadIdx.x; n < count; n += u64(gridDim.x) * blockDim.x) {
        const u64 at = place_of<N>(n, count, per_row, ld_in);
        Held<T, N> g, u;
        g.load(gate + at);
        u.load(up + at);
        float vg[N], vu[N];
        g.unpack(vg);
        u.unpack(vu);
#pragma unroll
        for (int j = 0; j < N; ++j) vu[j] *= activate<ACTIVATION>(vg[j]).value;
        store_f32(y + place_of<N>(n, count, per_row, ld), vu);
    }
}

// Two groups a thread at a time.
template <u32 ACTIVATION, int N, typename T>
__device__ __forceinline__ void backward_packs(T *dgate, T *dup, T *y, const T *dy, const T *gate, const T *up, u64 count,
                                               u32 per_row, u32 ld) {
    constexpr int PACKS = 2;
    for (u64 first = u64(blockIdx.x) * blockDim.x * PACKS; first < count; first += u64(gridDim.x) * blockDim.x * PACKS) {
        Held<T, N> d[PACKS], g[PACKS], u[PACKS];
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const u64 n = first + threadIdx.x + i * blockDim.x;
            if (n < count) {
                const u64 at = place_of<N>(n, count, per_row, ld);
                d[i].load(dy + n * N);
                g[i].load(gate + at);
                u[i].load(up + at);
            }
        }
#pragma unroll
        for (int i = 0; i < PACKS; ++i) {
            const u64 n = first + threadIdx.x + i * blockDim.x;
            if (n >= count) break;
            float vd[N], vg[N], vu[N];
            d[i].unpack(vd);
            g[i].unpack(vg);
            u[i].unpack(vu);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const Act act = activate<ACTIVATION>(vg[j]);
                vg[j] = vu[j] * act.value;
                vu[j] = vd[j] * vu[j] * act.slope;
                vd[j] *= act.value;
            }
            const u64 at = place_of<N>(n, count, per_row, ld);
            store_f32(dgate + at, vu);
            store_f32(dup + at, vd);
            if (y) store_f32(y + n * N, vg);
        }
    }
}

template <u32 ACTIVATION, typename T>
__device__ __forceinline__ void forward_of(T *y, const T *gate, const T *up, u32 rows, u32 cols, u32 ld, u32 ld_in) {
    constexpr u32 N = Pack<T>::N;
    if (cols % N == 0 && ld % N == 0 && ld_in % N == 0 && aligned16(y) && aligned16(gate) && aligned16(up))
        forward_packs<ACTIVATION, N>(y, gate, up, u64(rows) * (cols / N), cols / N, ld, ld_in);
    else
        forward_packs<ACTIVATION, 1>(y, gate, up, u64(rows) * cols, cols, ld, ld_in);
}

template <u32 ACTIVATION, typename T>
__device__ __forceinline__ void backward_of(T *dgate, T *dup, T *y, const T *dy, const T *gate, const T *up, u32 rows, u32 cols,
                                            u32 ld) {
    constexpr u32 N = Pack<T>::N;
    const bool aligned =
        aligned16(dgate) && aligned16(dup) && aligned16(y) && aligned16(dy) && aligned16(gate) && aligned16(up);
    if (cols % N == 0 && ld % N == 0 && aligned)
        backward_packs<ACTIVATION, N>(dgate, dup, y, dy, gate, up, u64(rows) * (cols / N), cols / N, ld);
    else
        backward_packs<ACTIVATION, 1>(dgate, dup, y, dy, gate, up, u64(rows) * cols, cols, ld);
}

template <typename T>
__device__ __forceinline__ void forward(T *y, const T *gate, const T *up, u32 activation, u32 rows, u32 cols, u32 ld, u32 ld_in,
                                        u32 early) {
    if (early) begin_early();
    if (activation == SILU)
        forward_of<SILU>(y, gate, up, rows, cols, ld, ld_in);
    else if (activation == GELU_TANH)
        forward_of<GELU_TANH>(y, gate, up, rows, cols, ld, ld_in);
    else
        forward_of<GELU>(y, gate, up, rows, cols, ld, ld_in);
}

template <typename T>
__device__ __forceinline__ void backward(T *dgate, T *dup, T *y, const T *dy, const T *gate, const T *up, u32 activation, u32 rows,
                                         u32 cols, u32 ld) {
    if (activation == SILU)
        backward_of<SILU>(dgate, dup, y, dy, gate, up, rows, cols, ld);
    else if (activation == GELU_TANH)
        backward_of<GELU_TANH>(dgate, dup, y, dy, gate, up, rows, cols, ld);
    else
        backward_of<GELU>(dgate, dup, y, dy, gate, up, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(256)
    glu_fwd_f32(float *y, const float *gate, const float *up, u32 activation, u32 rows, u32 cols, u32 ld,
                u32 ld_in, u32 early) {
    forward(y, gate, up, activation, rows, cols, ld, ld_in, early);
}

extern "C" __global__ void __launch_bounds__(256)
    glu_fwd_f16(f16 *y, const f16 *gate, const f16 *up, u32 activation, u32 rows, u32 cols, u32 ld,
                u32 ld_in, u32 early) {
    forward(y, gate, up, activation, rows, cols, ld, ld_in, early);
}

extern "C" __global__ void __launch_bounds__(256)
    glu_bwd_f32(float *dgate, float *dup, float *y, const float *dy, const float *gate, const float *up, u32 activation, u32 rows,
                 u32 cols, u32 ld) {
    backward(dgate, dup, y, dy, gate, up, activation, rows, cols, ld);
}

extern "C" __global__ void __launch_bounds__(256)
    glu_bwd_f16(f16 *dgate, f16 *dup, f16 *y, const f16 *dy, const f16 *gate, const f16 *up, u32 activation, u32 rows,
                 u32 cols, u32 ld) {
    backward(dgate, dup, y, dy, gate, up, activation, rows, cols, ld);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(256)
    glu_fwd_bf16(bf16 *y, const bf16 *gate, const bf16 *up, u32 activation, u32 rows, u32 cols, u32 ld,
                u32 ld_in, u32 early) {
    forward(y, gate, up, activation, rows, cols, ld, ld_in, early);
}

extern "C" __global__ void __launch_bounds__(256)
    glu_bwd_bf16(bf16 *dgate, bf16 *dup, bf16 *y, const bf16 *dy, const bf16 *gate, const bf16 *up, u32 activation, u32 rows,
                 u32 cols, u32 ld) {
    backward(dgate, dup, y, dy, gate, up, activation, rows, cols, ld);
}
#endif
