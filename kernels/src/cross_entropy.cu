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
// before it and after the last whole pack go one by one. For the second pass the first packs are still in registers; the others
// are read again, the last first, from the caches.
// Launch: block 1024 (or another multiple of 32 from 32 on), grid rows in x (a smaller one takes the rest in turn).
//
// cross_entropy_whole_T (16-bit, no cap, vocab a multiple of 8, logits on 16 bytes): the same where a multiprocessor holds a row
// whole, the first packs of a thread in registers and the others in shared memory. While a row's gradient is written, the next row
// is on its way to where each pack lay, and summed as it comes: reading, writing and both passes' exponentials go on side by side.
// Hopper has cross_entropy_sm90.cu in its place.
// Launch: block 1024, grid min(rows, multiprocessors), shared bytes 16384 ceil(max(vocab / 8 - 5120, 0) / 1024).
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

constexpr u32 MOST_THREADS = 1024;
constexpr float LOG2_E = 1.4426950408889634f;
// Below every logit that matters, and finite: a thread without logits adds 0 and not NaN.
constexpr float LOWEST = -1e38f;
// Packs of a thread that stay in registers from the first pass to the second, and packs read at a time.
#if __CUDA_ARCH__ < 1000
constexpr u32 HELD = 4, BATCH = 2;
#else
constexpr u32 HELD = 4, BATCH = 1;
#endif

// tanh(s / cap) to about 1e-6; to f32's rounding for f32.
template <typename T>
__device__ __forceinline__ float tanh_of(float s, float cap, float inverse) {
    if constexpr (sizeof(T) == 4) return tanhf(s / cap);
    else return tanh_fast(s * inverse);
}

// What happens to logits before the loss: nothing, or the cap.
template <typename T, bool CAPPED>
struct Cap {
    float cap, inverse;

    template <int N>
    __device__ __forceinline__ void apply(float (&z)[N]) const {
        if constexpr (CAPPED) {
#pragma unroll
            for (int j = 0; j < N; ++j) z[j] = cap * tanh_of<T>(z[j], cap, inverse);
        }
    }
    // With slope[j] = dz / ds.
    template <int N>
    __device__ __forceinline__ void apply(float (&z)[N], float (&slope)[N]) const {
        if constexpr (CAPPED) {
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float t = tanh_of<T>(z[j], cap, inverse);
                z[j] = cap * t;
                slope[j] = 1.0f - t * t;
            }
        }
    }
};

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

    // Over the block, in each thread.
    __device__ __forceinline__ void join_all() {
        __shared__ float mosts[MOST_THREADS / 32], sums[MOST_THREADS / 32];
        __syncthreads();
        join_warp();
        if (threadIdx.x % 32 == 0) mosts[threadIdx.x / 32] = most, sums[threadIdx.x / 32] = sum;
        __syncthreads();
        const bool one = threadIdx.x % 32 < blockDim.x / 32;
        most = one ? mosts[threadIdx.x % 32] : LOWEST;
        sum = one ? sums[threadIdx.x % 32] : 0.0f;
        join_warp();
    }

    __device__ __forceinline__ void join_warp() {
#pragma unroll
        for (u32 step = 16; step > 0; step >>= 1) {
            const float other = __shfl_xor_sync(0xffffffffu, most, step);
            join(other, __shfl_xor_sync(0xffffffffu, sum, step));
        }
    }
};

// What turns logits into their gradient.
template <typename T, bool CAPPED>
struct Gradient {
    Cap<T, CAPPED> cap;
    float most, factor, scale;
    u32 target;

    // z[j] is number first + j of the row.
    template <int N>
    __device__ __forceinline__ void apply(float (&z)[N], u32 first) const {
        float slope[N];
        cap.apply(z, slope);
#pragma unroll
        for (int j = 0; j < N; ++j) z[j] = exp2_fast((z[j] - most) * LOG2_E) * factor;
        if (target - first < N) {
#pragma unroll
            for (int j = 0; j < N; ++j)
                if (first + j == target) z[j] -= scale;
        }
        if constexpr (CAPPED) {
#pragma unroll
            for (int j = 0; j < N; ++j) z[j] *= slope[j];
        }
    }
};

