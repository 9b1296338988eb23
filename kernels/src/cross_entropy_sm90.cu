// cross_entropy.cu for Hopper: the loss of rows of 16-bit logits, and the logits' gradient in their place. No cap, vocab a
// multiple of 8, logits on 16 bytes.
//
// The blocks of a cluster take a row, and each of their warps packs of 16 bytes side by side, which the copy engine brings to
// shared memory once. A warp finds the most of its logits, then Σ exp against it; all warps of the cluster join what each found, in
// the same order, so that results repeat bit for bit; and each writes the gradient over its packs. Of three blocks on a
// multiprocessor one waits for its logits while another sums and the third writes.
//
// Exponents are of 2: exp(z − m) = 2^(z log2 e − m log2 e), one multiply-add before the instruction.
//
// cross_entropy_sm90_T_splitS: cluster of S (as compiled), block 256, grid S rows (a smaller multiple of S takes the rest in
// turn), shared bytes 256 ceil(vocab / (128 S)).
//
// Bytes: a row read once and, with want_grad, written once.

#include "common/cluster.cuh"
#include "common/ptx.cuh"
#include "common/reduce.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"

constexpr u32 BLOCK = 256, BLOCKS = 3;

constexpr float TO_LOG2 = 1.4426950408889634f, FROM_LOG2 = 0.6931471805599453f;
// Below every logit that matters, and finite: who has no logits adds 0 and not NaN.
constexpr float LEAST = -1e38f;

// Pairs of 16-bit values: −∞ twice, and the larger, half by half, where a NaN gives way.
template <typename T>
struct Pairs;

template <>
struct Pairs<f16> {
    static constexpr u32 NONE = 0xfc00fc00;
    static __device__ __forceinline__ u32 larger(u32 a, u32 b) {
        u32 y;
        asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
        return y;
    }
};

template <>
struct Pairs<bf16> {
    static constexpr u32 NONE = 0xff80ff80;
    static __device__ __forceinline__ u32 larger(u32 a, u32 b) {
        u32 y;
        asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
        return y;
    }
};

