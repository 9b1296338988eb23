// The loss of rows of logits against their targets, and the logits' gradient in their place.
//
//   z = cap tanh(s / cap)   (z = s where the cap is 0)
//   losses[r] = ln Σ_v exp z_v − z_y,   s_v ← scale (exp(z_v) / Σ_u exp z_u − [v = y]) (1 − (z_v / cap)²),   y = targets[r]
//
// A target below 0 (−100): loss 0 and gradient 0. Losses are not scaled; `scale` is in device memory. Non-finite logits reach the
// loss as they are. want_grad = 0 leaves the logits alone.
//
// cross_entropy_T: a block takes a row. Each thread keeps the most and the sum of exponentials of what it read, in packs of 16
// bytes, and these are joined in a fixed order. Rows that begin anywhere are taken from their first aligned element on; those
// before it and after the last whole pack go one by one. The second pass goes backwards: what the first read last is still near.
// Launch: block 1024, grid rows in x (a smaller one takes the rest in turn).
//
// sum_f32: out = (add ? out : 0) + scale · Σ x, in f64, in an order that depends on n alone. Launch: block 1024, grid 1.
//
// softcap_T: x = cap tanh(x / cap) in place, four elements a thread. Launch: block 256, grid ceil(n / 1024) in x (a smaller one
// takes the rest in turn).
//
// None has dynamic shared memory. Bytes: a row read once and, with want_grad, written once; x read; x read and written.

#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"

constexpr u32 THREADS = 1024;
constexpr float LOG2_E = 1.4426950408889634f;
// Below every logit that matters, and finite: a thread without logits adds 0 and not NaN.
constexpr float LOWEST = -1e38f;

// tanh to about 1e-6; exact to f32 for f32.
template <typename T>
__device__ __forceinline__ float capped(float s, float cap) {
    if constexpr (sizeof(T) == 4) return cap * tanhf(s / cap);
    else return cap * tanh_fast(__fdividef(s, cap));
}

// Σ exp(z − most) of some values.
struct SumExp {
    float most, sum;

    template <int N>
    __device__ __forceinline__ void add(const float (&z)[N]) {
        float top = most;
#pragma unroll
        for (int j = 0; j < N; ++j) top = fmaxf(top, z[j]);
        sum *= exp2_fast((most - top) * LOG2_E);
        most = top;
#pragma unroll
        for (int j = 0; j < N; ++j) sum += exp2_fast((z[j] - top) * LOG2_E);
    }

    __device__ __forceinline__ void join(float other_most, float other_sum) {
        const float top = fmaxf(most, other_most);
        sum = sum * exp2_fast((most - top) * LOG2_E) + other_sum * exp2_fast((other_most - top) * LOG2_E);
        most = top;
    }
};

// Joined over the block, in each thread.
__device__ __forceinline__ SumExp joined(SumExp x) {
    __shared__ float mosts[THREADS / 32], sums[THREADS / 32];
    __syncthreads();
#pragma unroll
    for (u32 step = 16; step > 0; step >>= 1) {
        const float most = __shfl_xor_sync(0xffffffffu, x.most, step), sum = __shfl_xor_sync(0xffffffffu, x.sum, step);
        x.join(most, sum);
    }
    if (threadIdx.x % 32 == 0) mosts[threadIdx.x / 32] = x.most, sums[threadIdx.x / 32] = x.sum;
    __syncthreads();
    x = {mosts[threadIdx.x % 32], sums[threadIdx.x % 32]};
#pragma unroll
    for (u32 step = 16; step > 0; step >>= 1) {
        const float most = __shfl_xor_sync(0xffffffffu, x.most, step), sum = __shfl_xor_sync(0xffffffffu, x.sum, step);
        x.join(most, sum);
    }
    return x;
}

// What turns logits into their gradient.
template <typename T>
struct Gradient {
    float most, factor, scale, cap;
    u32 target;

    // z[j] is number first + j of the row.
    template <int N>
    __device__ __forceinline__ void apply(float (&z)[N], u32 first) const {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            float slope = 1.0f;
            if (cap != 0.0f) {
                z[j] = capped<T>(z[j], cap);
                const float r = z[j] / cap;
                slope = 1.0f - r * r;
            }
            float g = exp2_fast((z[j] - most) * LOG2_E) * factor;
            if (first + j == target) g -= scale;
            z[j] = g * slope;
        }
    }
};

