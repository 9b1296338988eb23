// Copies of boxes of a tensor by the copy engine (sm_90 on). The host describes the tensor by cuTensorMapEncodeTiled and passes
// the description by value: `const __grid_constant__ TensorMap name`. Elements outside the tensor read as zeros and are not
// written.
#pragma once

#include "common/mbarrier.cuh"

struct __align__(64) TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ void tma_prefetch(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// The box at (x, y, z), x the fastest dimension; its bytes count on `barrier`.
__device__ __forceinline__ void tma_load(u32 dst, const TensorMap &map, u32 barrier, u32 x, u32 y, u32 z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst),
                 "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
                 : "memory");
}

// A box of a tensor of four sizes.
__device__ __forceinline__ void tma_load4(u32 dst, const TensorMap &map, u32 barrier, u32 x, u32 y, u32 z, u32 w) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst),
                 "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}

// The same to this place in COUNT blocks of a cluster, the bits of `blocks`; the bytes count on the barrier of each.
template <u32 COUNT>
__device__ __forceinline__ void tma_load(u32 dst, const TensorMap &map, u32 barrier, u32 x, u32 y, u32 z, u32 blocks) {
    if constexpr (COUNT == 1) {
        tma_load(dst, map, barrier, x, y, z);
    } else {
        asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(dst),
                     "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(u16(blocks))
                     : "memory");
    }
}

template <u32 COUNT>
__device__ __forceinline__ void tma_load4(u32 dst, const TensorMap &map, u32 barrier, u32 x, u32 y, u32 z, u32 w, u32 blocks) {
    if constexpr (COUNT == 1) {
        tma_load4(dst, map, barrier, x, y, z, w);
    } else {
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
                     "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(dst),
                     "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "h"(u16(blocks))
                     : "memory");
    }
}

// A box from shared memory to (x, y, z).
__device__ __forceinline__ void tma_store(const TensorMap &map, u32 src, u32 x, u32 y, u32 z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map), "r"(src), "r"(x),
                 "r"(y), "r"(z)
                 : "memory");
}

// `bytes` (a multiple of 16) of consecutive memory; they count on `barrier`.
__device__ __forceinline__ void bulk_load(u32 dst, const void *src, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst), "l"(src),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

// The policy of what is the first to leave the second-level cache.
__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void bulk_load(u32 dst, const void *src, u32 bytes, u32 barrier, u64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(dst),
                 "l"(src), "r"(bytes), "r"(barrier), "l"(policy)
                 : "memory");
}

// `bytes` (a multiple of 16) from shared memory to consecutive global memory: over it, or added to the f32 that is there.
__device__ __forceinline__ void bulk_store(void *dst, u32 src, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}

__device__ __forceinline__ void bulk_add(float *dst, u32 src, u32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until all but N groups of this thread's bulk copies have read their source; until all are done.
template <int N = 0>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