__device__ __forceinline__ float lanes_max(float x) {
#pragma unroll
    for (u32 step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}

// Σ 2^(z log2 e − most) of some logits z.
struct SumExp {
    float most, sum;
};

// A warp's packs of a row, in shared memory.
template <typename T>
struct Share {
    static constexpr u32 N = 8;
    using Values = Held<T, N>;
    Values *packs;
    // The first's number in the row, and how many there are.
    u32 first, count;

    // In each lane.
    __device__ __forceinline__ SumExp sum() const {
        u32 top = Pairs<T>::NONE;
#pragma unroll 4
        for (u32 i = threadIdx.x % 32; i < count; i += 32) {
            const Values values = packs[i];
#pragma unroll
            for (u32 w = 0; w < N / 2; ++w) top = Pairs<T>::larger(top, values.word[w]);
        }
        const float most = TO_LOG2 * fmaxf(LEAST, lanes_max(fmaxf(low_of<T>(top), high_of<T>(top))));
        float sums[N] = {};
#pragma unroll 2
        for (u32 i = threadIdx.x % 32; i < count; i += 32) {
            float z[N];
            packs[i].unpack(z);
#pragma unroll
            for (u32 j = 0; j < N; ++j) sums[j] += exp2_fast(fmaf(z[j], TO_LOG2, -most));
        }
#pragma unroll
        for (u32 step = N / 2; step > 0; step >>= 1) {
#pragma unroll
            for (u32 j = 0; j < step; ++j) sums[j] += sums[j + step];
        }
        return {most, lanes_sum(sums[0])};
    }

    // Whether this lane has logit v of the row, and its place in shared memory then.
    __device__ __forceinline__ bool has(u32 v) const {
        const u32 at = v / N - first;
        return at < count && at % 32 == threadIdx.x % 32;
    }
    __device__ __forceinline__ T &at(u32 v) const { return reinterpret_cast<T *>(packs)[v - first * N]; }
};

// Where the warps of a cluster of SPLIT blocks leave what they found in a row: in each of its blocks, for even rows and for odd
// ones. Who has what all found in one row knows that all have read that of the row before it.
template <u32 SPLIT, u32 WARPS>
struct Meeting {
    static constexpr u32 ALL = SPLIT * WARPS, TURNS = (ALL + 31) / 32;
    // A block alone arrives warp by warp; others count bytes.
    static constexpr u32 ARRIVALS = SPLIT == 1 ? WARPS : 1;
    float2 found[2][ALL];
    u64 barriers[2];

    __device__ __forceinline__ void begin() {
#pragma unroll
        for (u32 i = 0; i < 2; ++i) mbarrier_init(shared_address(barriers + i), ARRIVALS);
    }

    // What all found, in each lane, from what each warp did; `met` counts these calls.
    __device__ __forceinline__ SumExp join(const SumExp &part, u32 met) {
        const u32 lane = threadIdx.x % 32, rank = cluster_rank() * WARPS + threadIdx.x / 32;
        const u32 barrier = shared_address(barriers + met % 2);
        const float2 *const all = found[met % 2];
        if constexpr (SPLIT == 1) {
            if (lane == 0) found[met % 2][rank] = {part.most, part.sum}, mbarrier_arrive(barrier);
        } else {
            if (threadIdx.x == 0) mbarrier_expect(barrier, ALL * sizeof(float2));
            if (lane < SPLIT) cluster_send(shared_address(all + rank), {part.most, part.sum}, barrier, lane);
        }
        mbarrier_wait(barrier, met / 2 % 2);
        SumExp mine[TURNS];
        float top = LEAST, sum = 0.0f;
#pragma unroll
        for (u32 turn = 0; turn < TURNS; ++turn) {
            const u32 i = turn * 32 + lane;
            mine[turn] = i < ALL ? SumExp{all[i].x, all[i].y} : SumExp{LEAST, 0.0f};
            top = fmaxf(top, mine[turn].most);
        }
        top = lanes_max(top);
#pragma unroll
        for (u32 turn = 0; turn < TURNS; ++turn) sum += mine[turn].sum * exp2_fast(mine[turn].most - top);
        return {top, lanes_sum(sum)};
    }
};

// Writes the gradient of a warp's packs over the row x; zeros without a target.
template <typename T>
__device__ __forceinline__ void write(const Share<T> &share, T *x, const SumExp &all, float scale, i32 target) {
    using Values = typename Share<T>::Values;
    constexpr u32 N = Share<T>::N;
    T *const to = x + u64(share.first) * N;
    const float factor = scale / all.sum;
    const bool has = target >= 0 && share.has(target);
    float at_target = has ? to_f32(share.at(target)) : 0.0f;
    at_target = exp2_fast(fmaf(at_target, TO_LOG2, -all.most)) * factor - scale;
#pragma unroll 2
    for (u32 i = threadIdx.x % 32; i < share.count; i += 32) {
        Values values = {};
        if (target >= 0) {
            float z[N];
            share.packs[i].unpack(z);
#pragma unroll
            for (u32 j = 0; j < N; ++j) z[j] = exp2_fast(fmaf(z[j], TO_LOG2, -all.most)) * factor;
            values.pack(z);
        }
        *(reinterpret_cast<Values *>(to) + i) = values;
    }
    // After the pack it lies in: by the same thread.
    if (has) x[target] = from_f32<T>(at_target);
}

template <u32 SPLIT, typename T>
__device__ __forceinline__ void cross_entropy_split(T *logits, float *losses, const i32 *targets, const float *scale_at, u32 rows,
                                                    u32 vocab, u32 want_grad) {
    extern __shared__ __align__(128) u8 memory[];
    constexpr u32 WARPS = BLOCK / 32, N = Share<T>::N;
    __shared__ __align__(16) Meeting<SPLIT, WARPS> meeting;
    __shared__ __align__(8) u64 barriers[WARPS];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, packs = vocab / N, step = gridDim.x / SPLIT;
    // An even number: 32 bytes are what memory moves.
    const u32 each = (packs + 2 * SPLIT * WARPS - 1) / (2 * SPLIT * WARPS) * 2;
    Share<T> share = {reinterpret_cast<typename Share<T>::Values *>(memory) + warp * each, 0, 0};
    share.first = min((cluster_rank() * WARPS + warp) * each, packs);
    share.count = min(each, packs - share.first);
    const u32 barrier = shared_address(barriers + warp);
    const auto fetch = [&](u32 row) {
        const T *from = logits + u64(row) * vocab + u64(share.first) * N;
        mbarrier_expect(barrier, share.count * 16);
        if (share.count > 0) bulk_load(shared_address(share.packs), from, share.count * 16, barrier);
    };
    u32 row = blockIdx.x / SPLIT;
    if (lane == 0) {
        mbarrier_init(barrier, 1);
        if (warp == 0) meeting.begin();
        mbarrier_init_fence();
        if (row < rows) fetch(row);
    }
    const float scale = *scale_at;
    __syncwarp();
    cluster_begin();
    for (u32 parity = 0, met = 0; row < rows; row += step, parity ^= 1) {
        const i32 target = targets[row];
        SumExp all = {0.0f, 1.0f};
        mbarrier_wait(barrier, parity);
        if (target >= 0) {
            all = meeting.join(share.sum(), met++);
            if (share.has(target)) {
                const float z = to_f32(share.at(target));
                losses[row] = FROM_LOG2 * fmaf(-z, TO_LOG2, all.most) + logf(all.sum);
            }
        } else if (cluster_rank() == 0 && threadIdx.x == 0) {
            losses[row] = 0.0f;
        }
        if (want_grad) write(share, logits + u64(row) * vocab, all, scale, target);
        if (row + step >= rows) break;
        // All lanes have read their packs.
        __syncwarp();
        if (lane == 0) fetch(row + step);
    }
}

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(BLOCK, BLOCKS)
    cross_entropy_sm90_f16_split1(f16 *logits, float *losses, const i32 *targets, const float *scale, u32 rows, u32 vocab,
                                  u32 want_grad) {
    cross_entropy_split<1>(logits, losses, targets, scale, rows, vocab, want_grad);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(BLOCK, BLOCKS)
    cross_entropy_sm90_f16_split2(f16 *logits, float *losses, const i32 *targets, const float *scale, u32 rows, u32 vocab,
                                  u32 want_grad) {
    cross_entropy_split<2>(logits, losses, targets, scale, rows, vocab, want_grad);
}

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(BLOCK, BLOCKS)
    cross_entropy_sm90_f16_split4(f16 *logits, float *losses, const i32 *targets, const float *scale, u32 rows, u32 vocab,
                                  u32 want_grad) {
    cross_entropy_split<4>(logits, losses, targets, scale, rows, vocab, want_grad);
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(BLOCK, BLOCKS)
    cross_entropy_sm90_f16_split8(f16 *logits, float *losses, const i32 *targets, const float *scale, u32 rows, u32 vocab,
                                  u32 want_grad) {
    cross_entropy_split<8>(logits, losses, targets, scale, rows, vocab, want_grad);
}

extern "C" __global__ void __cluster_dims__(1, 1, 1) __launch_bounds__(BLOCK, BLOCKS)
    cross_entropy_sm90_bf16_split1(bf16 *logits, float *losses, const i32 *targets, const float *scale, u32 rows, u32 vocab,
                                   u32 want_grad) {
    cross_entropy_split<1>(logits, losses, targets, scale, rows, vocab, want_grad);
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(BLOCK, BLOCKS)
    cross_entropy_sm90_bf16_split2(bf16 *logits, float *losses, const i32 *targets, const float *scale, u32 rows, u32 vocab,
                                   u32 want_grad) {
    cross_entropy_split<2>(logits, losses, targets, scale, rows, vocab, want_grad);
}

extern "C" __global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(BLOCK, BLOCKS)
    cross_entropy_sm90_bf16_split4(bf16 *logits, float *losses, const i32 *targets, const float *scale, u32 rows, u32 vocab,
                                   u32 want_grad) {
    cross_entropy_split<4>(logits, losses, targets, scale, rows, vocab, want_grad);
}

extern "C" __global__ void __cluster_dims__(8, 1, 1) __launch_bounds__(BLOCK, BLOCKS)
    cross_entropy_sm90_bf16_split8(bf16 *logits, float *losses, const i32 *targets, const float *scale, u32 rows, u32 vocab,
                                   u32 want_grad) {
    cross_entropy_split<8>(logits, losses, targets, scale, rows, vocab, want_grad);
}
