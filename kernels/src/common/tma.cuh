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
