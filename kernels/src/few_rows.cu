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
// Work: a block takes neighbouring tiles of 16 rows, in units of two slices, which its warps take in turn: what a block reads at a
// time are long pieces of rows side by side, as memory likes it. Loads of W run ahead by DEPTH units in registers, those of scales
// too; no barrier of the block lies within the loop. A warp leaves its sum of each tile in shared memory. few_rows (m <= 4) and
// few_rows_held hold x in shared memory; few_rows_any, for what does not fit there, reads it as it goes.
//
// Launches may overlap (early.cuh): all that a block reads before it waits are weights, the adapters' B among them.
//
// Launch: block 512, few_rows_any 256, grid any up to the number of tiles, one a multiprocessor is best. Dynamic shared memory: TABLE
// bytes; but for few_rows_any x as [slice][row][word of a lane][lane % 4], 512 m bytes a unit; then 16 m floats for each warp of each
// of the most tiles that a block has.
//
// Bytes: W once.
//
// spills: few_rows_held_f16 8 on sm_75: one value

#include "common/few_rows_units.cuh"

__device__ __forceinline__ uint4 load_codes(const u8 *p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// From one of a warp's units to its next.
struct Step {
    u32 units, tiles, unit;

    __device__ __forceinline__ Step(u32 units, u32 warps) : units(units), tiles(warps / units), unit(warps % units) {}
};

// Where a warp is in the block's line of units: it takes every WARPS-th.
struct Spot {
    u32 tile, unit;

    __device__ __forceinline__ void next(const Step &step) {
        tile += step.tiles, unit += step.unit;
        if (unit >= step.units) unit -= step.units, ++tile;
    }
};

// Loads a warp's units in turn.
template <bool EVEN, typename T>
struct Reader {
    const u8 *codes;
    u32 below;  // bytes from the lane's upper row to its lower one
    Spot at;
    u32 end;  // the tiles up to here are whole ones of one part
    ScaleReader<EVEN> scales;

    __device__ __forceinline__ void seek(const Launch<T> &launch, u32 lane) {
        const Found<T> found = launch.find(at.tile);
        const Part<T> &part = found.part;
        const u32 first = (at.tile - found.tile) * TILE, last = part.n - 1;
        const u32 upper = min(first + lane / 4, last), lower = min(first + lane / 4 + 8, last);
        codes = part.packed + (u64(upper) * launch.k + at.unit * UNIT + lane % 4 * 32) / 2;
        below = (lower - upper) * (launch.k / 2);
        scales.seek(part, min(first + lane % 16, last) * launch.k + at.unit * UNIT + lane / 16 * SLICE);
        end = found.tile + part.n / TILE;
    }
    __device__ __forceinline__ void fetch(Fetched<EVEN> &to, const Launch<T> &launch, u32 lane) {
#pragma unroll
        for (u32 s = 0; s < 2; s++) {
            const u8 *from = codes + s * (SLICE / 2);
            if constexpr (!EVEN) {
                // Beyond the row: its first columns, whose products with x, zero there, are zero.
                const u32 column = at.unit * UNIT + s * SLICE + lane % 4 * 32;
                if (column >= launch.k) from -= column / 2;
            }
            to.codes[s][0] = load_codes(from), to.codes[s][1] = load_codes(from + below);
        }
        if constexpr (EVEN) scales.fetch(to.scales);
        else scales.fetch(to.scales, at.unit * UNIT + lane / 16 * SLICE, launch.k, launch.shift);
    }
    __device__ __forceinline__ void next(const Launch<T> &launch, u32 lane, const Step &step) {
        const Spot before = at;
        at.next(step);
        if (at.tile < end) {
            const u32 elements = (at.tile - before.tile) * TILE * launch.k + (at.unit - before.unit) * UNIT;
            codes += elements / 2, scales.move(elements);
        } else seek(launch, lane);
    }
};

// The warp's units; its sums of each tile to `sums` [tile][warp][row of W][row of x].
template <int GROUPS, bool HELD, bool EVEN, u32 WARPS, int DEPTH, typename T>
__device__ __forceinline__ void units_of_warp(float *sums, const Launch<T> &launch, u8 *table, u32 held, float *stage, float *maps,
                                              u32 first_tile, u32 tiles) {
    const u32 lane = threadIdx.x % 32, warp = warp_of_block(), units = (launch.k + UNIT - 1) / UNIT;
    const u32 all = tiles * units, count = (all + WARPS - 1 - warp) / WARPS;
    const Step step(units, WARPS);
    // Everything that comes from memory is asked for before anything is waited for; a warp without units reads the last.
    const u32 begin = min(warp, all - 1);
    Spot at = {first_tile + begin / units, begin % units};
    Reader<EVEN, T> reader;
    reader.at = at;
    reader.seek(launch, lane);
    Fetched<EVEN> ring[DEPTH];
#pragma unroll
    for (u32 i = 0; i < DEPTH; i++) {
        if (i && i < count) reader.next(launch, lane, step);
        reader.fetch(ring[i], launch, lane);
    }
    const Tables<WARPS * 32> loaded(launch);
    prefetch_beside(launch, first_tile, tiles);
    loaded.template store<T>(table, maps);
    // All before came from frozen weights; x and h are what launches before write.
    wait_for_launches();
    if constexpr (HELD) hold_x(held, launch, units);
    copy_wait<0>();
    __syncthreads();
    u32 place = lane * 4;
    asm volatile("" : "+r"(place));
    Scales scales = scales_of(launch, maps, at.tile);
    Columns<GROUPS, HELD, T> columns(held, launch, lane);
    sums += (at.tile - first_tile) * (WARPS * TILE * launch.m);
    float acc[GROUPS][2] = {};
    for (u32 done = 0; done < count; done += DEPTH) {
#pragma unroll
        for (u32 i = 0; i < DEPTH; i++) {
            if (done + i >= count) break;
            // Lanes that are behind still read the scales of the unit before, which lie elsewhere.
            float *const here = stage + i * STAGE;
            stage_scales(here, scales.values(ring[i].scales), lane);
            __syncwarp();
            add_unit(acc, ring[i], here, table, columns, launch, at.unit, lane, place);
            if (done + i + DEPTH < count) reader.next(launch, lane, step), reader.fetch(ring[i], launch, lane);
            const u32 tile = at.tile;
            at.next(step);
            if (at.tile != tile || done + i + 1 == count) {
                leave_sums(sums, acc, launch.m, lane);
                sums += (at.tile - tile) * (WARPS * TILE * launch.m);
                scales = scales_of(launch, maps, at.tile);
            }
        }
    }
}

template <int GROUPS, bool HELD, u32 WARPS, int DEPTH, typename T>
__device__ __forceinline__ void few_rows(const Launch<T> &launch) {
    launch_dependents();
    extern __shared__ __align__(256) u8 shared[];
    __shared__ float maps[3 * 256];
    __shared__ __align__(16) float stages[WARPS][DEPTH * STAGE];
    const u32 tiles = launch.tiles(), units = (launch.k + UNIT - 1) / UNIT;
    const u32 first = u32(u64(blockIdx.x) * tiles / gridDim.x), last = u32(u64(blockIdx.x + 1) * tiles / gridDim.x);
    u8 *const held = shared + TABLE;
    float *const sums = reinterpret_cast<float *>(held + (HELD ? units * (UNIT * 2) * launch.m : 0));
    const u32 warp = warp_of_block();
    float *const mine = sums + warp * TILE * launch.m;
    if (launch.even()) units_of_warp<GROUPS, HELD, true, WARPS, DEPTH>(mine, launch, shared, shared_address(held), stages[warp], maps, first, last - first);
    else units_of_warp<GROUPS, HELD, false, WARPS, DEPTH>(mine, launch, shared, shared_address(held), stages[warp], maps, first, last - first);
    __syncthreads();
    finish<WARPS, true>(sums, launch, first, last - first);
}

extern "C" __global__ void __launch_bounds__(512, 1) few_rows_f16(
    f16 *y0, f16 *y1, f16 *y2, const f16 *x, const f16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const f16 *bias0, const f16 *bias1,
    const f16 *bias2, const f16 *b0, const f16 *b1, const f16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size) {
    few_rows<1, true, 16, 2>(Launch<f16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(512, 1) few_rows_held_f16(
    f16 *y0, f16 *y1, f16 *y2, const f16 *x, const f16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const f16 *bias0, const f16 *bias1,
    const f16 *bias2, const f16 *b0, const f16 *b1, const f16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size) {
    few_rows<2, true, 16, 2>(Launch<f16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(256, 1) few_rows_any_f16(
    f16 *y0, f16 *y1, f16 *y2, const f16 *x, const f16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const f16 *bias0, const f16 *bias1,
    const f16 *bias2, const f16 *b0, const f16 *b1, const f16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size) {
    few_rows<2, false, 8, 2>(Launch<f16> LAUNCH);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(512, 1) few_rows_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size) {
    few_rows<1, true, 16, 2>(Launch<bf16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(512, 1) few_rows_held_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size) {
    few_rows<2, true, 16, 2>(Launch<bf16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(256, 1) few_rows_any_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size) {
    few_rows<2, false, 8, 2>(Launch<bf16> LAUNCH);
}
#endif
