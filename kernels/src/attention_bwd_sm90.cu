// Causal attention over packed documents, backward, on Hopper: head sizes up to 128, bf16 and f16, no softcap, scale > 0.
// Formulas and names as in attention_bwd.cu; delta comes from its attention_delta.
//
// A persistent block takes a tile of 128 keys of a key/value head and walks over the query heads of its group and, from the
// document's end to the diagonal, the tiles of 64 queries that see it: five products a step. Two warpgroups own 64 keys each:
//     Sᵀ = K Qᵀ, dPᵀ = V dOᵀ (operands in shared memory), dV += Pᵀ dO, dK += dSᵀ Q (Pᵀ, dSᵀ from registers),
//     dQ = dS K (dS of both through shared memory; each warpgroup half the columns).
// Order of issue: dP; exp under it; dV; dS under it; dQ, dK and the next step's S; dQ's way out under those. The four warps of the
// third warpgroup: copies in by the copy engine, lse and delta, and for each of the two others the way of dQ to memory.
//
// dQ is summed over key tiles in `sums` (f32) by the copy engine's adds, in the order of the keys: `turns` counts the tiles that have
// been added to a query tile, and who comes next waits for it. The first one stores, so nothing needs zeroing; the last one sets the
// count back to 0. Key tiles are handed out in order, so whom a block waits for is at work or done. The result is the same each time.
// attention_dq then writes dq = scale * sums in T.
//
// sums: F32 [H, SLOTS, 64 D'], turns: u32 [2 + 2 H SLOTS], zero before the first launch (and left zero), the first two words the
// counter of tiles; SLOTS = T / 64 + docs, D' the instance's D. The order within a tile of sums is that of the registers.
//
// Tensor maps as in attention_sm90.cu; q and d_o: box (64, 1, 64); k, v: box (64, 1, 128).
// Launch: attention_bwd_sm90: grid min(multiprocessors, (T / 128 + docs) K), block 384, shared bytes 1792 D' + 2048.
// attention_dq: grid (T / 64 + docs, H), block 256.

#include "common/attention.cuh"
#include "common/tma.cuh"
#include "common/wgmma.cuh"

constexpr u32 KEYS = 128, ROWS = 64;
constexpr u32 AUXILIARY = 256;  // first thread of the third warpgroup

// A tile as the producer hands it to the others; len 0 ends.
struct __align__(16) Work {
    u32 begin, len, key, kv_head;
    u32 slot;  // of the document's first query tile
    u32 unused[3];
};

// The query tiles low..high that see the keys of a tile.
struct Span {
    u32 low, high;
};

__device__ __forceinline__ Span span_of(const Work &w, u32 window) {
    const u32 last = min(w.key + KEYS, w.len);
    const u64 seen = window == 0 ? w.len : min(u64(w.len), u64(last) - 1 + window);
    return {w.key / ROWS, u32((seen + ROWS - 1) / ROWS)};
}

// Addresses in shared memory. Stages alternate from step to step, whatever the tile: stage = step % 2.
template <int D>
struct Shared {
    static constexpr u32 K_TILE = KEYS * D * 2, Q_TILE = ROWS * D * 2, DS_TILE = KEYS * ROWS * 2, DQ_TILE = ROWS * D * 4;
    static constexpr u32 DS = 2 * K_TILE + 4 * Q_TILE, DQ = DS + 2 * DS_TILE, STATS = DQ + 2 * DQ_TILE, BARRIERS = STATS + 1024;
    static constexpr u32 WORK = BARRIERS + 256;
    u32 base;
    __device__ u32 k() const { return base; }
    __device__ u32 v() const { return base + K_TILE; }
    __device__ u32 q(u32 stage) const { return base + 2 * K_TILE + stage * Q_TILE; }
    __device__ u32 d_o(u32 stage) const { return base + 2 * K_TILE + (2 + stage) * Q_TILE; }
    __device__ u32 ds(u32 stage) const { return base + DS + stage * DS_TILE; }
    __device__ u32 dq(u32 stage, u32 group) const { return base + DQ + stage * DQ_TILE + group * (DQ_TILE / 2); }
    __device__ u32 barrier(u32 i) const { return base + BARRIERS + i * 8; }
    __device__ u32 work_full() const { return barrier(0); }
    __device__ u32 work_empty() const { return barrier(1); }
    __device__ u32 kv_full() const { return barrier(2); }
    __device__ u32 kv_empty() const { return barrier(3); }
    __device__ u32 q_full(u32 stage) const { return barrier(4 + stage); }
    __device__ u32 q_empty(u32 stage) const { return barrier(6 + stage); }
    __device__ u32 do_full(u32 stage) const { return barrier(8 + stage); }
    __device__ u32 do_empty(u32 stage) const { return barrier(10 + stage); }
    __device__ u32 stats_full(u32 stage) const { return barrier(12 + stage); }
    __device__ u32 stats_empty(u32 stage) const { return barrier(14 + stage); }
    __device__ u32 dq_full(u32 stage, u32 group) const { return barrier(16 + 2 * group + stage); }
    __device__ u32 dq_empty(u32 stage, u32 group) const { return barrier(20 + 2 * group + stage); }
};

