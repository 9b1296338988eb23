// Products of many rows x [m, k] for Hopper, with the weights of a layer as they lie (`Lies`): y [m, n] = x wᵀ forward, y = x w backward.
//
// Tiles are made as wᵀ's rows times x's: 64 columns of y are the 64 rows of an instruction, tokens its 256 columns (the other way
// round takes 2 % more energy for the same sums, and a large product is as fast as the power that a card may draw). A block's tile has
// 128 columns and 256 tokens; the blocks of a cluster lie beside each other (`Cluster`), those with the same columns bring their part
// of w to each other, those with the same tokens of x, since what comes from the second-level cache takes an eighth of a product's energy.
// One thread of a block has the copy engine bring steps of 64 in k through a ring of buffers. Two warpgroups multiply; what becomes of
// their sums (the ends: `Plain`, those of product_gated.cuh) is done beside the first steps of their next tile. The warps beside the
// copying thread widen the weight of a product to come (common/widen.cuh).
//
// A launch makes a share of a result (`Share`): all of it, or of two launches that run side by side the one makes most by clusters of
// eight, and the other the rest by clusters of two, on the multiprocessors that no cluster of eight finds room on.
//
// Launch: block 384, any grid of whole clusters, dynamic shared memory PRODUCT_BYTES.
#pragma once

#include "common/cluster.cuh"
#include "common/early.cuh"
#include "common/mma.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"
#include "common/widen.cuh"

// Columns of y and tokens of a block's tile; steps of k in a buffer; buffers; columns of tiles that are taken together.
constexpr u32 TILE_N = 128, TILE_M = 256, DEPTH = 64, STAGES = 4, BAND = 2048;
constexpr u32 W_BYTES = TILE_N * DEPTH * 2, X_BYTES = TILE_M * DEPTH * 2, STAGE_BYTES = W_BYTES + X_BYTES;
// 64 x 64 results on their way to memory, two a warpgroup.
constexpr u32 OUT_BYTES = 64 * 64 * 2, OUT_AT = STAGES * STAGE_BYTES, BARRIERS_AT = OUT_AT + 4 * OUT_BYTES;
// The barriers of the ring, and one more for each warpgroup.
constexpr u32 PRODUCT_BYTES = BARRIERS_AT + 2 * STAGES * 8 + 2 * 8;
// Warps of a block that widen the weight of a later product.
constexpr u32 WORKERS = 3;

// How w lies: [n, k]; [k, n]; or [n, k], whose rows are those of two matrices of n / 2, one below the other, of which a tile has 8
// of the one and 8 of the other in turn.
enum class Lies { ROWS, TURNED, PAIRED };

// How the blocks of a cluster lie: N beside each other along the columns of y, and M along its tokens.
template <u32 N, u32 M>
struct Cluster {
    static_assert(M <= 2, "one other block at most has the same columns");
    // Blocks, and those that bring something to a block, itself among them.
    static constexpr u32 SIZE = N * M, MATES = N + M - 1, COLUMNS = N * TILE_N, TOKENS = M * TILE_M;

    static __device__ __forceinline__ u32 n() { return cluster_rank() % N; }
    static __device__ __forceinline__ u32 m() { return cluster_rank() / N; }
    // The blocks with the same tokens, and with the same columns, as bits.
    static __device__ __forceinline__ u32 with_tokens() { return ((1u << N) - 1) << (m() * N); }
    static __device__ __forceinline__ u32 with_columns() { return (M == 2 ? 1u | 1u << N : 1u) << n(); }
    // The mates one after another, first those with the same tokens.
    static __device__ __forceinline__ u32 mate(u32 i) { return i < N ? m() * N + i : n() + (m() + 1) % M * N; }
};
using Two = Cluster<2, 1>;
using Eight = Cluster<4, 2>;

// What a launch makes of a result: tokens m up to m_end, columns n up to n_end. All but the ends of the result itself are ends of tiles,
// so that no two shares have an element. Of two launches that share a result the first leads, and the second follows: it begins when all
// blocks of the first have begun, and goes on when the first has waited for the launches before it (`meeting`: that it has, and how many
// blocks of the second have seen it; zero between launches).
struct Share {
    static constexpr u32 ALONE = 0, LEADS = 1, FOLLOWS = 2;
    u32 *meeting;
    u32 m, m_end, n, n_end, role;

