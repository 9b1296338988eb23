// AdamW with 8-bit states over a flat buffer of parameters, in one pass, as bitsandbytes does it. With g = (grad_scale · clip) · grad:
//
//   m = β₁ m + (1 − β₁) g,  v = β₂ v + (1 − β₂) g²
//   p = p · keep − size · m / (√v · inverse_root + eps), keep before or after (adamw.cu)
//
// m and v are decoded, updated and encoded anew: codes of the signed map and of the unsigned one, with the largest magnitude of
// each block of 256. Where g is not finite p stays and m and v become 0. `step` as in adamw.cu.
//
// `blocks` holds two words a block: its first element in p and grad; its length, and in bit 31 whether it decays. The first
// `quantised` of them have codes and absmax at 256 times and once their number; the other `exact` ones (of small parameters) f32
// states at 256 times their number less `quantised`. `tables`: the signed map's and the unsigned map's (common/dynamic8.cuh).
//
// Threads: a warp a block, 8 elements a lane. Blocks of 256; grid: min(ceil((quantised + exact) / 8), 4 · multiprocessors) in x, at
// least 1: they take the blocks in turn. 25 KiB of static shared memory.
//
// Bytes: 16 a parameter, and 24 a block.

#include "common/dynamic8.cuh"

struct Factors {
    float grad, beta1, one_less_beta1, beta2, one_less_beta2, size, inverse_root, eps, before, after;
};

__device__ __forceinline__ void update(float &p, float &m, float &v, float g, const Factors &f, bool decay) {
    g *= f.grad;
    const bool ok = finite(g);
    const float m_next = __fmaf_rn(m, f.beta1, f.one_less_beta1 * g);
    const float v_next = __fmaf_rn(v, f.beta2, f.one_less_beta2 * g * g);
    m = ok ? m_next : 0.0f;
    v = ok ? v_next : 0.0f;
    const float change = f.size * fast_div(m, fast_sqrt(v) * f.inverse_root + f.eps);
    const float p_next = (p * (decay ? f.before : 1.0f) - change) * (decay ? f.after : 1.0f);
    p = ok ? p_next : p;
}

template <bool WHOLE>
__device__ __forceinline__ void update_block(float *p, const float *g, const State &m, const State &v, u32 number, u32 len,
                                             bool decay, const Factors &f, const Map<true> &map1, const Map<false> &map2) {
    const u32 *codes1 = m.words(number), *codes2 = v.words(number);
    const u32 words1[2] = {codes1[0], codes1[BLOCK / 8]}, words2[2] = {codes2[0], codes2[BLOCK / 8]};
    const float absmax1 = m.absmax[number], absmax2 = v.absmax[number];
    float vg[8], vp[8], vm[8], vv[8];
    load_block<WHOLE>(g, len, vg);
    load_block<WHOLE>(p, len, vp);
    m.load(map1, words1, absmax1, vm);
    v.load(map2, words2, absmax2, vv);
#pragma unroll
    for (u32 j = 0; j < 8; ++j) {
        update(vp[j], vm[j], vv[j], vg[j], f, decay);
        if (!WHOLE && lane_at() + j / 4 * (BLOCK / 2) + j % 4 >= len) vm[j] = vv[j] = 0.0f;
    }
    store_block<WHOLE>(p, len, vp);
    m.store(map1, number, vm);
    v.store(map2, number, vv);
}

extern "C" __global__ void __launch_bounds__(256, 4)
    adamw_8bit(float *p, u8 *m, u8 *v, float *m_absmax, float *v_absmax, float *m_exact, float *v_exact, const float *g,
               const float *step, const u32 *blocks, u32 quantised, u32 exact, const u32 *tables, float beta1,
               float one_less_beta1, float beta2, float one_less_beta2, float eps, u32 decay_after) {
    __shared__ u32 shared[SIGNED_WORDS + UNSIGNED_WORDS];
    if (skipped(step)) return;
    for (u32 i = threadIdx.x; i < SIGNED_WORDS + UNSIGNED_WORDS; i += blockDim.x) shared[i] = tables[i];
    __syncthreads();
    const Map<true> map1 = {shared};
    const Map<false> map2 = {shared + SIGNED_WORDS};
    const State first = {m, m_absmax, m_exact}, second = {v, v_absmax, v_exact};
    const float keep = step[STEP_KEEP];
    const Factors f = {gradient_factor(step), beta1, one_less_beta1, beta2, one_less_beta2, step[STEP_SIZE],
                       step[STEP_INVERSE_ROOT], eps, decay_after ? 1.0f : keep, decay_after ? keep : 1.0f};
    const uint2 *entries = reinterpret_cast<const uint2 *>(blocks);
    const u32 warps = gridDim.x * (blockDim.x / 32), count = quantised + exact;
    u32 number = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    uint2 next = number < count ? entries[number] : uint2{0, 0};
    for (; number < count; number += warps) {
        const Block block(next);
        // The next block's place is read ahead: its elements wait for it.
        if (number + warps < count) next = entries[number + warps];
        float *here = p + block.start;
        const float *grads = g + block.start;
        if (number >= quantised) {
            const u64 base = u64(number - quantised) * BLOCK;
            for (u32 at = threadIdx.x % 32; at < block.len; at += 32)
                update(here[at], m_exact[base + at], v_exact[base + at], grads[at], f, block.decayed);
        } else if (block.len == BLOCK && aligned16(here) && aligned16(grads)) {
            update_block<true>(here, grads, first, second, number, BLOCK, block.decayed, f, map1, map2);
        } else {
            update_block<false>(here, grads, first, second, number, block.len, block.decayed, f, map1, map2);
        }
    }
}
