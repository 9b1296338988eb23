// Causal attention over packed documents, forward, on Hopper: head sizes up to 128, bf16 and f16, no softcap, scale > 0.
// Formula and names as in attention_fwd.cu.
//
// Persistent blocks of GROUPS + 1 warpgroups, GROUPS 2 (D' 128) or 3 (D' 64). One thread of the last takes tiles (64 GROUPS
// queries of a document, one head) from a counter and has the copy engine bring Q and, tile of 128 keys by tile, from the
// diagonal backwards, K and V into rings of two buffers each. The others own 64 query rows each: S = Q Kᵀ and O += P V are wgmma
// products with S, P and O in registers, and a warpgroup issues the product S of the next keys before the P V of the present
// ones, so that its softmax runs under its own P V; by named barriers the warpgroups take turns, so that one's softmax runs
// under the other's products (FlashAttention-3, Shah et al. 2024). P is rounded to T, its sum is of the unrounded values. Rows of
// V beyond the document are zeroed in shared memory (0 · NaN).
//
// Order of tiles: sections of key/value heads whose K and V fit the L2 together; in a section those with most keys first, by a
// table that attention_order makes once for a batch (documents and window): order[rank] = slot (attention.cuh).
// `counter` (2 words, zero before the first launch; the launch leaves zeros) hands out tiles; a result does not depend on who
// takes one.
//
// Tensor maps (16-bit, 3 dimensions, 128-byte swizzle, no interleave, zeros outside, element strides 1, L2 promotion 128 bytes):
//   q: dims (D, H, T), strides (2 D, 2 H D) bytes, box (64, 1, 64 GROUPS)
//   k, v: dims (D, K, T), strides (2 D, 2 K D), box (64, 1, 128).
// Columns beyond D come as zeros, so the instance for 128 serves 72..128, that for 64 serves 8..64 (D a multiple of 8).
//
// o has a pitch of ld_o >= H D from token to token.
//
// Bytes: q, o once, K and V once a query tile, from L2 mostly. Arithmetic bounds it.
// Launch: attention_order: grid ceil((T / 128 + docs) / 256), block 256; tables u32 [T / 192 + docs] and two [T / 128 + docs].
// attention_fwd_sm90: grid min(multiprocessors, (T / (64 GROUPS) + docs) H), block 128 (GROUPS + 1), shared bytes
// 256 D' (GROUPS + 4) + 256 with D' the instance's D: 196864 for D' 128, 114944 for D' 64.

#include "common/attention_sm90.cuh"

constexpr u32 KEYS = 128, STAGES = 2;
constexpr u32 SECTION_BYTES = 32u << 20;

// A tile as the producer hands it to the consumers; len 0 ends.
struct __align__(16) Work {
    u32 begin, len, row, head;
};

// Addresses in shared memory.
template <int D, int GROUPS>
struct Shared {
    static constexpr u32 ROWS = 64 * GROUPS, Q_TILE = ROWS * D * 2, TILE = KEYS * D * 2, BARRIERS = STAGES * (Q_TILE + 2 * TILE);
    u32 base;
    __device__ u32 q(u32 stage) const { return base + stage * Q_TILE; }
    __device__ u32 k(u32 stage) const { return base + STAGES * Q_TILE + stage * TILE; }
    __device__ u32 v(u32 stage) const { return base + STAGES * (Q_TILE + TILE) + stage * TILE; }
    __device__ u32 barrier(u32 i) const { return base + BARRIERS + i * 8; }
    __device__ u32 q_full(u32 stage) const { return barrier(stage); }
    __device__ u32 q_empty(u32 stage) const { return barrier(STAGES + stage); }
    __device__ u32 k_full(u32 stage) const { return barrier(2 * STAGES + stage); }
    __device__ u32 k_empty(u32 stage) const { return barrier(3 * STAGES + stage); }
    __device__ u32 v_full(u32 stage) const { return barrier(4 * STAGES + stage); }
    __device__ u32 v_empty(u32 stage) const { return barrier(5 * STAGES + stage); }
    static constexpr u32 WORK = BARRIERS + 128;  // offset of Work[STAGES]
};

