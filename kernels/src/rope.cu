// Rotary position embedding, half-split layout: of each head the first 2 · half dimensions are rotated in pairs (i, half + i), in
// place.
//
//   y[i] = x[i] cos − x[half + i] sin,  y[half + i] = x[half + i] cos + x[i] sin,  cos and sin at [position of the token, i]
//
// The other dimensions stay. `backward` turns the other way. cos and sin are F32 [positions, half] each; x [tokens, heads,
// head_size], the tokens ld elements apart.
//
// Threads: a block a token. threadIdx.x is a pack of 16 bytes of the half (of each half one), threadIdx.y a head; a thread keeps
// its cos and sin for the heads that it takes in turn, two at a time. With L = half / (16 / sizeof(T)), or half itself where half
// or head_size is no multiple of a pack: block (min(L, 64), y), y = min(ceil(heads / 2), 64 / min(L, 64)). Any block of up to 256
// threads is right. No shared memory. Grid: tokens, or less.
//
// Bytes: x twice; the tables come from the caches.
//
// rope_append turns the newest token's query and key of each of B texts, the query in place, and puts key and value into the
// text's slot of a cache, [slots, capacity, K, D], at position lens[text] - 1. Grid (B, H + 2 K), block any up to 256.

#include "common/early.cuh"
#include "common/vec.cuh"

struct Heads {
    u32 count;
    u32 size;
    u32 half;
};

template <int N, typename T>
__device__ __forceinline__ void rotate_token(T *x, const float *cos_row, const float *sin_row, Heads heads, float direction) {
    for (u32 i = threadIdx.x * N; i < heads.half; i += blockDim.x * N) {
        float cos[N], sin[N];
        load_f32(cos_row + i, cos);
        load_f32(sin_row + i, sin);
#pragma unroll
        for (int j = 0; j < N; ++j) sin[j] *= direction;
        // Two heads a turn, so that their loads overlap.
        for (u32 h = threadIdx.y; h < heads.count; h += 2 * blockDim.y) {
            Held<T, N> a[2], b[2];
            T *at[2];
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const u32 head = h + u * blockDim.y;
                at[u] = x + u64(head) * heads.size + i;
                if (head < heads.count) {
                    a[u].load(at[u]);
                    b[u].load(at[u] + heads.half);
                }
            }
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                if (h + u * blockDim.y >= heads.count) break;
                float v[N], w[N];
                a[u].unpack(v);
                b[u].unpack(w);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    const float first = v[j] * cos[j] - w[j] * sin[j];
                    w[j] = w[j] * cos[j] + v[j] * sin[j];
                    v[j] = first;
                }
                store_f32(at[u], v);
                store_f32(at[u] + heads.half, w);
            }
        }
    }
}

template <typename T>
__device__ __forceinline__ void turn(T *x, const u32 *positions, const float *cos, const float *sin, u32 tokens, u32 heads,
                                     u32 head_size, u32 half, u32 ld, u32 backward) {
    constexpr int N = Pack<T>::N;
    const float direction = backward ? -1.0f : 1.0f;
    const bool vector =
        half % N == 0 && head_size % N == 0 && ld % N == 0 && aligned16(x) && aligned16(cos) && aligned16(sin);
    for (u32 t = blockIdx.x; t < tokens; t += gridDim.x) {
        T *const token = x + u64(t) * ld;
        const u64 table = u64(positions[t]) * half;
        if (vector) rotate_token<N>(token, cos + table, sin + table, {heads, head_size, half}, direction);
        else rotate_token<1>(token, cos + table, sin + table, {heads, head_size, half}, direction);
    }
}

template <typename T>
__device__ __forceinline__ void append(T *q, T *keys, T *values, const T *k, const T *v, const u32 *lens, const u32 *slots,
                                       const float *cos, const float *sin, u32 q_heads, u32 k_heads, u32 head_size, u32 half,
                                       u32 capacity) {
    begin_early();
    const u32 text = blockIdx.x, head = blockIdx.y, position = lens[text] - 1;
    const u64 row = u64(slots[text]) * capacity + position;
    const bool query = head < q_heads, key = !query && head < q_heads + k_heads;
    const u32 kv_head = key ? head - q_heads : head - q_heads - k_heads;
    const u64 from = (query ? u64(text) * q_heads + head : u64(text) * k_heads + kv_head) * head_size;
    const T *in = (query ? q : key ? k : v) + from;
    T *out = query ? q + from : (key ? keys : values) + (row * k_heads + kv_head) * head_size;
    const u32 turned = query || key ? half : 0;
    for (u32 i = threadIdx.x; i < turned; i += blockDim.x) {
        const float c = cos[u64(position) * half + i], s = sin[u64(position) * half + i];
        const float a = to_f32(in[i]), b = to_f32(in[half + i]);
        out[i] = from_f32<T>(a * c - b * s);
        out[half + i] = from_f32<T>(b * c + a * s);
    }
    if (query) return;
    for (u32 i = 2 * turned + threadIdx.x; i < head_size; i += blockDim.x) out[i] = in[i];
}

extern "C" __global__ void __launch_bounds__(256, 3)
    rope_f32(float *x, const u32 *positions, const float *cos, const float *sin, u32 tokens, u32 heads, u32 head_size,
             u32 half, u32 ld, u32 backward) {
    turn(x, positions, cos, sin, tokens, heads, head_size, half, ld, backward);
}

extern "C" __global__ void __launch_bounds__(256, 3)
    rope_f16(f16 *x, const u32 *positions, const float *cos, const float *sin, u32 tokens, u32 heads, u32 head_size,
             u32 half, u32 ld, u32 backward) {
    turn(x, positions, cos, sin, tokens, heads, head_size, half, ld, backward);
}

extern "C" __global__ void __launch_bounds__(256)
    rope_append_f32(float *q, float *keys, float *values, const float *k, const float *v, const u32 *lens, const u32 *slots, const float *cos,
                   const float *sin, u32 q_heads, u32 k_heads, u32 head_size, u32 half, u32 capacity) {
    append(q, keys, values, k, v, lens, slots, cos, sin, q_heads, k_heads, head_size, half, capacity);
}

extern "C" __global__ void __launch_bounds__(256)
    rope_append_f16(f16 *q, f16 *keys, f16 *values, const f16 *k, const f16 *v, const u32 *lens, const u32 *slots, const float *cos,
                   const float *sin, u32 q_heads, u32 k_heads, u32 head_size, u32 half, u32 capacity) {
    append(q, keys, values, k, v, lens, slots, cos, sin, q_heads, k_heads, head_size, half, capacity);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(256)
    rope_append_bf16(bf16 *q, bf16 *keys, bf16 *values, const bf16 *k, const bf16 *v, const u32 *lens, const u32 *slots, const float *cos,
                   const float *sin, u32 q_heads, u32 k_heads, u32 head_size, u32 half, u32 capacity) {
    append(q, keys, values, k, v, lens, slots, cos, sin, q_heads, k_heads, head_size, half, capacity);
}

extern "C" __global__ void __launch_bounds__(256, 3)
    rope_bf16(bf16 *x, const u32 *positions, const float *cos, const float *sin, u32 tokens, u32 heads, u32 head_size,
              u32 half, u32 ld, u32 backward) {
    turn(x, positions, cos, sin, tokens, heads, head_size, half, ld, backward);
}
#endif
