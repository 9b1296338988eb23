// What the attention kernels share: which document and rows a block works on, tiles in shared memory, and the mask.
//
// Block slots. A tile of a document is TILE of its rows. Document d owns the slots cu[d] / TILE + d up to cu[d + 1] / TILE + d +
// 1, which are at least the ceil(len / TILE) that it needs, so a block finds its document by binary search in cu_seqlens alone:
// no table is made on the host, and T / TILE + docs slots serve whatever documents a captured launch is replayed with. A slot
// beyond its document's rows is idle.
#pragma once

#include "common/mma.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
#define NEG_INFINITY __int_as_float(0xff800000)

struct DocTile {
    u32 begin;  // the document's first token
    u32 len;    // its tokens
    u32 row;    // the tile's first row within it; >= len: an idle slot
    u32 index;  // the document
};

template <int TILE>
__device__ __forceinline__ DocTile find_tile(const u32 *__restrict__ cu_seqlens, u32 docs, u32 slot) {
    u32 low = 0, high = docs;  // the last d in low..high with its first slot at or before `slot`
    while (high - low > 1) {
        u32 mid = (low + high) / 2;
        if (cu_seqlens[mid] / TILE + mid <= slot) low = mid;
        else high = mid;
    }
    u32 begin = cu_seqlens[low], end = cu_seqlens[low + 1];
    return {begin, end - begin, (slot - (begin / TILE + low)) * TILE, low};
}

// Byte offset of 16 bytes (8 columns) of a row in a tile [rows, D] of 16-bit values. The chunks of a row are permuted by its
// number so that the eight rows that one matrix load touches lie in different banks.
template <int D>
__device__ __forceinline__ u32 tile_offset(u32 row, u32 chunk) {
    u32 key = D % 64 == 0 ? row & 7 : row >> 1 & 3;
    return row * (D * 2) + (chunk ^ key) * 16;
}

// Rows 0..ROWS of a matrix with `stride` elements a row into a tile; zeros beyond `rows` and `cols` (a multiple of 8).
template <int D, int ROWS, int THREADS, typename T>
__device__ __forceinline__ void load_tile(u32 tile, const T *base, u64 stride, u32 rows, u32 cols) {
    constexpr u32 CHUNKS = D / 8;
    static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies equally many chunks");
#pragma unroll
    for (u32 i = 0; i < ROWS * CHUNKS / THREADS; i++) {
        u32 at = i * THREADS + threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
        bool valid = row < rows && chunk * 8 < cols;
        copy16(tile + tile_offset<D>(row, chunk), valid ? base + row * stride + chunk * 8 : base, valid);
    }
}

// The same for f32, rows PITCH floats apart, by ordinary loads (cols a multiple of 4).
template <int D, int ROWS, int PITCH, int THREADS>
__device__ __forceinline__ void load_tile_f32(float *tile, const float *base, u64 stride, u32 rows, u32 cols) {
    for (u32 at = threadIdx.x; at < ROWS * D / 4; at += THREADS) {
        u32 row = at / (D / 4), col = at % (D / 4) * 4;
        bool valid = row < rows && col < cols;
        float4 x = valid ? *reinterpret_cast<const float4 *>(base + row * stride + col) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        *reinterpret_cast<float4 *>(tile + row * PITCH + col) = x;
    }
}

// Query i sees key j. Both count from the start of the document; `window` 0 is none.
__device__ __forceinline__ bool sees(u32 i, u32 j, u32 window) { return j <= i && (window == 0 || j + window > i); }

// The first key that query i sees.
__device__ __forceinline__ u32 first_key(u32 i, u32 window) { return window == 0 || i < window ? 0 : i - window + 1; }

// Queries query..query + queries see all of keys key..key + keys.
__device__ __forceinline__ bool all_seen(u32 query, u32 queries, u32 key, u32 keys, u32 window) {
    return key + keys <= query + 1 && (window == 0 || key + window >= query + queries);
}

// The sizes and constants every entry takes.
struct Sizes {
    u32 docs, tokens, heads, kv_heads, head_size;
    float scale;
    u32 window;
    float softcap;
};

// Scores q · k times scale, through the softcap, in units of ln 2.
template <bool EXACT, int N, int M>
__device__ __forceinline__ void scores(float (&s)[N][M], const Sizes &n) {
    if (n.softcap == 0.0f) {
        const float scale = n.scale * LOG2_E;
#pragma unroll
        for (u32 j = 0; j < N; j++)
#pragma unroll
            for (u32 e = 0; e < M; e++) s[j][e] *= scale;
    } else {
        const float scale = n.scale / n.softcap, cap = n.softcap * LOG2_E;
#pragma unroll
        for (u32 j = 0; j < N; j++)
#pragma unroll
            for (u32 e = 0; e < M; e++) s[j][e] = cap * (EXACT ? tanhf(s[j][e] * scale) : tanh_fast(s[j][e] * scale));
    }
}

// The f32 kernels' products, for thread (y, x) of a 16 x 8 block. s[r][j] += a row y + 16 r · b row x + 8 j.
template <int D, int PITCH, int R, int J>
__device__ __forceinline__ void dots(float (&s)[R][J], const float *a, const float *b, u32 y, u32 x) {
#pragma unroll 4
    for (u32 d = 0; d < D; d += 4) {
        float4 u[R];
#pragma unroll
        for (u32 r = 0; r < R; r++) u[r] = *reinterpret_cast<const float4 *>(a + (y + r * 16) * PITCH + d);
#pragma unroll
        for (u32 j = 0; j < J; j++) {
            const float4 w = *reinterpret_cast<const float4 *>(b + (x + j * 8) * PITCH + d);
#pragma unroll
            for (u32 r = 0; r < R; r++) s[r][j] += u[r].x * w.x + u[r].y * w.y + u[r].z * w.z + u[r].w * w.w;
        }
    }
}

// acc[r][c][e] += Σ_j p[y + 16 r][j] b[j][4 x + 32 c + e].
template <int D, int KEYS, int PITCH, int P_PITCH, int R>
__device__ __forceinline__ void add_product(float (&acc)[R][D / 32][4], const float *p, const float *b, u32 y, u32 x) {
#pragma unroll 4
    for (u32 j = 0; j < KEYS; j++) {
        float w[R];
#pragma unroll
        for (u32 r = 0; r < R; r++) w[r] = p[(y + r * 16) * P_PITCH + j];
#pragma unroll
        for (u32 c = 0; c < D / 32; c++) {
            const float4 u = *reinterpret_cast<const float4 *>(b + j * PITCH + x * 4 + c * 32);
#pragma unroll
            for (u32 r = 0; r < R; r++) {
                acc[r][c][0] += w[r] * u.x;
                acc[r][c][1] += w[r] * u.y;
                acc[r][c][2] += w[r] * u.z;
                acc[r][c][3] += w[r] * u.w;
            }
        }
    }
}

template <int D>
__device__ __forceinline__ void store_row(float *out, const float (&acc)[D / 32][4], float factor, u32 x, u32 cols) {
#pragma unroll
    for (u32 c = 0; c < D / 32; c++) {
        const u32 col = x * 4 + c * 32;
        if (col < cols)
            *reinterpret_cast<float4 *>(out + col) =
                make_float4(acc[c][0] * factor, acc[c][1] * factor, acc[c][2] * factor, acc[c][3] * factor);
    }
}