__device__ __forceinline__ u32 phase(u32 step) { return step / 2 % 2; }

template <int D, int TILE_ROWS>
__device__ __forceinline__ void load_box(u32 tile, const TensorMap &map, u32 barrier, u32 head, u32 token) {
#pragma unroll
    for (u32 c = 0; c < D / 64; c++) tma_load(tile + c * (TILE_ROWS * 128), map, barrier, c * 64, head, token);
}

// Rows from..to of a tile of TILE_ROWS become zeros: they are another document's, and 0 times them must be 0.
template <int D, int TILE_ROWS>
__device__ __forceinline__ void zero_rows(u32 tile, u32 from, u32 to) {
    for (u32 c = from * 8 + threadIdx.x % 128; c < to * 8; c += 128)
#pragma unroll
        for (u32 d = 0; d < D / 64; d++) store16_zero(tile + d * (TILE_ROWS * 128) + c * 16);
}

// The next tile for the other warps, or the end.
template <int D>
__device__ __forceinline__ Work receive(Shared<D> at, const Work *work, u32 round) {
    mbarrier_wait(at.work_full(), round % 2);
    const Work w = *work;
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(at.work_empty());
    return w;
}

// Takes tiles and has their operands copied in. One thread.
template <int D>
__device__ __forceinline__ void produce(Shared<D> at, Work *work, u32 *counter, const TensorMap &q, const TensorMap &k,
                                        const TensorMap &v, const TensorMap &d_o, const u32 *cu_seqlens, const Sizes &n) {
    const u32 slots = n.tokens / KEYS + n.docs, tiles = slots * n.kv_heads, group = n.heads / n.kv_heads;
    const u32 section = min((2 * gridDim.x + slots - 1) / slots, n.kv_heads);  // heads side by side
    u32 step = 0, round = 0;
    for (;;) {
        const u32 tile = atomicAdd(counter, 1u);
        Work w = {0, 0, 0, 0, 0, {}};
        if (tile < tiles) {
            const u32 from = tile / (slots * section) * section, rest = tile % (slots * section);
            const u32 heads = min(section, n.kv_heads - from);
            const DocTile doc = find_tile<KEYS>(cu_seqlens, n.docs, rest / heads);
            if (doc.row >= doc.len) continue;
            w = {doc.begin, doc.len, doc.row, from + rest % heads, doc.begin / ROWS + doc.index, {}};
        }
        mbarrier_wait(at.work_empty(), round % 2 ^ 1);
        *work = w;
        mbarrier_arrive(at.work_full());
        if (w.len == 0) break;
        const Span span = span_of(w, n.window);
        for (u32 head = w.kv_head * group; head < (w.kv_head + 1) * group; head++)
#pragma unroll 1
            for (u32 m = span.high; m-- > span.low; step++) {
                const u32 stage = step % 2, row = w.begin + m * ROWS;
                mbarrier_wait(at.q_empty(stage), phase(step) ^ 1);
                mbarrier_expect(at.q_full(stage), at.Q_TILE);
                load_box<D, ROWS>(at.q(stage), q, at.q_full(stage), head, row);
                if (head == w.kv_head * group && m + 1 == span.high) {
                    mbarrier_wait(at.kv_empty(), round % 2 ^ 1);
                    mbarrier_expect(at.kv_full(), 2 * at.K_TILE);
                    load_box<D, KEYS>(at.k(), k, at.kv_full(), w.kv_head, w.begin + w.key);
                    load_box<D, KEYS>(at.v(), v, at.kv_full(), w.kv_head, w.begin + w.key);
                }
                mbarrier_wait(at.do_empty(stage), phase(step) ^ 1);
                mbarrier_expect(at.do_full(stage), at.Q_TILE);
                load_box<D, ROWS>(at.d_o(stage), d_o, at.do_full(stage), head, row);
            }
        round++;
    }
    if (atomicAdd(counter + 1, 1u) == gridDim.x - 1) counter[0] = counter[1] = 0;  // all have taken their last tile
}

