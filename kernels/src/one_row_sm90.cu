// few_rows.cu for one row of x on Hopper, where the next launch's block lies beside this one's: it fills its table and asks for its
// first codes while this launch multiplies, and little is left to do between two launches but to read x.
//
// mma: lane t of a row of W holds columns 32 t .. 32 t + 32 of the unit's first half and of its second. Even rows take the first half
// first and odd ones the second, so that neighbours lie in other banks. x is column t of B for the first half and column t + 4 for
// the second, in lane t, and zero elsewhere: columns 2 t and 2 t + 1 of C are then the halves of the sum of the unit's block t, in
// the first or the second four words' C; the others are of weights with x of the other half.
//
// Work: a block takes neighbouring tiles; of all of them the first 8 units' columns, then the next, so that a warp keeps its unit's
// x in registers. A stage is a tile's columns of 8 units, one for each of the warps that multiply; another warp asks for the stages,
// each row's columns by one copy, and one more decodes the stage's scales. Two of the warps that multiply share a scheduler, which
// begins a look-up every fourth cycle, 64 a unit: nothing a warp waits for may come between two units, nor a branch that a unit could
// do without.
//
// Shared memory: an entry of the table has as much room again beside it: a hole. In them lie the warps' sums of each tile, the scales
// of the stages, the maps of scales and, on its way to registers, x. After the table the ring of stages.
//
// Takes m = 1, scales that are codes (double quantisation) of blocks of 64, and k a multiple of 256, not 0.
//
// Launch: block 320, grid min(tiles, multiprocessors) for at most 19 tiles a block, at least one. Dynamic shared memory: TABLE and 49,152
// bytes: with barriers, what the driver takes and 96 registers a thread two blocks a multiprocessor.
//
// Bytes: W once.

#include "common/few_rows_stages.cuh"
#include "common/few_rows_units.cuh"

constexpr u32 WARPS = 8;                    // that multiply, and units of a stage
constexpr u32 ASKS = WARPS, DECODES = WARPS + 1, ALL_WARPS = WARPS + 2;
constexpr u32 PIECE = WARPS * UNIT / 2;     // bytes of a row in a stage
constexpr u32 STAGE_BYTES = TILE * PIECE;
constexpr u32 COUNT = 3;                    // stages in shared memory, and of scales on their way

// The holes: [tile][warp] sums, [stage][row] scales, [part][code / 32] maps, [warp][64 columns] x.
constexpr u32 X_HOLES = 256 - WARPS * 4, MAP_HOLES = X_HOLES - 3 * 8, SCALE_HOLES = MAP_HOLES - COUNT * TILE;
static_assert(ENTRY_SHIFT == 8 && SCALE_HOLES / WARPS == 19, "ONE_TILES of linear/cuda/few.rs");
static_assert(2 * (TABLE + COUNT * STAGE_BYTES + 256 + 1024) <= 228 * 1024, "two blocks a multiprocessor");

__device__ __forceinline__ u32 hole(u32 table, u32 index) { return table + index * 256 + 128; }

// The block's stages in their order, and the place of one in the ring.
struct Line {
    u32 first, last, chunks;  // tiles; units of a row by eights
    u32 tile, chunk = 0;
    Ring<COUNT> slot;

    __device__ __forceinline__ Line(u32 first, u32 last, u32 chunks) : first(first), last(last), chunks(chunks), tile(first) {}
    __device__ __forceinline__ bool more() const { return chunk < chunks; }
    __device__ __forceinline__ void next() {
        slot.next();
        if (++tile == last) tile = first, chunk++;
    }
};

// Where the ring of stages and its barriers lie: those of full stages, then those of empty ones.
struct Stages {
    u32 ring, full;

    __device__ __forceinline__ static u32 empty_of(u32 full) { return full + COUNT * 8; }
    __device__ __forceinline__ void begin() const {
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) mbarrier_init(full + i * 8, 1 + 32), mbarrier_init(empty_of(full) + i * 8, WARPS * 32);
        mbarrier_init_fence();
    }
    template <typename T>
    __device__ __forceinline__ void ask(const Launch<T> &launch, const Line &at) const {
        ask_tile<PIECE, PIECE>(launch, at.tile, at.chunk, ring + at.slot.index * STAGE_BYTES, full + at.slot.index * 8);
    }
};

