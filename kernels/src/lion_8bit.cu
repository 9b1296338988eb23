// Lion (lion.cu) with an 8-bit state: m is decoded, updated and encoded anew, with the signed map and the largest magnitude of each
// block of 256. Where g is not finite p stays and m becomes 0.
//
// `blocks`, `quantised` and `exact` as in adamw_8bit.cu; `tables`: the signed map's (common/dynamic8.cuh).
//
// Threads: a warp a block, 8 elements a lane. Blocks of 256; grid: min(ceil((quantised + exact) / 8), 4 · multiprocessors) in x, at
// least 1: they take the blocks in turn. 13 KiB of static shared memory.
//
// Bytes: 14 a parameter, and 16 a block.

#include "common/dynamic8.cuh"
#include "common/lion.cuh"

__device__ __forceinline__ void update(float &p, float &m, float g, const LionFactors &f, bool decay) {
    g *= f.grad;
    if (finite(g)) lion(p, m, g, f, decay);
    else m = 0.0f;
}

template <bool WHOLE>
__device__ __forceinline__ void update_block(float *p, const float *g, const State &m, u32 number, u32 len, bool decay,
                                             const LionFactors &f, const Map<true> &map) {
    const u32 *codes = m.words(number);
    const u32 words[2] = {codes[0], codes[BLOCK / 8]};
    const float absmax = m.absmax[number];
    float vg[8], vp[8], vm[8];
    load_block<WHOLE>(g, len, vg);
    load_block<WHOLE>(p, len, vp);
    m.load(map, words, absmax, vm);
#pragma unroll
    for (u32 j = 0; j < 8; ++j) {
        update(vp[j], vm[j], vg[j], f, decay);
        if (!WHOLE && lane_at() + j / 4 * (BLOCK / 2) + j % 4 >= len) vm[j] = 0.0f;
    }
    store_block<WHOLE>(p, len, vp);
    m.store(map, number, vm);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    lion_8bit(float *p, u8 *m, float *m_absmax, float *m_exact, const float *g, const float *step, const u32 *blocks, u32 quantised,
              u32 exact, const u32 *tables, float beta1, float one_less_beta1, float beta2, float one_less_beta2) {
    __shared__ u32 shared[SIGNED_WORDS];
    if (skipped(step)) return;
    for (u32 i = threadIdx.x; i < SIGNED_WORDS; i += blockDim.x) shared[i] = tables[i];
    __syncthreads();
    const Map<true> map = {shared};
    const State state = {m, m_absmax, m_exact};
    const LionFactors f = {gradient_factor(step), beta1, one_less_beta1, beta2, one_less_beta2, step[STEP_LR], step[STEP_KEEP]};
    const uint2 *entries = reinterpret_cast<const uint2 *>(blocks);
    const u32 warps = gridDim.x * (blockDim.x / 32), count = quantised + exact;
    u32 number = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    uint2 next = number < count ? entries[number] : uint2{0, 0};
    for (; number < count; number += warps) {
        const Block block(next);
        if (number + warps < count) next = entries[number + warps];
        float *here = p + block.start;
        const float *grads = g + block.start;
        if (number >= quantised) {
            float *exact_m = m_exact + u64(number - quantised) * BLOCK;
            for (u32 at = threadIdx.x % 32; at < block.len; at += 32) update(here[at], exact_m[at], grads[at], f, block.decayed);
        } else if (block.len == BLOCK && aligned16(here) && aligned16(grads)) {
            update_block<true>(here, grads, state, number, BLOCK, block.decayed, f, map);
        } else {
            update_block<false>(here, grads, state, number, block.len, block.decayed, f, map);
        }
    }
}