// lse (units of ln 2) and delta of each step's queries to shared memory. One warp. Beyond the document lse is inf, so p is 0.
template <int D>
__device__ __forceinline__ void bring_stats(Shared<D> at, const Work *work, float *stats, const float *lse, const float *delta,
                                            const Sizes &n) {
    const u32 lane = threadIdx.x % 32, group = n.heads / n.kv_heads;
    u32 step = 0;
    for (u32 round = 0;; round++) {
        const Work w = receive(at, work, round);
        if (w.len == 0) break;
        const Span span = span_of(w, n.window);
        for (u32 head = w.kv_head * group; head < (w.kv_head + 1) * group; head++)
            for (u32 m = span.high; m-- > span.low; step++) {
                float a[2], b[2];
#pragma unroll
                for (u32 r = 0; r < 2; r++) {
                    const u32 i = m * ROWS + lane + r * 32;
                    const u64 from = u64(head) * n.tokens + w.begin + i;
                    a[r] = i < w.len ? lse[from] * LOG2_E : -NEG_INFINITY;
                    b[r] = i < w.len ? delta[from] : 0.0f;
                }
                const u32 stage = step % 2;
                mbarrier_wait(at.stats_empty(stage), phase(step) ^ 1);
#pragma unroll
                for (u32 r = 0; r < 2; r++) {
                    stats[stage * 128 + lane + r * 32] = a[r];
                    stats[stage * 128 + 64 + lane + r * 32] = b[r];
                }
                mbarrier_arrive(at.stats_full(stage));
            }
    }
}

// One warpgroup's dQ to memory, in turn. One thread.
template <int D>
__device__ __forceinline__ void send_dq(Shared<D> at, const Work *work, u32 half, float *sums, u32 *turns, const Sizes &n) {
    const u32 group = n.heads / n.kv_heads, slots = n.tokens / ROWS + n.docs;
    u32 step = 0;
    for (u32 round = 0;; round++) {
        mbarrier_wait(at.work_full(), round % 2);
        const Work w = *work;
        mbarrier_arrive(at.work_empty());
        if (w.len == 0) break;
        const Span span = span_of(w, n.window);
        for (u32 head = w.kv_head * group; head < (w.kv_head + 1) * group; head++)
#pragma unroll 1
            for (u32 m = span.high; m-- > span.low; step++) {
                const u32 stage = step % 2, before = w.key / KEYS - first_key(m * ROWS, n.window) / KEYS;
                const u64 slot = u64(head) * slots + w.slot + m;
                float *to = sums + slot * (ROWS * D) + half * (ROWS * D / 2);
                u32 *turn = turns + 2 + slot * 2 + half;
                mbarrier_wait(at.dq_full(stage, half), phase(step));
                if (before == 0) {
                    bulk_store(to, at.dq(stage, half), at.DQ_TILE / 2);
                } else {
                    while (load_acquire(turn) != before) {
                    }
                    bulk_add(to, at.dq(stage, half), at.DQ_TILE / 2);
                }
                bulk_commit();
                bulk_wait_read();
                mbarrier_arrive(at.dq_empty(stage, half));
                bulk_wait();
                __threadfence();
                store_release(turn, w.key / KEYS == m * ROWS / KEYS ? 0 : before + 1);
            }
    }
}

// Rows of C [64, D], times factor, in T, as columns col0.. of head w.kv_head.
template <typename T, int D>
__device__ __forceinline__ void store_rows(T *out, u64 stride, const float (&c)[D / 2], float factor, u32 row, const Work &w,
                                           u32 cols, u32 col0) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        const bool valid = row + r * 8 < w.len;
        T *to = out + (w.begin + row + r * 8) * stride + w.kv_head * cols;
#pragma unroll
        for (u32 g = 0; g < D / 32; g++) {
            u32 x[4];
#pragma unroll
            for (u32 b = 0; b < 4; b++) {
                const u32 e = 16 * g + 4 * b + 2 * r;
                x[b] = pack2<T>(c[e] * factor, c[e + 1] * factor);
            }
            transpose4(x, lane);
            const u32 column = col0 + g * 32 + lane % 4 * 8;
            if (valid && column < cols) *reinterpret_cast<uint4 *>(to + column) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}

