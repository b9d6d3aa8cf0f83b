// SPDX-License-Identifier: Apache-2.0
// Where a thread is, through 3-D indices, a warp that is not full, vector types, cached loads and parameters of every type.
extern "C" __global__ void __launch_bounds__(120) geometry(const int4* __restrict__ source, int scale, long long offset,
                                                           float factor, double exact, uint2* indices, float* sums) {
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned size = blockDim.x * blockDim.y * blockDim.z, last_warp = size / 32 * 32;
    const int4 word = __ldg(source + thread % 4);
    const float4 exchanged = make_float4(word.x, __ldcg(&source[1].y), __ldcs(&source[2].z), __ldca(&source[3].w));
    __syncwarp();
    const unsigned mask = thread >= last_warp ? (1u << size % 32) - 1u : 0xffffffffu;
    const int lanes = __popc(__ballot_sync(mask, 1));
    __stcs(&indices[block * size + thread], make_uint2(block, thread));
    __stcg(&sums[block * size + thread], static_cast<float>(scale + offset + lanes + exact) + factor + exchanged.x +
                                             exchanged.y + exchanged.z + exchanged.w);
}
