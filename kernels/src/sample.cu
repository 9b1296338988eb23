// The next token of each of B texts from its logits F32 [B, V], as crates/tensor/src/ops/sample.rs says, to the bit: all that
// decides is f32 operations that round everywhere alike, and integers.
//
//   l  = logits, of tokens in `seen` divided (positive) or multiplied by `penalty`
//   w  = 2^31 · exp((l − max l) / temperature) in whole numbers; 0 below 2^-32
//   order: largest w first, of equal ones the lowest token; of this the first top_k; of these the fewest that have top_p of
//   the sum; of these the first whose sum with those before it is above (uniform · their sum)
//
// Then the text goes on (`advance`): its token, its length (at most `capacity`), how many tokens were chosen, what it has seen.
//
// sample_best: grid (ceil(V / 4096), B), block 256. Greedy: the whole step. Else it leaves max l in `highest`. best: u64 [B], arrivals:
// u32 [B], zero before the first launch and left zero.
// sample_weights: grid (ceil(V / 4096), B), block 256: w, u32 [B, V].
// sample_draw: grid B, block 1024. It looks for a place in the order digit by digit of w: 11, 11 and 10 bits, then by token.
//
// Bytes: the logits once or twice, and w up to twelve times.

#include "common/reduce.cuh"

constexpr u32 EACH = 4096;

struct Texts {
    u32 *tokens, *lens, *counts, *seen;
    u32 vocab, words, capacity;
};

__device__ __forceinline__ void advance(const Texts &texts, u32 text, u32 token) {
    texts.tokens[text] = token;
    texts.counts[text] += 1;
    if (texts.lens[text] < texts.capacity) texts.lens[text] += 1;
    texts.seen[u64(text) * texts.words + token / 32] |= 1u << token % 32;
}

__device__ __forceinline__ float penalized(float logit, u32 token, const u32 *seen, float penalty) {
    if (penalty == 1.0f || !(seen[token / 32] >> token % 32 & 1)) return logit;
    return logit > 0.0f ? __fdiv_rn(logit, penalty) : __fmul_rn(logit, penalty);
}

// Larger floats are larger numbers; of equal floats the lower token is larger. Never 0.
__device__ __forceinline__ u64 rank_of(float logit, u32 token) {
    const u32 bits = __float_as_uint(logit == 0.0f ? 0.0f : logit);
    return u64(bits >> 31 ? ~bits : bits | 0x80000000) << 32 | ~token;
}

__device__ __forceinline__ float logit_of(u64 rank) {
    const u32 bits = u32(rank >> 32);
    return __uint_as_float(bits >> 31 ? bits & 0x7fffffff : ~bits);
}

extern "C" __global__ void __launch_bounds__(256)
    sample_best(u32 *tokens, u32 *lens, u32 *counts, u32 *seen, float *highest, u64 *best, u32 *arrivals, const float *logits, u32 vocab,
                u32 words, u32 capacity, float penalty, u32 greedy) {
    const u32 text = blockIdx.y, first = blockIdx.x * EACH, last = min(first + EACH, vocab);
    const float *of_text = logits + u64(text) * vocab;
    const u32 *seen_of_text = seen + u64(text) * words;
    u64 mine = 0;
    for (u32 i = first + threadIdx.x; i < last; i += 256) {
        const float logit = penalized(of_text[i], i, seen_of_text, penalty);
        if (logit == logit) mine = max(mine, rank_of(logit, i));
    }
#pragma unroll
    for (u32 d = 16; d; d /= 2) mine = max(mine, __shfl_xor_sync(~0u, mine, d));
    if (threadIdx.x % 32 == 0) atomicMax(best + text, mine);
    __threadfence();
    __syncthreads();
    if (threadIdx.x) return;
    if (atomicAdd(arrivals + text, 1u) != gridDim.x - 1) return;
    __threadfence();
    const u64 found = atomicExch(best + text, 0ull);
    arrivals[text] = 0;
    if (greedy) advance({tokens, lens, counts, seen, vocab, words, capacity}, text, found ? ~u32(found) : 0);
    else highest[text] = found ? logit_of(found) : 0.0f;
}

