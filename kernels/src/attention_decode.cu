// Attention of a few new tokens over a cache of keys and values, for generation; of several texts at once along blockIdx.z.
//
// q, o [n, H, D], n in 1..8 or more; keys, values [L, K, D], of which the first *len rows are the tokens so far, the last n of
// them the queries' own. Query r is token i = *len - n + r and sees the keys j <= i, j > i - window (window 0: all), through
// softcap (0: none). Text z has its queries and results after those of the texts before it, len[z], and its keys and values in
// slot slots[z] of `capacity` rows (slots null: one text, in slot 0).
//
// The n H / K query rows of a key/value head are taken 16 at a time; blockIdx.y is (head, sixteen), blockIdx.x a range of keys,
// its bounds computed from *len. The warps of a block each walk over their own keys, 16 at a time, copying the next while they
// work on the present ones: scores and P V by mma.sync as in attention_fwd.cu (f32: plain FMA, one row after the other). The
// block writes its unnormalised sum, its maximum and its sum of exp to `partial`; the last block of a blockIdx.y to arrive adds
// the ranges up in their order.
//
// Bytes: the keys and values so far, once for every 16 query rows.
//
// Launch: grid (SPLITS, K ceil(n H / K / 16), texts), block 128 (D' 256: 64), shared bytes min(512 D', 65536), D' the instance's D.
// SPLITS: about 2 multiprocessors / gridDim.y, 1 to 32, at most one for 64 keys of the longest *len expected.
// partial: F32 [texts, gridDim.y, SPLITS, 16, D' + 2]; arrivals: u32 [texts, gridDim.y], zero before the first launch and left zero.
//
// spills: attention_decode_f16_d256 96 on sm_75: 255 registers hold the queries' 64 and the output's 128
// spills: attention_decode_f16_d64 8 one value outside the loop
// spills: attention_decode_bf16_d64 8 one value outside the loop

#include "common/attention.cuh"
#include "common/early.cuh"

struct Cache {
    u32 len, rows, heads, kv_heads, head_size;
    float scale;
    u32 window;
    float softcap;
};

// The length of the block's text, once launches before have ended.
__device__ __forceinline__ u32 length(const u32 *len) {
    begin_early();
    return len[blockIdx.z];
}

// The launch's pointers, moved to the block's text.
template <typename T>
struct Text {
    T *o;
    float *partial;
    u32 *arrivals;
    const T *q, *keys, *values;

    __device__ __forceinline__ void choose(const u32 *slots, u32 capacity, u32 size, const Cache &n) {
        const u64 token = u64(n.heads) * n.head_size, row = u64(n.kv_heads) * n.head_size;
        o += blockIdx.z * n.rows * token, q += blockIdx.z * n.rows * token;
        partial += u64(blockIdx.z) * gridDim.y * gridDim.x * (16 * (size + 2)), arrivals += blockIdx.z * gridDim.y;
        if (slots) keys += slots[blockIdx.z] * (capacity * row), values += slots[blockIdx.z] * (capacity * row);
    }
};

// Where the row'th of a key/value head's query rows lies in q and o, and its place in the document.
struct QueryRow {
    u64 at;
    u32 i;
};

__device__ __forceinline__ QueryRow query_row(u32 row, u32 kv_head, const Cache &n) {
    const u32 group = n.heads / n.kv_heads, query = row / group;
    return {(u64(query) * n.heads + kv_head * group + row % group) * n.head_size, n.len - n.rows + query};
}

// What the block works on.
struct Range {
    u32 kv_head, row, rows;  // query rows row..row + rows of the head's
    u32 first, last;         // keys
};

template <u32 STEP>
__device__ __forceinline__ Range find_range(const Cache &n) {
    const u32 all = n.rows * (n.heads / n.kv_heads), tiles = (all + 15) / 16;
    const u32 row = blockIdx.y % tiles * 16, from = first_key(n.len - n.rows, n.window), keys = n.len - from;
    const u32 each = ((keys + gridDim.x - 1) / gridDim.x + STEP - 1) / STEP * STEP;
    const u32 first = u32(min(u64(blockIdx.x) * each, u64(keys))), last = min(first + each, keys);
    return {blockIdx.y / tiles, row, min(all - row, 16u), from + first, from + last};
}

