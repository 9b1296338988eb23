// y_p = x W_pᵀ + s_p h_p B_pᵀ + bias_p for one to three matrices of 4-bit blocks W_p [n_p, k] over the same few rows x [m, k],
// m <= 8: the step of generation. y_p [m, n_p]; h_p [m, r_p] are the columns of h that follow those of the parts before, or
// there is no B_p [n_p, r_p].
//
// A W is level(code) · scale(block). Tensor cores sum level · x over a block, with the level rounded to T; the sum is multiplied by
// the block's scale in f32. Blocks are of 64 elements or a multiple, and k is a multiple of 64; pointers are aligned to 16 bytes.
//
// Two codes at a time become a pair of T: byte b of W looks up entry b of a table in shared memory, which holds every entry once
// for each lane, so that no two lanes want the same bank: one byte permutation makes the address, one load gives the pair.
//
// mma: W's rows are A's rows, x's rows are B's columns, and a slice of 128 columns of W is eight products. A lane holds 32
// neighbouring columns of rows g and g + 8, so lanes t < 2 hold the slice's first half and t >= 2 its second, whose scales may
// differ: row r of x is column 2 r of B in the lanes of the first half and column 2 r + 1 in those of the second, zero
// elsewhere. C (g, 2 r) and (g, 2 r + 1), which lie in one lane, are then the sums of the two halves.
//
// Work: a block takes neighbouring tiles of 16 rows; their slices in one line are shared out to its warps evenly. A warp leaves its
// sum of each tile that it has a part of in shared memory. There is one barrier before the loop and one after it.
//
// Launch: block 32 WARPS, grid any up to the number of tiles, one a multiprocessor is best. Dynamic shared memory: TABLE bytes, then
// with `held` x as [slice][word of a lane][lane % 4][row], 256 m bytes a slice, then WARPS · segments · 16 m floats. `segments`: the
// most tiles that a warp has a part of.
//
// Bytes: W once.
//
// spills: few_rows_any_bf16 8 two groups of sums, and x from memory

#include "common/mma.cuh"
#include "common/vec.cuh"

constexpr u32 TILE = 16;
constexpr u32 SLICE = 128;
#if __CUDA_ARCH__ >= 800
// An entry and as much room again, so that the byte itself is the second byte of the address.
constexpr u32 ENTRY_SHIFT = 8;
#else
constexpr u32 ENTRY_SHIFT = 7;
#endif
constexpr u32 TABLE = 256 << ENTRY_SHIFT;

template <typename T>
struct Part {
    T *y;
    const u8 *packed;
    const void *absmax;     // codes, or floats
    const float *absmax2, *map;  // null: `absmax` are floats
    const T *bias, *b;
    float offset, scale;
    u32 n, rank;

    __device__ __forceinline__ u32 tiles() const { return (n + TILE - 1) / TILE; }
};

// A part, its number, and which of the launch's tiles and of h's columns is its first.
template <typename T>
struct Found {
    Part<T> part;
    u32 index, tile, column;
};

template <typename T>
struct Launch {
    Part<T> parts[3];
    const T *x, *h;
    const float *code;
    u32 m, k, shift, segments;

    __device__ __forceinline__ u32 tiles() const { return parts[0].tiles() + parts[1].tiles() + parts[2].tiles(); }
    __device__ __forceinline__ u32 ranks() const { return parts[0].rank + parts[1].rank + parts[2].rank; }
    __device__ __forceinline__ Found<T> find(u32 tile) const {
        const u32 second = parts[0].tiles(), third = second + parts[1].tiles();
        if (tile < second) return {parts[0], 0, 0, 0};
        if (tile < third) return {parts[1], 1, second, parts[0].rank};
        return {parts[2], 2, third, parts[0].rank + parts[1].rank};
    }
};

// A scale as it lies in memory; code PLAIN: it is `absmax` itself.
struct Scale {
    u32 code;
    float absmax;
};
constexpr u32 PLAIN = 256;

// How scales of a part are read.
struct Scales {
    const float *map;
    float offset;

    // The product is rounded before the offset is added, as on the CPU: no fused multiply-add.
    __device__ __forceinline__ float value(Scale x) const {
        return x.code == PLAIN ? x.absmax : __fadd_rn(__fmul_rn(map[x.code], x.absmax), offset);
    }
};

struct Fetched {
    uint4 codes[2];
    Scale scale;
};

