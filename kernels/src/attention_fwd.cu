// Causal attention over packed documents, forward, on any GPU.
//
//     s_ij = scale q_i · k_j, j of i's document with i - window < j <= i (window 0: no bound)
//     z_ij = softcap tanh(s_ij / softcap) (softcap 0: z = s)
//     lse_i = ln Σ_j exp z_ij,  o_i = Σ_j exp(z_ij - lse_i) v_j
//
// q, o [T, H, D]; k, v [T, K, D]; lse F32 [H, T]; cu_seqlens [docs + 1]: document d is tokens cu[d]..cu[d + 1] (cu[docs] = T;
// empty ones are allowed). D (head_size): a multiple of 8 up to the instance's; scale > 0 or not; H a multiple of K.
//
// A block of 128 threads owns a tile of query rows of one document and head and walks over the key tiles that its rows see, from
// the diagonal backwards, with the running maximum and sum of each row (online softmax); blocks of late rows, which have most to
// do, start first. 16-bit types: 64 rows, 16 a warp, products by mma.sync, probabilities rounded to T before they multiply V,
// their sum is of the unrounded ones. f32: 32 rows, 2 a thread, plain FMA (error about 1e-6); for parity and for sm_75, not for
// speed. Tiles lie in shared memory with permuted 16-byte chunks; the copy of V runs under S = Q Kᵀ and softmax, that of the
// next K under P V.
//
// Bytes: q, o once, lse once, and K, V once a query tile (from L2 mostly); arithmetic bounds it.
//
// Launch: grid (T / TILE + docs, H), block 128. 16-bit: TILE 64, shared bytes 2 D (64 + 2 KEYS), KEYS 64 (D 256: 32).
// f32: TILE 32, shared bytes 4 ((32 + KEYS) (D + 4) + 32 (KEYS + 4)), KEYS 32 (D 256: 16). D here is the instance's.
//
// spills: attention_fwd_f16_d256 80 on sm_75: 255 registers hold the output's 128 and half a tile
// spills: attention_fwd_bf16_d256 8 as above
// spills: attention_fwd_f16_d32 16 a loop bound
// spills: attention_fwd_f32_d32 16 a loop bound

#include "common/attention.cuh"

