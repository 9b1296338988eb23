// LLM.int8's weights widened: w[o, i] = codes[o, i] * (scale[o] / 127).
//
// out is rows x cols with a pitch of ld. Threads: 256 a block, a row a block in x. Bytes: 1 read and sizeof(T) written an element.

#include "common/types.cuh"

template <typename T>
__device__ __forceinline__ void widen(T *out, const i8 *codes, const float *scale, u32 cols, u32 ld) {
    const float factor = __fdiv_rn(scale[blockIdx.x], 127.0f);
    const i8 *from = codes + u64(blockIdx.x) * cols;
    T *to = out + u64(blockIdx.x) * ld;
    for (u32 i = threadIdx.x; i < cols; i += blockDim.x) to[i] = from_f32<T>(__fmul_rn(float(from[i]), factor));
}

extern "C" __global__ void __launch_bounds__(256)
    dequantize_int8_f32(float *out, const i8 *codes, const float *scale, u32 rows, u32 cols, u32 ld) {
    if (blockIdx.x < rows) widen(out, codes, scale, cols, ld);
}

extern "C" __global__ void __launch_bounds__(256)
    dequantize_int8_f16(f16 *out, const i8 *codes, const float *scale, u32 rows, u32 cols, u32 ld) {
    if (blockIdx.x < rows) widen(out, codes, scale, cols, ld);
}

#if HAS_BF16
extern "C" __global__ void __launch_bounds__(256)
    dequantize_int8_bf16(bf16 *out, const i8 *codes, const float *scale, u32 rows, u32 cols, u32 ld) {
    if (blockIdx.x < rows) widen(out, codes, scale, cols, ld);
}
#endif