// The warps' sums (rows of D, maximum and sum of exp of each, in shared memory) to `partial`; the last block to come adds up the
// ranges.
template <typename T, int D, int WARPS>
__device__ __forceinline__ void combine(T *o, float *partial, u32 *arrivals, float *sums, u32 &arrived, const Range &range,
                                        const Cache &n) {
    const float *stats = sums + WARPS * 16 * D;
    float *mine = partial + (u64(blockIdx.y) * gridDim.x + blockIdx.x) * (16 * (D + 2));
    for (u32 at = threadIdx.x; at < range.rows * D; at += 32 * WARPS) {
        const u32 row = at / D;
        float high = NEG_INFINITY, sum = 0.0f, total = 0.0f;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) high = fmaxf(high, stats[(w * 16 + row) * 2]);
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) {
            const float m = stats[(w * 16 + row) * 2], factor = m == NEG_INFINITY ? 0.0f : exp2f(m - high);
            sum += factor * sums[w * (16 * D) + at];
            total += factor * stats[(w * 16 + row) * 2 + 1];
        }
        mine[at] = sum;
        if (at % D == 0) mine[16 * D + 2 * row] = high, mine[16 * D + 2 * row + 1] = total;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) arrived = atomicAdd(arrivals + blockIdx.y, 1u);
    __syncthreads();
    if (arrived != gridDim.x - 1) return;
    __threadfence();
    if (threadIdx.x == 0) arrivals[blockIdx.y] = 0;
    // Every step's loads are independent of one another: one trip to memory for the maxima, one for the sums.
    const float *all = partial + u64(blockIdx.y) * gridDim.x * (16 * (D + 2));
    float *factors = sums;  // [row][range]: exp(maximum - the row's) / the row's sum of exp
    for (u32 row = threadIdx.x / 32; row < range.rows; row += WARPS) {
        const float *stat = all + 16 * D + 2 * row;
        float high = NEG_INFINITY, total = 0.0f;
        for (u32 s = threadIdx.x % 32; s < gridDim.x; s += 32) high = fmaxf(high, __ldcg(stat + u64(s) * (16 * (D + 2))));
#pragma unroll
        for (u32 d = 16; d; d /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, d));
        for (u32 s = threadIdx.x % 32; s < gridDim.x; s += 32) {
            const float2 x = __ldcg(reinterpret_cast<const float2 *>(stat + u64(s) * (16 * (D + 2))));
            factors[row * gridDim.x + s] = x.x == NEG_INFINITY ? 0.0f : exp2f(x.x - high);
            total += factors[row * gridDim.x + s] * x.y;
        }
#pragma unroll
        for (u32 d = 16; d; d /= 2) total += __shfl_xor_sync(~0u, total, d);
        for (u32 s = threadIdx.x % 32; s < gridDim.x; s += 32) factors[row * gridDim.x + s] /= total;
    }
    __syncthreads();
    for (u32 at = threadIdx.x * 4; at < range.rows * D; at += 128 * WARPS) {
        const u32 row = at / D;
        if (at % D >= n.head_size) continue;
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
        for (u32 s = 0; s < gridDim.x; s++) {
            const float2 *of = reinterpret_cast<const float2 *>(all + u64(s) * (16 * (D + 2)) + at);
            const float2 x = __ldcg(of), y = __ldcg(of + 1);
            const float factor = factors[row * gridDim.x + s];
            sum = make_float4(sum.x + factor * x.x, sum.y + factor * x.y, sum.z + factor * y.x, sum.w + factor * y.y);
        }
        T *to = o + query_row(range.row + row, range.kv_head, n).at + at % D;
        to[0] = from_f32<T>(sum.x), to[1] = from_f32<T>(sum.y), to[2] = from_f32<T>(sum.z), to[3] = from_f32<T>(sum.w);
    }
}

