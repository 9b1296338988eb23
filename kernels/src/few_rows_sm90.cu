// few_rows.cu (m <= 4; one row where one_row_sm90.cu does not take it) for Hopper, where a block's codes come as the copy engine brings
// them: whole rows, or 2 KiB of them.
//
// A stage is a tile's columns c .. c + 4096, 16 pieces of rows, each one copy to shared memory; rows lie 64 bytes further apart than
// they are long, so that two of them have other banks. One warp asks for the stages ahead of the others; each of the 16
// other warps takes one unit of a stage. Codes, read once, are the first to leave the second-level cache. Scales are codes (double
// quantisation) of blocks of 64, and k is a multiple of 256.
//
// Launch: block 544, grid as few_rows. Dynamic shared memory: TABLE, then 33,792 bytes for each stage (few_rows_bulk3 has three,
// few_rows_bulk2 two); then x and sums as there.
//
// Bytes: W once.

#include "common/few_rows_stages.cuh"
#include "common/few_rows_units.cuh"

constexpr u32 WARPS = 16;                      // and units of a stage
constexpr u32 PIECE = WARPS * UNIT / 2;        // bytes of a row in a stage
constexpr u32 PITCH = PIECE + 64;
constexpr u32 STAGE_BYTES = TILE * PITCH;

// The block's stages in their order: a tile's stages one after another.
struct Line {
    u32 chunks;  // stages of a tile
    u32 tile, chunk = 0;

    __device__ __forceinline__ Line(u32 chunks, u32 tile) : chunks(chunks), tile(tile) {}
    // Whether the step led to another tile.
    __device__ __forceinline__ bool next() {
        if (++chunk < chunks) return false;
        chunk = 0, ++tile;
        return true;
    }
};

// Where the ring of COUNT stages and its barriers lie.
template <u32 COUNT>
struct Stages {
    u32 ring, full, empty;

    __device__ __forceinline__ void begin() const {
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) mbarrier_init(full + i * 8, 1), mbarrier_init(empty + i * 8, WARPS * 32);
        mbarrier_init_fence();
    }
    template <typename T>
    __device__ __forceinline__ void ask(const Launch<T> &launch, const Line &at, u32 slot) const {
        ask_tile<PIECE, PITCH>(launch, at.tile, at.chunk, ring + slot * STAGE_BYTES, full + slot * 8);
    }
};

// A warp's scales, stage by stage: a lane has row lane % 16 and slice lane / 16 of the warp's unit.
template <typename T>
struct Reader {
    Line at;
    bool lasts;  // whether the warp has a unit in a tile's last stage
    u32 end = 0;  // the tiles up to here are whole ones of one part
    ScaleReader<true> scales;

    __device__ __forceinline__ Reader(const Line &at, u32 units, u32 warp)
        : at(at), lasts((at.chunks - 1) * WARPS + warp < units) {}
    __device__ __forceinline__ bool has(const Line &at) const { return at.chunk + 1 < at.chunks || lasts; }
    __device__ __forceinline__ void seek(const Launch<T> &launch, u32 warp, u32 lane) {
        const Found<T> found = launch.find(at.tile);
        const u32 row = min((at.tile - found.tile) * TILE + lane % 16, found.part.n - 1);
        scales.seek(found.part, row * launch.k + (at.chunk * WARPS + warp) * UNIT + lane / 16 * SLICE);
        end = found.tile + found.part.n / TILE;
    }
    __device__ __forceinline__ void fetch(Pair<true> &to) const {
        if (has(at)) scales.fetch(to);
    }
    __device__ __forceinline__ void next(const Launch<T> &launch, u32 warp, u32 lane) {
        if (!at.next()) scales.move(WARPS * UNIT);
        else if (at.tile < end) scales.move(TILE * launch.k - (at.chunks - 1) * (WARPS * UNIT));
        else seek(launch, warp, lane);
    }
};

// The units of a warp, `count` stages; its sums of each tile to `sums` [tile][warp][row of W][row of x].
template <typename T>
struct Multiplier {
    static constexpr u32 DEPTH = 2;

    Pair<true> pairs[DEPTH];
    Reader<T> reader;

