// t and dB of the adapters of up to three layers in one pass over their dy, on Hopper: what lora_t_db_sm90.cu is made of.
//
// The columns of all dy are dealt out in units of 128, the last of each part filled up with zeros. A block takes up to eight units and a
// share of the rows, 64 at a time: one thread has the copy engine bring tiles of 64 x 128 of dy, unit after unit, through STAGES buffers,
// and h with the first of them. Two warpgroups take 64 columns of a tile each: t += dy B, with Bᵀ in shared memory, and dB += dyᵀ h, by
// wgmma with f32 sums; a unit's dB stays in registers. After a part's last unit the two t are added up; the dB at the end over the blocks
// of a cluster, which have neighbouring shares of the rows.
#pragma once

#include "common/cluster.cuh"
#include "common/early.cuh"
#include "common/mma.cuh"
#include "common/tma.cuh"
#include "common/vec.cuh"
#include "common/wgmma.cuh"

// Layers of a launch at most; columns of a unit; units of a block at most; rows of a step; bytes of 64 x 64 values, of a unit's
// Bᵀ [16, 64] for each warpgroup, of a t [64, 16]; steps whose h is under way or there.
constexpr u32 PARTS = 3, UNIT = 128, UNITS = 8, DEPTH = 64, TILE_BYTES = 8192, B_BYTES = 2048, T_BYTES = 4096, H_STAGES = 4;

// A layer: dy [rows, n] in boxes of 64 x 64, B [n, r]; its h and t begin with column `first`. n = 0: there is none.
template <typename T>
struct Part {
    const TensorMap *dy;
    const T *b;
    u32 n, r, first;
};

// Where the parts lie among the units and the partial sums of t.
struct Places {
    u32 units;            // of a block
    u32 unit[PARTS + 1];  // first unit of a part
    u32 slot[PARTS + 1];  // first partial sum of its t

    __device__ __forceinline__ Places(const u32 (&n)[PARTS], u32 units) : units(units) {
        unit[0] = slot[0] = 0;
#pragma unroll
        for (u32 p = 0; p < PARTS; ++p) {
            unit[p + 1] = unit[p] + (n[p] + UNIT - 1) / UNIT;
            slot[p + 1] = slot[p] + (n[p] ? (unit[p + 1] - 1) / units - unit[p] / units + 1 : 0);
        }
    }
    __device__ __forceinline__ u32 blocks() const { return (unit[PARTS] + units - 1) / units; }
    __device__ __forceinline__ bool has(u32 p, u32 which) const { return which >= unit[p] && which < unit[p + 1]; }
};

// Rows `row` and the next of B [n, r] as columns `column` and the next of a swizzled Bᵀ, zeros beyond n and r.
template <typename T>
__device__ __forceinline__ void turn_pair(u32 to, const T *b, u32 row, u32 n, u32 r, u32 column) {
    Pack<T> x[2][2] = {};
#pragma unroll
    for (u32 i = 0; i < 2; ++i)
#pragma unroll
        for (u32 half = 0; half < 2; ++half)
            if (row + i < n && half * 8 < r) x[i][half] = load16(b + u64(row + i) * r + half * 8);
#pragma unroll
    for (u32 q = 0; q < 16; ++q) {
        const u32 word = u32(x[0][q / 8].v[q % 8].bits) | u32(x[1][q / 8].v[q % 8].bits) << 16;
        store4(to + q * 128 + ((column / 8 ^ q) & 7) * 16 + column % 8 * 2, word);
    }
}

// What a block works on, and where it has it in shared memory. Partials: t [slots, rows, 16], then dB [shares / CLUSTER, columns of all
// units, 16].
template <typename T, u32 STAGES, u32 CLUSTER>
struct Worker {
    const Part<T> (&parts)[PARTS];
    float *partials;
    u32 rows;
    Places places;
    u32 block, share, begin, end, first_unit, count;  // of its units and steps
    u8 *memory;
    u32 base, h_at, b_at, t_at, full, empty, h_empty;