// The scales of a stage: a lane has unit lane % 8 in rows lane / 8, + 4, + 8 and + 12.
template <typename T>
struct StageScales {
    u32 codes[4];
    float absmax[4], offset;
    u32 map;

    __device__ __forceinline__ void fetch(const Launch<T> &launch, const Line &at, u32 units, u32 maps, u32 lane) {
        const Found<T> found = launch.find(at.tile);
        const u32 first = (at.tile - found.tile) * TILE + lane / 8, unit = min(at.chunk * WARPS + lane % 8, units - 1);
        map = maps + found.index * (8 * 256), offset = found.part.offset;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 block = min(first + i * 4, found.part.n - 1) * (launch.k / 64) + unit * 4;
            asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(codes[i]) : "l"(reinterpret_cast<const u8 *>(found.part.absmax) + block));
            asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(absmax[i]) : "l"(found.part.absmax2 + (block >> 8)));
        }
    }
    // Of block J. The address by one instruction: bytes of the code's hole and of its place there; a place's sign, 0, twice.
    template <u32 J>
    __device__ __forceinline__ float value(u32 holes, u32 places, u32 i) const {
        u32 at;
        asm("prmt.b32 %0, %1, %2, %3;" : "=r"(at) : "r"(places), "r"(holes), "n"(0x8840 + J * 0x1111));
        return nested_scale(load4_f32(map + at), absmax[i], offset);
    }
    // To [row][unit][block] from `to`, each row a unit further round, so that eight rows lie in other banks.
    __device__ __forceinline__ void leave(u32 to, u32 lane) const {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            const u32 holes = codes[i] >> 5 & 0x07070707, places = codes[i] << 2 & 0x7c7c7c7c;
            const float v[4] = {value<0>(holes, places, i), value<1>(holes, places, i), value<2>(holes, places, i),
                                value<3>(holes, places, i)};
            const u32 row = i * 4 + lane / 8, at = to + row * 256 + (lane + row) % 8 * 16;
            store16_f32(at, v[0], v[1], v[2], v[3]);
        }
    }
};

// A warp's unit of a stage: codes of rows g and g + 8, and the scales of the lane's block in them. Its first half, if it has come by then,
// is loaded while the second of the unit before is multiplied, which has no more need of the registers.
struct Unit {
    uint4 upper[2], lower[2];
    float scales[2];
    u32 codes_at, scales_at, full, place = 0, parity = 0;  // `place`: of the stage's barrier, from `full` on
    bool has_first = false;

    // The barriers' address by a shuffle, so that it is not worked out anew wherever it is used.
    __device__ __forceinline__ Unit(const Stages &stages, u32 table, u32 warp, u32 lane)
        : codes_at(stages.ring + lane / 4 * PIECE + warp * (UNIT / 2) + lane / 4 % 2 * 64 + lane % 4 * 16),
          scales_at(hole(table, SCALE_HOLES) + lane / 4 * 256 + (warp + lane / 4) % 8 * 16 + lane % 4 * 4),
          full(__shfl_sync(~0u, stages.full, 0)) {}
    template <u32 I>
    __device__ __forceinline__ void load_half() {
        const u32 from = (codes_at ^ I * 64) + place * (STAGE_BYTES / 8);
        upper[I] = load16(from), lower[I] = load16(from + TILE / 2 * PIECE);
    }
    // Goes on to the next unit: its first half, if it has come.
    __device__ __forceinline__ void next() {
        place += 8;
        if (place == COUNT * 8) place = 0, parity ^= 1;
        has_first = mbarrier_test(full + place, parity);
        if (has_first) load_half<0>();
    }
    // The rest of it. `exists`: there is such a unit; after the last nothing is waited for, what is loaded is of no use, and the
    // arrival is one that nobody waits for, as the stage is never asked for.
    __device__ __forceinline__ void load(bool exists) {
        if (!has_first && exists) mbarrier_wait(full + place, parity), load_half<0>();
        load_half<1>();
        const u32 from = scales_at + place * (TILE * 256 / 8);
        scales[0] = load4_f32(from), scales[1] = load4_f32(from + 8 * 256);
        mbarrier_arrive(Stages::empty_of(full) + place);
    }
};