template <typename T>
__device__ __forceinline__ float unpack_p(u32 x, u32 upper) {
    T y;
    y.bits = u16(upper ? x >> 16 : x & 0xffff);
    return to_f32(y);
}

template <typename T, int D>
__device__ __forceinline__ void consume(Shared<D> at, const Work *work, const float *stats, T *dk, T *dv, const Sizes &n) {
    const u32 half = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const u32 group = n.heads / n.kv_heads;
    const float scale = n.scale * LOG2_E;
    const u32 k_rows = at.k() + half * (64 * 128), v_rows = at.v() + half * (64 * 128);
    const u32 k_cols = at.k() + half * (D == 128 ? KEYS * 128 : 64);
    const u32 ds_at = tile_offset<64>(half * 64 + warp * 16 + (lane & 15), 0), ds_key = lane & 7, ds_chunk = lane >> 4;
    u32 step = 0;

    for (u32 round = 0;; round++) {
        const Work w = receive(at, work, round);
        if (w.len == 0) break;
        const Span span = span_of(w, n.window);
        const u32 steps = group * (span.high - span.low);
        const u32 key = w.key + half * 64 + warp * 16 + lane / 4;  // this thread's keys: key and key + 8
        float acc_k[D / 2], acc_v[D / 2], s[32];
#pragma unroll
        for (u32 e = 0; e < D / 2; e++) acc_k[e] = acc_v[e] = 0.0f;

        mbarrier_wait(at.kv_full(), round % 2);
        if (w.len < w.key + KEYS) {
            const u32 from = max(w.len - w.key, half * 64), to = half * 64 + 64;
            zero_rows<D, KEYS>(at.k(), from, to);
            zero_rows<D, KEYS>(at.v(), from, to);
            fence_async();
            barrier_sync(2 + half, 128);
        }
        auto await = [&](u32 full, u32 tile, u32 of, u32 m) {
            mbarrier_wait(full, phase(of));
            if (w.len < (m + 1) * ROWS) {
                zero_rows<D, ROWS>(tile, w.len - m * ROWS, ROWS);
                fence_async();
                barrier_sync(2 + half, 128);
            }
        };
        auto issue_s = [&](float(&c)[32], u32 rows, u32 columns) {
#pragma unroll
            for (u32 kk = 0; kk < D / 16; kk++)
                wgmma<T, 0, 0>(c, k_major(rows + kk / 4 * (KEYS * 128) + kk % 4 * 32),
                               k_major(columns + kk / 4 * (ROWS * 128) + kk % 4 * 32), kk != 0);
            wgmma_commit();
        };
        auto issue_acc = [&](float(&c)[D / 2], const u32(&a)[16], u32 rows) {
#pragma unroll
            for (u32 kk = 0; kk < 4; kk++) wgmma<T, 1>(c, a + 4 * kk, mn_major(rows + kk * 2048, ROWS * 128), 1);
            wgmma_commit();
        };

        u32 m = span.high - 1;
        await(at.q_full(step % 2), at.q(step % 2), step, m);
        wgmma_fence();
        issue_s(s, k_rows, at.q(step % 2));
        wgmma_wait<0>();
        hold(s);
        for (u32 left = steps; left > 0; left--, step++) {
            const u32 stage = step % 2, next_m = m == span.low ? span.high - 1 : m - 1;
            float dp[32], dq[D / 4];
            u32 p[16], d[16];
            await(at.do_full(stage), at.d_o(stage), step, m);
            wgmma_fence();
            issue_s(dp, v_rows, at.d_o(stage));
            mbarrier_wait(at.stats_full(stage), phase(step));
            const float *stat = stats + stage * 128 + lane % 4 * 2;
            const i32 high = n.window == 0 ? 1 << 30 : i32(key + n.window) - i32(m * ROWS), low = i32(key) - i32(m * ROWS);
            if (m * ROWS < w.key + half * 64 + 63 || (n.window != 0 && (m + 1) * ROWS > w.key + half * 64 + n.window)) {
#pragma unroll
                for (u32 e = 0; e < 32; e++) {
                    const i32 c = i32(e / 4 * 8 + e % 2 + lane % 4 * 2), down = e / 2 % 2 * 8;
                    if (c < low + down || c >= high + down) s[e] = NEG_INFINITY;
                }
            }
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                const float2 a = *reinterpret_cast<const float2 *>(stat + j * 8);
#pragma unroll
                for (u32 e = 0; e < 4; e++) s[4 * j + e] = exp2_fast(fmaf(s[4 * j + e], scale, e % 2 ? -a.y : -a.x));
            }
#pragma unroll
            for (u32 e = 0; e < 16; e++) p[e] = pack2<T>(s[2 * e], s[2 * e + 1]);
            hold(p);
            wgmma_fence();
            issue_acc(acc_v, p, at.d_o(stage));
            wgmma_wait<1>();
            hold(dp);
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                const float2 b = *reinterpret_cast<const float2 *>(stat + 64 + j * 8);
#pragma unroll
                for (u32 e = 0; e < 4; e++) dp[4 * j + e] = unpack_p<T>(p[2 * j + e / 2], e % 2) * (dp[4 * j + e] - (e % 2 ? b.y : b.x));
            }
#pragma unroll
            for (u32 e = 0; e < 16; e++) d[e] = pack2<T>(dp[2 * e], dp[2 * e + 1]);
#pragma unroll
            for (u32 kk = 0; kk < 4; kk++)
                store_matrices(at.ds(stage) + ds_at - ds_key * 16 + ((2 * kk + ds_chunk) ^ ds_key) * 16, d[4 * kk], d[4 * kk + 1],
                               d[4 * kk + 2], d[4 * kk + 3]);
            fence_async();
            __syncwarp();
            if (lane == 0) mbarrier_arrive(at.stats_empty(stage));
            barrier_sync(1, 256);
            hold(d);
            wgmma_fence();
#pragma unroll
            for (u32 kk = 0; kk < 8; kk++)
                wgmma<T, 1, 1>(dq, mn_major(at.ds(stage) + kk * 2048, 0), mn_major(k_cols + kk * 2048, 0), kk != 0);
            wgmma_commit();
            issue_acc(acc_k, d, at.q(stage));
            wgmma_wait<1>();  // dV, dQ
            hold(p);
            hold(acc_v);
            hold(dq);
            if (lane == 0) mbarrier_arrive(at.do_empty(stage));
            mbarrier_wait(at.dq_empty(stage, half), phase(step) ^ 1);
#pragma unroll
            for (u32 e = 0; e < D / 16; e++)
                asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at.dq(stage, half) + (e * 128 + thread) * 16),
                             "f"(dq[4 * e]), "f"(dq[4 * e + 1]), "f"(dq[4 * e + 2]), "f"(dq[4 * e + 3])
                             : "memory");
            fence_async();
            __syncwarp();
            if (lane == 0) mbarrier_arrive(at.dq_full(stage, half));
            if (left > 1) await(at.q_full(stage ^ 1), at.q(stage ^ 1), step + 1, next_m);
            wgmma_fence();
            issue_s(s, k_rows, at.q(stage ^ 1));  // after the last step of whatever lies there; nobody looks
            wgmma_wait<0>();  // dK, S
            hold(s);
            hold(d);
            hold(acc_k);
            if (lane == 0) mbarrier_arrive(at.q_empty(stage));
            m = next_m;
        }
        if (lane == 0) mbarrier_arrive(at.kv_empty());
        const u64 stride = u64(n.kv_heads) * n.head_size;
        store_rows<T, D>(dv, stride, acc_v, 1.0f, key, w, n.head_size, 0);
        store_rows<T, D>(dk, stride, acc_k, n.scale, key, w, n.head_size, 0);
    }
}

