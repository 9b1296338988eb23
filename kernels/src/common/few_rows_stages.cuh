// A tile's codes by the copy engine, for few_rows_sm90.cu and one_row_sm90.cu.
#pragma once

#include "common/few_rows.cuh"
#include "common/ptx.cuh"
#include "common/tma.cuh"

// Asks for PIECE bytes of each of a tile's rows, the `chunk`-th of the row, or what is left of it: to `to`, rows PITCH bytes apart, rows
// beyond the part as its last; they count on `barrier`. Read once, they are the first to leave the second-level cache. One lane of the
// warp asks, with addresses in uniform registers: lanes that ask for a row each would take turns.
template <u32 PIECE, u32 PITCH, typename T>
__device__ __forceinline__ void ask_tile(const Launch<T> &launch, u32 tile, u32 chunk, u32 to, u32 barrier) {
    const Found<T> found = launch.find(tile);
    const u32 row_bytes = launch.k / 2, row = (tile - found.tile) * TILE, last = min(TILE, found.part.n - row) - 1;
    const u32 bytes = min(PIECE, row_bytes - chunk * PIECE);
    const u8 *const from = found.part.packed + u64(row) * row_bytes + chunk * PIECE;
    if (!elect_one()) return;
    const u64 policy = read_once();
    mbarrier_expect(barrier, TILE * bytes);
#pragma unroll
    for (u32 i = 0; i < TILE; i++) bulk_load(to + i * PITCH, from + min(i, last) * row_bytes, bytes, barrier, policy);
}
