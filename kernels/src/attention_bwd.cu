// Causal attention over packed documents, backward, on any GPU. Names and sizes as in attention_fwd.cu.
//
//     δ_i = do_i · o_i                                                        attention_delta
//     p_ij = exp(z_ij - lse_i),  ds_ij = p_ij (do_i · v_j - δ_i) (1 - (z_ij / softcap)²)
//     dv_j = Σ_i p_ij do_i,  dk_j = scale Σ_i ds_ij q_i,  dq_i = scale Σ_j ds_ij k_j         attention_bwd
//
// do, dq, o [T, H, D] (o with a pitch of ld_o >= H D from token to token); dk, dv [T, K, D]; lse, delta F32 [H, T]. T H < 2³².
//
// attention_bwd is one launch of two kinds of blocks. A block of grid row y < K owns a tile of keys of key/value head y and
// walks over the query heads of its group and the query tiles that see it: dk, dv. A block of row K + h owns a tile of queries
// of head h and walks over the keys: dq. Both compute S and dP again (seven products in place of five), so that every sum has
// one owner and a fixed order: no atomics, no workspace, the same result each time. The two kinds are one piece of code: X1 X2
// stay (K V, or Q dO), Y1 Y2 stream by (Q dO, or K V), S = X1 Y1ᵀ, dP = X2 Y2ᵀ, acc1 += dS Y1, acc2 += P Y2. P and dS are
// rounded to T for the products.
//
// 16-bit types: 16 rows a warp by mma.sync; Y double-buffered by asynchronous copies. Where D is 256, two warps share the rows
// and each keeps half the output's columns. f32: plain FMA, thread (y, x) of 16 x 8, as in attention_fwd.cu.
//
// Launch: attention_delta: a row of D a warp or a part of one, grid ceil(T H / 8) or less, block 128.
// attention_bwd: grid (T / ROWS + docs, K + H), block 128.
// 16-bit: ROWS 64 (D 256: 32), STREAM 64 (D 32, 64), 32 (D 96, 128) or 16 (D 256), shared bytes 4 D (ROWS + 2 STREAM) + 16
// STREAM. f32: ROWS 32 (D 256: 16), STREAM 16 (D 256: 8), shared bytes 8 (ROWS + STREAM) (D + 4) + 4 ROWS (STREAM + 4) + 8
// STREAM.
//
// spills: attention_bwd_f16_d128 64 on sm_75: the two sums' 128 registers, scores and dP's 32
// spills: attention_bwd_f16_d64 48 on sm_75: scores and dP are 64 registers wide
// spills: attention_bwd_f16_d32 48 on sm_120a: outside the products
// spills: attention_bwd_bf16_d32 48 on sm_120a: outside the products
// spills: attention_bwd_f32_d96 8 one value

#include "common/attention.cuh"