    __device__ __forceinline__ Worker(float *partials, const Part<T> (&parts)[PARTS], u32 rows, u32 units, u8 *memory)
        : parts(parts), partials(partials), rows(rows), places({parts[0].n, parts[1].n, parts[2].n}, units), memory(memory) {
        const u32 blocks = places.blocks(), place = blockIdx.x / CLUSTER, shares = gridDim.x / blocks;
        const u32 steps = (rows + DEPTH - 1) / DEPTH;
        block = place % blocks, share = place / blocks * CLUSTER + blockIdx.x % CLUSTER;
        begin = u64(steps) * share / shares, end = u64(steps) * (share + 1) / shares;
        first_unit = block * units, count = min(units, places.unit[PARTS] - first_unit);
        base = shared_address(memory), h_at = base + STAGES * 2 * TILE_BYTES, b_at = h_at + H_STAGES * TILE_BYTES;
        t_at = b_at + UNITS * 2 * B_BYTES, full = t_at + 2 * T_BYTES, empty = full + STAGES * 8, h_empty = empty + STAGES * 8;
    }

    __device__ __forceinline__ void init(const TensorMap &h) const {
        if (threadIdx.x == 0) {
            tma_prefetch(h);
            for (u32 i = 0; i < STAGES; ++i) mbarrier_init(full + i * 8, 1), mbarrier_init(empty + i * 8, 8);
            for (u32 i = 0; i < H_STAGES; ++i) mbarrier_init(h_empty + i * 8, 8);
            mbarrier_init_fence();
        }
        launch_dependents();
        __syncthreads();
    }

    // All tiles of dy, and h with the first unit of each step; one thread.
    __device__ __forceinline__ void bring(const TensorMap &h) const {
        Ring<STAGES> ring;
        Ring<H_STAGES> h_ring;
        for (u32 step = begin; step < end; ++step, h_ring.next()) {
            mbarrier_wait(h_empty + h_ring.index * 8, h_ring.parity ^ 1);
            for (u32 u = 0; u < count; ++u, ring.next()) {
                const u32 barrier = full + ring.index * 8, to = base + ring.index * 2 * TILE_BYTES, unit = first_unit + u;
                mbarrier_wait(empty + ring.index * 8, ring.parity ^ 1);
                mbarrier_expect(barrier, (u ? 2 : 3) * TILE_BYTES);
                if (u == 0) tma_load(h_at + h_ring.index * TILE_BYTES, h, barrier, 0, 0, step * DEPTH);
#pragma unroll
                for (u32 p = 0; p < PARTS; ++p)
                    if (places.has(p, unit)) {
                        const u32 column = (unit - places.unit[p]) * UNIT;
                        tma_load(to, *parts[p].dy, barrier, column, 0, step * DEPTH);
                        tma_load(to + TILE_BYTES, *parts[p].dy, barrier, column + 64, 0, step * DEPTH);
                    }
            }
        }
    }

    // Bᵀ of all units; both warpgroups.
    __device__ __forceinline__ void turn_b() const {
        for (u32 i = threadIdx.x; i < count * UNIT / 2; i += 256) {
            const u32 unit = first_unit + i / 64, column = i % 64 * 2, to = b_at + (i / 64 * 2 + column / 64) * B_BYTES;
#pragma unroll
            for (u32 p = 0; p < PARTS; ++p)
                if (places.has(p, unit)) {
                    const u32 row = (unit - places.unit[p]) * UNIT + column;
                    turn_pair(to, parts[p].b, row, parts[p].n, parts[p].r, column % 64);
                }
        }
        fence_async();
        barrier_sync(1, 256);
    }

    // A part's t of a step: the second warpgroup's to the first, which adds its own and writes the sum.
    __device__ __forceinline__ void write_t(const float (&t)[8], u32 step, u32 slot, u32 turn) const {
        const u32 warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        float4 *other = reinterpret_cast<float4 *>(memory + (t_at - base) + turn % 2 * T_BYTES) + threadIdx.x % 128;
        if (threadIdx.x >= 128) other[0] = make_float4(t[0], t[1], t[2], t[3]), other[128] = make_float4(t[4], t[5], t[6], t[7]);
        barrier_sync(1, 256);
        if (threadIdx.x >= 128) return;
        const u32 row = step * DEPTH + warp * 16 + lane / 4;
        float *to = partials + (u64(slot) * rows + row) * 16 + lane % 4 * 2;
#pragma unroll
        for (u32 j = 0; j < 2; ++j) {
            const float4 x = other[j * 128];
            if (row < rows) *reinterpret_cast<float2 *>(to + j * 8) = make_float2(t[4 * j] + x.x, t[4 * j + 1] + x.y);
            if (row + 8 < rows) *reinterpret_cast<float2 *>(to + 128 + j * 8) = make_float2(t[4 * j + 2] + x.z, t[4 * j + 3] + x.w);
        }
    }

