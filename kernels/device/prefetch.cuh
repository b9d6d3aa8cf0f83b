// SPDX-License-Identifier: Apache-2.0
// Hints to fetch bytes that will be read soon. Nothing waits for them.
#pragma once

// Fetch the 128-byte line of an address, which must be readable, to L2, for any block.
__device__ __forceinline__ void prefetch_line(const void* address) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
#else
    const volatile char touched = *static_cast<const char*>(address);  // a sanitizer sees a wrong address
    static_cast<void>(touched);
#endif
}

// Fetch the 128-byte line of a readable word to L1, for this block.
__device__ __forceinline__ void fetch_line(const float* word) {
#ifdef __CUDACC__
    float unused;
    asm volatile("ld.global.ca.f32 %0, [%1];" : "=f"(unused) : "l"(__cvta_generic_to_global(word)));
#else
    const volatile float touched = *word;
    static_cast<void>(touched);
#endif
}