template <typename T, int D, int WARPS>
__device__ __forceinline__ void decode_mma(Text<T> text, const u32 *slots, u32 capacity, const Cache &n) {
    text.choose(slots, capacity, D, n);
    const auto *const q = text.q, *const keys = text.keys, *const values = text.values;
    constexpr u32 KEYS = 16, STEP = KEYS * WARPS, TILE = KEYS * D * 2;
    extern __shared__ __align__(128) u8 shared[];
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Range range = find_range<STEP>(n);
    const u32 tiles = shared_address(shared) + warp * (4 * TILE);  // K, V of each of two stages
    const Sizes sizes = {0, 0, n.heads, n.kv_heads, n.head_size, n.scale, n.window, n.softcap};
    const u64 stride = u64(n.kv_heads) * n.head_size, base = u64(range.kv_head) * n.head_size;

    const u32 begin = range.first + warp * KEYS;
    const u32 steps = begin < range.last ? (range.last - begin + STEP - 1) / STEP : 0;
    auto load = [&](u32 step) {
        const u32 key = begin + step * STEP, tile = tiles + step % 2 * (2 * TILE);
#pragma unroll
        for (u32 c = 0; c < D / 16; c++) {
            const u32 at = c * 32 + lane, row = at / (D / 8), chunk = at % (D / 8);
            const bool valid = key + row < range.last && chunk * 8 < n.head_size;
            const u64 from = valid ? base + (key + row) * stride + chunk * 8 : 0;
            copy16(tile + tile_offset<D>(row, chunk), keys + from, valid);
            copy16(tile + TILE + tile_offset<D>(row, chunk), values + from, valid);
        }
    };
    if (steps > 0) load(0);
    copy_commit();

    u32 a[D / 16][4];  // the query rows
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        const u32 row = lane / 4 + r * 8;
        const T *from = q + query_row(range.row + (row < range.rows ? row : 0), range.kv_head, n).at;
#pragma unroll
        for (u32 kk = 0; kk < D / 16; kk++)
#pragma unroll
            for (u32 h = 0; h < 2; h++) {
                const u32 col = kk * 16 + h * 8 + lane % 4 * 2;
                a[kk][2 * h + r] = row < range.rows && col < n.head_size ? *reinterpret_cast<const u32 *>(from + col) : 0;
            }
    }
    const Place by_rows = place_rows(lane), by_columns = place_columns(lane);
    u32 i[2];
#pragma unroll
    for (u32 r = 0; r < 2; r++) i[r] = query_row(range.row + min(lane / 4 + r * 8, range.rows - 1), range.kv_head, n).i;
    float acc[D / 8][4] = {}, row_max[2] = {NEG_INFINITY, NEG_INFINITY}, row_sum[2] = {0.0f, 0.0f};

    for (u32 step = 0; step < steps; step++) {
        if (step + 1 < steps) load(step + 1);
        copy_commit();
        copy_wait<1>();
        __syncwarp();
        const u32 k_tile = tiles + step % 2 * (2 * TILE), v_tile = k_tile + TILE, key = begin + step * STEP;
        float s[2][4] = {};
#pragma unroll
        for (u32 kk = 0; kk < D / 16; kk++) {
            u32 b[4];
            load_matrices(b, k_tile + tile_offset<D>(by_columns.row, kk * 2 + by_columns.chunk));
            mma<T>(s[0], a[kk], b[0], b[1]);
            mma<T>(s[1], a[kk], b[2], b[3]);
        }
        scores<false>(s, sizes);
        float keep[2];
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            float m = row_max[r];
#pragma unroll
            for (u32 j = 0; j < 2; j++)
#pragma unroll
                for (u32 e = 2 * r; e < 2 * r + 2; e++) {
                    const u32 at = key + j * 8 + lane % 4 * 2 + e % 2;
                    if (at >= range.last || !sees(i[r], at, n.window)) s[j][e] = NEG_INFINITY;
                    m = fmaxf(m, s[j][e]);
                }
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
            const float from = m == NEG_INFINITY ? 0.0f : m;
            keep[r] = exp2_fast(row_max[r] - from);
            row_max[r] = m;
            row_sum[r] *= keep[r];
#pragma unroll
            for (u32 j = 0; j < 2; j++)
#pragma unroll
                for (u32 e = 2 * r; e < 2 * r + 2; e++) row_sum[r] += s[j][e] = exp2_fast(s[j][e] - from);
        }
        const u32 p[4] = {pack2<T>(s[0][0], s[0][1]), pack2<T>(s[0][2], s[0][3]), pack2<T>(s[1][0], s[1][1]),
                          pack2<T>(s[1][2], s[1][3])};