    // t of each step, and dB of each unit left in `c`; both warpgroups.
    __device__ __forceinline__ void multiply(float (&c)[UNITS][8]) const {
        const u32 group = threadIdx.x / 128, lane = threadIdx.x % 32;
        Ring<STAGES> ring;
        u32 turn = 0;
        for (u32 step = begin; step < end; ++step) {
            const u32 h_index = (step - begin) % H_STAGES;
            float t[8] = {};
#pragma unroll
            for (u32 u = 0; u < UNITS; ++u) {
                if (u >= count) break;
                const u32 unit = first_unit + u, tile = base + (ring.index * 2 + group) * TILE_BYTES;
                const u32 turned = b_at + (u * 2 + group) * B_BYTES;
                u32 thin = h_at + h_index * TILE_BYTES, slot = 0;
                bool last = u + 1 == count;
#pragma unroll
                for (u32 p = 0; p < PARTS; ++p)
                    if (places.has(p, unit)) {
                        thin += parts[p].first * 2, slot = places.slot[p] + block - places.unit[p] / places.units;
                        last |= unit + 1 == places.unit[p + 1];
                    }
                mbarrier_wait(full + ring.index * 8, ring.parity);
                hold(t);
                hold(c[u]);
                wgmma_fence();
#pragma unroll
                for (u32 kk = 0; kk < 4; ++kk) {
                    wgmma<T, 0, 0>(t, k_major(tile + kk * 32), k_major(turned + kk * 32), 1);
                    wgmma<T, 1, 1>(c[u], mn_major(tile + kk * 2048, 0), mn_major(thin + kk * 2048, 0), 1);
                }
                wgmma_commit();
                wgmma_wait<0>();
                hold(t);
                hold(c[u]);
                if (lane == 0) mbarrier_arrive(empty + ring.index * 8);
                if (lane == 0 && u + 1 == count) mbarrier_arrive(h_empty + h_index * 8);
                ring.next();
                if (!last) continue;
                write_t(t, step, slot, turn++);
#pragma unroll
                for (u32 j = 0; j < 8; ++j) t[j] = 0;
            }
        }
    }

    // The sum of dB over the cluster, by way of the buffers, in rows of 20 values; all threads.
    __device__ __forceinline__ void write_db(const float (&c)[UNITS][8]) const {
        constexpr u32 PITCH = 20;
        const u32 group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, rank = blockIdx.x % CLUSTER;
        if (group < 2) {
            float *to = reinterpret_cast<float *>(memory) + (group * 64 + warp * 16 + lane / 4) * PITCH + lane % 4 * 2;
#pragma unroll
            for (u32 u = 0; u < UNITS; ++u)
#pragma unroll
                for (u32 j = 0; j < 2; ++j) {
                    *reinterpret_cast<float2 *>(to + u * UNIT * PITCH + j * 8) = make_float2(c[u][4 * j], c[u][4 * j + 1]);
                    *reinterpret_cast<float2 *>(to + (u * UNIT + 8) * PITCH + j * 8) = make_float2(c[u][4 * j + 2], c[u][4 * j + 3]);
                }
        }
        cluster_sync();
        const u32 columns = places.unit[PARTS] * UNIT, each = count * UNIT / CLUSTER;
        float *db = partials + u64(places.slot[PARTS]) * rows * 16 + (u64(share / CLUSTER) * columns + first_unit * UNIT) * 16;
        for (u32 i = threadIdx.x; i < each * 4; i += blockDim.x) {
            const u32 at = rank * each + i / 4, q = i % 4 * 4;
            *reinterpret_cast<float4 *>(db + at * 16 + q) = cluster_sum<CLUSTER>(base + (at * PITCH + q) * 4);
        }
        __syncwarp();
        cluster_sync();
    }
};

