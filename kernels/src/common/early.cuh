// Launches that begin while the one before them ends (sm_90 on), where the host asks for it (`launch_early`): from
// `launch_dependents` on the one that follows may begin, and what launches before write is there after `wait_for_launches`, not
// before. Every block waits before it writes anything, so that the end of a launch is the end of all before it. What a kernel reads
// before it waits is written by no kernel that is launched early; what it reads after may have been written while it ran, so that
// read-only loads (ld.global.nc, __ldg) are not for it. The second of two kernels that are launched beside each other (`launch_beside`)
// learns from the first that what was before both is there, and waits at its end, for the first (`Share` of common/product.cuh).
#pragma once

__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_launches() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Both at once, where a kernel reads nothing first.
__device__ __forceinline__ void begin_early() {
    launch_dependents();
    wait_for_launches();
}