template <typename T, int D>
__device__ __forceinline__ void bwd(T *dk, T *dv, float *sums, u32 *turns, const TensorMap &q, const TensorMap &k, const TensorMap &v,
                                    const TensorMap &d_o, const float *lse, const float *delta, const u32 *cu_seqlens, const Sizes &n) {
    extern __shared__ __align__(1024) u8 shared[];
    const Shared<D> at = {shared_address(shared)};
    Work *work = reinterpret_cast<Work *>(shared + at.WORK);
    float *stats = reinterpret_cast<float *>(shared + at.STATS);
    if (threadIdx.x == 0) {
        mbarrier_init(at.work_full(), 1);
        mbarrier_init(at.work_empty(), 11);
        mbarrier_init(at.kv_full(), 1);
        mbarrier_init(at.kv_empty(), 8);
        for (u32 stage = 0; stage < 2; stage++) {
            mbarrier_init(at.q_full(stage), 1);
            mbarrier_init(at.q_empty(stage), 8);
            mbarrier_init(at.do_full(stage), 1);
            mbarrier_init(at.do_empty(stage), 8);
            mbarrier_init(at.stats_full(stage), 32);
            mbarrier_init(at.stats_empty(stage), 8);
            for (u32 half = 0; half < 2; half++) {
                mbarrier_init(at.dq_full(stage, half), 4);
                mbarrier_init(at.dq_empty(stage, half), 1);
            }
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= AUXILIARY) {
        registers_fewer<24>();
        const u32 warp = (threadIdx.x - AUXILIARY) / 32;
        if (warp == 3) bring_stats(at, work, stats, lse, delta, n);
        else if (threadIdx.x % 32 == 0) {
            if (warp == 0) produce(at, work, turns, q, k, v, d_o, cu_seqlens, n);
            else send_dq(at, work, warp - 1, sums, turns, n);
        }
    } else {
        registers_more<240>();
        consume<T, D>(at, work, stats, dk, dv, n);
    }
}

template <typename T, int D>
__device__ __forceinline__ void write_dq(T *dq, const float *sums, const u32 *cu_seqlens, const Sizes &n) {
    const DocTile doc = find_tile<ROWS>(cu_seqlens, n.docs, blockIdx.x);
    if (doc.row >= doc.len) return;
    const u32 half = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
    const u32 row = doc.row + thread / 32 * 16 + lane / 4;
    const float4 *from = reinterpret_cast<const float4 *>(sums) +
                         (u64(blockIdx.y) * (n.tokens / ROWS + n.docs) + blockIdx.x) * (ROWS * D / 4) + half * (ROWS * D / 8) + thread;
    float c[D / 4];
#pragma unroll
    for (u32 e = 0; e < D / 16; e++) {
        const float4 x = from[e * 128];
        c[4 * e] = x.x, c[4 * e + 1] = x.y, c[4 * e + 2] = x.z, c[4 * e + 3] = x.w;
    }
    const Work w = {doc.begin, doc.len, 0, blockIdx.y, 0, {}};
    store_rows<T, D / 2>(dq, u64(n.heads) * n.head_size, c, n.scale, row, w, n.head_size, half * (D / 2));
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_bwd_sm90_bf16_d64(
    bf16 *dk, bf16 *dv, float *sums, u32 *turns, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o, const float *lse, const float *delta,
    const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window) {
    bwd<bf16, 64>(dk, dv, sums, turns, q, k, v, d_o, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, 0.0f});
}

extern "C" __global__ void __launch_bounds__(256) attention_dq_bf16_d64(
    bf16 *dq, const float *sums, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 head_size, float scale) {
    write_dq<bf16, 64>(dq, sums, cu_seqlens, {docs, tokens, heads, heads, head_size, scale, 0, 0.0f});
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_bwd_sm90_bf16_d128(
    bf16 *dk, bf16 *dv, float *sums, u32 *turns, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o, const float *lse, const float *delta,
    const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window) {
    bwd<bf16, 128>(dk, dv, sums, turns, q, k, v, d_o, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, 0.0f});
}

extern "C" __global__ void __launch_bounds__(256) attention_dq_bf16_d128(
    bf16 *dq, const float *sums, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 head_size, float scale) {
    write_dq<bf16, 128>(dq, sums, cu_seqlens, {docs, tokens, heads, heads, head_size, scale, 0, 0.0f});
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_bwd_sm90_f16_d64(
    f16 *dk, f16 *dv, float *sums, u32 *turns, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o, const float *lse, const float *delta,
    const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window) {
    bwd<f16, 64>(dk, dv, sums, turns, q, k, v, d_o, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, 0.0f});
}

extern "C" __global__ void __launch_bounds__(256) attention_dq_f16_d64(
    f16 *dq, const float *sums, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 head_size, float scale) {
    write_dq<f16, 64>(dq, sums, cu_seqlens, {docs, tokens, heads, heads, head_size, scale, 0, 0.0f});
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_bwd_sm90_f16_d128(
    f16 *dk, f16 *dv, float *sums, u32 *turns, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o, const float *lse, const float *delta,
    const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window) {
    bwd<f16, 128>(dk, dv, sums, turns, q, k, v, d_o, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, 0.0f});
}

extern "C" __global__ void __launch_bounds__(256) attention_dq_f16_d128(
    f16 *dq, const float *sums, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 head_size, float scale) {
    write_dq<f16, 128>(dq, sums, cu_seqlens, {docs, tokens, heads, heads, head_size, scale, 0, 0.0f});
}
