// Warp-level matrix product: C [16, 8] += A [16, 16] B [16, 8], f32 accumulation.
//
// With g = lane / 4 and t = lane % 4 a lane holds A (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with the column
// after it; B (2t, g), (2t + 8, g), each with the row after it; C (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
// So the C of two neighbouring products, packed in pairs, is the A of the next product.
#pragma once

#include "common/ptx.cuh"

template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1);

template <>
__device__ __forceinline__ void mma<f16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

#if HAS_BF16
template <>
__device__ __forceinline__ void mma<bf16>(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// Two values rounded to T in one register, the first in the low half.
template <typename T>
__device__ __forceinline__ u32 pack2(float first, float second);

template <>
__device__ __forceinline__ u32 pack2<f16>(float first, float second) {
#if __CUDA_ARCH__ >= 800
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
    return r;
#else
    return u32(from_f32<f16>(first).bits) | u32(from_f32<f16>(second).bits) << 16;
#endif
}

#if HAS_BF16
template <>
__device__ __forceinline__ u32 pack2<bf16>(float first, float second) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(second), "f"(first));
    return r;
}
#endif

// Where lane `lane` points for load_matrices: A rows row..row + 16, columns 8 chunk..8 chunk + 16 of a tile stored by rows of A.
struct Place {
    u32 row;
    u32 chunk;
};

// A [16, 16] from a tile with A's rows; also (transposed loads) B for two products side by side from a tile with B's rows.
__device__ __forceinline__ Place place_rows(u32 lane) { return {lane & 15, lane >> 4}; }

// B [16, 8] for two products side by side, from a tile whose rows are B's columns: registers 0, 1 the first, 2, 3 the second.
__device__ __forceinline__ Place place_columns(u32 lane) { return {(lane & 7) | (lane >> 4 << 3), lane >> 3 & 1}; }