// 2^31 · 2^t for t <= 0.
__device__ __forceinline__ u32 power(float t) {
    if (!(t > -32.0f)) return 0;
    const float n = floorf(__fadd_rn(t, 0.5f)), f = __fsub_rn(t, n);
    float p = 1.5403530e-4f;
    const float c[6] = {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f};
#pragma unroll
    for (u32 i = 0; i < 6; i++) p = __fadd_rn(__fmul_rn(p, f), c[i]);
    const u32 shift = u32(-n);
    return shift < 32 ? u32(__fmul_rn(p, 8388608.0f)) << 8 >> shift : 0;
}

extern "C" __global__ void __launch_bounds__(256)
    sample_weights(u32 *weights, const float *logits, const float *highest, const u32 *seen, u32 vocab, u32 words, float penalty,
                   float temperature) {
    const u32 text = blockIdx.y, first = blockIdx.x * EACH, last = min(first + EACH, vocab);
    const float top = highest[text];
    for (u32 i = first + threadIdx.x; i < last; i += 256) {
        const float logit = penalized(logits[u64(text) * vocab + i], i, seen + u64(text) * words, penalty);
        weights[u64(text) * vocab + i] = power(__fmul_rn(__fdiv_rn(__fsub_rn(logit, top), temperature), 1.4426950f));
    }
}

constexpr u32 BINS = 2048;

// What lies before a place in the order, and the token there.
struct Place {
    u64 mass;  // of the tokens before it and itself
    u32 token;
};

struct Shared {
    u64 mass[BINS];
    u32 count[BINS];
    u64 before_mass, target;
    u32 before_count, digit, token;
    u32 matches[32];
};

// The digit, from the largest on, in which the sum passes `target`; what lies before it. By the first warp.
template <bool BY_MASS>
__device__ __forceinline__ void find_digit(Shared &s, u64 target) {
    const u32 lane = threadIdx.x;
    const u32 high = BINS - 1 - lane * (BINS / 32);
    u64 mass = 0;
    u32 count = 0;
    for (u32 i = 0; i < BINS / 32; i++) mass += s.mass[high - i], count += s.count[high - i];
    u64 mass_to = mass;
    u32 count_to = count;
#pragma unroll
    for (u32 d = 1; d < 32; d *= 2) {
        const u64 m = __shfl_up_sync(~0u, mass_to, d);
        const u32 c = __shfl_up_sync(~0u, count_to, d);
        if (lane >= d) mass_to += m, count_to += c;
    }
    u64 before_mass = s.before_mass + mass_to - mass;
    u32 before_count = s.before_count + count_to - count;
    const u64 from = BY_MASS ? before_mass : before_count, to = from + (BY_MASS ? mass : u64(count));
    __syncwarp();
    if (from <= target && target < to) {
        for (u32 i = 0; i < BINS / 32; i++) {
            const u64 next = BY_MASS ? before_mass + s.mass[high - i] : u64(before_count) + s.count[high - i];
            if (target < next) {
                s.digit = high - i, s.before_mass = before_mass, s.before_count = before_count;
                break;
            }
            before_mass += s.mass[high - i], before_count += s.count[high - i];
        }
    }
}

