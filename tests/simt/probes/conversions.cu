// SPDX-License-Identifier: Apache-2.0
// All 65536 words of half and bfloat16 to float, and floats to both; sm_80 and later.
#ifdef __CUDACC__
namespace simt {
__device__ float half_to_float(unsigned short word) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(word));
    return value;
}
__device__ float bfloat16_to_float(unsigned short word) { return __uint_as_float(static_cast<unsigned>(word) << 16); }
__device__ unsigned short float_to_half(float value) {
    unsigned short word;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(word) : "f"(value));
    return word;
}
__device__ unsigned short float_to_bfloat16(float value) {
    unsigned short word;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(word) : "f"(value));
    return word;
}
}  // namespace simt
#endif

extern "C" __global__ void __launch_bounds__(256)
    conversions(unsigned* from_half, unsigned* from_bfloat16, const float* values, unsigned short* to_half,
                unsigned short* to_bfloat16, int count) {
    const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
    for (int word = first; word < 65536; word += step) {
        from_half[word] = __float_as_uint(simt::half_to_float(word));
        from_bfloat16[word] = __float_as_uint(simt::bfloat16_to_float(word));
    }
    for (int i = first; i < count; i += step) {
        to_half[i] = simt::float_to_half(values[i]);
        to_bfloat16[i] = simt::float_to_bfloat16(values[i]);
    }
}
