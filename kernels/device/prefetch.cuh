// SPDX-License-Identifier: Apache-2.0
// A hint that bytes will soon be read, by whichever block: they are fetched from memory to L2, and nobody waits.
#pragma once

// The 128-byte line of an address, which must be one that may be read.
__device__ __forceinline__ void prefetch_line(const void* address) {
#ifdef __CUDACC__
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
#else
    const volatile char touched = *static_cast<const char*>(address);  // so that a sanitizer sees a wrong address
    static_cast<void>(touched);
#endif
}
