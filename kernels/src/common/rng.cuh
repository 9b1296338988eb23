// The counter-based generator of crates/tensor/src/rng.rs: SplitMix64 of a key and the number's index.
#pragma once

#include "common/types.cuh"

constexpr u64 GOLDEN = 0x9e3779b97f4a7c15ull;

__device__ __forceinline__ u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// The key of the stream `index` below a key.
__device__ __forceinline__ u64 stream_key(u64 key, u64 index) { return mix(key ^ mix(index + GOLDEN)); }

// The key below `key` on a path of `depth` (up to 4) stream indices of 16 bits each, the first in the lowest bits.
__device__ __forceinline__ u64 path_key(u64 key, u64 path, u32 depth) {
    for (u32 i = 0; i < depth; ++i, path >>= 16) key = stream_key(key, path & 0xffff);
    return key;
}

// The highest 24 of the n-th 64 random bits: the n-th uniform number times 2^24. `counter` is key + (n + 1) · GOLDEN. The last
// xor of `mix` does not reach these bits.
__device__ __forceinline__ u32 uniform24(u64 counter) {
    u64 z = (counter ^ (counter >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return u32(z >> 40);
}
