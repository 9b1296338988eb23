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
// and P = n / (16 / sizeof(T)), ceil(P / 256) blocks in x (backward ceil(P / 512)), at least 1; a smaller grid takes them in turn.
// Where cols or a pitch is no multiple of a pack, or a pointer is not 16-byte aligned, values go one by one.
//
// glu_h is one row of the forward pass, and h = y Aᵀ for the A [R, cols] of an adapter behind it: block 512, grid R, launched early. Each block
// makes all of y for itself and writes its share. cols is a multiple of a pack, all on 16 bytes. No kernel has dynamic shared memory.
//
// Forward may be launched early, and must be told: waiting costs each block of a large launch a tenth of its time.
//
// Bytes: forward gate, up and y, with h A beside them; backward dy, gate, up, dgate and dup, and y.

#include "common/activation.cuh"
#include "common/early.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

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

template <u32 ACTIVATION, typename T>
__device__ __forceinline__ float row_with_h(T *y, const T *gate, const T *up, const T *row, u32 cols) {
    // Packs of a thread on their way.
    constexpr u32 N = Pack<T>::N, AHEAD = 4;
    const u32 packs = cols / N, share = (packs + gridDim.x - 1) / gridDim.x;
    float sum = 0;
    for (u32 first = threadIdx.x; first < packs; first += AHEAD * blockDim.x) {
        Held<T, N> g[AHEAD], u[AHEAD], factor[AHEAD];
#pragma unroll
        for (u32 i = 0; i < AHEAD; ++i) {
            const u32 c = first + i * blockDim.x;
            if (c < packs) g[i].load(gate + c * N), u[i].load(up + c * N), factor[i].load(row + c * N);
        }
#pragma unroll
        for (u32 i = 0; i < AHEAD; ++i) {
            const u32 c = first + i * blockDim.x;
            if (c >= packs) break;
            float vg[N], vu[N], f[N];
            g[i].unpack(vg);
            u[i].unpack(vu);
            factor[i].unpack(f);
#pragma unroll
            for (int j = 0; j < N; ++j) vu[j] *= activate<ACTIVATION>(vg[j]).value;
            if (c - blockIdx.x * share < share) store_f32(y + c * N, vu);
#pragma unroll
            for (int j = 0; j < N; ++j) sum += rounded<T>(vu[j]) * f[j];
        }
    }
    return sum;
}

template <typename T>
__device__ __forceinline__ void forward_with_h(T *y, T *h, const T *gate, const T *up, const T *lora_a, u32 activation, u32 cols) {
    __shared__ float slots[32];
    begin_early();
    const T *row = lora_a + u64(blockIdx.x) * cols;
    float sum;
    if (activation == SILU) sum = row_with_h<SILU>(y, gate, up, row, cols);
    else if (activation == GELU_TANH) sum = row_with_h<GELU_TANH>(y, gate, up, row, cols);
    else sum = row_with_h<GELU>(y, gate, up, row, cols);
    sum = block_sum(sum, slots);
    if (threadIdx.x == 0) h[blockIdx.x] = from_f32<T>(sum);
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

extern "C" __global__ void __launch_bounds__(512)
    glu_h_f16(f16 *y, f16 *h, const f16 *gate, const f16 *up, const f16 *lora_a, u32 activation, u32 cols) {
    forward_with_h(y, h, gate, up, lora_a, activation, cols);
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

extern "C" __global__ void __launch_bounds__(512)
    glu_h_bf16(bf16 *y, bf16 *h, const bf16 *gate, const bf16 *up, const bf16 *lora_a, u32 activation, u32 cols) {
    forward_with_h(y, h, gate, up, lora_a, activation, cols);
}

extern "C" __global__ void __launch_bounds__(256)
    glu_bwd_bf16(bf16 *dgate, bf16 *dup, bf16 *y, const bf16 *dy, const bf16 *gate, const bf16 *up, u32 activation, u32 rows,
                 u32 cols, u32 ld) {
    backward(dgate, dup, y, dy, gate, up, activation, rows, cols, ld);
}
#endif