// A word's codes of two rows as pairs of T: two A.
struct Pairs {
    u32 a[2][4];

    __device__ __forceinline__ Pairs(const u8 *table, u32 upper, u32 lower, u32 place)
        : a{{pair<0>(table, upper, place), pair<0>(table, lower, place), pair<1>(table, upper, place), pair<1>(table, lower, place)},
            {pair<2>(table, upper, place), pair<2>(table, lower, place), pair<3>(table, upper, place), pair<3>(table, lower, place)}} {}
};

// A unit's sums of rows g and g + 8, left in shared memory while the next unit is multiplied: [row % 8][block / 2][row / 8].
struct Sums {
    float first[2] = {};   // of the first four words
    float scales[2] = {};  // of the unit that `take` comes to
    float upper, lower;
    u32 at;
    bool add = false;

    __device__ __forceinline__ explicit Sums(u32 at) : at(at) {}
    // Of row g for j = 0 and g + 8 for j = 2. c: [half of a word], of four words.
    __device__ __forceinline__ static float row(const float (&c)[2][4], u32 j) { return c[0][j] + c[0][j + 1] + (c[1][j] + c[1][j + 1]); }
    __device__ __forceinline__ void take_first(const float (&c)[2][4]) { first[0] = row(c, 0), first[1] = row(c, 2); }
    __device__ __forceinline__ void take(const float (&c)[2][4], u32 lane) {
        const bool is_first = lane / 2 % 2 == lane / 4 % 2;
        upper = (is_first ? first[0] : row(c, 0)) * scales[0], lower = (is_first ? first[1] : row(c, 2)) * scales[1];
    }
    __device__ __forceinline__ void leave(u32 lane) const {
        const bool odd = lane % 2;
        float sum = (odd ? lower : upper) + __shfl_xor_sync(~0u, odd ? upper : lower, 1);
        if (add) sum += load4_f32(at);
        store4_f32(at, sum);
    }
};

// The warp's x of a unit: the lane's columns, if it holds any, or zero.
struct Column {
    uint4 words[4];

    __device__ __forceinline__ Column() {
#pragma unroll
        for (u32 i = 0; i < 4; i++) words[i] = make_uint4(0, 0, 0, 0);
    }
    // `row`: eight columns of the lane. Every 64 columns lie in a hole, neighbouring eights exchanged so that no bank has two.
    __device__ __forceinline__ void set(const uint4 &row, u32 holes, u32 lane) {
        const u32 at = holes + lane / 8 * 256 + lane / 4 % 2 * 64;
        __syncwarp();
        store16(at + (lane ^ lane / 8) % 4 * 16, row);
        __syncwarp();
        if (lane / 4 % 4 != lane % 4) return;
#pragma unroll
        for (u32 i = 0; i < 4; i++) words[i] = load16(at + (lane / 8 ^ i) * 16);
    }
};