    __device__ __forceinline__ void begin() const {
        if (role == FOLLOWS) return follow();
        launch_dependents();
        wait_for_launches();
        if (role == LEADS && blockIdx.x == 0 && threadIdx.x == 0) store_release(meeting, 1);
    }
    // The next launch begins when all blocks have met the first, so that the words are zero for those after it.
    __device__ __forceinline__ void follow() const {
        if (threadIdx.x == 0) {
            while (load_acquire(meeting) == 0) {}
            if (atomicAdd(meeting + 1, 1u) + 1 == gridDim.x) atomicExch(meeting + 1, 0u), atomicExch(meeting, 0u), __threadfence();
        }
        __syncthreads();
        fence_async_global();
        launch_dependents();
    }
    // The end of the second is the end of both.
    __device__ __forceinline__ void end() const {
        if (role == FOLLOWS) wait_for_launches();
    }
};

// The tiles of a cluster, one after another: bands of BAND columns, token by token, there and back, so that a band begins with tokens
// that the second-level cache still has. Every other tile of a cluster is summed from the end of k, where all clusters have just been in the
// same rows of w, or of x where a band ends. Of gate and up of Llama-3-8B memory is read a tenth less for it, and of o a fifth.
template <typename C>
struct Tiles {
    const Share &share;
    u32 next, m, n;
    bool back = true;  // before the first; for the copying thread

    __device__ __forceinline__ explicit Tiles(const Share &share) : share(share), next(blockIdx.x / C::SIZE) {}

    // The first token and column of the next tile's share of this block; false after the last.
    __device__ __forceinline__ bool take() {
        constexpr u32 ROWS = BAND / C::COLUMNS;
        const u32 high = (share.n_end - share.n + C::COLUMNS - 1) / C::COLUMNS, wide = (share.m_end - share.m + C::TOKENS - 1) / C::TOKENS;
        if (next >= high * wide) return false;
        const u32 band = next / (ROWS * wide), rows = min(ROWS, high - band * ROWS), rest = next - band * ROWS * wide;
        const u32 at = band % 2 ? wide - 1 - rest / rows : rest / rows;
        n = share.n + (band * ROWS + rest % rows) * C::COLUMNS + C::n() * TILE_N;
        m = share.m + at * C::TOKENS + C::m() * TILE_M;
        next += gridDim.x / C::SIZE;
        back = !back;
        return true;
    }
    // The first of the i-th DEPTH columns of k; what is left of k comes last either way.
    __device__ __forceinline__ u32 step(u32 i, u32 k) const { return (back && i < k / DEPTH ? k / DEPTH - 1 - i : i) * DEPTH; }
};

// Where everything lies in shared memory, from `base` on.
struct Buffers {
    u32 base;

    __device__ __forceinline__ u32 w(u32 stage) const { return base + stage * STAGE_BYTES; }
    __device__ __forceinline__ u32 x(u32 stage) const { return base + stage * STAGE_BYTES + W_BYTES; }
    __device__ __forceinline__ u32 full(u32 stage) const { return base + BARRIERS_AT + stage * 8; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return base + BARRIERS_AT + (STAGES + stage) * 8; }
    // A warpgroup's own: two boxes of results, and a barrier.
    __device__ __forceinline__ u32 out() const { return base + OUT_AT + threadIdx.x / 128 * 2 * OUT_BYTES; }
    __device__ __forceinline__ u32 extra() const { return base + BARRIERS_AT + (2 * STAGES + threadIdx.x / 128) * 8; }
};