template <int D, int GROUPS>
__device__ __forceinline__ void produce(Shared<D, GROUPS> at, Work *work, const TensorMap &q, const TensorMap &k,
                                        const TensorMap &v, u32 *counter, const u32 *cu_seqlens, const u32 *order,
                                        const Sizes &n) {
    constexpr u32 ROWS = 64 * GROUPS;
    const u32 slots = n.tokens / ROWS + n.docs, tiles = slots * n.heads, group = n.heads / n.kv_heads;
    const u32 kv_section = min(max(u32(SECTION_BYTES / (u64(n.tokens) * (4 * D))), 1u), n.kv_heads), section = kv_section * group;
    Ring<STAGES> q_at, kv_at;
    for (u32 tile = blockIdx.x; tile < tiles; tile = gridDim.x + atomicAdd(counter, 1u)) {
        const u32 from = tile / (slots * section) * section, rest = tile % (slots * section);
        const u32 heads = min(section, n.heads - from), head = from + rest % heads;
        const u32 slot = order[rest / heads];
        if (slot == ~0u) continue;
        const DocTile doc = find_tile<ROWS>(cu_seqlens, n.docs, slot);
        const u32 rows = min(doc.len - doc.row, ROWS), kv_head = head / group;
        const u32 first = first_key(doc.row, n.window) / KEYS, last = (doc.row + rows - 1) / KEYS;

        mbarrier_wait(at.q_empty(q_at.index), q_at.parity ^ 1);
        work[q_at.index] = {doc.begin, doc.len, doc.row, head};
        mbarrier_expect(at.q_full(q_at.index), at.Q_TILE);
        load_box<D, ROWS>(at.q(q_at.index), q, at.q_full(q_at.index), head, doc.begin + doc.row);
        q_at.next();
#pragma unroll 1
        for (u32 j = last + 1; j-- > first; kv_at.next()) {
            const u32 stage = kv_at.index;
            mbarrier_wait(at.k_empty(stage), kv_at.parity ^ 1);
            mbarrier_expect(at.k_full(stage), at.TILE);
            load_box<D, KEYS>(at.k(stage), k, at.k_full(stage), kv_head, doc.begin + j * KEYS);
            mbarrier_wait(at.v_empty(stage), kv_at.parity ^ 1);
            mbarrier_expect(at.v_full(stage), at.TILE);
            load_box<D, KEYS>(at.v(stage), v, at.v_full(stage), kv_head, doc.begin + j * KEYS);
        }
    }
    mbarrier_wait(at.q_empty(q_at.index), q_at.parity ^ 1);
    work[q_at.index] = {0, 0, 0, 0};
    mbarrier_arrive(at.q_full(q_at.index));
    // the last block: all have taken their last tile
    if (atomicAdd(counter + 1, 1u) == gridDim.x - 1) counter[0] = counter[1] = 0;
}

// S = Q Kᵀ for this warpgroup's 64 rows.
template <typename T, int D, int GROUPS>
__device__ __forceinline__ void issue_s(float (&s)[KEYS / 2], u32 q, u32 k) {
#pragma unroll
    for (u32 kk = 0; kk < D / 16; kk++) {
        const u32 column = kk % 4 * 32;
        wgmma<T, 0, 0>(s, k_major(q + kk / 4 * (GROUPS * 64 * 128) + column), k_major(k + kk / 4 * (KEYS * 128) + column),
                       kk != 0);
    }
}

// O += P V.
template <typename T, int D>
__device__ __forceinline__ void issue_o(float (&o)[D / 2], const u32 (&p)[KEYS / 4], u32 v) {
#pragma unroll
    for (u32 kk = 0; kk < KEYS / 16; kk++) wgmma<T, 1>(o, p + 4 * kk, mn_major(v + kk * 2048, 128 * 128), 1);
}

struct Row {
    float max[2], sum[2];  // of scores (not scaled), and of exp
};

