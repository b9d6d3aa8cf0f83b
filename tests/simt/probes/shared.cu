// SPDX-License-Identifier: Apache-2.0
// Every kind of shared variable: what it holds when a block starts, which is nothing. Each block then writes to all.
struct Found {
    int bits;
};

template <typename T>
__device__ T in_template(T value) {
    __shared__ T kept[32];
    const T before = kept[threadIdx.x];
    kept[threadIdx.x] = value;
    return before;
}

template <int SIZE>
struct Holder {
    __device__ int in_member(int value) {
        __shared__ int kept[SIZE];
        const int before = kept[threadIdx.x];
        kept[threadIdx.x] = value;
        return before;
    }
};

__device__ __forceinline__ int in_inline_function(int value) {
    __shared__ __align__(16) int kept[32];
    const int before = kept[threadIdx.x];
    kept[threadIdx.x] = value;
    return before;
}

__shared__ int in_file[32];

extern "C" __global__ void __launch_bounds__(32) shared(int* found) {
    __shared__ Found in_kernel[32];
    int* out = found + (blockIdx.x * 32 + threadIdx.x) * 5;
    out[0] = in_template(7);
    out[1] = Holder<32>().in_member(7);
    out[2] = in_inline_function(7);
    out[3] = in_file[threadIdx.x];
    out[4] = in_kernel[threadIdx.x].bits;
    in_file[threadIdx.x] = 7;
    in_kernel[threadIdx.x].bits = 7;
}
