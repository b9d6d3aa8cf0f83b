// SPDX-License-Identifier: Apache-2.0
// Barriers and warp collectives. Where the result of an intrinsic is undefined (a shuffle from a lane that does not take
// part), it is all one bits here, NaN as a float.
#pragma once
#include <type_traits>

#include "schedule.h"

namespace simt {

template <class To, class From>
inline To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "a bit copy");
    To result;
    memcpy(&result, &value, sizeof result);
    return result;
}
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

template <class Body>
SIMT_RUNTIME inline void for_lanes(unsigned mask, Body body) {
    for (unsigned lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) body(lane);
}
SIMT_RUNTIME static void combine_shuffle(Thread* lanes, unsigned mask) {
    for_lanes(mask, [=](unsigned lane) SIMT_RUNTIME {
        const unsigned source = lanes[lane].source;
        lanes[lane].result = mask >> source & 1 ? lanes[source].value : ~uint64_t{0};
    });
}
SIMT_RUNTIME static void combine_ballot(Thread* lanes, unsigned mask) {
    unsigned ballot = 0;
    for_lanes(mask, [&](unsigned lane) SIMT_RUNTIME { ballot |= (unsigned)lanes[lane].value << lane; });
    for_lanes(mask, [=](unsigned lane) SIMT_RUNTIME { lanes[lane].result = ballot; });
}
SIMT_RUNTIME static void combine_match(Thread* lanes, unsigned mask) {
    for_lanes(mask, [=](unsigned lane) SIMT_RUNTIME {
        unsigned equal = 0;
        for_lanes(mask, [&](unsigned other) SIMT_RUNTIME { equal |= (unsigned)(lanes[other].value == lanes[lane].value) << other; });
        lanes[lane].result = equal;
    });
}
SIMT_RUNTIME static void combine_nothing(Thread*, unsigned) {}
template <class T, T (*operation)(T, T)>
SIMT_RUNTIME void combine_reduce(Thread* lanes, unsigned mask) {
    T sum = unpack<T>(lanes[__builtin_ctz(mask)].value);
    for_lanes(mask & (mask - 1), [&](unsigned lane) SIMT_RUNTIME { sum = operation(sum, unpack<T>(lanes[lane].value)); });
    for_lanes(mask, [=](unsigned lane) SIMT_RUNTIME { lanes[lane].result = pack(sum); });
}
// clang-format off
template <class T> T add(T a, T b) { return (T)((typename std::make_unsigned<T>::type)a + (typename std::make_unsigned<T>::type)b); }
template <class T> T least(T a, T b) { return b < a ? b : a; }
template <class T> T most(T a, T b) { return a < b ? b : a; }
template <class T> T both(T a, T b) { return a & b; }
template <class T> T either(T a, T b) { return a | b; }
template <class T> T one_of(T a, T b) { return a ^ b; }
// clang-format on

}  // namespace simt

// -- Barriers, shuffles, votes, reductions -----------------------------------------------------------------------------

// clang-format off
#define SIMT_SITE simt::Site site = simt::Site::here()
inline void __syncthreads(SIMT_SITE) { simt::block_barrier("__syncthreads", 0, site); }
inline int __syncthreads_count(int p, SIMT_SITE) { return simt::block_barrier("__syncthreads_count", p, site); }
inline int __syncthreads_or(int p, SIMT_SITE) { return simt::block_barrier("__syncthreads_or", p, site) != 0; }
inline int __syncthreads_and(int p, SIMT_SITE) { return simt::block_barrier("__syncthreads_and", !p, site) == 0; }
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) { simt::collective("__syncwarp", mask, 0, simt::combine_nothing, site); }

template <class T>
T simt_shuffle(const char* name, unsigned mask, T value, unsigned source, simt::Site site) {
    return simt::unpack<T>(simt::collective(name, mask, simt::pack(value), simt::combine_shuffle, site, source));
}
template <class T> T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_SITE) {
    return simt_shuffle("__shfl_sync", mask, value, (simt::lane() & -width) | (source & (width - 1)), site);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_SITE) {
    const unsigned lane = simt::lane(), source = lane ^ lanes;
    return simt_shuffle("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source, site);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    const unsigned lane = simt::lane();
    return simt_shuffle("__shfl_up_sync", mask, value, (lane & (width - 1)) < delta ? lane : lane - delta, site);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, SIMT_SITE) {
    const unsigned lane = simt::lane();
    return simt_shuffle("__shfl_down_sync", mask, value, (lane & (width - 1)) + delta >= (unsigned)width ? lane : lane + delta, site);
}

inline unsigned simt_ballot(const char* name, unsigned mask, bool vote, simt::Site site) {
    return (unsigned)simt::collective(name, mask, vote, simt::combine_ballot, site);
}
inline unsigned __ballot_sync(unsigned mask, int p, SIMT_SITE) { return simt_ballot("__ballot_sync", mask, p, site); }
inline int __any_sync(unsigned mask, int p, SIMT_SITE) { return simt_ballot("__any_sync", mask, p, site) != 0; }
inline int __all_sync(unsigned mask, int p, SIMT_SITE) { return simt_ballot("__all_sync", mask, !p, site) == 0; }
template <class T> unsigned __match_any_sync(unsigned mask, T value, SIMT_SITE) {
    return (unsigned)simt::collective("__match_any_sync", mask, simt::pack(value), simt::combine_match, site);
}
template <class T> unsigned __match_all_sync(unsigned mask, T value, int* all, SIMT_SITE) {
    const unsigned equal = (unsigned)simt::collective("__match_all_sync", mask, simt::pack(value), simt::combine_match, site);
    return (*all = equal == (mask & simt::launched_lanes(*simt::self))) ? mask : 0;
}
#define SIMT_REDUCE(name, T, operation)                           \
    inline T name(unsigned mask, T value, SIMT_SITE) {            \
        return simt::unpack<T>(simt::collective(#name, mask, simt::pack(value), simt::combine_reduce<T, simt::operation<T>>, site)); \
    }
SIMT_REDUCE(__reduce_add_sync, int, add)      SIMT_REDUCE(__reduce_add_sync, unsigned, add)
SIMT_REDUCE(__reduce_min_sync, int, least)    SIMT_REDUCE(__reduce_min_sync, unsigned, least)
SIMT_REDUCE(__reduce_max_sync, int, most)     SIMT_REDUCE(__reduce_max_sync, unsigned, most)
SIMT_REDUCE(__reduce_and_sync, unsigned, both)
SIMT_REDUCE(__reduce_or_sync, unsigned, either)
SIMT_REDUCE(__reduce_xor_sync, unsigned, one_of)
#undef SIMT_REDUCE
// clang-format on
#undef SIMT_SITE