    __device__ __forceinline__ Multiplier(const Launch<T> &launch, const Line &line, u32 units, u32 count, u32 warp, u32 lane)
        : reader(line, units, warp) {
        reader.seek(launch, warp, lane);
#pragma unroll
        for (u32 i = 0; i < DEPTH; i++) {
            pairs[i] = {0, 0};
            if (i && i < count) reader.next(launch, warp, lane);
            if (i < count) reader.fetch(pairs[i]);
        }
    }
    template <u32 COUNT>
    __device__ __forceinline__ void run(float *sums, const Launch<T> &launch, const Stages<COUNT> &stages, const u8 *ring, const u8 *table,
                                        u32 held, float *stage, const float *maps, Line line, u32 count, u32 warp, u32 lane) {
        u32 place = lane * 4;
        asm volatile("" : "+r"(place));
        Scales scales = scales_of(launch, maps, line.tile);
        Columns<1, true, T> columns(held, launch, lane);
        float acc[1][2] = {};
        Ring<COUNT> slot;
        const u8 *const from = ring + lane / 4 * PITCH + warp * (UNIT / 2) + lane % 4 * 16;
#pragma unroll 1
        for (u32 done = 0; done < count; done += DEPTH) {
#pragma unroll
            for (u32 i = 0; i < DEPTH; i++) {
                if (done + i >= count) break;
                float *const here = stage + i * STAGE;
                stage_scales(here, scales.values(pairs[i]), lane);
                mbarrier_wait(stages.full + slot.index * 8, slot.parity);
                Fetched<true> unit;
#pragma unroll
                for (u32 s = 0; s < 2; s++)
#pragma unroll
                    for (u32 r = 0; r < 2; r++)
                        unit.codes[s][r] =
                            *reinterpret_cast<const uint4 *>(from + slot.index * STAGE_BYTES + r * 8 * PITCH + s * (SLICE / 2));
                mbarrier_arrive(stages.empty + slot.index * 8);
                __syncwarp();  // the scales are there
                if (reader.has(line)) add_unit(acc, unit, here, table, columns, launch, line.chunk * WARPS + warp, lane, place);
                if (done + i + DEPTH < count) reader.next(launch, warp, lane), reader.fetch(pairs[i]);
                slot.next();
                if (line.next()) {
                    leave_sums(sums, acc, launch.m, lane);
                    sums += WARPS * TILE * launch.m;
                    scales = scales_of(launch, maps, line.tile);
                }
            }
        }
    }
};

template <u32 COUNT, typename T>
__device__ __forceinline__ void few_rows(const Launch<T> &launch) {
    launch_dependents();
    extern __shared__ __align__(256) u8 shared[];
    __shared__ float maps[3 * 256];
    __shared__ __align__(16) float scales[WARPS][Multiplier<T>::DEPTH * STAGE];
    __shared__ __align__(8) u64 barriers[2 * COUNT];
    const u32 all = launch.tiles(), units = launch.k / UNIT, lane = threadIdx.x % 32, warp = warp_of_block();
    const u32 first = u32(u64(blockIdx.x) * all / gridDim.x), tiles = u32(u64(blockIdx.x + 1) * all / gridDim.x) - first;
    u8 *const ring = shared + TABLE, *const held = ring + COUNT * STAGE_BYTES;
    float *const sums = reinterpret_cast<float *>(held + units * (UNIT * 2) * launch.m);
    const u32 full = shared_address(barriers);
    const Stages<COUNT> stages = {shared_address(ring), full, full + COUNT * 8};
    const Line line((units + WARPS - 1) / WARPS, first);
    const u32 steps = tiles * line.chunks;
    const bool asks = warp == WARPS;
    Line to_come = line;
    if (asks) {
        if (lane == 0) stages.begin();
        __syncwarp();
#pragma unroll 1
        for (u32 i = 0; i < min(COUNT, steps); i++) stages.ask(launch, to_come, i), to_come.next();
    }
    Multiplier<T> multiplier(launch, line, units, asks ? 0 : steps, warp, lane);
    const Tables<(WARPS + 1) * 32> loaded(launch);
    prefetch_beside(launch, first, tiles);
    loaded.template store<T>(shared, maps);
    // All before came from frozen weights; x and h are what launches before write.
    wait_for_launches();
    hold_x(shared_address(held), launch, units);
    copy_wait<0>();
    __syncthreads();
    if (asks) {
        Ring<COUNT> slot;
#pragma unroll 1
        for (u32 i = COUNT; i < steps; i++) {
            mbarrier_wait(stages.empty + slot.index * 8, slot.parity);
            stages.ask(launch, to_come, slot.index);
            to_come.next(), slot.next();
        }
    } else {
        float *const mine = sums + warp * TILE * launch.m;
        multiplier.run(mine, launch, stages, ring, shared, shared_address(held), scales[warp], maps, line, steps, warp, lane);
    }
    __syncthreads();
    finish<WARPS, false>(sums, launch, first, tiles);
}

extern "C" __global__ void __launch_bounds__(544, 1) few_rows_bulk3_f16(
    f16 *y0, f16 *y1, f16 *y2, const f16 *x, const f16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const f16 *bias0, const f16 *bias1,
    const f16 *bias2, const f16 *b0, const f16 *b1, const f16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size) {
    few_rows<3>(Launch<f16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(544, 1) few_rows_bulk3_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size) {
    few_rows<3>(Launch<bf16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(544, 1) few_rows_bulk2_f16(
    f16 *y0, f16 *y1, f16 *y2, const f16 *x, const f16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const f16 *bias0, const f16 *bias1,
    const f16 *bias2, const f16 *b0, const f16 *b1, const f16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size) {
    few_rows<2>(Launch<f16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(544, 1) few_rows_bulk2_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size) {
    few_rows<2>(Launch<bf16> LAUNCH);
}
