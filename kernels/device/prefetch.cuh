// SPDX-License-Identifier: Apache-2.0
// A hint to fetch bytes from memory to L2, for any block to read soon. Nothing waits for it.
#pragma once

// Fetch the 128-byte line of an address, which must be readable.
__device__ __forceinline__ void prefetch_line(const void* address) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
#else
    const volatile char touched = *static_cast<const char*>(address);  // a sanitizer sees a wrong address
    static_cast<void>(touched);
#endif
}