template <typename T, bool CAPPED>
__device__ __forceinline__ void row_loss(T *x, float *loss, u32 target, const float *scale_at, const Cap<T, CAPPED> &cap, u32 vocab,
                                         bool want_grad) {
    constexpr int N = Pack<T>::N;
    using Values = Held<T, N>;
    const u32 threads = blockDim.x;
    // Elements before the first aligned one, and whole packs from there.
    u32 head = u32(-reinterpret_cast<u64>(x) & 15) / sizeof(T);
    head = head < vocab ? head : vocab;
    const u32 packs = (vocab - head) / N, tail = head + packs * N;
    T *body = x + head;
    SumExp all = {LOWEST, 0.0f};
    Values held[HELD];
#pragma unroll
    for (u32 i = 0; i < HELD; ++i)
        if (i * threads + threadIdx.x < packs) held[i].load(body + u64(i * threads + threadIdx.x) * N);
    // At most one element before and one after the packs for each thread.
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        const u32 at = threadIdx.x + (side == 0 ? 0 : tail);
        if (at >= (side == 0 ? head : vocab)) continue;
        float z[1] = {to_f32(x[at])};
        cap.apply(z);
        all.add(z);
    }
#pragma unroll
    for (u32 i = 0; i < HELD; ++i) {
        if (i * threads + threadIdx.x >= packs) break;
        float z[N];
        held[i].unpack(z);
        cap.apply(z);
        all.add(z);
    }
    for (u32 first = HELD * threads + threadIdx.x; first < packs; first += BATCH * threads) {
        Values batch[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i)
            if (first + i * threads < packs) batch[i].load(body + u64(first + i * threads) * N);
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) {
            if (first + i * threads >= packs) break;
            float z[N];
            batch[i].unpack(z);
            cap.apply(z);
            all.add(z);
        }
    }
    float at_target[1] = {to_f32(x[target])};
    cap.apply(at_target);
    all.join_all();
    if (threadIdx.x == 0) *loss = (all.most - at_target[0]) + logf(all.sum);
    if (!want_grad) return;
    const float scale = *scale_at;
    const Gradient<T, CAPPED> gradient = {cap, all.most, scale / all.sum, scale, target};
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        const u32 at = threadIdx.x + (side == 0 ? 0 : tail);
        if (at >= (side == 0 ? head : vocab)) continue;
        float z[1] = {to_f32(x[at])};
        gradient.apply(z, at);
        x[at] = from_f32<T>(z[0]);
    }
    // The packs that this thread read, the last batch first.
    const u32 batches = packs > HELD * threads ? (packs - HELD * threads - 1) / (BATCH * threads) + 1 : 0;
    for (u32 b = batches; b-- > 0;) {
        const u32 first = (HELD + b * BATCH) * threads + threadIdx.x;
        Values batch[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i)
            if (first + i * threads < packs) batch[i].load(body + u64(first + i * threads) * N);
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) {
            if (first + i * threads >= packs) break;
            float z[N];
            batch[i].unpack(z);
            gradient.apply(z, head + (first + i * threads) * N);
            batch[i].pack(z);
            batch[i].store(body + u64(first + i * threads) * N);
        }
    }
#pragma unroll
    for (u32 i = 0; i < HELD; ++i) {
        const u32 at = i * threads + threadIdx.x;
        if (at >= packs) break;
        float z[N];
        held[i].unpack(z);
        gradient.apply(z, head + at * N);
        held[i].pack(z);
        held[i].store(body + u64(at) * N);
    }
}