template <typename T, int D, int KEYS>
__device__ __forceinline__ void fwd_mma(T *o, float *lse, const T *q, const T *k, const T *v, const u32 *cu_seqlens, Sizes n) {
    constexpr int ROWS = 64, THREADS = 128;
    constexpr bool HOLD_Q = D <= 128;  // Q stays in registers
    extern __shared__ __align__(128) u8 shared[];
    const u32 q_tile = shared_address(shared), k_tile = q_tile + ROWS * D * 2, v_tile = k_tile + KEYS * D * 2;

    const DocTile doc = find_tile<ROWS>(cu_seqlens, n.docs, gridDim.x - 1 - blockIdx.x);
    if (doc.row >= doc.len) return;
    const u32 head = blockIdx.y, kv_head = head / (n.heads / n.kv_heads);
    const u64 q_stride = u64(n.heads) * n.head_size, k_stride = u64(n.kv_heads) * n.head_size;
    const u64 q_base = (doc.begin + doc.row) * q_stride + head * n.head_size;
    const u64 k_base = doc.begin * k_stride + kv_head * n.head_size;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 rows = min(doc.len - doc.row, u32(ROWS));
    const u32 first = first_key(doc.row, n.window) / KEYS, last = (doc.row + rows - 1) / KEYS;

    load_tile<D, ROWS, THREADS>(q_tile, q + q_base, q_stride, rows, n.head_size);
    load_tile<D, KEYS, THREADS>(k_tile, k + k_base + last * KEYS * k_stride, k_stride, doc.len - last * KEYS, n.head_size);
    copy_commit();

    const Place by_rows = place_rows(lane), by_columns = place_columns(lane);
    u32 q_held[HOLD_Q ? D / 16 : 1][4];
    float acc[D / 8][4] = {};
    float row_max[2] = {NEG_INFINITY, NEG_INFINITY}, row_sum[2] = {0.0f, 0.0f};
    const u32 i0 = doc.row + warp * 16 + lane / 4;  // this thread's rows: i0 and i0 + 8

    for (u32 tile = last + 1; tile-- > first;) {
        const u32 key = tile * KEYS;
        copy_wait<0>();
        __syncthreads();  // K has come, and nobody reads the last V any more
        load_tile<D, KEYS, THREADS>(v_tile, v + k_base + key * k_stride, k_stride, doc.len - key, n.head_size);
        copy_commit();
        if (HOLD_Q && tile == last) {
#pragma unroll
            for (u32 kk = 0; kk < D / 16; kk++)
                load_matrices(q_held[HOLD_Q ? kk : 0], q_tile + tile_offset<D>(warp * 16 + by_rows.row, kk * 2 + by_rows.chunk));
        }

        float s[KEYS / 8][4] = {};
#pragma unroll
        for (u32 kk = 0; kk < D / 16; kk++) {
            u32 a[4];
            if (!HOLD_Q) load_matrices(a, q_tile + tile_offset<D>(warp * 16 + by_rows.row, kk * 2 + by_rows.chunk));
#pragma unroll
            for (u32 j = 0; j < KEYS / 16; j++) {
                u32 b[4];
                load_matrices(b, k_tile + tile_offset<D>(j * 16 + by_columns.row, kk * 2 + by_columns.chunk));
                mma<T>(s[2 * j], HOLD_Q ? q_held[HOLD_Q ? kk : 0] : a, b[0], b[1]);
                mma<T>(s[2 * j + 1], HOLD_Q ? q_held[HOLD_Q ? kk : 0] : a, b[2], b[3]);
            }
        }

        scores<false>(s, n);
        const bool masked = !all_seen(doc.row, ROWS, key, KEYS, n.window);
        if (masked) {
#pragma unroll
            for (u32 j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (u32 e = 0; e < 4; e++)
                    if (!sees(i0 + e / 2 * 8, key + j * 8 + lane % 4 * 2 + e % 2, n.window)) s[j][e] = NEG_INFINITY;
        }
        float keep[2];
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            float m = row_max[r];
#pragma unroll
            for (u32 j = 0; j < KEYS / 8; j++) m = fmaxf(m, fmaxf(s[j][2 * r], s[j][2 * r + 1]));
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
            const float base = m == NEG_INFINITY ? 0.0f : m;  // a row that sees none of the keys so far
            keep[r] = exp2_fast(row_max[r] - base);
            row_max[r] = m;
            float sum = 0.0f;
#pragma unroll
            for (u32 j = 0; j < KEYS / 8; j++)
#pragma unroll
                for (u32 e = 2 * r; e < 2 * r + 2; e++) sum += s[j][e] = exp2_fast(s[j][e] - base);
            row_sum[r] = row_sum[r] * keep[r] + sum;
        }
#pragma unroll
        for (u32 d = 0; d < D / 8; d++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) acc[d][e] *= keep[e / 2];

        copy_wait<0>();
        __syncthreads();  // V has come, and everyone is done with K
        if (tile > first) {
            const u32 next = key - KEYS;
            load_tile<D, KEYS, THREADS>(k_tile, k + k_base + next * k_stride, k_stride, doc.len - next, n.head_size);
            copy_commit();
        }
#pragma unroll
        for (u32 kk = 0; kk < KEYS / 16; kk++) {
            const u32 p[4] = {pack2<T>(s[2 * kk][0], s[2 * kk][1]), pack2<T>(s[2 * kk][2], s[2 * kk][3]),
                              pack2<T>(s[2 * kk + 1][0], s[2 * kk + 1][1]), pack2<T>(s[2 * kk + 1][2], s[2 * kk + 1][3])};
#pragma unroll
            for (u32 d = 0; d < D / 16; d++) {
                u32 b[4];
                load_matrices_transposed(b, v_tile + tile_offset<D>(kk * 16 + by_rows.row, d * 2 + by_rows.chunk));
                mma<T>(acc[2 * d], p, b[0], b[1]);
                mma<T>(acc[2 * d + 1], p, b[2], b[3]);
            }
        }
    }

#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        float sum = row_sum[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const u32 row = warp * 16 + lane / 4 + r * 8;
        if (row >= rows) continue;
        const float inverse = 1.0f / sum;
        if (lane % 4 == 0) lse[u64(head) * n.tokens + doc.begin + doc.row + row] = row_max[r] * LN_2 + logf(sum);
        T *out = o + q_base + row * q_stride;
#pragma unroll
        for (u32 d = 0; d < D / 8; d++) {
            const u32 col = d * 8 + lane % 4 * 2;
            if (d * 8 < n.head_size)
                *reinterpret_cast<u32 *>(out + col) = pack2<T>(acc[d][2 * r] * inverse, acc[d][2 * r + 1] * inverse);
        }
    }
}