__device__ __forceinline__ uint4 load_codes(const u8 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// Walks over the slices of the block's tiles in order: what the lane loads there.
template <typename T>
struct Reader {
    const u8 *codes;
    const void *absmax;
    const float *absmax2;
    u32 below;    // bytes from the lane's upper row to its lower one
    u32 scale;    // the element whose scale it loads
    u32 tile, slice;

    __device__ __forceinline__ void seek(const Launch<T> &launch, u32 lane) {
        const Found<T> found = launch.find(tile);
        const Part<T> &part = found.part;
        const u32 first = (tile - found.tile) * TILE, last = part.n - 1;
        const u32 upper = min(first + lane / 4, last), lower = min(first + lane / 4 + 8, last);
        const u32 column = slice * SLICE + lane % 4 * 32;
        codes = part.packed + (u64(upper) * launch.k + column) / 2;
        below = (lower - upper) * (launch.k / 2);
        scale = min(first + lane / 2, last) * launch.k + slice * SLICE + lane % 2 * 64;
        absmax = part.absmax, absmax2 = part.absmax2;
    }
    __device__ __forceinline__ void fetch(Fetched &to, const Launch<T> &launch, u32 lane) {
        // Beyond the row: the columns before, whose x is zero there.
        const u32 back = slice * SLICE + lane % 4 * 32 < launch.k ? 0 : 32;
        to.codes[0] = load_codes(codes - back), to.codes[1] = load_codes(codes + below - back);
        const u32 block = (scale - (slice * SLICE + lane % 2 * 64 < launch.k ? 0 : 64)) >> launch.shift;
        if (absmax2) to.scale = {reinterpret_cast<const u8 *>(absmax)[block], absmax2[block >> 8]};
        else to.scale = {PLAIN, reinterpret_cast<const float *>(absmax)[block]};
    }
    __device__ __forceinline__ void next(const Launch<T> &launch, u32 lane, u32 slices) {
        codes += SLICE / 2, scale += SLICE;
        if (++slice == slices) slice = 0, ++tile, seek(launch, lane);
    }
};

// Byte `i` of `word` as a pair of T; `place`: the lane's four bytes of an entry.
template <int I>
__device__ __forceinline__ u32 pair(const u8 *table, u32 word, u32 place) {
    u32 at;
    if constexpr (ENTRY_SHIFT == 8) asm("prmt.b32 %0, %1, %2, %3;" : "=r"(at) : "r"(word), "r"(place), "n"(0x5504 | I << 4));
    else at = (I == 0 ? word << 7 : word >> (I * 8 - 7)) & 0x7f80 | place;
    return *reinterpret_cast<const u32 *>(table + at);
}

template <typename T>
__device__ __forceinline__ void fill_table(u8 *table, const float *code) {
    const float level = code[threadIdx.x % 16];
    for (u32 i = threadIdx.x / 8; i < 256; i += blockDim.x / 8) {
        const u32 word = pack2<T>(__shfl_sync(~0u, level, i / 16), __shfl_sync(~0u, level, i % 16));
        *reinterpret_cast<uint4 *>(table + (i << ENTRY_SHIFT) + threadIdx.x % 8 * 16) = make_uint4(word, word, word, word);
    }
}

// x in 16 bytes: [slice][word][lane % 4][row], zeros beyond k.
template <typename T>
__device__ __forceinline__ void hold_x(uint4 *to, const Launch<T> &launch, u32 slices) {
    const u32 words = slices * (SLICE / 8);
    for (u32 i = threadIdx.x; i < words * launch.m; i += blockDim.x) {
        const u32 row = i / words, word = i % words;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (word * 8 < launch.k) v = *reinterpret_cast<const uint4 *>(launch.x + row * launch.k + word * 8);
        to[((word / 16 * 4 + word % 4) * 4 + word / 4 % 4) * launch.m + row] = v;
    }
}

// Where the lane's part of B comes from: its row of x (in the first or second four), if it holds one.
template <int GROUPS, bool HELD, typename T>
struct Columns {
    const T *x[HELD ? 1 : GROUPS];
    u32 at, step;
    bool valid[GROUPS];

    __device__ __forceinline__ Columns(const Launch<T> &launch, u32 lane) {
        const u32 row = lane / 8;
        at = lane % 4 * launch.m + row, step = 4 * launch.m;
#pragma unroll
        for (u32 j = 0; j < GROUPS; j++) {
            valid[j] = lane / 4 % 2 == lane % 4 / 2 && row + j * 4 < launch.m;
            if constexpr (!HELD) x[j] = launch.x + (row + j * 4) * launch.k;
        }
    }
    __device__ __forceinline__ uint4 get(const uint4 *held, const Launch<T> &launch, u32 slice, u32 lane, u32 word, u32 j) const {
        uint4 b = make_uint4(0, 0, 0, 0);
        if constexpr (HELD) {
            if (valid[j]) b = held[at + (slice * 4 + word) * step + j * 4];
        } else {
            const u32 column = slice * SLICE + lane % 4 * 32 + word * 8;
            if (valid[j] && column < launch.k) b = *reinterpret_cast<const uint4 *>(x[j] + column);
        }
        return b;
    }
};

// Sums of one slice, for rows 0..4 of x and, with two groups, 4..8: acc[group] of rows g and g + 8.
template <int GROUPS, bool HELD, typename T>
__device__ __forceinline__ void add_slice(float (&acc)[GROUPS][2], const Fetched &from, float scale, const u8 *table,
                                          const uint4 *held, const Columns<GROUPS, HELD, T> &columns, const Launch<T> &launch,
                                          u32 slice, u32 lane, u32 place) {
    float c[GROUPS][4] = {};
    const u32 upper[4] = {from.codes[0].x, from.codes[0].y, from.codes[0].z, from.codes[0].w};
    const u32 lower[4] = {from.codes[1].x, from.codes[1].y, from.codes[1].z, from.codes[1].w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
        const u32 first[4] = {pair<0>(table, upper[i], place), pair<0>(table, lower[i], place), pair<1>(table, upper[i], place),
                              pair<1>(table, lower[i], place)};
        const u32 second[4] = {pair<2>(table, upper[i], place), pair<2>(table, lower[i], place),
                               pair<3>(table, upper[i], place), pair<3>(table, lower[i], place)};
#pragma unroll
        for (u32 j = 0; j < GROUPS; j++) {
            const uint4 b = columns.get(held, launch, slice, lane, i, j);
            mma<T>(c[j], first, b.x, b.y);
            mma<T>(c[j], second, b.z, b.w);
        }
    }
    const u32 g = lane / 4;
    const float upper_left = __shfl_sync(~0u, scale, 2 * g), upper_right = __shfl_sync(~0u, scale, 2 * g + 1);
    const float lower_left = __shfl_sync(~0u, scale, 2 * g + 16), lower_right = __shfl_sync(~0u, scale, 2 * g + 17);
#pragma unroll
    for (u32 j = 0; j < GROUPS; j++) {
        acc[j][0] += c[j][0] * upper_left + c[j][1] * upper_right;
        acc[j][1] += c[j][2] * lower_left + c[j][3] * lower_right;
    }
}

// The first of the block's `all` slices that warp `w` takes.
template <u32 WARPS>
__device__ __forceinline__ u32 begin_of(u32 w, u32 all) {
    return w * all / WARPS;
}

// The warp's slices; its sums of each tile to `sums` [segment][row of W][row of x].
template <int GROUPS, bool HELD, u32 WARPS, int DEPTH, typename T>
__device__ __forceinline__ void slices_of_warp(float *sums, const Launch<T> &launch, const u8 *table, uint4 *held, float *maps,
                                               u32 first_tile, u32 tiles) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, slices = (launch.k + SLICE - 1) / SLICE;
    const u32 all = tiles * slices, begin = begin_of<WARPS>(warp, all), count = begin_of<WARPS>(warp + 1, all) - begin;
    Reader<T> reader;
    reader.tile = first_tile + begin / slices, reader.slice = begin % slices;
    u32 tile = reader.tile, slice = reader.slice;
    Fetched ring[DEPTH];
    if (count) {
        reader.seek(launch, lane);
#pragma unroll
        for (u32 i = 0; i < DEPTH; i++)
            if (i < count) {
                if (i) reader.next(launch, lane, slices);
                reader.fetch(ring[i], launch, lane);
            }
    }
    fill_table<T>(const_cast<u8 *>(table), launch.code);
    for (u32 i = threadIdx.x; i < 3 * 256; i += WARPS * 32) {
        const float *from = i < 256 ? launch.parts[0].map : i < 512 ? launch.parts[1].map : launch.parts[2].map;
        if (from) maps[i] = from[i % 256];
    }
    if constexpr (HELD) hold_x(held, launch, slices);
    __syncthreads();
    u32 place = lane * 4;
    asm volatile("" : "+r"(place));
    const auto scales_of = [&](u32 tile) {
        const Found<T> found = launch.find(tile);
        return Scales{maps + found.index * 256, found.part.offset};
    };
    Scales scales = scales_of(tile);
    const Columns<GROUPS, HELD, T> columns(launch, lane);
    float acc[GROUPS][2] = {};
    for (u32 done = 0; done < count; done += DEPTH) {
#pragma unroll
        for (u32 i = 0; i < DEPTH; i++) {
            if (done + i >= count) break;
            add_slice(acc, ring[i], scales.value(ring[i].scale), table, held, columns, launch, slice, lane, place);
            if (done + i + DEPTH < count) reader.next(launch, lane, slices), reader.fetch(ring[i], launch, lane);
            if (++slice == slices || done + i + 1 == count) {
#pragma unroll
                for (u32 j = 0; j < GROUPS; j++) {
                    const u32 row = lane % 4 + j * 4;
                    if (row < launch.m) {
                        sums[lane / 4 * launch.m + row] = acc[j][0];
                        sums[(lane / 4 + 8) * launch.m + row] = acc[j][1];
                    }
                    acc[j][0] = acc[j][1] = 0;
                }
                sums += TILE * launch.m;
                slice = 0, ++tile;
                if (done + i + 1 < count) scales = scales_of(tile);
            }
        }
    }
}

