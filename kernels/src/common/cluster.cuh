// Blocks of a cluster (sm_90 on): who this one is, meeting the others, reading and writing their shared memory.
#pragma once

#include "common/types.cuh"

__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// Waits for all threads of all blocks; what they wrote to shared memory before is seen after.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Waits for all blocks to have begun, and for their mbarriers, where mbarrier_init_fence comes before it. Cheaper than
// cluster_sync: it waits for no other access.
__device__ __forceinline__ void cluster_begin() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Writes two f32 to an address of shared memory as block `rank` of the cluster has it; their 8 bytes count on its `barrier`.
__device__ __forceinline__ void cluster_send(u32 address, float2 x, u32 barrier, u32 rank) {
    asm volatile("{\n"
                 ".reg .b32 to, on;\n"
                 "mapa.shared::cluster.u32 to, %0, %4;\n"
                 "mapa.shared::cluster.u32 on, %3, %4;\n"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [to], {%1, %2}, [on];\n"
                 "}\n" ::"r"(address),
                 "f"(x.x), "f"(x.y), "r"(barrier), "r"(rank)
                 : "memory");
}

// Four f32 at an address of this block's shared memory, as block `rank` of the cluster has them.
__device__ __forceinline__ float4 cluster_load(u32 address, u32 rank) {
    u32 there;
    float4 x;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(there)
                 : "memory");
    return x;
}

// The sum over the N blocks of a cluster, in their order, of four f32 at an address of shared memory.
template <u32 N>
__device__ __forceinline__ float4 cluster_sum(u32 address) {
    float4 sum = cluster_load(address, 0);
#pragma unroll
    for (u32 i = 1; i < N; i++) {
        const float4 x = cluster_load(address, i);
        sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    return sum;
}
