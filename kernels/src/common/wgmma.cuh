// Matrix products of a warpgroup (four warps, sm_90a): C [64, N] += A [64, 16] B [16, N], asynchronous, f32 accumulation.
//
// C: thread t holds, in row t / 32 * 16 + t % 32 / 4 (and 8 below), columns 8 j + t % 4 * 2 and the next, as four values c[4
// j..]: two of the upper row, two of the lower. A in registers has mma.cuh's layout; so packed pairs of C are the A of a next
// product.
//
// Operands in shared memory lie in 128-byte rows (64 columns of 16-bit values) as the copy engine's 128-byte swizzle leaves
// them, tiles on 1024 bytes. A matrix wider than 64 columns is several such tiles, one after the other. Two readings of a tile:
//   rows of the operand's M or N, columns its K (`k_major`): a step of 16 in K adds 32 bytes to the address, within a tile;
//   rows of K, columns of M or N (`mn_major`, transposed): a step of 16 in K adds 16 rows, 2048 bytes; `pitch` is the
//   distance of the tiles that hold further columns.
#pragma once

#include "common/ptx.cuh"

__device__ __forceinline__ u64 k_major(u32 address) {
    return u64((address & 0x3ffff) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

__device__ __forceinline__ u64 mn_major(u32 address, u32 pitch) {
    return u64((address & 0x3ffff) >> 4) | u64(pitch >> 4) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}

// The same of a tile of 32 columns, 64-byte rows as the 64-byte swizzle leaves them: a step of 16 in K adds 1024 bytes.
__device__ __forceinline__ u64 mn_major_32(u32 address) {
    return u64((address & 0x3ffff) >> 4) | u64(512 >> 4) << 32 | u64(2) << 62;
}

// Before the first product after registers that it reads or adds to were written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most N groups are under way.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps the compiler from moving uses of registers that products read or write across this point.
template <int N>
__device__ __forceinline__ void hold(float (&r)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; i++) asm volatile("" : "+f"(r[i])::"memory");
}

template <int N>
__device__ __forceinline__ void hold(u32 (&r)[N]) {
#pragma unroll
    for (u32 i = 0; i < N; i++) asm volatile("" : "+r"(r[i])::"memory");
}

// Four registers of each of four neighbouring lanes, transposed: pairs of C's columns 8 j + 2 t, j = 0..4, become 16 bytes a
// lane.
__device__ __forceinline__ void transpose4(u32 (&x)[4], u32 lane) {
#pragma unroll
    for (u32 bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if ((i & bit) == 0) {
                const bool upper = lane & bit;
                const u32 got = __shfl_xor_sync(~0u, upper ? x[i] : x[i | bit], bit);
                if (upper) x[i] = got;
                else x[i | bit] = got;
            }
}

// Ordinary stores to shared memory so far, made visible to products and the copy engine.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What this thread knows other launches to have stored to memory, made visible to the copy engine.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Takes registers from (or gives them to) the block's other warpgroups; every warp of the warpgroup.
template <int N>
__device__ __forceinline__ void registers_more() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void registers_fewer() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

#define WGMMA_LIST8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_OUT8 \
    "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7])
#define WGMMA_LIST16 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_OUT16 \
    "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), \
    "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15])
#define WGMMA_LIST32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_OUT32 \
    "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), \
    "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), \
    "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), \
    "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
#define WGMMA_LIST64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_OUT64 \
    "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), \
    "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), \
    "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), \
    "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), \
    "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), \
    "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), \
    "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), \
    "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
#define WGMMA_LIST128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_OUT128 \
    "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), \
    "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), \
    "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), \
    "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), \
    "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), \
    "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), \
    "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), \
    "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]), \
    "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]), \
    "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79]), \
    "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]), \
    "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]), \
    "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103]), \
    "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]), "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111]), \
    "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115]), "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]), \
    "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127])

// WGMMA_TYPE(T, "name"): products with A and B in shared memory, and with A in registers. `add` 0: C = A B. TA, TB: mn_major.
template <typename T, int TA, int TB, int C>
struct Wgmma;