template <typename T, u32 STAGES, u32 CLUSTER>
__device__ __forceinline__ void parts_t_db(float *partials, const Part<T> (&parts)[PARTS], const TensorMap &h, u32 rows, u32 units) {
    extern __shared__ __align__(1024) u8 memory[];
    const Worker<T, STAGES, CLUSTER> worker(partials, parts, rows, units, memory);
    worker.init(h);
    float c[UNITS][8] = {};
    if (threadIdx.x == 256) {
        wait_for_launches();
        worker.bring(h);
    } else if (threadIdx.x < 256) {
        worker.turn_b();
        wait_for_launches();
        worker.multiply(c);
    }
    __syncwarp();
    __syncthreads();
    worker.write_db(c);
}

// Σ of the partial sums first, first + every, … below `count`, of four values each, `stride` apart, in their order.
__device__ __forceinline__ float4 sum_of(const float *partials, u32 first, u32 every, u32 count, u64 stride) {
    constexpr u32 BATCH = 8;
    float4 sum = {};
    for (; first < count; first += BATCH * every) {
        float4 batch[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) {
            const u32 at = first + i * every;
            batch[i] = at < count ? *reinterpret_cast<const float4 *>(partials + at * stride) : float4{};
        }
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) sum.x += batch[i].x, sum.y += batch[i].y, sum.z += batch[i].z, sum.w += batch[i].w;
    }
    return sum;
}

__device__ __forceinline__ float4 with_lane(float4 x, u32 away) {
    return {x.x + __shfl_xor_sync(~0u, x.x, away), x.y + __shfl_xor_sync(~0u, x.y, away), x.z + __shfl_xor_sync(~0u, x.z, away),
            x.w + __shfl_xor_sync(~0u, x.w, away)};
}

// What a part's sums go to.
struct Gradient {
    float *db;
    float scale;
    u32 n, r, first;
};

// A thread has four values of t, or with three others, which take every fourth share, four values of dB.
template <typename T>
__device__ __forceinline__ void parts_sum(T *t, const float *partials, const Gradient (&parts)[PARTS], u32 rows, u32 ld_t, u32 units,
                                          u32 shares) {
    begin_early();
    const Places places({parts[0].n, parts[1].n, parts[2].n}, units);
    const u32 count = (parts[0].n > 0) + (parts[1].n > 0) + (parts[2].n > 0);
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x, quads = rows * 4, of_t = (count * quads + 31) / 32 * 32;
    if (i < of_t) {
        const u32 p = i / quads, row = (i - p * quads) / 4, q = i % 4 * 4;
        u32 slot = 0, slots = 0, r = 0, first = 0;
        float scale = 0;
#pragma unroll
        for (u32 j = 0; j < PARTS; ++j)
            if (j == p) {
                slot = places.slot[j], slots = places.slot[j + 1] - slot;
                r = parts[j].r, first = parts[j].first, scale = parts[j].scale;
            }
        if (q >= r) return;
        const float4 sum = sum_of(partials + (u64(slot) * rows + row) * 16 + q, 0, 1, slots, u64(rows) * 16);
        *reinterpret_cast<uint2 *>(t + u64(row) * ld_t + first + q) =
            make_uint2(pack2<T>(scale * sum.x, scale * sum.y), pack2<T>(scale * sum.z, scale * sum.w));
        return;
    }
    const u32 rest = i - of_t, quad = rest / 32 * 8 + rest % 8, at = quad / 4, q = quad % 4 * 4;
    const u32 columns = places.unit[PARTS] * UNIT;
    if (at >= columns) return;  // whole warps
    const float *from = partials + u64(places.slot[PARTS]) * rows * 16 + u64(at) * 16 + q;
    const float4 sum = with_lane(with_lane(sum_of(from, rest % 32 / 8, 4, shares, u64(columns) * 16), 8), 16);
    u32 column = 0, n = 0, r = 0;
    float scale = 0, *db = nullptr;
#pragma unroll
    for (u32 j = 0; j < PARTS; ++j)
        if (parts[j].n && at >= places.unit[j] * UNIT)
            column = at - places.unit[j] * UNIT, n = parts[j].n, r = parts[j].r, scale = parts[j].scale, db = parts[j].db;
    if (column >= n || q >= r || rest % 32 >= 8) return;
    float4 *to = reinterpret_cast<float4 *>(db + u64(column) * r + q);
    float4 old = *to;
    old.x += scale * sum.x, old.y += scale * sum.y, old.z += scale * sum.z, old.w += scale * sum.w;
    *to = old;
}