#pragma unroll
        for (u32 d = 0; d < D / 16; d++) {
            u32 b[4];
            load_matrices_transposed(b, v_tile + tile_offset<D>(by_rows.row, d * 2 + by_rows.chunk));
#pragma unroll
            for (u32 e = 0; e < 4; e++) acc[2 * d][e] *= keep[e / 2], acc[2 * d + 1][e] *= keep[e / 2];
            mma<T>(acc[2 * d], p, b[0], b[1]);
            mma<T>(acc[2 * d + 1], p, b[2], b[3]);
        }
        __syncwarp();
    }

    copy_wait<0>();
    __syncwarp();
    __syncthreads();  // all are done with their tiles
    float *all = reinterpret_cast<float *>(shared), *sums = all + warp * (16 * D), *stats = all + WARPS * 16 * D;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        const u32 row = lane / 4 + r * 8;
        float sum = row_sum[r];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (lane % 4 == 0) stats[(warp * 16 + row) * 2] = row_max[r], stats[(warp * 16 + row) * 2 + 1] = sum;
#pragma unroll
        for (u32 d = 0; d < D / 8; d++)
            *reinterpret_cast<float2 *>(sums + row * D + d * 8 + lane % 4 * 2) = make_float2(acc[d][2 * r], acc[d][2 * r + 1]);
    }
    __syncthreads();
    combine<T, D, WARPS>(text.o, text.partial, text.arrivals, all, reinterpret_cast<u32 *>(all + WARPS * (16 * D + 32))[0], range, n);
}

