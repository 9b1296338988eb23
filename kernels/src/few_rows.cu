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
// sum of each tile that it has a part of in shared memory. Loads of W run ahead by DEPTH slices in registers; no barrier lies within
// the loop. few_rows (m <= 4) and few_rows_held hold x and the scales of all the block's slices in shared memory; few_rows_any, for
// what does not fit there, reads them as it goes.
//
// Launch: block 512, grid any up to the number of tiles, one a multiprocessor is best. Dynamic shared memory: TABLE bytes; but for
// few_rows_any x as [slice][word of a lane][lane % 4][row], 256 m bytes a slice, and STAGE floats for each slice of the most tiles that
// a block has; then 16 · segments · 16 m floats. `segments`: the most tiles that a warp has a part of.
//
// Bytes: W once.

#include "common/few_rows.cuh"
#include "common/mma.cuh"

template <bool STAGED>
struct Fetched {
    uint4 codes[2];
    Scale scale;
};

template <>
struct Fetched<true> {
    uint4 codes[2];
};

__device__ __forceinline__ uint4 load_codes(const u8 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
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
    template <bool STAGED>
    __device__ __forceinline__ void fetch(Fetched<STAGED> &to, const Launch<T> &launch, u32 lane) {
        // Beyond the row: the columns before, whose x is zero there.
        const u32 back = slice * SLICE + lane % 4 * 32 < launch.k ? 0 : 32;
        to.codes[0] = load_codes(codes - back), to.codes[1] = load_codes(codes + below - back);
        if constexpr (!STAGED)
            to.scale = load_scale(absmax, absmax2, (scale - (slice * SLICE + lane % 2 * 64 < launch.k ? 0 : 64)) >> launch.shift);
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
__device__ __forceinline__ void fill_table(u8 *table, float level) {
    for (u32 i = threadIdx.x / 8; i < 256; i += blockDim.x / 8) {
        const u32 word = pack2<T>(__shfl_sync(~0u, level, i / 16), __shfl_sync(~0u, level, i % 16));
        *reinterpret_cast<uint4 *>(table + (i << ENTRY_SHIFT) + threadIdx.x % 8 * 16) = make_uint4(word, word, word, word);
    }
}

// x in 16 bytes: [slice][word][lane % 4][row], zeros beyond k. Asynchronous.
template <typename T>
__device__ __forceinline__ void hold_x(uint4 *to, const Launch<T> &launch, u32 slices) {
    const u32 words = slices * (SLICE / 8);
    for (u32 row = 0; row < launch.m; row++)
        for (u32 word = threadIdx.x; word < words; word += blockDim.x) {
            const uint4 *place = to + ((word / 16 * 4 + word % 4) * 4 + word / 4 % 4) * launch.m + row;
            const bool valid = word * 8 < launch.k;
            copy16(shared_address(place), launch.x + (valid ? row * launch.k + word * 8 : 0), valid);
        }
    copy_commit();
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
template <int GROUPS, bool HELD, bool STAGED, typename T>
__device__ __forceinline__ void add_slice(float (&acc)[GROUPS][2], const Fetched<STAGED> &from, const float2 (&scales)[2],
                                          const u8 *table, const uint4 *held, const Columns<GROUPS, HELD, T> &columns,
                                          const Launch<T> &launch, u32 slice, u32 lane, u32 place) {
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
#pragma unroll
    for (u32 j = 0; j < GROUPS; j++) {
        acc[j][0] += c[j][0] * scales[0].x + c[j][1] * scales[0].y;
        acc[j][1] += c[j][2] * scales[1].x + c[j][3] * scales[1].y;
    }
}

// The first of the block's `all` slices that warp `w` takes.
template <u32 WARPS>
__device__ __forceinline__ u32 begin_of(u32 w, u32 all) {
    return w * all / WARPS;
}

// The warp's slices; its sums of each tile to `sums` [segment][row of W][row of x].
template <int GROUPS, bool HELD, bool STAGED, u32 WARPS, int DEPTH, typename T>
__device__ __forceinline__ void slices_of_warp(float *sums, const Launch<T> &launch, u8 *table, uint4 *held, float *stage,
                                               float *maps, u32 first_tile, u32 tiles) {
    // Everything that comes from memory is asked for before anything is waited for.
    const float level = launch.code[threadIdx.x % 16];
    constexpr u32 THREADS = WARPS * 32, MAPS = (3 * 256 + THREADS - 1) / THREADS;
    float map[MAPS];
#pragma unroll
    for (u32 j = 0; j < MAPS; j++) {
        const u32 i = j * THREADS + threadIdx.x;
        const float *from = i < 256 ? launch.parts[0].map : i < 512 ? launch.parts[1].map : launch.parts[2].map;
        map[j] = i < 3 * 256 && from ? from[i % 256] : 0.0f;
    }
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, slices = (launch.k + SLICE - 1) / SLICE;
    const u32 all = tiles * slices, begin = begin_of<WARPS>(warp, all), count = begin_of<WARPS>(warp + 1, all) - begin;
    Reader<T> reader;
    reader.tile = first_tile + begin / slices, reader.slice = begin % slices;
    u32 tile = reader.tile, slice = reader.slice;
    Fetched<STAGED> ring[DEPTH];
    if (count) {
        reader.seek(launch, lane);
#pragma unroll
        for (u32 i = 0; i < DEPTH; i++)
            if (i < count) {
                if (i) reader.next(launch, lane, slices);
                reader.fetch(ring[i], launch, lane);
            }
    }
    if constexpr (HELD) hold_x(held, launch, slices);
    fill_table<T>(table, level);
#pragma unroll
    for (u32 j = 0; j < MAPS; j++)
        if (j * THREADS + threadIdx.x < 3 * 256) maps[j * THREADS + threadIdx.x] = map[j];
    if constexpr (STAGED) {
        Stager<WARPS, T> stager(launch, tiles);
        stager.load(launch, first_tile, lane);
        __syncthreads();
        while (true) {
            stager.store(stage, maps, launch, first_tile, lane, slices);
            if (stager.done()) break;
            stager.load(launch, first_tile, lane);
        }
    }
    copy_wait<0>();
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
            float2 of_rows[2];
            if constexpr (STAGED) {
                const float *of_slice = stage + ((tile - first_tile) * slices + slice) * STAGE + lane / 4 * 2;
                of_rows[0] = *reinterpret_cast<const float2 *>(of_slice);
                of_rows[1] = *reinterpret_cast<const float2 *>(of_slice + 16);
            } else {
                const float scale = scales.value(ring[i].scale);
#pragma unroll
                for (u32 r = 0; r < 2; r++) {
                    const u32 from = lane / 4 * 2 + r * 16;
                    of_rows[r] = {__shfl_sync(~0u, scale, from), __shfl_sync(~0u, scale, from + 1)};
                }
            }
            add_slice(acc, ring[i], of_rows, table, held, columns, launch, slice, lane, place);
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
                if (!STAGED && done + i + 1 < count) scales = scales_of(tile);
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
        const float beside = beside_row(launch, found, row, x_row);
        float sum = 0;
        for (u32 w = ((tile * slices + 1) * WARPS - 1) / all; w < WARPS && begin_of<WARPS>(w, all) < (tile + 1) * slices; ++w) {
            const u32 begin = begin_of<WARPS>(w, all);
            if (begin == begin_of<WARPS>(w + 1, all)) continue;
            sum += sums[((w * launch.segments + tile - begin / slices) * TILE + row_in_tile) * launch.m + x_row];
        }
        const Part<T> &part = found.part;
        sum += beside;
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
    float *stage = reinterpret_cast<float *>(held + (HELD ? slices * 16 * launch.m : 0));
    // As many for every block, as the launch reckons.
    const u32 most = (tiles + gridDim.x - 1) / gridDim.x;
    float *sums = stage + (HELD ? most * slices * STAGE : 0);
    prefetch_beside(launch, first, last - first);
    float *mine = sums + threadIdx.x / 32 * launch.segments * TILE * launch.m;
    slices_of_warp<GROUPS, HELD, HELD, WARPS, DEPTH>(mine, launch, shared, held, stage, maps, first, last - first);
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

extern "C" __global__ void __launch_bounds__(512, 1) few_rows_f16(
    f16 *y0, f16 *y1, f16 *y2, const f16 *x, const f16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const f16 *bias0, const f16 *bias1,
    const f16 *bias2, const f16 *b0, const f16 *b1, const f16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size,
    u32 segments) {
    few_rows<1, true, 16, 4>(Launch<f16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(512, 1) few_rows_held_f16(
    f16 *y0, f16 *y1, f16 *y2, const f16 *x, const f16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const f16 *bias0, const f16 *bias1,
    const f16 *bias2, const f16 *b0, const f16 *b1, const f16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size,
    u32 segments) {
    few_rows<2, true, 16, 4>(Launch<f16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(512, 1) few_rows_any_f16(
    f16 *y0, f16 *y1, f16 *y2, const f16 *x, const f16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const f16 *bias0, const f16 *bias1,
    const f16 *bias2, const f16 *b0, const f16 *b1, const f16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size,
    u32 segments) {
    few_rows<2, false, 16, 3>(Launch<f16> LAUNCH);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(512, 1) few_rows_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size,
    u32 segments) {
    few_rows<1, true, 16, 4>(Launch<bf16> LAUNCH);
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
    few_rows<2, false, 16, 3>(Launch<bf16> LAUNCH);
}
#endif
