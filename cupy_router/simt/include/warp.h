// SPDX-License-Identifier: Apache-2.0
// Barriers and warp collectives. Where the result of an intrinsic is undefined (a shuffle from a lane that does not take
// part), it is all one bits here, NaN as a float.
#pragma once
#include <type_traits>

#include "threads.h"

namespace simt {

template <class T>
inline uint64_t pack(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "lanes exchange up to 64 bits");
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    return word;
}
template <class T>
inline T unpack(uint64_t word) {
    T value;
    memcpy(&value, &word, sizeof value);
    return value;
}

SIMT_RUNTIME static void combine_nothing(Thread*, unsigned) {}
SIMT_RUNTIME static void combine_shuffle(Thread* lanes, unsigned members) {
    for (unsigned lane : Lanes{members}) {
        const unsigned source = lanes[lane].source;
        lanes[lane].result = members >> source & 1 ? lanes[source].value : ~uint64_t{0};
    }
}
SIMT_RUNTIME static void combine_ballot(Thread* lanes, unsigned members) {
    unsigned ballot = 0;
    for (unsigned lane : Lanes{members}) ballot |= (unsigned)lanes[lane].value << lane;
    for (unsigned lane : Lanes{members}) lanes[lane].result = ballot;
}
SIMT_RUNTIME static void combine_match(Thread* lanes, unsigned members) {
    for (unsigned lane : Lanes{members}) {
        lanes[lane].result = 0;
        for (unsigned other : Lanes{members})
            if (lanes[other].value == lanes[lane].value) lanes[lane].result |= 1u << other;
    }
}

}  // namespace simt

// -- Barriers, shuffles, votes, reductions -----------------------------------------------------------------------------

#define SIMT_SITE simt::Site site = simt::Site::here()
inline void __syncthreads(SIMT_SITE) { simt::block_barrier("__syncthreads", 0, site); }
inline int __syncthreads_count(int p, SIMT_SITE) { return simt::block_barrier("__syncthreads_count", p, site); }
inline int __syncthreads_or(int p, SIMT_SITE) { return simt::block_barrier("__syncthreads_or", p, site) != 0; }
inline int __syncthreads_and(int p, SIMT_SITE) { return simt::block_barrier("__syncthreads_and", !p, site) == 0; }
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) {
    simt::collective("__syncwarp", mask, 0, simt::combine_nothing, site);
}

inline void __nanosleep(unsigned) { simt::poll(); }
inline void __trap(SIMT_SITE) { simt::fault(site, "trap", "__trap"); }

template <class T>
T simt_shuffle(const char* name, unsigned mask, T value, unsigned source, simt::Site site) {
    return simt::unpack<T>(simt::collective(name, mask, simt::pack(value), simt::combine_shuffle, site, source));
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
    return simt_shuffle("__shfl_sync", mask, value, (simt::lane() & -width) | (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_SITE) {
    const unsigned lane = simt::lane(), source = lane ^ lanes;
    return simt_shuffle("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    const unsigned lane = simt::lane();
    return simt_shuffle("__shfl_up_sync", mask, value, (lane & (width - 1)) < delta ? lane : lane - delta, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    const unsigned lane = simt::lane();
    return simt_shuffle("__shfl_down_sync", mask, value,
                        (lane & (width - 1)) + delta >= (unsigned)width ? lane : lane + delta, site);
}

inline unsigned simt_ballot(const char* name, unsigned mask, bool vote, simt::Site site) {
    return (unsigned)simt::collective(name, mask, vote, simt::combine_ballot, site);
}
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_SITE) { return simt_ballot("__ballot_sync", mask, p, site); }
inline int __any_sync(unsigned mask, int p, SIMT_SITE) { return simt_ballot("__any_sync", mask, p, site) != 0; }
inline int __all_sync(unsigned mask, int p, SIMT_SITE) { return simt_ballot("__all_sync", mask, !p, site) == 0; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value, SIMT_SITE) {
    return (unsigned)simt::collective("__match_any_sync", mask, simt::pack(value), simt::combine_match, site);
}
template <class T>
unsigned __match_all_sync(unsigned mask, T value, int* all, SIMT_SITE) {
    const unsigned equal =
        (unsigned)simt::collective("__match_all_sync", mask, simt::pack(value), simt::combine_match, site);
    return (*all = equal == (mask & simt::launched_lanes(*simt::self))) ? mask : 0;
}

#define SIMT_REDUCE(name, T, expression)                                                         \
    inline T name(unsigned mask, T value, SIMT_SITE) {                                           \
        const auto combine = [](simt::Thread* lanes, unsigned members) SIMT_RUNTIME {            \
            T a = simt::unpack<T>(lanes[__builtin_ctz(members)].value);                          \
            for (unsigned lane : simt::Lanes{members & (members - 1)}) {                         \
                const T b = simt::unpack<T>(lanes[lane].value);                                  \
                a = expression;                                                                  \
            }                                                                                    \
            for (unsigned lane : simt::Lanes{members}) lanes[lane].result = simt::pack(a);       \
        };                                                                                       \
        return simt::unpack<T>(simt::collective(#name, mask, simt::pack(value), combine, site)); \
    }
SIMT_REDUCE(__reduce_add_sync, unsigned, a + b);
SIMT_REDUCE(__reduce_add_sync, int, (int)((unsigned)a + (unsigned)b));
SIMT_REDUCE(__reduce_min_sync, unsigned, b < a ? b : a);
SIMT_REDUCE(__reduce_min_sync, int, b < a ? b : a);
SIMT_REDUCE(__reduce_max_sync, unsigned, a < b ? b : a);
SIMT_REDUCE(__reduce_max_sync, int, a < b ? b : a);
SIMT_REDUCE(__reduce_and_sync, unsigned, a& b);
SIMT_REDUCE(__reduce_or_sync, unsigned, a | b);
SIMT_REDUCE(__reduce_xor_sync, unsigned, a ^ b);
#undef SIMT_REDUCE
#undef SIMT_SITE