template <typename T>
__device__ __forceinline__ void cross_entropy(T *logits, float *losses, const i32 *targets, const float *scale, float cap,
                                              u32 rows, u32 vocab, u32 want_grad) {
    for (u64 row = blockIdx.x; row < rows; row += gridDim.x) {
        T *x = logits + row * vocab;
        const i32 target = targets[row];
        if (target < 0) {
            if (threadIdx.x == 0) losses[row] = 0.0f;
            const u32 head = min(u32(-reinterpret_cast<u64>(x) & 15) / u32(sizeof(T)), vocab);
            const u32 packs = (vocab - head) / Pack<T>::N, tail = head + packs * Pack<T>::N;
            if (!want_grad) continue;
            for (u32 i = threadIdx.x; i < head; i += blockDim.x) x[i] = from_f32<T>(0.0f);
            for (u32 i = threadIdx.x; i < packs; i += blockDim.x) store16(x + head + i * Pack<T>::N, Pack<T>{});
            for (u32 i = tail + threadIdx.x; i < vocab; i += blockDim.x) x[i] = from_f32<T>(0.0f);
        } else if (cap == 0.0f) {
            row_loss(x, losses + row, u32(target), scale, Cap<T, false>{}, vocab, want_grad);
        } else {
            row_loss(x, losses + row, u32(target), scale, Cap<T, true>{cap, 1.0f / cap}, vocab, want_grad);
        }
    }
}

// A row in registers and shared memory; each thread has packs of its own.
template <typename T>
struct WholeRow {
    // BEHIND: copies into slots that are under way while one before them is summed.
    static constexpr u32 N = Pack<T>::N, THREADS = 1024, KEPT = 5, BEHIND = 2;
    Held<T, N> kept[KEPT];
    u8 *slots;
    u32 packs;

    __device__ __forceinline__ Held<T, N> *slot(u32 i) const { return reinterpret_cast<Held<T, N> *>(slots) + i * THREADS; }

    __device__ __forceinline__ void fetch_kept(u32 i, const T *x) {
        const u32 at = i * THREADS + threadIdx.x;
        if (at < packs) kept[i].load(x + u64(at) * N);
    }

    __device__ __forceinline__ void fetch_slot(u32 i, const T *x) {
        copy16(shared_address(slot(i)), x + u64((KEPT + i) * THREADS + threadIdx.x) * N, true);
    }

    // Packs of this thread in shared memory.
    __device__ __forceinline__ u32 in_slots() const {
        const u32 first = KEPT * THREADS + threadIdx.x;
        return first < packs ? (packs - first - 1) / THREADS + 1 : 0;
    }
};

