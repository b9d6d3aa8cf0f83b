// SPDX-License-Identifier: Apache-2.0
// Atomics, fences, cached loads and stores.
#pragma once
#include "warp.h"

// Fibers take turns, so a load and a store are one step; both are atomic to ThreadSanitizer and order nothing.
template <class T, class Change>
inline T simt_atomic(T* address, Change change) {
    T before, after;
    __atomic_load(address, &before, __ATOMIC_RELAXED);
    after = change(before);
    __atomic_store(address, &after, __ATOMIC_RELAXED);
    return before;
}
template <class T>
T simt_sum(T a, T b) {
    if constexpr (std::is_integral<T>::value)
        return (T)((std::make_unsigned_t<T>)a + (std::make_unsigned_t<T>)b);  // wraps around
    else
        return a + b;
}

#define SIMT_ATOMIC(name, result)                                  \
    template <class T>                                             \
    T name(T* p, std::common_type_t<T> v) {                        \
        return simt_atomic(p, [=](T old) -> T { return result; }); \
    }
SIMT_ATOMIC(atomicAdd, simt_sum<T>(old, v));
SIMT_ATOMIC(atomicSub, simt_sum<T>(old, -v));
SIMT_ATOMIC(atomicExch, ((void)old, v));
SIMT_ATOMIC(atomicMin, v < old ? v : old);
SIMT_ATOMIC(atomicMax, old < v ? v : old);
SIMT_ATOMIC(atomicAnd, old& v);
SIMT_ATOMIC(atomicOr, old | v);
SIMT_ATOMIC(atomicXor, old ^ v);
SIMT_ATOMIC(atomicInc, old >= v ? 0 : old + 1);
SIMT_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1);
#undef SIMT_ATOMIC
template <class T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> v) {
    return simt_atomic(p, [=](T old) -> T { return old == expected ? v : old; });
}

// A fence orders the thread after every earlier fence of the launch: enough for "write, fence, count; last one reads".
static simt::Tag simt_fences;
inline void __threadfence() {
    simt::release(&simt_fences);
    simt::acquire(&simt_fences);
}
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }

#define SIMT_LOAD(name)  \
    template <class T>   \
    T name(const T* p) { \
        return *p;       \
    }
SIMT_LOAD(__ldg);
SIMT_LOAD(__ldca);
SIMT_LOAD(__ldcg);
SIMT_LOAD(__ldcs);
SIMT_LOAD(__ldcv);
SIMT_LOAD(__ldlu);
#undef SIMT_LOAD

#define SIMT_STORE(name)                           \
    template <class T>                             \
    void name(T* p, std::common_type_t<T> value) { \
        *p = value;                                \
    }
SIMT_STORE(__stwb);
SIMT_STORE(__stcg);
SIMT_STORE(__stcs);
SIMT_STORE(__stwt);
#undef SIMT_STORE