// s becomes exp(scale (s - max)); `keep` is the factor of what came before. BLIND: a row may have seen no key yet.
template <bool BLIND>
__device__ __forceinline__ void softmax(float (&s)[KEYS / 2], Row &row, float (&keep)[2], float scale) {
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        float m = row.max[r];
#pragma unroll
        for (u32 j = 0; j < KEYS / 8; j++) m = fmaxf(m, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
        m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
        const float from = BLIND && m == NEG_INFINITY ? 0.0f : m, base = from * scale;
        keep[r] = exp2_fast((row.max[r] - from) * scale);
        row.max[r] = m;
        float sum = 0.0f;
#pragma unroll
        for (u32 j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (u32 e = 4 * j + 2 * r; e < 4 * j + 2 * r + 2; e++) sum += s[e] = exp2_fast(fmaf(s[e], scale, -base));
        row.sum[r] = row.sum[r] * keep[r] + sum;
    }
}

// Hides keys beyond the diagonal or the window. `i` is the thread's upper row, both from the document's start.
__device__ __forceinline__ void mask(float (&s)[KEYS / 2], u32 i, u32 key, u32 window) {
    const i32 column = threadIdx.x % 4 * 2;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        const i32 high = i32(i + r * 8) - i32(key) - column, low = window == 0 ? -(1 << 30) : high - i32(window);
#pragma unroll
        for (u32 j = 0; j < KEYS / 8; j++)
#pragma unroll
            for (u32 e = 0; e < 2; e++) {
                const i32 c = 8 * j + e;
                if (c > high || c <= low) s[4 * j + 2 * r + e] = NEG_INFINITY;
            }
    }
}

template <typename T>
__device__ __forceinline__ void pack(u32 (&p)[KEYS / 4], const float (&s)[KEYS / 2]) {
#pragma unroll
    for (u32 i = 0; i < KEYS / 4; i++) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
}

template <typename T, int D, int GROUPS>
__device__ __forceinline__ void consume(Shared<D, GROUPS> at, const Work *work, T *o, float *lse, const Sizes &n, u64 stride) {
    const u32 group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    constexpr u32 ROWS = 64 * GROUPS;
    const u32 turn = 1 + group, other = 1 + (group + 1) % GROUPS;  // named barriers
    const float scale = n.scale * LOG2_E;
    Ring<STAGES> q_at, kv_at;
    if (group == 0) barrier_arrive(turn, 256);

    for (;; q_at.next()) {
        mbarrier_wait(at.q_full(q_at.index), q_at.parity);
        const Work w = work[q_at.index];
        if (w.len == 0) break;
        const u32 rows = min(w.len - w.row, ROWS);
        const u32 first = first_key(w.row, n.window) / KEYS, last = (w.row + rows - 1) / KEYS;
        const u32 q = at.q(q_at.index) + group * (64 * 128);
        const u32 i = w.row + group * 64 + warp * 16 + lane / 4;

        float acc[D / 2], s[KEYS / 2], keep[2];
        u32 p[KEYS / 4];
        Row row = {{NEG_INFINITY, NEG_INFINITY}, {0.0f, 0.0f}};
#pragma unroll
        for (u32 e = 0; e < D / 2; e++) acc[e] = 0.0f;

        mbarrier_wait(at.k_full(kv_at.index), kv_at.parity);
        wgmma_fence();
        issue_s<T, D, GROUPS>(s, q, at.k(kv_at.index));
        wgmma_commit();
        wgmma_wait<0>();
        hold(s);
        if (lane == 0) mbarrier_arrive(at.k_empty(kv_at.index));
        mask(s, i, last * KEYS, n.window);
        softmax<(ROWS > KEYS)>(s, row, keep, scale);
        pack<T>(p, s);

        if (w.len < (last + 1) * KEYS) {  // the document ends within the tile: what follows is another's
            mbarrier_wait(at.v_full(kv_at.index), kv_at.parity);
            zero_rows<D, KEYS>(at.v(kv_at.index), w.len - last * KEYS, KEYS);
            fence_async();
            barrier_sync(1 + GROUPS + group, 128);
        }

        for (u32 j = last; j-- > first;) {
            const Ring<STAGES> v_at = kv_at;
            kv_at.next();
            if (j + 1 == last) mbarrier_wait(at.k_full(kv_at.index), kv_at.parity);
            barrier_sync(turn, 256);
            hold(p);
            hold(acc);
            wgmma_fence();
            issue_s<T, D, GROUPS>(s, q, at.k(kv_at.index));
            wgmma_commit();
            mbarrier_wait(at.v_full(v_at.index), v_at.parity);
            issue_o<T, D>(acc, p, at.v(v_at.index));
            wgmma_commit();
            barrier_arrive(other, 256);
            wgmma_wait<1>();
            hold(s);
            if (lane == 0) mbarrier_arrive(at.k_empty(kv_at.index));
            if (!all_seen(w.row, ROWS, j * KEYS, KEYS, n.window)) mask(s, i, j * KEYS, n.window);
            softmax<(ROWS > KEYS)>(s, row, keep, scale);
            // Here, and not where the loop begins: this branch keeps ptxas from moving the softmax behind the wait for P V.
            if (j > first) mbarrier_wait(at.k_full(v_at.index), kv_at.parity ^ kv_at.index);
            wgmma_wait<0>();
            hold(acc);
            hold(p);
            if (lane == 0) mbarrier_arrive(at.v_empty(v_at.index));
            pack<T>(p, s);
#pragma unroll
            for (u32 e = 0; e < D / 2; e++) acc[e] *= keep[e / 2 % 2];
        }
        mbarrier_arrive(at.q_empty(q_at.index));
        mbarrier_wait(at.v_full(kv_at.index), kv_at.parity);
        hold(p);
        hold(acc);
        wgmma_fence();
        issue_o<T, D>(acc, p, at.v(kv_at.index));
        wgmma_commit();
        wgmma_wait<0>();
        hold(acc);
        if (lane == 0) mbarrier_arrive(at.v_empty(kv_at.index));
        kv_at.next();

        float inverse[2];
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            float sum = row.sum[r];
            sum += __shfl_xor_sync(~0u, sum, 1);
            sum += __shfl_xor_sync(~0u, sum, 2);
            inverse[r] = 1.0f / sum;
            if (i + r * 8 < w.len && lane % 4 == 0)
                lse[u64(w.head) * n.tokens + w.begin + i + r * 8] = row.max[r] * n.scale + logf(sum);
        }
        T *out = o + w.begin * stride + w.head * n.head_size;
        store_rows<T, D>(out, stride, acc, inverse[0], inverse[1], i, w.len, n.head_size, 0);
    }
}

