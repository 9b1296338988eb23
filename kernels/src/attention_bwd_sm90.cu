// Causal attention over packed documents, backward, on Hopper: head sizes up to 128, bf16 and f16, no softcap, scale > 0.
// Formulas and names as in attention_bwd.cu; delta comes from its attention_delta.
//
// A persistent block takes a tile of 128 keys of a key/value head and walks over the tiles of 64 queries that see it, from the
// document's end to the diagonal, and in each over the query heads of its group: five products a step. Two warpgroups own 64 keys
// each:
//     Sᵀ = K Qᵀ, dPᵀ = V dOᵀ (operands in shared memory), dV += Pᵀ dO, dK += dSᵀ Q (Pᵀ, dSᵀ from registers),
//     dQ = dS K (dS of both through shared memory; each warpgroup half the columns).
// Order of issue: S (under dK of the step before), dP; exp under it; dV; dS under it; dQ, dK; dQ's way out under dK. The four
// warps of the third warpgroup: copies in by the copy engine, lse and delta, and dQ's way to memory, even and odd steps.
//
// dQ is summed over key tiles in `sums` (f32) by the copy engine's adds, in the order of the keys: `turns` counts the tiles that
// have been added to a query tile, and who comes next waits for it. The first one stores, so nothing needs zeroing; the last one
// sets the count back to 0. Key tiles are handed out in order, so whom a block waits for is at work or done. The result is the
// same each time. attention_dq (attention_sums_sm90.cu) then writes dq = scale * sums in T.
//
// sums: F32 [H, SLOTS, 64 D'], turns: u32 [2 + H SLOTS], zero before the first launch (and left zero), the first two words the
// counter of tiles; SLOTS = T / 64 + docs, D' the instance's D. The order within a tile of sums is that of the registers.
//
// Few tiles (short sequences, few key/value heads): the query heads of a group are dealt to PARTS tiles, whose dk and dv (dk
// scaled) go to kv_sums F32 [PARTS, 2, T, K, D], and attention_dkv adds them up in order. PARTS 1: dk and dv are written at
// once, kv_sums unused. Rows of dk and dv are ld >= K D elements apart, a multiple of 8, so that they may lie beside those of dq.
//
// With tables (cos not null; D = D'), dk is turned back before it is written, to the gradient of what rope.cu made k of.
//
// `order` is the table `backward` of attention_order (attention_sm90.cu): longest walks first, keys of a document in their order.
// Tensor maps as in attention_sm90.cu; q and d_o: box (64, 1, 64); k, v: box (64, 1, 128).
// Launch: attention_bwd_sm90: grid min(multiprocessors, (T / 128 + docs) K PARTS), block 384, shared bytes 1536 D' + 34816;
// PARTS in 1..H / K, best so that (T / 128 + docs) K PARTS is about twice the multiprocessors or more.
//
// spills: attention_bwd_sm90_bf16_d64 208 the third warpgroup's: 24 registers a thread
// spills: attention_bwd_sm90_bf16_d128 208 the third warpgroup's: 24 registers a thread
// spills: attention_bwd_sm90_f16_d64 208 the third warpgroup's: 24 registers a thread
// spills: attention_bwd_sm90_f16_d128 208 the third warpgroup's: 24 registers a thread

#include "common/attention_sm90.cuh"

constexpr u32 KEYS = 128, ROWS = 64;
constexpr u32 AUXILIARY = 256;  // first thread of the third warpgroup

// A tile as the producer hands it to the others; len 0 ends.
struct __align__(16) Work {
    u32 begin, len, key, kv_head;
    u32 slot;        // of the document's first query tile
    u32 head, heads; // query heads head..heads
    u32 part;
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
    __device__ u32 dq(u32 stage) const { return base + DQ + stage * DQ_TILE; }
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
    __device__ u32 dq_full(u32 stage) const { return barrier(16 + stage); }
    __device__ u32 dq_empty(u32 stage) const { return barrier(18 + stage); }
};