// Adds up the warps' sums, in their order, and what comes beside them.
template <u32 WARPS, typename T>
__device__ __forceinline__ void finish(const float *sums, const Launch<T> &launch, u32 first_tile, u32 tiles) {
    const u32 slices = (launch.k + SLICE - 1) / SLICE, all = tiles * slices;
    for (u32 i = threadIdx.x; i < tiles * TILE * launch.m; i += WARPS * 32) {
        const u32 x_row = i % launch.m, row_in_tile = i / launch.m % TILE, tile = i / (launch.m * TILE);
        const Found<T> found = launch.find(first_tile + tile);
        const u32 row = (first_tile + tile - found.tile) * TILE + row_in_tile;
        if (row >= found.part.n) continue;
        float sum = 0;
        for (u32 w = ((tile * slices + 1) * WARPS - 1) / all; w < WARPS && begin_of<WARPS>(w, all) < (tile + 1) * slices; ++w) {
            const u32 begin = begin_of<WARPS>(w, all);
            if (begin == begin_of<WARPS>(w + 1, all)) continue;
            sum += sums[((w * launch.segments + tile - begin / slices) * TILE + row_in_tile) * launch.m + x_row];
        }
        const Part<T> &part = found.part;
        if (part.b) {
            float beside = 0;
            const T *b = part.b + u64(row) * part.rank, *h = launch.h + x_row * launch.ranks() + found.column;
            for (u32 j = 0; j < part.rank; j++) beside += to_f32(b[j]) * to_f32(h[j]);
            sum += part.scale * beside;
        }
        if (part.bias) sum += to_f32(part.bias[row]);
        part.y[u64(x_row) * part.n + row] = from_f32<T>(sum);
    }
}