// All steps of all tiles; one thread. Each block with the same columns brings its share of them to all, and each with the same tokens.
template <Lies LIES, u32 N, u32 M>
__device__ __forceinline__ void bring(const Buffers &buffers, Tiles<Cluster<N, M>> tiles, const TensorMap &x, const TensorMap &w, u32 k) {
    using C = Cluster<N, M>;
    const u32 with_tokens = C::with_tokens(), with_columns = C::with_columns(), from_n = C::n(), from_m = C::m();
    Ring<STAGES> ring;
    while (tiles.take())
        for (u32 nth = 0; nth * DEPTH < k; nth++, ring.next()) {
            const u32 at = tiles.step(nth, k);
            const u32 barrier = buffers.full(ring.index), to = buffers.w(ring.index) + from_m * (W_BYTES / M);
            mbarrier_wait(buffers.empty(ring.index), ring.parity ^ 1);
            mbarrier_expect(barrier, STAGE_BYTES);
            if constexpr (LIES == Lies::PAIRED) {
                tma_load4<M>(to, w, barrier, at, 0, 0, tiles.n / 16 + from_m * (TILE_N / 16 / M), with_columns);
            } else if constexpr (LIES == Lies::TURNED) {
#pragma unroll
                for (u32 i = 0; i < 2 / M; i++)
                    tma_load<M>(to + i * (W_BYTES / 2), w, barrier, tiles.n + (from_m + i) * 64, 0, at, with_columns);
            } else {
                tma_load<M>(to, w, barrier, at, 0, tiles.n + from_m * (TILE_N / M), with_columns);
            }
            tma_load<N>(buffers.x(ring.index) + from_n * (X_BYTES / N), x, barrier, at, 0, tiles.m + from_n * (TILE_M / N), with_tokens);
        }
}

// Where a lane's row of the matrices of sixteen tokens from 16 g on lies in a box of 64 tokens x 64 columns, for
// store_matrices_transposed of four words of a chunk.
__device__ __forceinline__ u32 place_in_box(u32 g) {
    const u32 warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const u32 token = g * 16 + lane / 16 * 8 + lane % 8, pack = warp * 2 + lane / 8 % 2;
    return token * 128 + (pack ^ token % 8) * 16;
}

// A tile's sums, rounded, on their way from a warpgroup's registers to memory: pairs of tokens of a column of this thread and of the
// eighth after it. They leave in chunks of 64 tokens, always the first of what is there.
template <typename T>
struct Rounded {
    static constexpr u32 CHUNKS = TILE_M / 64, WORDS = TILE_M / 4 / CHUNKS;

    u32 pair[TILE_M / 4], m, n;
    bool waiting = false;

    template <typename C>
    __device__ __forceinline__ void take(const float (&c)[TILE_M / 2], const Tiles<C> &tiles) {
#pragma unroll
        for (u32 i = 0; i < TILE_M / 4; i++) pair[i] = pack2<T>(c[2 * i], c[2 * i + 1]);
        m = tiles.m, n = tiles.n, waiting = true;
    }
    __device__ __forceinline__ void next_chunk() {
#pragma unroll
        for (u32 i = WORDS; i < TILE_M / 4; i++) pair[i - WORDS] = pair[i];
        m += 64;
    }
    // The first chunk to a box of 64 tokens x 64 columns, for the copy engine.
    __device__ __forceinline__ void put(u32 box) const {
#pragma unroll
        for (u32 g = 0; g < 4; g++) {
            const u32 *x = pair + g * 4;
            store_matrices_transposed(box + place_in_box(g), x[0], x[1], x[2], x[3]);
        }
        fence_async();
    }
};

// All of a warpgroup.
__device__ __forceinline__ void group_sync() { barrier_sync(1 + threadIdx.x / 128, 128); }
__device__ __forceinline__ bool leads_group() { return threadIdx.x % 128 == 0; }

// Ends that write the sums to y, through two buffers in turn.
template <typename T>
struct Plain : Rounded<T> {
    static constexpr u32 PHASES = 1;
    const TensorMap &y;

    __device__ __forceinline__ explicit Plain(const TensorMap &y) : y(y) {}

    __device__ __forceinline__ void phase(const Buffers &buffers, u32, u32 chunk) {
        const u32 box = buffers.out() + chunk % 2 * OUT_BYTES;
        if (leads_group()) bulk_wait_read<1>();
        group_sync();
        this->put(box);
        group_sync();
        if (leads_group()) {
            tma_store(y, box, this->n + threadIdx.x / 128 * 64, 0, this->m);
            bulk_commit();
        }
    }
};

// The sums of a warpgroup's tiles, from the buffers.
template <typename T, Lies LIES, typename C>
struct Multiplier {
    const Buffers &buffers;
    const u32 mate = C::mate(threadIdx.x % 32);  // whom this lane tells of an empty buffer, of the first lanes
    Ring<STAGES> ring;
    u32 before = 0;  // the buffer of the step before