// The place whose sum (of w, or of tokens) passes `target`, which is below the sum of all.
template <bool BY_MASS>
__device__ __forceinline__ Place find(Shared &s, const u32 *weights, u32 vocab, u64 target) {
    if (threadIdx.x == 0) s.before_mass = 0, s.before_count = 0;
    u32 prefix = 0;
#pragma unroll 1
    for (u32 pass = 0; pass < 3; pass++) {
        const u32 shift = pass == 0 ? 21 : pass == 1 ? 10 : 0, bits = pass == 2 ? 10 : 11;
        for (u32 i = threadIdx.x; i < BINS; i += 1024) s.mass[i] = 0, s.count[i] = 0;
        __syncthreads();
        u64 mass = 0;
        u32 count = 0;
        for (u32 i = threadIdx.x; i < vocab; i += 1024) {
            const u32 w = weights[i];
            if (pass && w >> (shift + bits) != prefix) continue;
            const u32 digit = w >> shift & ((1u << bits) - 1);
            // Most are small: summed up here, so that they do not queue for one word.
            if (digit == 0) mass += w, count += 1;
            else atomicAdd(&s.mass[digit], u64(w)), atomicAdd(&s.count[digit], 1u);
        }
        mass = lanes_sum(mass), count = lanes_sum(count);
        if (threadIdx.x % 32 == 0 && count) atomicAdd(&s.mass[0], mass), atomicAdd(&s.count[0], count);
        __syncthreads();
        if (threadIdx.x < 32) find_digit<BY_MASS>(s, target);
        __syncthreads();
        prefix = prefix << bits | s.digit;
    }
    // Of the tokens with this w the one in its place: each warp counts those of its stretch.
    const u64 before_mass = s.before_mass, left = target - (BY_MASS ? before_mass : u64(s.before_count));
    const u32 place = u32(BY_MASS ? left / prefix : left);
    const u32 each = (vocab + 1023) / 1024 * 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 first = warp * each, last = min(first + each, vocab);
    u32 count = 0;
    for (u32 i = first; i < last; i += 32) count += __popc(__ballot_sync(~0u, i + lane < last && weights[i + lane] == prefix));
    if (lane == 0) s.matches[warp] = count;
    __syncthreads();
    u32 before = 0;
    for (u32 w = 0; w < warp; w++) before += s.matches[w];
    if (before <= place && place < before + count) {
        for (u32 i = first; i < last; i += 32) {
            const bool match = i + lane < last && weights[i + lane] == prefix;
            const u32 all = __ballot_sync(~0u, match), mine = before + __popc(all & ((1u << lane) - 1));
            if (match && mine == place) s.token = i + lane;
            before += __popc(all);
        }
    }
    __syncthreads();
    const Place found = {before_mass + u64(place + 1) * prefix, s.token};
    __syncthreads();
    return found;
}

// The n-th 24 random bits of a stream, as crates/tensor/src/rng.rs.
__device__ __forceinline__ u64 random_bits(u64 key, u64 n) {
    u64 z = key + (n + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (z ^ (z >> 31)) >> 40;
}

extern "C" __global__ void __launch_bounds__(1024)
    sample_draw(u32 *tokens, u32 *lens, u32 *counts, u32 *seen, const u32 *weights, u32 vocab, u32 words, u32 capacity, u32 top_k,
                float top_p, u64 key) {
    __shared__ Shared s;
    __shared__ u64 sums[32];
    const u32 text = blockIdx.x;
    const u32 *of_text = weights + u64(text) * vocab;
    u64 total = 0;
    u32 some = 0;
    for (u32 i = threadIdx.x; i < vocab; i += 1024) total += of_text[i], some += of_text[i] != 0;
    total = block_sum(total, sums);
    __syncthreads();
    const u64 positive = block_sum(u64(some), sums);
    __syncthreads();
    u32 token = 0;
    if (total) {
        if (top_k && top_k < positive) total = find<false>(s, of_text, vocab, top_k - 1).mass;
        const u64 need = max(u64(ceil(double(top_p) * double(total))), u64(1));
        if (need < total) total = find<true>(s, of_text, vocab, need - 1).mass;
        const u64 uniform = random_bits(key, counts[text]);
        const u64 target = (total >> 24) * uniform + ((total & 0xffffff) * uniform >> 24);
        token = find<true>(s, of_text, vocab, target).token;
    }
    if (threadIdx.x == 0) advance({tokens, lens, counts, seen, vocab, words, capacity}, text, token);
}