template <int GROUPS, bool HELD, u32 WARPS, int DEPTH, typename T>
__device__ __forceinline__ void few_rows(const Launch<T> &launch) {
    extern __shared__ __align__(256) u8 shared[];
    __shared__ float maps[3 * 256];
    const u32 tiles = launch.tiles(), slices = (launch.k + SLICE - 1) / SLICE;
    const u32 first = u32(u64(blockIdx.x) * tiles / gridDim.x), last = u32(u64(blockIdx.x + 1) * tiles / gridDim.x);
    uint4 *held = reinterpret_cast<uint4 *>(shared + TABLE);
    float *sums = reinterpret_cast<float *>(held + (HELD ? slices * 16 * launch.m : 0));
    float *mine = sums + threadIdx.x / 32 * launch.segments * TILE * launch.m;
    slices_of_warp<GROUPS, HELD, WARPS, DEPTH>(mine, launch, shared, held, maps, first, last - first);
    __syncthreads();
    finish<WARPS>(sums, launch, first, last - first);
}

#define PART(I) \
    { \
        y##I, packed##I, absmax##I, absmax2_##I, map##I, bias##I, b##I, offset##I, scale##I, n##I, rank##I \
    }
#define LAUNCH \
    { \
        {PART(0), PART(1), PART(2)}, x, h, code, m, k, u32(31 - __clz(block_size)), segments \
    }

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(1024, 1) few_rows_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size,
    u32 segments) {
    few_rows<1, true, 32, 2>(Launch<bf16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(512, 1) few_rows_held_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size,
    u32 segments) {
    few_rows<2, true, 16, 4>(Launch<bf16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(512, 1) few_rows_any_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size,
    u32 segments) {
    few_rows<2, false, 16, 4>(Launch<bf16> LAUNCH);
}

// scratch

extern "C" __global__ void __launch_bounds__(512, 1) few_rows_b4_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size,
    u32 segments) {
    few_rows<1, true, 16, 4>(Launch<bf16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(512, 1) few_rows_b6_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size,
    u32 segments) {
    few_rows<1, true, 16, 6>(Launch<bf16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(768, 1) few_rows_c3_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size,
    u32 segments) {
    few_rows<1, true, 24, 3>(Launch<bf16> LAUNCH);
}
#endif