// A warp takes every WARPS-th key of the range; a lane columns lane + 32 c.
template <int D>
__device__ __forceinline__ void decode_f32(Text<float> text, const u32 *slots, u32 capacity, const Cache &n) {
    text.choose(slots, capacity, D, n);
    const auto *const q = text.q, *const keys = text.keys, *const values = text.values;
    constexpr u32 WARPS = D == 256 ? 2 : 4;
    extern __shared__ __align__(128) u8 shared[];
    float *sums = reinterpret_cast<float *>(shared), *stats = sums + WARPS * 16 * D;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Range range = find_range<WARPS>(n);
    const u64 stride = u64(n.kv_heads) * n.head_size, base = u64(range.kv_head) * n.head_size;
    for (u32 row = 0; row < range.rows; row++) {
        const QueryRow query = query_row(range.row + row, range.kv_head, n);
        float a[D / 32], acc[D / 32] = {}, high = NEG_INFINITY, sum = 0.0f;
#pragma unroll
        for (u32 c = 0; c < D / 32; c++) a[c] = c * 32 + lane < n.head_size ? q[query.at + c * 32 + lane] : 0.0f;
        for (u32 key = range.first + warp; key < range.last; key += WARPS) {
            if (!sees(query.i, key, n.window)) continue;
            const u64 from = base + key * stride;
            float dot[1][1] = {};
#pragma unroll
            for (u32 c = 0; c < D / 32; c++)
                if (c * 32 + lane < n.head_size) dot[0][0] += a[c] * keys[from + c * 32 + lane];
#pragma unroll
            for (u32 d = 16; d; d /= 2) dot[0][0] += __shfl_xor_sync(~0u, dot[0][0], d);
            scores<true>(dot, Sizes{0, 0, 0, 0, 0, n.scale, 0, n.softcap});
            const float m = fmaxf(high, dot[0][0]), keep = exp2f(high - m), p = exp2f(dot[0][0] - m);
            high = m;
            sum = sum * keep + p;
#pragma unroll
            for (u32 c = 0; c < D / 32; c++)
                acc[c] = acc[c] * keep + (c * 32 + lane < n.head_size ? p * values[from + c * 32 + lane] : 0.0f);
        }
        if (lane == 0) stats[(warp * 16 + row) * 2] = high, stats[(warp * 16 + row) * 2 + 1] = sum;
#pragma unroll
        for (u32 c = 0; c < D / 32; c++) sums[warp * (16 * D) + row * D + c * 32 + lane] = acc[c];
    }
    __syncthreads();
    combine<float, D, WARPS>(text.o, text.partial, text.arrivals, sums, reinterpret_cast<u32 *>(stats + WARPS * 32)[0], range, n);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(128) attention_decode_bf16_d64(
    bf16 *o, float *partial, u32 *arrivals, const bf16 *q, const bf16 *keys, const bf16 *values, const u32 *len,
    const u32 *slots, u32 capacity, u32 rows, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    decode_mma<bf16, 64, 4>({o, partial, arrivals, q, keys, values}, slots, capacity,
        {length(len), rows, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_decode_bf16_d128(
    bf16 *o, float *partial, u32 *arrivals, const bf16 *q, const bf16 *keys, const bf16 *values, const u32 *len,
    const u32 *slots, u32 capacity, u32 rows, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    decode_mma<bf16, 128, 4>({o, partial, arrivals, q, keys, values}, slots, capacity,
        {length(len), rows, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(64) attention_decode_bf16_d256(
    bf16 *o, float *partial, u32 *arrivals, const bf16 *q, const bf16 *keys, const bf16 *values, const u32 *len,
    const u32 *slots, u32 capacity, u32 rows, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    decode_mma<bf16, 256, 2>({o, partial, arrivals, q, keys, values}, slots, capacity,
        {length(len), rows, heads, kv_heads, head_size, scale, window, softcap});
}
#endif

extern "C" __global__ void __launch_bounds__(128) attention_decode_f16_d64(
    f16 *o, float *partial, u32 *arrivals, const f16 *q, const f16 *keys, const f16 *values, const u32 *len,
    const u32 *slots, u32 capacity, u32 rows, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    decode_mma<f16, 64, 4>({o, partial, arrivals, q, keys, values}, slots, capacity,
        {length(len), rows, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_decode_f16_d128(
    f16 *o, float *partial, u32 *arrivals, const f16 *q, const f16 *keys, const f16 *values, const u32 *len,
    const u32 *slots, u32 capacity, u32 rows, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    decode_mma<f16, 128, 4>({o, partial, arrivals, q, keys, values}, slots, capacity,
        {length(len), rows, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(64) attention_decode_f16_d256(
    f16 *o, float *partial, u32 *arrivals, const f16 *q, const f16 *keys, const f16 *values, const u32 *len,
    const u32 *slots, u32 capacity, u32 rows, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    decode_mma<f16, 256, 2>({o, partial, arrivals, q, keys, values}, slots, capacity,
        {length(len), rows, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_decode_f32_d64(
    float *o, float *partial, u32 *arrivals, const float *q, const float *keys, const float *values, const u32 *len,
    const u32 *slots, u32 capacity, u32 rows, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    decode_f32<64>({o, partial, arrivals, q, keys, values}, slots, capacity,
        {length(len), rows, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(128) attention_decode_f32_d128(
    float *o, float *partial, u32 *arrivals, const float *q, const float *keys, const float *values, const u32 *len,
    const u32 *slots, u32 capacity, u32 rows, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    decode_f32<128>({o, partial, arrivals, q, keys, values}, slots, capacity,
        {length(len), rows, heads, kv_heads, head_size, scale, window, softcap});
}

extern "C" __global__ void __launch_bounds__(64) attention_decode_f32_d256(
    float *o, float *partial, u32 *arrivals, const float *q, const float *keys, const float *values, const u32 *len,
    const u32 *slots, u32 capacity, u32 rows, u32 heads, u32 kv_heads, u32 head_size, float scale, u32 window, float softcap) {
    decode_f32<256>({o, partial, arrivals, q, keys, values}, slots, capacity,
        {length(len), rows, heads, kv_heads, head_size, scale, window, softcap});
}