template <typename T, int D, int GROUPS>
__device__ __forceinline__ void fwd(T *o, float *lse, u32 *counter, const TensorMap &q, const TensorMap &k, const TensorMap &v,
                                    const u32 *cu_seqlens, const u32 *order, const Sizes &n, u32 ld_o) {
    extern __shared__ __align__(1024) u8 shared[];
    const Shared<D, GROUPS> at = {shared_address(shared)};
    Work *work = reinterpret_cast<Work *>(shared + at.WORK);
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < STAGES; stage++) {
            mbarrier_init(at.q_full(stage), 1);
            mbarrier_init(at.k_full(stage), 1);
            mbarrier_init(at.v_full(stage), 1);
            mbarrier_init(at.q_empty(stage), 128 * GROUPS);  // with Q goes `work`, which every thread has read
            mbarrier_init(at.k_empty(stage), 4 * GROUPS);
            mbarrier_init(at.v_empty(stage), 4 * GROUPS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x >= 128 * GROUPS) {
        registers_fewer<GROUPS == 2 ? 24 : 32>();
        if (threadIdx.x == 128 * GROUPS) produce(at, work, q, k, v, counter, cu_seqlens, order, n);
    } else {
        registers_more<GROUPS == 2 ? 240 : 160>();
        consume<T>(at, work, o, lse, n, ld_o);
    }
}

// order[rank] = slot, rank = tiles that have more to do, or as much and a lower slot; ~0 for slots that have nothing to do.
template <typename Weigh>
__device__ __forceinline__ void rank_tiles(u32 *order, u32 *weights, u32 slots, Weigh weigh) {
    const u32 mine = blockIdx.x * 256 + threadIdx.x, w = weigh(mine);
    u32 rank = 0;
    for (u32 from = 0; from < slots; from += 256) {
        __syncthreads();
        weights[threadIdx.x] = weigh(from + threadIdx.x);
        __syncthreads();
        for (u32 i = 0; i < min(256u, slots - from); i++) rank += weights[i] > w || (weights[i] == w && from + i < mine);
    }
    if (mine < slots) order[rank] = w ? mine : ~0u;
}