template <typename T>
__device__ __forceinline__ void delta_rows(float *delta, const T *o, const T *d_o, u32 tokens, u32 heads, u32 head_size,
                                           u32 ld_o) {
    constexpr u32 N = Pack<T>::N;
    u32 lanes = 32;  // of a row
    while (lanes > 1 && (lanes / 2) * N >= head_size) lanes /= 2;
    const u32 lane = threadIdx.x % lanes, each = 128 / lanes;
    const u64 rows = u64(tokens) * heads;
    for (u64 first = u64(blockIdx.x) * each; first < rows; first += u64(gridDim.x) * each) {
        const u64 row = first + threadIdx.x / lanes;
        float sum = 0.0f;
        for (u32 c = lane * N; c < head_size && row < rows; c += lanes * N) {
            const u64 at = u64(u32(row) / heads) * ld_o + u32(row) % heads * head_size;
            const Pack<T> a = load16(o + at + c), b = load16(d_o + row * head_size + c);
#pragma unroll
            for (u32 e = 0; e < N; e++) sum += to_f32(a.v[e]) * to_f32(b.v[e]);
        }
        for (u32 d = lanes / 2; d; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
        if (lane == 0 && row < rows) delta[row % heads * tokens + row / heads] = sum;
    }
}

// What a block works on.
struct Job {
    DocTile doc;
    u32 kv_head;
    u32 head;      // the first query head
    u32 group;     // query heads to walk over
    u32 rows;      // of the tile that are the document's
    u32 first;     // streamed tiles first..last
    u32 last;
    bool of_keys;  // dk, dv, or else dq
};

template <int ROWS, int STREAM>
__device__ __forceinline__ Job find_job(const u32 *cu_seqlens, const Sizes &n) {
    Job job;
    const u32 group = n.heads / n.kv_heads;
    job.of_keys = blockIdx.y < n.kv_heads;
    // the tiles with most to stream first: early keys, late queries
    job.doc = find_tile<ROWS>(cu_seqlens, n.docs, job.of_keys ? blockIdx.x : gridDim.x - 1 - blockIdx.x);
    const u32 row = job.doc.row, len = job.doc.len;
    job.rows = min(len - row, u32(ROWS));
    if (job.of_keys) {
        job.kv_head = blockIdx.y;
        job.head = job.kv_head * group;
        job.group = group;
        job.first = row / STREAM;
        const u64 seen = n.window == 0 ? len : min(u64(len), u64(row) + job.rows - 1 + n.window);
        job.last = u32((seen + STREAM - 1) / STREAM);
    } else {
        job.head = blockIdx.y - n.kv_heads;
        job.kv_head = job.head / group;
        job.group = 1;
        job.first = first_key(row, n.window) / STREAM;
        job.last = (row + job.rows + STREAM - 1) / STREAM;
    }
    return job;
}

// p and ds from the scores (units of ln 2) and dP. `a` and `b` are lse and delta of the query.
__device__ __forceinline__ void gradient(float z, float dp, float a, float b, bool seen, const Sizes &n, float &p, float &ds) {
    p = seen ? exp2_fast(z - a * LOG2_E) : 0.0f;
    ds = p * (dp - b);
    if (n.softcap != 0.0f) {
        const float t = z / (n.softcap * LOG2_E);
        ds *= 1.0f - t * t;
    }
}

template <typename T, int D, int KG, int DG, int STREAM, bool KEYS>
__device__ __forceinline__ void bwd_walk(T *out1, T *out2, const T *x1, const T *x2, const T *y1, const T *y2, const float *lse,
                                         const float *delta, const Job &job, const Sizes &n) {
    constexpr int ROWS = 16 * KG, THREADS = 128, DW = D / DG;
    extern __shared__ __align__(128) u8 shared[];
    const u32 x1_tile = shared_address(shared), x2_tile = x1_tile + ROWS * D * 2;
    const u32 y_tiles = x2_tile + ROWS * D * 2;  // Y1, Y2 of each of two stages, then lse, delta of each
    float *stats = reinterpret_cast<float *>(shared + 4 * D * (ROWS + 2 * STREAM));

    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 row0 = warp % KG * 16, col0 = warp / KG * DW;
    const u64 q_stride = u64(n.heads) * n.head_size, k_stride = u64(n.kv_heads) * n.head_size;
    const u64 x_stride = KEYS ? k_stride : q_stride, y_stride = KEYS ? q_stride : k_stride;
    const u64 x_base = (job.doc.begin + job.doc.row) * x_stride + (KEYS ? job.kv_head : job.head) * n.head_size;
    const u64 y_base = job.doc.begin * y_stride + (KEYS ? job.head : job.kv_head) * n.head_size;

    load_tile<D, ROWS, THREADS>(x1_tile, x1 + x_base, x_stride, job.rows, n.head_size);
    load_tile<D, ROWS, THREADS>(x2_tile, x2 + x_base, x_stride, job.rows, n.head_size);

    const u32 tiles = job.last - job.first, steps = job.group * tiles;
    auto load = [&](u32 step) {
        const u32 member = step / tiles, at = (job.first + step % tiles) * STREAM, stage = step % 2;
        const u64 from = y_base + member * n.head_size + at * y_stride;
        const u32 y1_tile = y_tiles + stage * (4 * D * STREAM), left = job.doc.len - at;
        load_tile<D, STREAM, THREADS>(y1_tile, y1 + from, y_stride, left, n.head_size);
        load_tile<D, STREAM, THREADS>(y1_tile + 2 * D * STREAM, y2 + from, y_stride, left, n.head_size);
        if (KEYS && threadIdx.x < 2 * STREAM) {
            const u32 i = threadIdx.x % STREAM;
            const bool valid = i < left;
            const float *of = (threadIdx.x < STREAM ? lse : delta) + u64(job.head + member) * n.tokens + job.doc.begin + at;
            copy4(shared_address(stats + stage * (2 * STREAM) + threadIdx.x), valid ? of + i : of, valid);
        }
    };
    load(0);
    copy_commit();

    const Place by_rows = place_rows(lane), by_columns = place_columns(lane);
    float acc1[DW / 8][4] = {}, acc2[KEYS ? DW / 8 : 1][4] = {};
    const u32 x_at = job.doc.row + row0 + lane / 4;  // this thread's rows: x_at and x_at + 8
    float row_lse[2] = {}, row_delta[2] = {};
    if (!KEYS) {
#pragma unroll
        for (u32 r = 0; r < 2; r++)
            if (x_at + r * 8 < job.doc.len) {
                row_lse[r] = lse[u64(job.head) * n.tokens + job.doc.begin + x_at + r * 8];
                row_delta[r] = delta[u64(job.head) * n.tokens + job.doc.begin + x_at + r * 8];
            }
    }

    for (u32 step = 0; step < steps; step++) {
        if (step + 1 < steps) load(step + 1);
        copy_commit();
        copy_wait<1>();
        __syncthreads();
        const u32 y1_tile = y_tiles + step % 2 * (4 * D * STREAM), y2_tile = y1_tile + 2 * D * STREAM;
        const float *stat = stats + step % 2 * (2 * STREAM);
        const u32 at = (job.first + step % tiles) * STREAM;

        float s[STREAM / 8][4] = {}, dp[STREAM / 8][4] = {};
#pragma unroll
        for (u32 kk = 0; kk < D / 16; kk++) {
            u32 a1[4], a2[4];
            load_matrices(a1, x1_tile + tile_offset<D>(row0 + by_rows.row, kk * 2 + by_rows.chunk));
            load_matrices(a2, x2_tile + tile_offset<D>(row0 + by_rows.row, kk * 2 + by_rows.chunk));
#pragma unroll
            for (u32 j = 0; j < STREAM / 16; j++) {
                u32 b[4];
                load_matrices(b, y1_tile + tile_offset<D>(j * 16 + by_columns.row, kk * 2 + by_columns.chunk));
                mma<T>(s[2 * j], a1, b[0], b[1]);
                mma<T>(s[2 * j + 1], a1, b[2], b[3]);
                load_matrices(b, y2_tile + tile_offset<D>(j * 16 + by_columns.row, kk * 2 + by_columns.chunk));
                mma<T>(dp[2 * j], a2, b[0], b[1]);
                mma<T>(dp[2 * j + 1], a2, b[2], b[3]);
            }
        }

        scores<false>(s, n);
        const bool whole = at + STREAM <= job.doc.len && (KEYS ? all_seen(at, STREAM, job.doc.row, ROWS, n.window)
                                                               : all_seen(job.doc.row, ROWS, at, STREAM, n.window));
#pragma unroll
        for (u32 j = 0; j < STREAM / 8; j++)
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                const u32 x = x_at + e / 2 * 8, c = j * 8 + lane % 4 * 2 + e % 2, y = at + c;
                const bool seen = whole || (y < job.doc.len && (KEYS ? sees(y, x, n.window) : sees(x, y, n.window)));
                gradient(s[j][e], dp[j][e], KEYS ? stat[c] : row_lse[e / 2], KEYS ? stat[STREAM + c] : row_delta[e / 2], seen, n,
                         s[j][e], dp[j][e]);
            }

#pragma unroll
        for (u32 kk = 0; kk < STREAM / 16; kk++) {
            const u32 p[4] = {pack2<T>(s[2 * kk][0], s[2 * kk][1]), pack2<T>(s[2 * kk][2], s[2 * kk][3]),
                              pack2<T>(s[2 * kk + 1][0], s[2 * kk + 1][1]), pack2<T>(s[2 * kk + 1][2], s[2 * kk + 1][3])};
            const u32 ds[4] = {pack2<T>(dp[2 * kk][0], dp[2 * kk][1]), pack2<T>(dp[2 * kk][2], dp[2 * kk][3]),
                               pack2<T>(dp[2 * kk + 1][0], dp[2 * kk + 1][1]), pack2<T>(dp[2 * kk + 1][2], dp[2 * kk + 1][3])};
#pragma unroll
            for (u32 d = 0; d < DW / 16; d++) {
                u32 b[4];
                const u32 offset = tile_offset<D>(kk * 16 + by_rows.row, col0 / 8 + d * 2 + by_rows.chunk);
                load_matrices_transposed(b, y1_tile + offset);
                mma<T>(acc1[2 * d], ds, b[0], b[1]);
                mma<T>(acc1[2 * d + 1], ds, b[2], b[3]);
                if (KEYS) {
                    load_matrices_transposed(b, y2_tile + offset);
                    mma<T>(acc2[KEYS ? 2 * d : 0], p, b[0], b[1]);
                    mma<T>(acc2[KEYS ? 2 * d + 1 : 0], p, b[2], b[3]);
                }
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        const u32 row = row0 + lane / 4 + r * 8;
        if (row >= job.rows) continue;
#pragma unroll
        for (u32 d = 0; d < DW / 8; d++) {
            const u32 col = col0 + d * 8 + lane % 4 * 2;
            if (col0 + d * 8 >= n.head_size) continue;
            const u64 to = x_base + row * x_stride + col;
            *reinterpret_cast<u32 *>(out1 + to) = pack2<T>(acc1[d][2 * r] * n.scale, acc1[d][2 * r + 1] * n.scale);
            if (KEYS) *reinterpret_cast<u32 *>(out2 + to) = pack2<T>(acc2[KEYS ? d : 0][2 * r], acc2[KEYS ? d : 0][2 * r + 1]);
        }
    }
}

template <typename T, int D, int KG, int DG, int STREAM>
__device__ __forceinline__ void bwd_mma(T *dq, T *dk, T *dv, const T *d_o, const T *q, const T *k, const T *v, const float *lse,
                                        const float *delta, const u32 *cu_seqlens, Sizes n) {
    const Job job = find_job<16 * KG, STREAM>(cu_seqlens, n);
    if (job.doc.row >= job.doc.len) return;
    if (job.of_keys) bwd_walk<T, D, KG, DG, STREAM, true>(dk, dv, k, v, q, d_o, lse, delta, job, n);
    else bwd_walk<T, D, KG, DG, STREAM, false>(dq, nullptr, q, d_o, k, v, lse, delta, job, n);
}

template <int D, int ROWS, int STREAM, bool KEYS>
__device__ __forceinline__ void bwd_walk_f32(float *out1, float *out2, const float *x1, const float *x2, const float *y1,
                                             const float *y2, const float *lse, const float *delta, const Job &job,
                                             const Sizes &n) {
    constexpr int THREADS = 128, PITCH = D + 4, P_PITCH = STREAM + 4, R = ROWS / 16, J = STREAM / 8;
    extern __shared__ __align__(128) u8 shared[];
    float *x1_tile = reinterpret_cast<float *>(shared), *x2_tile = x1_tile + ROWS * PITCH, *y1_tile = x2_tile + ROWS * PITCH;
    float *y2_tile = y1_tile + STREAM * PITCH, *p_tile = y2_tile + STREAM * PITCH, *stats = p_tile + ROWS * P_PITCH;

    const u32 ty = threadIdx.x / 8, tx = threadIdx.x % 8;
    const u64 q_stride = u64(n.heads) * n.head_size, k_stride = u64(n.kv_heads) * n.head_size;
    const u64 x_stride = KEYS ? k_stride : q_stride, y_stride = KEYS ? q_stride : k_stride;
    const u64 x_base = (job.doc.begin + job.doc.row) * x_stride + (KEYS ? job.kv_head : job.head) * n.head_size;
    const u64 y_base = job.doc.begin * y_stride + (KEYS ? job.head : job.kv_head) * n.head_size;
    load_tile_f32<D, ROWS, PITCH, THREADS>(x1_tile, x1 + x_base, x_stride, job.rows, n.head_size);
    load_tile_f32<D, ROWS, PITCH, THREADS>(x2_tile, x2 + x_base, x_stride, job.rows, n.head_size);

    float acc1[R][D / 32][4] = {}, acc2[R][D / 32][4] = {};
    const u32 tiles = job.last - job.first, steps = job.group * tiles;
    for (u32 step = 0; step < steps; step++) {
        const u32 member = step / tiles, at = (job.first + step % tiles) * STREAM, left = job.doc.len - at;
        const u64 from = y_base + member * n.head_size + at * y_stride;
        const u64 stat_at = u64(job.head + member) * n.tokens + job.doc.begin + (KEYS ? at : job.doc.row);
        __syncthreads();
        load_tile_f32<D, STREAM, PITCH, THREADS>(y1_tile, y1 + from, y_stride, left, n.head_size);
        load_tile_f32<D, STREAM, PITCH, THREADS>(y2_tile, y2 + from, y_stride, left, n.head_size);
        if (KEYS && threadIdx.x < STREAM) {
            const bool valid = threadIdx.x < left;
            stats[threadIdx.x] = valid ? lse[stat_at + threadIdx.x] : 0.0f;
            stats[STREAM + threadIdx.x] = valid ? delta[stat_at + threadIdx.x] : 0.0f;
        }
        __syncthreads();

        float s[R][J] = {}, dp[R][J] = {};
        dots<D, PITCH>(s, x1_tile, y1_tile, ty, tx);
        dots<D, PITCH>(dp, x2_tile, y2_tile, ty, tx);
        scores<true>(s, n);
#pragma unroll
        for (u32 r = 0; r < R; r++)
#pragma unroll
            for (u32 j = 0; j < J; j++) {
                const u32 row = ty + r * 16, x = job.doc.row + row, c = tx + j * 8, y = at + c;
                const bool seen = row < job.rows && c < left && (KEYS ? sees(y, x, n.window) : sees(x, y, n.window));
                float a = 0.0f, b = 0.0f;
                if (seen) a = KEYS ? stats[c] : lse[stat_at + row], b = KEYS ? stats[STREAM + c] : delta[stat_at + row];
                gradient(s[r][j], dp[r][j], a, b, seen, n, s[r][j], dp[r][j]);
            }
        // the eight threads of a row lie in one warp, and nobody else reads the row
        auto add = [&](float(&acc)[R][D / 32][4], const float(&p)[R][J], const float *y_tile) {
            __syncwarp();
#pragma unroll
            for (u32 r = 0; r < R; r++)
#pragma unroll
                for (u32 j = 0; j < J; j++) p_tile[(ty + r * 16) * P_PITCH + tx + j * 8] = p[r][j];
            __syncwarp();
            add_product<D, STREAM, PITCH, P_PITCH>(acc, p_tile, y_tile, ty, tx);
        };
        if (KEYS) add(acc2, s, y2_tile);
        add(acc1, dp, y1_tile);
    }

#pragma unroll
    for (u32 r = 0; r < R; r++) {
        const u32 row = ty + r * 16;
        if (row >= job.rows) continue;
        store_row<D>(out1 + x_base + row * x_stride, acc1[r], n.scale, tx, n.head_size);
        if (KEYS) store_row<D>(out2 + x_base + row * x_stride, acc2[r], 1.0f, tx, n.head_size);
    }
}

template <int D, int ROWS, int STREAM>
__device__ __forceinline__ void bwd_f32(float *dq, float *dk, float *dv, const float *d_o, const float *q, const float *k,
                                        const float *v, const float *lse, const float *delta, const u32 *cu_seqlens, Sizes n) {
    const Job job = find_job<ROWS, STREAM>(cu_seqlens, n);
    if (job.doc.row >= job.doc.len) return;
    if (job.of_keys) bwd_walk_f32<D, ROWS, STREAM, true>(dk, dv, k, v, q, d_o, lse, delta, job, n);
    else bwd_walk_f32<D, ROWS, STREAM, false>(dq, nullptr, q, d_o, k, v, lse, delta, job, n);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(128) attention_delta_bf16(float *delta, const bf16 *o, const bf16 *d_o, u32 tokens,
                                                                      u32 heads, u32 head_size, u32 ld_o) {
    delta_rows(delta, o, d_o, tokens, heads, head_size, ld_o);
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_bf16_d32(
    bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *d_o, const bf16 *q, const bf16 *k, const bf16 *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_mma<bf16, 32, 4, 1, 64>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_bf16_d64(
    bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *d_o, const bf16 *q, const bf16 *k, const bf16 *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_mma<bf16, 64, 4, 1, 64>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_bf16_d96(
    bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *d_o, const bf16 *q, const bf16 *k, const bf16 *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_mma<bf16, 96, 4, 1, 32>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_bf16_d128(
    bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *d_o, const bf16 *q, const bf16 *k, const bf16 *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_mma<bf16, 128, 4, 1, 32>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_bf16_d256(
    bf16 *dq, bf16 *dk, bf16 *dv, const bf16 *d_o, const bf16 *q, const bf16 *k, const bf16 *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_mma<bf16, 256, 2, 2, 16>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}
#endif

extern "C" __global__ void __launch_bounds__(128) attention_delta_f16(float *delta, const f16 *o, const f16 *d_o, u32 tokens,
                                                                      u32 heads, u32 head_size, u32 ld_o) {
    delta_rows(delta, o, d_o, tokens, heads, head_size, ld_o);
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_f16_d32(
    f16 *dq, f16 *dk, f16 *dv, const f16 *d_o, const f16 *q, const f16 *k, const f16 *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_mma<f16, 32, 4, 1, 64>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_f16_d64(
    f16 *dq, f16 *dk, f16 *dv, const f16 *d_o, const f16 *q, const f16 *k, const f16 *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_mma<f16, 64, 4, 1, 64>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_f16_d96(
    f16 *dq, f16 *dk, f16 *dv, const f16 *d_o, const f16 *q, const f16 *k, const f16 *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_mma<f16, 96, 4, 1, 32>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_f16_d128(
    f16 *dq, f16 *dk, f16 *dv, const f16 *d_o, const f16 *q, const f16 *k, const f16 *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_mma<f16, 128, 4, 1, 32>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_f16_d256(
    f16 *dq, f16 *dk, f16 *dv, const f16 *d_o, const f16 *q, const f16 *k, const f16 *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_mma<f16, 256, 2, 2, 16>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_delta_f32(float *delta, const float *o, const float *d_o, u32 tokens,
                                                                      u32 heads, u32 head_size, u32 ld_o) {
    delta_rows(delta, o, d_o, tokens, heads, head_size, ld_o);
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_f32_d32(
    float *dq, float *dk, float *dv, const float *d_o, const float *q, const float *k, const float *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_f32<32, 32, 16>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_f32_d64(
    float *dq, float *dk, float *dv, const float *d_o, const float *q, const float *k, const float *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_f32<64, 32, 16>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_f32_d96(
    float *dq, float *dk, float *dv, const float *d_o, const float *q, const float *k, const float *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_f32<96, 32, 16>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_f32_d128(
    float *dq, float *dk, float *dv, const float *d_o, const float *q, const float *k, const float *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_f32<128, 32, 16>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_bwd_f32_d256(
    float *dq, float *dk, float *dv, const float *d_o, const float *q, const float *k, const float *v, const float *lse,
    const float *delta, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 kv_heads, u32 head_size, float scale,
    u32 window, float softcap) {
    bwd_f32<256, 16, 8>(dq, dk, dv, d_o, q, k, v, lse, delta, cu_seqlens,
        {docs, tokens, heads, kv_heads, head_size, scale, window, softcap});
}