// A and B in shared memory alone.
#define WGMMA_16(T, NAME) \
    template <int TA, int TB> \
    struct Wgmma<T, TA, TB, 8> { \
        static __device__ __forceinline__ void run(float (&c)[8], u64 a, u64 b, u32 add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n16k16.f32." NAME "." NAME " {" WGMMA_LIST8 "}, " \
                         "%8, %9, p, 1, 1, %11, %12;\n}\n" \
                         : WGMMA_OUT8 \
                         : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB)); \
        } \
    };
#define WGMMA_32(T, NAME) \
    template <int TA, int TB> \
    struct Wgmma<T, TA, TB, 16> { \
        static __device__ __forceinline__ void run(float (&c)[16], u64 a, u64 b, u32 add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n32k16.f32." NAME "." NAME " {" WGMMA_LIST16 "}, " \
                         "%16, %17, p, 1, 1, %19, %20;\n}\n" \
                         : WGMMA_OUT16 \
                         : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB)); \
        } \
        static __device__ __forceinline__ void run(float (&c)[16], const u32 *a, u64 b, u32 add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %21, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n32k16.f32." NAME "." NAME " {" WGMMA_LIST16 "}, " \
                         "{%16, %17, %18, %19}, %20, p, 1, 1, %22;\n}\n" \
                         : WGMMA_OUT16 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TB)); \
        } \
    };
#define WGMMA_64(T, NAME) \
    template <int TA, int TB> \
    struct Wgmma<T, TA, TB, 32> { \
        static __device__ __forceinline__ void run(float (&c)[32], u64 a, u64 b, u32 add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" WGMMA_LIST32 "}, " \
                         "%32, %33, p, 1, 1, %35, %36;\n}\n" \
                         : WGMMA_OUT32 \
                         : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB)); \
        } \
        static __device__ __forceinline__ void run(float (&c)[32], const u32 *a, u64 b, u32 add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " {" WGMMA_LIST32 "}, " \
                         "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}\n" \
                         : WGMMA_OUT32 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TB)); \
        } \
    };
#define WGMMA_128(T, NAME) \
    template <int TA, int TB> \
    struct Wgmma<T, TA, TB, 64> { \
        static __device__ __forceinline__ void run(float (&c)[64], u64 a, u64 b, u32 add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" WGMMA_LIST64 "}, " \
                         "%64, %65, p, 1, 1, %67, %68;\n}\n" \
                         : WGMMA_OUT64 \
                         : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB)); \
        } \
        static __device__ __forceinline__ void run(float (&c)[64], const u32 *a, u64 b, u32 add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " {" WGMMA_LIST64 "}, " \
                         "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}\n" \
                         : WGMMA_OUT64 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TB)); \
        } \
    };
// A and B in shared memory alone.
#define WGMMA_256(T, NAME) \
    template <int TA, int TB> \
    struct Wgmma<T, TA, TB, 128> { \
        static __device__ __forceinline__ void run(float (&c)[128], u64 a, u64 b, u32 add) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %130, 0;\n" \
                         "wgmma.mma_async.sync.aligned.m64n256k16.f32." NAME "." NAME " {" WGMMA_LIST128 "}, " \
                         "%128, %129, p, 1, 1, %131, %132;\n}\n" \
                         : WGMMA_OUT128 \
                         : "l"(a), "l"(b), "r"(add), "n"(TA), "n"(TB)); \
        } \
    };
WGMMA_16(bf16, "bf16")
WGMMA_16(f16, "f16")
WGMMA_32(bf16, "bf16")
WGMMA_32(f16, "f16")
WGMMA_64(bf16, "bf16")
WGMMA_64(f16, "f16")
WGMMA_128(bf16, "bf16")
WGMMA_128(f16, "f16")
WGMMA_256(bf16, "bf16")
WGMMA_256(f16, "f16")

// C += A B, A and B in shared memory.
template <typename T, int TA, int TB, int C>
__device__ __forceinline__ void wgmma(float (&c)[C], u64 a, u64 b, u32 add) {
    Wgmma<T, TA, TB, C>::run(c, a, b, add);
}

// C += A B, A (4 registers) from the warpgroup's registers.
template <typename T, int TB, int C>
__device__ __forceinline__ void wgmma(float (&c)[C], const u32 *a, u64 b, u32 add) {
    Wgmma<T, 0, TB, C>::run(c, a, b, add);
}