// One unit, and meanwhile the end of the one before and the first half of the next. c: [four words][half of a word].
template <typename T>
__device__ __forceinline__ void multiply_unit(float (&c)[2][2][4], Unit &unit, Sums &sums, const Column &column, const u8 *table, u32 place,
                                              u32 lane) {
    const u32 upper[8] = {unit.upper[0].x, unit.upper[0].y, unit.upper[0].z, unit.upper[0].w,
                          unit.upper[1].x, unit.upper[1].y, unit.upper[1].z, unit.upper[1].w};
    const u32 lower[8] = {unit.lower[0].x, unit.lower[0].y, unit.lower[0].z, unit.lower[0].w,
                          unit.lower[1].x, unit.lower[1].y, unit.lower[1].z, unit.lower[1].w};
    sums.take(c[1], lane);
    sums.scales[0] = unit.scales[0], sums.scales[1] = unit.scales[1];
#pragma unroll
    for (u32 j = 0; j < 4; j++) c[0][0][j] = c[0][1][j] = c[1][0][j] = c[1][1][j] = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        const Pairs pairs(table, upper[i], lower[i], place);
        mma<T>(c[i / 4][0], pairs.a[0], column.words[i % 4].x, column.words[i % 4].y);
        mma<T>(c[i / 4][1], pairs.a[1], column.words[i % 4].z, column.words[i % 4].w);
        if (i == 2) sums.leave(lane);
        if (i == 5) unit.next();
        if (i == 6) sums.take_first(c[0]);
    }
}

// The units of a warp; its sums of each tile to the holes.
template <typename T>
__device__ __forceinline__ void multiply(const Launch<T> &launch, const Stages &stages, const u8 *table, u32 tiles, u32 chunks, u32 warp,
                                         u32 lane) {
    const u32 units = launch.k / UNIT, holes = shared_address(table), sums_at = hole(holes, warp) + lane * 4;
    u32 place = lane * 4;
    asm volatile("" : "+r"(place));
    Unit unit(stages, holes, warp, lane);
    unit.load(true);
    // All before came from frozen weights; x and h are what launches before write.
    wait_for_launches();
    const T *x = launch.x + warp * UNIT + lane * 8;
    uint4 row = make_uint4(0, 0, 0, 0);
    if (warp < units) row = *reinterpret_cast<const uint4 *>(x);
    Column column;
    Sums sums(sums_at);
    float c[2][2][4] = {};
#pragma unroll 1
    for (u32 index = warp, chunk = 0; chunk < chunks; index += WARPS, chunk++) {
        const bool is_last = chunk + 1 == chunks;
        u32 left = tiles, to = sums_at;
        if (index >= units) {
#pragma unroll 1
            do unit.next(), unit.load(!is_last || left > 1);
            while (--left);
            continue;
        }
        column.set(row, hole(holes, X_HOLES + warp * 4), lane);
        if (index + WARPS < units) x += WARPS * UNIT, row = *reinterpret_cast<const uint4 *>(x);
        asm volatile("" : "+r"(left), "+r"(to));  // no uniform registers, whose branches take longer
#pragma unroll 1
        do {
            multiply_unit<T>(c, unit, sums, column, table, place, lane);
            sums.at = to, sums.add = chunk > 0, to += WARPS * 256;
            unit.load(!is_last || left > 1);
        } while (--left);
    }
    sums.take(c[1], lane);
    sums.leave(lane);
}

// Adds up the warps' sums of each tile, and what comes beside them.
template <typename T>
__device__ __forceinline__ void finish_rows(u32 table, const Launch<T> &launch, u32 first_tile, u32 tiles) {
    const u32 warps = min(launch.k / UNIT, WARPS);
    for (u32 i = threadIdx.x; i < tiles * TILE; i += blockDim.x) {
        const u32 tile = i / TILE, row_in_tile = i % TILE;
        const u32 from = hole(table, tile * WARPS) + (row_in_tile % 8 * 4 + row_in_tile / 8) * 4;
        const Found<T> found = launch.find(first_tile + tile);
        const u32 row = (first_tile + tile - found.tile) * TILE + row_in_tile;
        float sum = 0;
#pragma unroll
        for (u32 j = 0; j < WARPS; j++)
            if (j < warps) sum += load4_f32(from + j * 256) + load4_f32(from + j * 256 + 8);
        if (row < found.part.n) found.part.y[row] = from_f32<T>(sum + beside_row(launch, found, row, 0));
    }
}