template <typename T>
__device__ __forceinline__ void cross_entropy(T *logits, float *losses, const i32 *targets, const float *scale, float cap,
                                              u32 rows, u32 vocab, u32 want_grad) {
    constexpr int N = Pack<T>::N;
    for (u64 row = blockIdx.x; row < rows; row += gridDim.x) {
        T *x = logits + row * vocab;
        // Elements before the first aligned one, and whole packs from there.
        u32 head = u32(-reinterpret_cast<u64>(x) & 15) / sizeof(T);
        head = head < vocab ? head : vocab;
        const u32 packs = (vocab - head) / N, tail = head + packs * N;
        const i32 target = targets[row];
        if (target < 0) {
            if (threadIdx.x == 0) losses[row] = 0.0f;
            if (!want_grad) continue;
            for (u32 i = threadIdx.x; i < head; i += THREADS) x[i] = from_f32<T>(0.0f);
            for (u32 i = threadIdx.x; i < packs; i += THREADS) store16(x + head + i * N, Pack<T>{});
            for (u32 i = tail + threadIdx.x; i < vocab; i += THREADS) x[i] = from_f32<T>(0.0f);
            continue;
        }
        SumExp mine = {LOWEST, 0.0f};
        // At most one element before and one after the packs for each thread.
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const u32 at = threadIdx.x + (side == 0 ? 0 : tail);
            if (at >= (side == 0 ? head : vocab)) continue;
            float z[1] = {to_f32(x[at])};
            if (cap != 0.0f) z[0] = capped<T>(z[0], cap);
            mine.add(z);
        }
        for (u32 i = threadIdx.x; i < packs; i += THREADS) {
            float z[N];
            load_f32(x + head + i * N, z);
            if (cap != 0.0f) {
#pragma unroll
                for (int j = 0; j < N; ++j) z[j] = capped<T>(z[j], cap);
            }
            mine.add(z);
        }
        float at_target = to_f32(x[target]);
        if (cap != 0.0f) at_target = capped<T>(at_target, cap);
        const SumExp all = joined(mine);
        if (threadIdx.x == 0) losses[row] = all.most + logf(all.sum) - at_target;
        if (!want_grad) continue;
        const Gradient<T> gradient = {all.most, *scale / all.sum, *scale, cap, u32(target)};
        for (u32 i = threadIdx.x; i < head; i += THREADS) {
            float z[1] = {to_f32(x[i])};
            gradient.apply(z, i);
            x[i] = from_f32<T>(z[0]);
        }
        for (u32 i = tail + threadIdx.x; i < vocab; i += THREADS) {
            float z[1] = {to_f32(x[i])};
            gradient.apply(z, i);
            x[i] = from_f32<T>(z[0]);
        }
        // The same packs that this thread read, the last first.
        const u32 turns = (packs + THREADS - 1) / THREADS;
        for (u32 turn = turns; turn-- > 0;) {
            const u32 i = turn * THREADS + threadIdx.x;
            if (i >= packs) continue;
            float z[N];
            load_f32(x + head + i * N, z);
            gradient.apply(z, head + i * N);
            store_f32(x + head + i * N, z);
        }
    }
}

template <typename T>
struct __align__(4 * sizeof(T)) Four {
    T v[4];
};

template <typename T>
__device__ __forceinline__ void softcap(T *x, float cap, u64 n) {
    for (u64 first = (u64(blockIdx.x) * blockDim.x + threadIdx.x) * 4; first < n; first += u64(gridDim.x) * blockDim.x * 4) {
        if (first + 4 <= n && aligned16(x)) {
            Four<T> *four = reinterpret_cast<Four<T> *>(x + first);
            Four<T> z = *four;
#pragma unroll
            for (int j = 0; j < 4; ++j) z.v[j] = from_f32<T>(capped<T>(to_f32(z.v[j]), cap));
            *four = z;
        } else {
            for (u64 i = first; i < n && i < first + 4; ++i) x[i] = from_f32<T>(capped<T>(to_f32(x[i]), cap));
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024) sum_f32(float *out, const float *x, u32 n, const float *scale, u32 add) {
    __shared__ double slots[32];
    double sum = 0;
    for (u64 i = threadIdx.x; i < n; i += blockDim.x) sum += double(x[i]);
    sum = block_sum(sum, slots) * double(*scale);
    if (threadIdx.x == 0) *out = float(add ? double(*out) + sum : sum);
}

extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy_f32(float *logits, float *losses, const i32 *targets, const float *scale, float softcap, u32 rows, u32 vocab,
                      u32 want_grad) {
    cross_entropy(logits, losses, targets, scale, softcap, rows, vocab, want_grad);
}

extern "C" __global__ void __launch_bounds__(256) softcap_f32(float *x, float cap, u64 n) { softcap(x, cap, n); }

extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy_f16(f16 *logits, float *losses, const i32 *targets, const float *scale, float softcap, u32 rows, u32 vocab,
                      u32 want_grad) {
    cross_entropy(logits, losses, targets, scale, softcap, rows, vocab, want_grad);
}

extern "C" __global__ void __launch_bounds__(256) softcap_f16(f16 *x, float cap, u64 n) { softcap(x, cap, n); }

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy_bf16(bf16 *logits, float *losses, const i32 *targets, const float *scale, float softcap, u32 rows, u32 vocab,
                       u32 want_grad) {
    cross_entropy(logits, losses, targets, scale, softcap, rows, vocab, want_grad);
}

extern "C" __global__ void __launch_bounds__(256) softcap_bf16(bf16 *x, float cap, u64 n) { softcap(x, cap, n); }
#endif