template <int ROWS>
__device__ __forceinline__ u32 forward_weight(u32 slot, const u32 *cu_seqlens, u32 docs, u32 slots, u32 window) {
    if (slot >= slots) return 0;
    const DocTile doc = find_tile<ROWS>(cu_seqlens, docs, slot);
    if (doc.row >= doc.len) return 0;
    return (min(doc.row + ROWS, doc.len) - 1) / KEYS - first_key(doc.row, window) / KEYS + 1;
}

// The tables: forward_d64 and forward_d128 for attention_fwd_sm90 (tiles of 192 and 128 queries), backward for attention_bwd_sm90
// (tiles of 128 keys).
extern "C" __global__ void __launch_bounds__(256) attention_order(u32 *forward_d64, u32 *forward_d128, u32 *backward,
                                                                  const u32 *cu_seqlens, u32 docs, u32 tokens, u32 window) {
    __shared__ u32 weights[256];
    const u32 slots = tokens / 128 + docs, slots_d64 = tokens / 192 + docs;
    rank_tiles(forward_d64, weights, slots_d64,
               [&](u32 slot) { return forward_weight<192>(slot, cu_seqlens, docs, slots_d64, window); });
    rank_tiles(forward_d128, weights, slots,
               [&](u32 slot) { return forward_weight<128>(slot, cu_seqlens, docs, slots, window); });
    rank_tiles(backward, weights, slots, [&](u32 slot) -> u32 {
        if (slot >= slots) return 0;
        const DocTile doc = find_tile<KEYS>(cu_seqlens, docs, slot);
        if (doc.row >= doc.len) return 0;
        const u64 last = min(doc.row + KEYS, doc.len), seen = window == 0 ? doc.len : min(u64(doc.len), last - 1 + window);
        return u32(seen - doc.row + 63) / 64;
    });
}

extern "C" __global__ void __launch_bounds__(512, 1) attention_fwd_sm90_bf16_d64(
    bf16 *o, float *lse, u32 *counter, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const u32 *cu_seqlens, const u32 *order, u32 docs, u32 tokens, u32 heads, u32 kv_heads,
    u32 head_size, float scale, u32 window, u32 ld_o) {
    fwd<bf16, 64, 3>(o, lse, counter, q, k, v, cu_seqlens, order,
        {docs, tokens, heads, kv_heads, head_size, scale, window, 0.0f}, ld_o);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_fwd_sm90_bf16_d128(
    bf16 *o, float *lse, u32 *counter, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const u32 *cu_seqlens, const u32 *order, u32 docs, u32 tokens, u32 heads, u32 kv_heads,
    u32 head_size, float scale, u32 window, u32 ld_o) {
    fwd<bf16, 128, 2>(o, lse, counter, q, k, v, cu_seqlens, order,
        {docs, tokens, heads, kv_heads, head_size, scale, window, 0.0f}, ld_o);
}

extern "C" __global__ void __launch_bounds__(512, 1) attention_fwd_sm90_f16_d64(
    f16 *o, float *lse, u32 *counter, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const u32 *cu_seqlens, const u32 *order, u32 docs, u32 tokens, u32 heads, u32 kv_heads,
    u32 head_size, float scale, u32 window, u32 ld_o) {
    fwd<f16, 64, 3>(o, lse, counter, q, k, v, cu_seqlens, order,
        {docs, tokens, heads, kv_heads, head_size, scale, window, 0.0f}, ld_o);
}

extern "C" __global__ void __launch_bounds__(384, 1) attention_fwd_sm90_f16_d128(
    f16 *o, float *lse, u32 *counter, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k,
    const __grid_constant__ TensorMap v, const u32 *cu_seqlens, const u32 *order, u32 docs, u32 tokens, u32 heads, u32 kv_heads,
    u32 head_size, float scale, u32 window, u32 ld_o) {
    fwd<f16, 128, 2>(o, lse, counter, q, k, v, cu_seqlens, order,
        {docs, tokens, heads, kv_heads, head_size, scale, window, 0.0f}, ld_o);
}