// Thread (y, x) of 16 x 8: rows y and y + 16, keys x + 8 j of the scores, columns 4 x + 32 c of the output. The eight threads of
// a row lie in one warp, so the probabilities pass through shared memory without a block barrier.
template <int D, int KEYS>
__device__ __forceinline__ void fwd_f32(float *o, float *lse, const float *q, const float *k, const float *v,
                                        const u32 *cu_seqlens, Sizes n) {
    constexpr int ROWS = 32, THREADS = 128, PITCH = D + 4, P_PITCH = KEYS + 4;
    extern __shared__ __align__(128) u8 shared[];
    float *q_tile = reinterpret_cast<float *>(shared), *kv_tile = q_tile + ROWS * PITCH, *p_tile = kv_tile + KEYS * PITCH;

    const DocTile doc = find_tile<ROWS>(cu_seqlens, n.docs, gridDim.x - 1 - blockIdx.x);
    if (doc.row >= doc.len) return;
    const u32 head = blockIdx.y, kv_head = head / (n.heads / n.kv_heads);
    const u64 q_stride = u64(n.heads) * n.head_size, k_stride = u64(n.kv_heads) * n.head_size;
    const u64 q_base = (doc.begin + doc.row) * q_stride + head * n.head_size;
    const u64 k_base = doc.begin * k_stride + kv_head * n.head_size;
    const u32 y = threadIdx.x / 8, x = threadIdx.x % 8;
    const u32 rows = min(doc.len - doc.row, u32(ROWS));
    const u32 first = first_key(doc.row, n.window) / KEYS, last = (doc.row + rows - 1) / KEYS;

    load_tile_f32<D, ROWS, PITCH, THREADS>(q_tile, q + q_base, q_stride, rows, n.head_size);
    float acc[2][D / 32][4] = {};
    float row_max[2] = {NEG_INFINITY, NEG_INFINITY}, row_sum[2] = {0.0f, 0.0f};

    for (u32 tile = last + 1; tile-- > first;) {
        const u32 key = tile * KEYS;
        __syncthreads();
        load_tile_f32<D, KEYS, PITCH, THREADS>(kv_tile, k + k_base + key * k_stride, k_stride, doc.len - key, n.head_size);
        __syncthreads();
        float s[2][KEYS / 8] = {};
        dots<D, PITCH>(s, q_tile, kv_tile, y, x);
        scores<true>(s, n);
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            const u32 i = doc.row + y + r * 16;
            float m = row_max[r];
#pragma unroll
            for (u32 j = 0; j < KEYS / 8; j++) {
                if (!sees(i, key + x + j * 8, n.window)) s[r][j] = NEG_INFINITY;
                m = fmaxf(m, s[r][j]);
            }
#pragma unroll
            for (u32 d = 1; d < 8; d *= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, d));
            const float base = m == NEG_INFINITY ? 0.0f : m, keep = exp2f(row_max[r] - base);
            row_max[r] = m;
            row_sum[r] *= keep;
#pragma unroll
            for (u32 j = 0; j < KEYS / 8; j++) {
                const float p = exp2f(s[r][j] - base);
                row_sum[r] += p;
                p_tile[(y + r * 16) * P_PITCH + x + j * 8] = p;
            }
#pragma unroll
            for (u32 c = 0; c < D / 32; c++)
#pragma unroll
                for (u32 e = 0; e < 4; e++) acc[r][c][e] *= keep;
        }
        __syncthreads();
        load_tile_f32<D, KEYS, PITCH, THREADS>(kv_tile, v + k_base + key * k_stride, k_stride, doc.len - key, n.head_size);
        __syncthreads();
        add_product<D, KEYS, PITCH, P_PITCH>(acc, p_tile, kv_tile, y, x);
    }

#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        float sum = row_sum[r];
#pragma unroll
        for (u32 d = 1; d < 8; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
        const u32 row = y + r * 16;
        if (row >= rows) continue;
        if (x == 0) lse[u64(head) * n.tokens + doc.begin + doc.row + row] = row_max[r] * LN_2 + logf(sum);
        store_row<D>(o + q_base + row * q_stride, acc[r], 1.0f / sum, x, n.head_size);
    }
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(128) attention_fwd_bf16_d32(
    bf16 *o, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_mma<bf16, 32, 64>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_bf16_d64(
    bf16 *o, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_mma<bf16, 64, 64>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_bf16_d96(
    bf16 *o, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_mma<bf16, 96, 64>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_bf16_d128(
    bf16 *o, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_mma<bf16, 128, 64>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_bf16_d256(
    bf16 *o, float *lse, const bf16 *q, const bf16 *k, const bf16 *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_mma<bf16, 256, 32>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}
#endif

extern "C" __global__ void __launch_bounds__(128) attention_fwd_f16_d32(
    f16 *o, float *lse, const f16 *q, const f16 *k, const f16 *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_mma<f16, 32, 64>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_f16_d64(
    f16 *o, float *lse, const f16 *q, const f16 *k, const f16 *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_mma<f16, 64, 64>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_f16_d96(
    f16 *o, float *lse, const f16 *q, const f16 *k, const f16 *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_mma<f16, 96, 64>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_f16_d128(
    f16 *o, float *lse, const f16 *q, const f16 *k, const f16 *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_mma<f16, 128, 64>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_f16_d256(
    f16 *o, float *lse, const f16 *q, const f16 *k, const f16 *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_mma<f16, 256, 32>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_f32_d32(
    float *o, float *lse, const float *q, const float *k, const float *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_f32<32, 32>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_f32_d64(
    float *o, float *lse, const float *q, const float *k, const float *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_f32<64, 32>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_f32_d96(
    float *o, float *lse, const float *q, const float *k, const float *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_f32<96, 32>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_f32_d128(
    float *o, float *lse, const float *q, const float *k, const float *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_f32<128, 32>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_fwd_f32_d256(
    float *o, float *lse, const float *q, const float *k, const float *v, const u32 *cu_seqlens, u32 docs, u32 tokens,
    u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    fwd_f32<256, 16>(o, lse, q, k, v, cu_seqlens, {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}