template <typename T>
__device__ __forceinline__ void cross_entropy_whole(T *logits, float *losses, const i32 *targets, const float *scale_at, u32 rows,
                                                    u32 vocab, u32 want_grad) {
    extern __shared__ __align__(16) u8 memory[];
    using Row = WholeRow<T>;
    constexpr u32 N = Row::N, THREADS = Row::THREADS, KEPT = Row::KEPT, BEHIND = Row::BEHIND;
    Row held;
    held.slots = memory + threadIdx.x * 16;
    held.packs = vocab / N;
    const u32 others = held.in_slots();
    const float scale = *scale_at;
    const auto add_kept = [&](SumExp &sum) {
#pragma unroll
        for (u32 i = 0; i < KEPT; ++i) {
            if (i * THREADS + threadIdx.x >= held.packs) break;
            float z[N];
            held.kept[i].unpack(z);
            sum.add(z);
        }
    };
    const auto add_slot = [&](SumExp &sum, u32 i) {
        float z[N];
        held.slot(i)->unpack(z);
        sum.add(z);
    };
    u32 row = blockIdx.x;
    SumExp sum = {LOWEST, 0.0f};
    if (row < rows) {
        const T *x = logits + u64(row) * vocab;
        for (u32 i = 0; i < others; ++i) held.fetch_slot(i, x);
        copy_commit();
#pragma unroll
        for (u32 i = 0; i < KEPT; ++i) held.fetch_kept(i, x);
        copy_wait<0>();
        for (u32 i = 0; i < others; ++i) add_slot(sum, i);
        add_kept(sum);
    }
    for (; row < rows; row += gridDim.x) {
        T *x = logits + u64(row) * vocab;
        const i32 target = targets[row];
        const bool more = row + gridDim.x < rows;
        const T *next = x + u64(gridDim.x) * vocab;
        const float at_target = target < 0 ? 0.0f : to_f32(x[target]);
        SumExp all = sum;
        all.join_all();
        if (threadIdx.x == 0) losses[row] = target < 0 ? 0.0f : (all.most - at_target) + logf(all.sum);
        const Gradient<T, false> gradient = {{}, all.most, scale / all.sum, scale, u32(target)};
        const auto write = [&](const Held<T, N> &from, u32 at) {
            float z[N];
            Held<T, N> to = {};
            from.unpack(z);
            gradient.apply(z, at * N);
            if (target >= 0) to.pack(z);
            to.store(x + u64(at) * N);
        };
        sum = {LOWEST, 0.0f};
#pragma unroll 1
        for (u32 i = 0; i < others; ++i) {
            if (want_grad) write(*held.slot(i), (KEPT + i) * THREADS + threadIdx.x);
            if (more) held.fetch_slot(i, next);
            copy_commit();
            if (more && i >= BEHIND) {
                copy_wait<BEHIND>();
                add_slot(sum, i - BEHIND);
            }
        }
#pragma unroll
        for (u32 i = 0; i < KEPT; ++i) {
            const u32 at = i * THREADS + threadIdx.x;
            if (at >= held.packs) break;
            if (want_grad) write(held.kept[i], at);
            if (more) held.fetch_kept(i, next);
        }
        if (!more) break;
        copy_wait<0>();
        for (u32 i = others > BEHIND ? others - BEHIND : 0; i < others; ++i) add_slot(sum, i);
        add_kept(sum);
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
            for (int j = 0; j < 4; ++j) z.v[j] = from_f32<T>(cap * tanh_of<T>(to_f32(z.v[j]), cap, 1.0f / cap));
            *four = z;
        } else {
            for (u64 i = first; i < n && i < first + 4; ++i) x[i] = from_f32<T>(cap * tanh_of<T>(to_f32(x[i]), cap, 1.0f / cap));
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024) sum_f32(float *out, const float *x, u32 n, const float *scale, u32 add) {
    __shared__ double slots[32];
    double sum = 0;
    for (u64 first = threadIdx.x; first < n; first += 8 * blockDim.x) {
        float v[8];
#pragma unroll
        for (u32 i = 0; i < 8; ++i) v[i] = first + i * blockDim.x < n ? x[first + i * blockDim.x] : 0.0f;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) sum += double(v[i]);
    }
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

extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy_whole_f16(f16 *logits, float *losses, const i32 *targets, const float *scale, u32 rows, u32 vocab,
                            u32 want_grad) {
    cross_entropy_whole(logits, losses, targets, scale, rows, vocab, want_grad);
}

extern "C" __global__ void __launch_bounds__(256) softcap_f16(f16 *x, float cap, u64 n) { softcap(x, cap, n); }

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy_bf16(bf16 *logits, float *losses, const i32 *targets, const float *scale, float softcap, u32 rows, u32 vocab,
                       u32 want_grad) {
    cross_entropy(logits, losses, targets, scale, softcap, rows, vocab, want_grad);
}

extern "C" __global__ void __launch_bounds__(1024)
    cross_entropy_whole_bf16(bf16 *logits, float *losses, const i32 *targets, const float *scale, u32 rows, u32 vocab,
                            u32 want_grad) {
    cross_entropy_whole(logits, losses, targets, scale, rows, vocab, want_grad);
}

extern "C" __global__ void __launch_bounds__(256) softcap_bf16(bf16 *x, float cap, u64 n) { softcap(x, cap, n); }
#endif