__device__ __forceinline__ u32 phase(u32 step) { return step / 2 % 2; }

// The next tile for the other warps, or the end.
template <int D>
__device__ __forceinline__ Work receive(Shared<D> at, const Work *work, u32 round) {
    mbarrier_wait(at.work_full(), round % 2);
    const Work w = *work;
    mbarrier_arrive(at.work_empty());
    return w;
}

// Takes tiles and has their operands copied in. One thread.
template <int D>
__device__ __forceinline__ void produce(Shared<D> at, Work *work, u32 *counter, const TensorMap &q, const TensorMap &k,
                                        const TensorMap &v, const TensorMap &d_o, const u32 *cu_seqlens, const u32 *order,
                                        u32 parts, const Sizes &n) {
    const u32 slots = n.tokens / KEYS + n.docs, all = n.kv_heads * parts, tiles = slots * all, group = n.heads / n.kv_heads;
    const u32 sections = max(all * slots / (4 * gridDim.x), 1u), section = (all + sections - 1) / sections;  // heads side by side
    u32 step = 0, round = 0;
    for (;;) {
        const u32 tile = atomicAdd(counter, 1u);
        Work w = {0, 0, 0, 0, 0, 0, 0, 0};
        if (tile < tiles) {
            const u32 from = tile / (slots * section) * section, rest = tile % (slots * section);
            const u32 count = min(section, all - from), slot = order[rest / count];
            if (slot == ~0u) continue;
            const DocTile doc = find_tile<KEYS>(cu_seqlens, n.docs, slot);
            const u32 kv_head = (from + rest % count) / parts, part = (from + rest % count) % parts;
            w = {doc.begin, doc.len, doc.row, kv_head, doc.begin / ROWS + doc.index, kv_head * group + part * group / parts,
                 kv_head * group + (part + 1) * group / parts, part};
        }
        mbarrier_wait(at.work_empty(), round % 2 ^ 1);
        *work = w;
        mbarrier_arrive(at.work_full());
        if (w.len == 0) break;
        const Span span = span_of(w, n.window);
        for (u32 m = span.high; m-- > span.low;)
#pragma unroll 1
            for (u32 head = w.head; head < w.heads; head++, step++) {
                const u32 stage = step % 2, row = w.begin + m * ROWS;
                mbarrier_wait(at.q_empty(stage), phase(step) ^ 1);
                mbarrier_expect(at.q_full(stage), at.Q_TILE);
                load_box<D, ROWS>(at.q(stage), q, at.q_full(stage), head, row);
                if (head == w.head && m + 1 == span.high) {
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
    const u32 lane = threadIdx.x % 32;
    u32 step = 0;
    for (u32 round = 0;; round++) {
        const Work w = receive(at, work, round);
        if (w.len == 0) break;
        const Span span = span_of(w, n.window);
        for (u32 m = span.high; m-- > span.low;)
            for (u32 head = w.head; head < w.heads; head++, step++) {
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

// dQ of every other step to memory, in turn. One thread for the even steps, one for the odd: the way there takes longer than a
// step.
template <int D>
__device__ __forceinline__ void send_dq(Shared<D> at, const Work *work, u32 stage, float *sums, u32 *turns, const Sizes &n) {
    const u32 slots = n.tokens / ROWS + n.docs;
    u32 step = 0;
    for (u32 round = 0;; round++) {
        mbarrier_wait(at.work_full(), round % 2);
        const Work w = *work;
        mbarrier_arrive(at.work_empty());
        if (w.len == 0) break;
        const Span span = span_of(w, n.window);
        for (u32 m = span.high; m-- > span.low;)
#pragma unroll 1
            for (u32 head = w.head; head < w.heads; head++, step++) {
                if (step % 2 != stage) continue;
                const u32 before = w.key / KEYS - first_key(m * ROWS, n.window) / KEYS;
                const u64 slot = u64(head) * slots + w.slot + m;
                u32 *turn = turns + 2 + slot;
                if (before > 0)
                    while (load_acquire(turn) != before) {
                    }
                mbarrier_wait(at.dq_full(stage), phase(step));
                if (before == 0) bulk_store(sums + slot * (ROWS * D), at.dq(stage), at.DQ_TILE);
                else bulk_add(sums + slot * (ROWS * D), at.dq(stage), at.DQ_TILE);
                bulk_commit();
                bulk_wait_read();
                mbarrier_arrive(at.dq_empty(stage));
                bulk_wait();
                store_release(turn, w.key / KEYS == m * ROWS / KEYS ? 0 : before + 1);
            }
    }
}

// Rows of C, times factor, in f32.
template <int D>
__device__ __forceinline__ void store_sums(float *out, u64 stride, const float (&c)[D / 2], float factor, u32 row, const Work &w,
                                           u32 cols) {
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        float *to = out + (w.begin + row + r * 8) * stride + w.kv_head * cols + threadIdx.x % 4 * 2;
        if (row + r * 8 < w.len)
#pragma unroll
            for (u32 j = 0; j < D / 8; j++)
                if (j * 8 < cols) {
                    const float *x = c + 4 * j + 2 * r;
                    *reinterpret_cast<float2 *>(to + j * 8) = make_float2(x[0] * factor, x[1] * factor);
                }
    }
}

// This thread's rows of C, turned back.
template <int D>
__device__ __forceinline__ void turn_rows(float (&c)[D / 2], const Turn &turn, u32 row, const Work &w) {
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        const u64 at = turn.at<D>(w.begin, row + r * 8, w.len);
#pragma unroll
        for (u32 j = 0; j < D / 16; j++) {
            const float2 cos = *reinterpret_cast<const float2 *>(turn.cos + at + j * 8);
            const float2 sin = *reinterpret_cast<const float2 *>(turn.sin + at + j * 8);
            turn_back(c + 4 * j + 2 * r, c + 4 * j + 2 * r + D / 4, cos, sin);
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
__device__ __forceinline__ void consume(Shared<D> at, const Work *work, const float *stats, T *dk, T *dv, float *kv_sums,
                                        u32 parts, u32 ld, const Turn &turn, const Sizes &n) {
    const u32 half = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    const float scale = n.scale * LOG2_E;
    const u32 k_rows = at.k() + half * (64 * 128), v_rows = at.v() + half * (64 * 128);
    const u32 k_cols = at.k() + half * (D == 128 ? KEYS * 128 : 64);
    const u32 ds_at = tile_offset<64>(half * 64 + warp * 16 + (lane & 15), 0), ds_key = lane & 7, ds_chunk = lane >> 4;
    const u32 dq_at = half * (at.DQ_TILE / 2) + thread * 16;
    u32 step = 0;

    for (u32 round = 0;; round++) {
        const Work w = receive(at, work, round);
        if (w.len == 0) break;
        const Span span = span_of(w, n.window);
        const u32 steps = (w.heads - w.head) * (span.high - span.low);
        const u32 key = w.key + half * 64 + warp * 16 + lane / 4;  // this thread's keys: key and key + 8
        float acc_k[D / 2], acc_v[D / 2];
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
        auto send = [&](const float(&c)[D / 4], u32 of) {
            mbarrier_wait(at.dq_empty(of % 2), phase(of) ^ 1);
#pragma unroll
            for (u32 e = 0; e < D / 16; e++)
                store16_f32(dq_at + at.dq(of % 2) + e * 2048, c[4 * e], c[4 * e + 1], c[4 * e + 2], c[4 * e + 3]);
            fence_async();
            __syncwarp();
            if (lane == 0) mbarrier_arrive(at.dq_full(of % 2));
        };
        u32 m = span.high - 1, head = w.head;
        u32 d[16];
#pragma unroll
        for (u32 e = 0; e < 16; e++) d[e] = 0;
        for (u32 left = steps; left > 0; left--, step++) {
            const u32 stage = step % 2;
            float s[32], dp[32], dq[D / 4];
            u32 p[16];
            // dK of the last step is under way still
            await(at.q_full(stage), at.q(stage), step, m);
            wgmma_fence();
            issue_s(s, k_rows, at.q(stage));
            await(at.do_full(stage), at.d_o(stage), step, m);
            wgmma_fence();
            issue_s(dp, v_rows, at.d_o(stage));
            mbarrier_wait(at.stats_full(stage), phase(step));
            const float *stat = stats + stage * 128 + lane % 4 * 2;
            wgmma_wait<1>();  // dK, S
            hold(s);
            hold(d);
            hold(acc_k);
            if (left != steps && lane == 0) mbarrier_arrive(at.q_empty(stage ^ 1));
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
                for (u32 e = 0; e < 4; e++)
                    dp[4 * j + e] = unpack_p<T>(p[2 * j + e / 2], e % 2) * (dp[4 * j + e] - (e % 2 ? b.y : b.x));
            }
#pragma unroll
            for (u32 e = 0; e < 16; e++) d[e] = pack2<T>(dp[2 * e], dp[2 * e + 1]);
#pragma unroll
            for (u32 kk = 0; kk < 4; kk++)
                store_matrices(at.ds(stage) + ds_at - ds_key * 16 + ((2 * kk + ds_chunk) ^ ds_key) * 16, d[4 * kk], d[4 * kk + 1],
                               d[4 * kk + 2], d[4 * kk + 3]);
            fence_async();
            mbarrier_arrive(at.stats_empty(stage));
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
            send(dq, step);
            if (++head == w.heads) head = w.head, m--;
        }
        wgmma_wait<0>();
        hold(d);
        hold(acc_k);
        if (lane == 0) mbarrier_arrive(at.q_empty((step - 1) % 2));
        if (lane == 0) mbarrier_arrive(at.kv_empty());
        if (turn.cos) turn_rows<D>(acc_k, turn, key, w);
        const u64 stride = u64(n.kv_heads) * n.head_size;
        if (parts > 1) {
            float *to = kv_sums + w.part * (2 * n.tokens * stride);
            store_sums<D>(to, stride, acc_k, n.scale, key, w, n.head_size);
            store_sums<D>(to + n.tokens * stride, stride, acc_v, 1.0f, key, w, n.head_size);
            continue;
        }
        const u64 to = u64(w.begin) * ld + w.kv_head * n.head_size;
        store_rows<T, D>(dv + to, ld, acc_v, 1.0f, 1.0f, key, w.len, n.head_size, 0);
        store_rows<T, D>(dk + to, ld, acc_k, n.scale, n.scale, key, w.len, n.head_size, 0);
    }
}

template <typename T, int D>
__device__ __forceinline__ void bwd(T *dk, T *dv, float *kv_sums, float *sums, u32 *turns, const TensorMap &q, const TensorMap &k,
                                    const TensorMap &v, const TensorMap &d_o, const float *lse, const float *delta,
                                    const u32 *cu_seqlens, const u32 *order, u32 parts, u32 ld, const Turn &turn, const Sizes &n) {
    extern __shared__ __align__(1024) u8 shared[];
    const Shared<D> at = {shared_address(shared)};
    Work *work = reinterpret_cast<Work *>(shared + at.WORK);
    float *stats = reinterpret_cast<float *>(shared + at.STATS);
    if (threadIdx.x == 0) {
        mbarrier_init(at.work_full(), 1);
        mbarrier_init(at.work_empty(), AUXILIARY + 32 + 2);
        mbarrier_init(at.kv_full(), 1);
        mbarrier_init(at.kv_empty(), 8);
        for (u32 stage = 0; stage < 2; stage++) {
            mbarrier_init(at.q_full(stage), 1);
            mbarrier_init(at.q_empty(stage), 8);
            mbarrier_init(at.do_full(stage), 1);
            mbarrier_init(at.do_empty(stage), 8);
            mbarrier_init(at.stats_full(stage), 32);
            mbarrier_init(at.stats_empty(stage), AUXILIARY);
            mbarrier_init(at.dq_full(stage), 8);
            mbarrier_init(at.dq_empty(stage), 1);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= AUXILIARY) {
        registers_fewer<24>();
        const u32 warp = (threadIdx.x - AUXILIARY) / 32;
        if (warp == 3) bring_stats(at, work, stats, lse, delta, n);
        else if (threadIdx.x % 32 == 0) {
            if (warp == 0) produce(at, work, turns, q, k, v, d_o, cu_seqlens, order, parts, n);
            else send_dq(at, work, warp - 1, sums, turns, n);
        }
    } else {
        registers_more<240>();
        consume<T, D>(at, work, stats, dk, dv, kv_sums, parts, ld, turn, n);
    }
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_bwd_sm90_bf16_d64(
    bf16 *dk, bf16 *dv, float *kv_sums, float *sums, u32 *turns, const __grid_constant__ TensorMap q,
    const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o,
    const float *lse, const float *delta, const u32 *cu_seqlens, const u32 *order, u32 docs, u32 tokens, u32 heads, u32 kv_heads,
    u32 head_size, u32 parts, float scale, u32 window, u32 ld,
    const u32 *positions, const float *cos, const float *sin) {
    bwd<bf16, 64>(dk, dv, kv_sums, sums, turns, q, k, v, d_o, lse, delta, cu_seqlens, order, parts, ld,
        {positions, cos, sin}, {docs, tokens, heads, kv_heads, head_size, scale, window, 0.0f});
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_bwd_sm90_bf16_d128(
    bf16 *dk, bf16 *dv, float *kv_sums, float *sums, u32 *turns, const __grid_constant__ TensorMap q,
    const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o,
    const float *lse, const float *delta, const u32 *cu_seqlens, const u32 *order, u32 docs, u32 tokens, u32 heads, u32 kv_heads,
    u32 head_size, u32 parts, float scale, u32 window, u32 ld,
    const u32 *positions, const float *cos, const float *sin) {
    bwd<bf16, 128>(dk, dv, kv_sums, sums, turns, q, k, v, d_o, lse, delta, cu_seqlens, order, parts, ld,
        {positions, cos, sin}, {docs, tokens, heads, kv_heads, head_size, scale, window, 0.0f});
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_bwd_sm90_f16_d64(
    f16 *dk, f16 *dv, float *kv_sums, float *sums, u32 *turns, const __grid_constant__ TensorMap q,
    const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o,
    const float *lse, const float *delta, const u32 *cu_seqlens, const u32 *order, u32 docs, u32 tokens, u32 heads, u32 kv_heads,
    u32 head_size, u32 parts, float scale, u32 window, u32 ld,
    const u32 *positions, const float *cos, const float *sin) {
    bwd<f16, 64>(dk, dv, kv_sums, sums, turns, q, k, v, d_o, lse, delta, cu_seqlens, order, parts, ld,
        {positions, cos, sin}, {docs, tokens, heads, kv_heads, head_size, scale, window, 0.0f});
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_bwd_sm90_f16_d128(
    f16 *dk, f16 *dv, float *kv_sums, float *sums, u32 *turns, const __grid_constant__ TensorMap q,
    const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, const __grid_constant__ TensorMap d_o,
    const float *lse, const float *delta, const u32 *cu_seqlens, const u32 *order, u32 docs, u32 tokens, u32 heads, u32 kv_heads,
    u32 head_size, u32 parts, float scale, u32 window, u32 ld,
    const u32 *positions, const float *cos, const float *sin) {
    bwd<f16, 128>(dk, dv, kv_sums, sums, turns, q, k, v, d_o, lse, delta, cu_seqlens, order, parts, ld,
        {positions, cos, sin}, {docs, tokens, heads, kv_heads, head_size, scale, window, 0.0f});
}
