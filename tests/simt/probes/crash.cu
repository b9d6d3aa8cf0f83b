// SPDX-License-Identifier: Apache-2.0
// One way to die each, in thread 40: kinds 1 to 7; kind 0 adds one to each element.
__device__ __noinline__ int descend(int depth) {
    volatile char frame[4096];
    frame[depth % 4096] = 1;
    return depth <= 0 ? frame[0] : descend(depth - 1) + frame[1];
}

extern "C" __global__ void __launch_bounds__(64) crash(int kind, int* x, int zero) {
    __shared__ int copy[64];
    copy[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 40) {
        if (kind == 1) x[0] = *static_cast<volatile int*>(nullptr);
        if (kind == 2) x[0] = 7 / zero;
        if (kind == 3) x[0] = descend(1000000 + zero);
        if (kind == 4) __trap();
        if (kind == 5) assert(zero == 1);
        while (kind == 6) *static_cast<volatile int*>(x) = 0;
        if (kind == 7) {
            while (*static_cast<volatile int*>(x) >= 0) __nanosleep(100);
        }
    }
    __syncthreads();
    x[threadIdx.x] = copy[threadIdx.x] + 1;
}