template <typename T>
__device__ __forceinline__ void one_row(const Launch<T> &launch) {
    launch_dependents();
    extern __shared__ __align__(256) u8 shared[];
    __shared__ __align__(8) u64 barriers[2 * COUNT];
    // By a shuffle, so that it is not read anew wherever it is used.
    const u32 lane = __shfl_sync(~0u, threadIdx.x % 32, threadIdx.x % 32), warp = warp_of_block();
    const u32 all = launch.tiles(), units = launch.k / UNIT;
    const u32 first = u32(u64(blockIdx.x) * all / gridDim.x), last = u32(u64(blockIdx.x + 1) * all / gridDim.x), tiles = last - first;
    const u32 table = shared_address(shared), full = shared_address(barriers), maps = hole(table, MAP_HOLES);
    const Stages stages = {table + TABLE, full};
    const Line line(first, last, (units + WARPS - 1) / WARPS);
    Line to_come = line;
    if (warp == ASKS) {
        if (lane == 0) stages.begin();
        __syncwarp();
#pragma unroll 1
        for (u32 i = 0; i < COUNT && to_come.more(); i++) stages.ask(launch, to_come), to_come.next();
    }
    StageScales<T> scales[COUNT];
    if (warp == DECODES)
#pragma unroll
        for (u32 i = 0; i < COUNT; i++)
            if (to_come.more()) scales[i].fetch(launch, to_come, units, maps, lane), to_come.next();
    const Tables<ALL_WARPS * 32> loaded(launch);
    prefetch_beside(launch, first, tiles);
    loaded.template store<T>(shared);
#pragma unroll
    for (u32 j = 0; j < loaded.MAPS; j++) {
        const u32 i = j * (ALL_WARPS * 32) + threadIdx.x;
        if (i < 3 * 256) store4_f32(maps + i / 32 * 256 + i % 32 * 4, loaded.map[j]);
    }
    __syncthreads();
    if (warp == ASKS) {
#pragma unroll 1
        for (; to_come.more(); to_come.next()) {
            mbarrier_wait(Stages::empty_of(full) + to_come.slot.index * 8, to_come.slot.parity ^ 1);
            stages.ask(launch, to_come);
        }
        wait_for_launches();
    } else if (warp == DECODES) {
        Line at = line;
#pragma unroll 1
        for (u32 n = 0; at.more(); n += COUNT)
#pragma unroll
            for (u32 i = 0; i < COUNT; i++) {  // i: at.slot.index, known to the compiler
                if (!at.more()) break;
                if (n > 0) mbarrier_wait(Stages::empty_of(full) + i * 8, at.slot.parity ^ 1);
                scales[i].leave(hole(table, SCALE_HOLES + i * TILE), lane);
                mbarrier_arrive(full + i * 8);
                if (to_come.more()) scales[i].fetch(launch, to_come, units, maps, lane), to_come.next();
                at.next();
            }
        wait_for_launches();
    } else {
        multiply(launch, stages, shared, tiles, line.chunks, warp, lane);
    }
    __syncthreads();
    finish_rows(table, launch, first, tiles);
}

extern "C" __global__ void __launch_bounds__(320, 2) one_row_f16(
    f16 *y0, f16 *y1, f16 *y2, const f16 *x, const f16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const f16 *bias0, const f16 *bias1,
    const f16 *bias2, const f16 *b0, const f16 *b1, const f16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size) {
    one_row(Launch<f16> LAUNCH);
}

extern "C" __global__ void __launch_bounds__(320, 2) one_row_bf16(
    bf16 *y0, bf16 *y1, bf16 *y2, const bf16 *x, const bf16 *h, const float *code, const u8 *packed0, const u8 *packed1, const u8 *packed2,
    const void *absmax0, const void *absmax1, const void *absmax2, const float *absmax2_0, const float *absmax2_1,
    const float *absmax2_2, const float *map0, const float *map1, const float *map2, const bf16 *bias0, const bf16 *bias1,
    const bf16 *bias2, const bf16 *b0, const bf16 *b1, const bf16 *b2, float offset0, float offset1, float offset2, float scale0,
    float scale1, float scale2, u32 n0, u32 n1, u32 n2, u32 rank0, u32 rank1, u32 rank2, u32 m, u32 k, u32 block_size) {
    one_row(Launch<bf16> LAUNCH);
}