    __device__ __forceinline__ explicit Multiplier(const Buffers &buffers) : buffers(buffers) {}

    // A tile, and the ends of the tile before it beside the first steps.
    template <typename E>
    __device__ __forceinline__ void run(float (&c)[TILE_M / 2], u32 k, E &ends) {
        const u32 steps = k / DEPTH, rest = (k % DEPTH + 15) / 16;
        u32 i = 0;
#pragma unroll 1
        for (u32 chunk = 0; chunk < E::CHUNKS; chunk++) {
#pragma unroll
            for (u32 p = 0; p < E::PHASES; p++, i++) {
                if (i < steps) step(c, DEPTH / 16, i > 0);
                if (ends.waiting) ends.phase(buffers, p, chunk);
            }
            ends.next_chunk();
        }
        ends.waiting = false;
#pragma unroll 1
        for (; i < steps; i++) step(c, DEPTH / 16, true);
        if (rest) step(c, rest, steps > 0);
        wgmma_wait<0>();
        hold(c);
        release();
    }

    __device__ __forceinline__ void release() const {
        if (threadIdx.x % 32 < C::MATES) mbarrier_arrive_at(buffers.empty(before), mate);
    }

    // `deep` products of 16 in k, left under way; those of the step before are done.
    __device__ __forceinline__ void step(float (&c)[TILE_M / 2], u32 deep, bool add) {
        constexpr bool TURNED = LIES == Lies::TURNED;
        const u32 w = buffers.w(ring.index) + threadIdx.x / 128 * (W_BYTES / 2), x = buffers.x(ring.index);
        mbarrier_wait(buffers.full(ring.index), ring.parity);
        hold(c);
        wgmma_fence();
#pragma unroll
        for (u32 kk = 0; kk < DEPTH / 16; kk++) {
            if (kk >= deep) break;
            const u64 left = TURNED ? mn_major(w + kk * 2048, 0) : k_major(w + kk * 32);
            wgmma<T, TURNED, 0>(c, left, k_major(x + kk * 32), add || kk > 0);
        }
        wgmma_commit();
        hold(c);
        wgmma_wait<1>();
        if (add) release();
        before = ring.index;
        ring.next();
    }
};

// What a product does beside its own work: a weight to widen into `out`, nothing where that is null.
template <typename T>
struct Ahead {
    T *out;
    const Widen &job;

    // A warp beside the copying one.
    __device__ __forceinline__ void run() const {
        if (out) widen(out, job, blockIdx.x * WORKERS + threadIdx.x / 32 - 9, gridDim.x * WORKERS);
    }
};

template <typename T, Lies LIES, typename C, typename E>
__device__ __forceinline__ void product(E &ends, const TensorMap &x, const TensorMap &w, const Share &share, u32 k, const Ahead<T> &ahead) {
    extern __shared__ __align__(1024) u8 memory[];
    const Buffers buffers = {shared_address(memory)};
    if (threadIdx.x == 0) {
        tma_prefetch(x), tma_prefetch(w);
        for (u32 i = 0; i < STAGES; i++) mbarrier_init(buffers.full(i), 1), mbarrier_init(buffers.empty(i), 8 * C::MATES);
        for (u32 i = 0; i < 2; i++) mbarrier_init(buffers.extra() + i * 8, 1);
        mbarrier_init_fence();
    }
    __syncwarp();
    cluster_sync();
    share.begin();
    Tiles<C> tiles(share);
    if (threadIdx.x >= 256) {
        registers_fewer<72>();
        if (threadIdx.x == 256) {
            bring<LIES>(buffers, tiles, x, w, k);
        } else if (threadIdx.x >= 288) {
            ahead.run();
        }
    } else {
        registers_more<216>();
        Multiplier<T, LIES, C> multiplier(buffers);
        float c[TILE_M / 2];
        while (tiles.take()) {
            multiplier.run(c, k, ends);
            ends.take(c, tiles);
        }
#pragma unroll 1
        for (u32 chunk = 0; chunk < E::CHUNKS && ends.waiting; chunk++) {
#pragma unroll
            for (u32 p = 0; p < E::PHASES; p++) ends.phase(buffers, p, chunk);
            ends.next_chunk();
        }
        if (leads_group()) bulk_wait();
    }
    __syncwarp();
    cluster_sync();
    share.end();
}
