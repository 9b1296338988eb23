// The f32 sums that attention_bwd_sm90.cu leaves, in T.
//
// attention_dq: dq [T, H, D] = scale * sums, sums F32 [H, T / 64 + docs, 64 D'] in the order of the warpgroups' registers: a
// block has a tile of 64 queries of its heads in turn, a thread 32 columns' values of a thread of the one warpgroup and those of
// the same thread of the other, which lie half a head on. With tables (cos not null; D = D') dq is turned back before it is
// written, to the gradient of what rope.cu made q of; a thread keeps its cos and sin for all heads. Bytes: sums once, dq once.
// attention_dkv: dk, dv [T, K, D] = the sum of `parts` arrays of kv_sums F32 [parts, 2, T K D], in order; count = T K D, cols = K D.
// Rows of dq, dk and dv are ld elements apart, a multiple of 8.
//
// Launch: attention_dq: grid (T / 64 + docs, H or less), block 2 D'. attention_dkv: grid ceil(count / 512) or less, block 256.

#include "common/attention_sm90.cuh"

constexpr u32 ROWS = 64;

template <typename T, int D>
__device__ __forceinline__ void write_dq(T *dq, const float *sums, const u32 *cu_seqlens, u32 ld, const Turn &turn, const Sizes &n) {
    const DocTile doc = find_tile<ROWS>(cu_seqlens, n.docs, blockIdx.x);
    if (doc.row >= doc.len) return;
    const u32 group = threadIdx.x / 128, thread = threadIdx.x % 128;
    const u32 row = doc.row + thread / 32 * 16 + thread % 32 / 4;
    float2 cos[2][4] = {}, sin[2][4] = {};
    if (turn.cos) {
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            const u64 at = turn.at<D>(doc.begin, row + r * 8, doc.len) + group * 32;
#pragma unroll
            for (u32 e = 0; e < 4; e++) {
                cos[r][e] = *reinterpret_cast<const float2 *>(turn.cos + at + e * 8);
                sin[r][e] = *reinterpret_cast<const float2 *>(turn.sin + at + e * 8);
            }
        }
    }
    for (u32 head = blockIdx.y; head < n.heads; head += gridDim.y) {
        const u64 slot = u64(head) * (n.tokens / ROWS + n.docs) + blockIdx.x;
        const float4 *from = reinterpret_cast<const float4 *>(sums) + slot * (ROWS * D / 4) + group * 512 + thread;
        float a[16], b[16];
#pragma unroll
        for (u32 e = 0; e < 4; e++) {
            const float4 x = from[e * 128], y = from[ROWS * D / 8 + e * 128];
            a[4 * e] = x.x, a[4 * e + 1] = x.y, a[4 * e + 2] = x.z, a[4 * e + 3] = x.w;
            b[4 * e] = y.x, b[4 * e + 1] = y.y, b[4 * e + 2] = y.z, b[4 * e + 3] = y.w;
        }
        if (turn.cos) {
#pragma unroll
            for (u32 e = 0; e < 8; e++) turn_back(a + 2 * e, b + 2 * e, cos[e % 2][e / 2], sin[e % 2][e / 2]);
        }
        T *out = dq + u64(doc.begin) * ld + head * n.head_size;
        store_rows<T, 32>(out, ld, a, n.scale, n.scale, row, doc.len, n.head_size, group * 32);
        store_rows<T, 32>(out, ld, b, n.scale, n.scale, row, doc.len, n.head_size, D / 2 + group * 32);
    }
}

template <typename T>
__device__ __forceinline__ void write_dkv(T *dk, T *dv, const float *kv_sums, u64 count, u32 cols, u32 parts, u32 ld) {
    for (u64 i = u64(blockIdx.x) * 256 + threadIdx.x; i < count / 2; i += u64(gridDim.x) * 256) {
        const bool of_v = i >= count / 4;  // four values a thread: dk's, then dv's
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (u32 p = 0; p < parts; p++) {
            const float4 x = reinterpret_cast<const float4 *>(kv_sums)[p * (count / 2) + i];
            sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
        }
        const u64 at = 4 * (of_v ? i - count / 4 : i), row = at / cols;
        T *const to = (of_v ? dv : dk) + row * ld + (at - row * cols);
        *reinterpret_cast<uint2 *>(to) = make_uint2(pack2<T>(sum.x, sum.y), pack2<T>(sum.z, sum.w));
    }
}

extern "C" __global__ void __launch_bounds__(256) attention_dkv_bf16(bf16 *dk, bf16 *dv, const float *kv_sums,
                                                                     u64 count, u32 cols, u32 parts, u32 ld) {
    write_dkv(dk, dv, kv_sums, count, cols, parts, ld);
}

extern "C" __global__ void __launch_bounds__(256) attention_dq_bf16_d64(
    bf16 *dq, const float *sums, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 head_size, float scale,
    u32 ld, const u32 *positions, const float *cos, const float *sin) {
    write_dq<bf16, 64>(dq, sums, cu_seqlens, ld, {positions, cos, sin},
        {docs, tokens, heads, heads, head_size, scale, 0, 0.0f});
}

extern "C" __global__ void __launch_bounds__(256) attention_dq_bf16_d128(
    bf16 *dq, const float *sums, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 head_size, float scale,
    u32 ld, const u32 *positions, const float *cos, const float *sin) {
    write_dq<bf16, 128>(dq, sums, cu_seqlens, ld, {positions, cos, sin},
        {docs, tokens, heads, heads, head_size, scale, 0, 0.0f});
}

extern "C" __global__ void __launch_bounds__(256) attention_dkv_f16(f16 *dk, f16 *dv, const float *kv_sums,
                                                                     u64 count, u32 cols, u32 parts, u32 ld) {
    write_dkv(dk, dv, kv_sums, count, cols, parts, ld);
}

extern "C" __global__ void __launch_bounds__(256) attention_dq_f16_d64(
    f16 *dq, const float *sums, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 head_size, float scale,
    u32 ld, const u32 *positions, const float *cos, const float *sin) {
    write_dq<f16, 64>(dq, sums, cu_seqlens, ld, {positions, cos, sin},
        {docs, tokens, heads, heads, head_size, scale, 0, 0.0f});
}

extern "C" __global__ void __launch_bounds__(256) attention_dq_f16_d128(
    f16 *dq, const float *sums, const u32 *cu_seqlens, u32 docs, u32 tokens, u32 heads, u32 head_size, float scale,
    u32 ld, const u32 *positions, const float *cos, const float *sin) {
    write_dq<f16, 128>(dq, sums, cu_seqlens, ld, {positions, cos, sin},
        {docs, tokens, heads, heads, head_size, scale, 0, 0.0f});
}
