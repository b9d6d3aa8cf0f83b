// SPDX-License-Identifier: Apache-2.0
// Adjacent elements of a row as they lie in memory: what a thread moves at once.
#pragma once

#include "device/types.cuh"

// 1 and 2 bytes are in the low bits of the word.
template <int BYTES>
struct Vector {
    unsigned words[(BYTES + 3) / 4];
};

// ONCE: nobody reads it again, so that it is the first to leave the caches.
template <bool ONCE, typename T>
__device__ __forceinline__ T load_word(const T* source) {
    return ONCE ? __ldcs(source) : __ldg(source);
}

// Load by words of up to 16 bytes; the address is a multiple of their size.
template <int BYTES, bool ONCE = false>
__device__ __forceinline__ Vector<BYTES> load_vector(const char* source) {
    static_assert(BYTES <= 16 ? (BYTES & (BYTES - 1)) == 0 : BYTES % 16 == 0, "whole words");
    Vector<BYTES> vector;
    if (BYTES >= 16) {
#pragma unroll
        for (int i = 0; i < BYTES / 16; ++i) {
            const uint4 word = load_word<ONCE>(reinterpret_cast<const uint4*>(source) + i);
            vector.words[4 * i] = word.x;
            vector.words[4 * i + 1] = word.y;
            vector.words[4 * i + 2] = word.z;
            vector.words[4 * i + 3] = word.w;
        }
    } else if (BYTES == 8) {
        const uint2 word = load_word<ONCE>(reinterpret_cast<const uint2*>(source));
        vector.words[0] = word.x;
        vector.words[BYTES / 8] = word.y;
    } else if (BYTES == 4) {
        vector.words[0] = load_word<ONCE>(reinterpret_cast<const unsigned*>(source));
    } else if (BYTES == 2) {
        vector.words[0] = load_word<ONCE>(reinterpret_cast<const unsigned short*>(source));
    } else {
        vector.words[0] = load_word<ONCE>(reinterpret_cast<const unsigned char*>(source));
    }
    return vector;
}

// Store likewise. Results are the first to leave the caches: they are larger than what is still to be read.
template <int BYTES>
__device__ __forceinline__ void store_vector(char* target, const Vector<BYTES>& vector) {
    if (BYTES >= 16) {
#pragma unroll
        for (int i = 0; i < BYTES / 16; ++i) {
            const uint4 word = {vector.words[4 * i], vector.words[4 * i + 1], vector.words[4 * i + 2],
                                vector.words[4 * i + 3]};
            __stcs(reinterpret_cast<uint4*>(target) + i, word);
        }
    } else if (BYTES == 8) {
        const uint2 word = {vector.words[0], vector.words[BYTES / 8]};
        __stcs(reinterpret_cast<uint2*>(target), word);
    } else if (BYTES == 4) {
        __stcs(reinterpret_cast<unsigned*>(target), vector.words[0]);
    } else if (BYTES == 2) {
        __stcs(reinterpret_cast<unsigned short*>(target), static_cast<unsigned short>(vector.words[0]));
    } else {
        __stcs(reinterpret_cast<unsigned char*>(target), static_cast<unsigned char>(vector.words[0]));
    }
}

// Return element j of a vector of T.
template <typename T, int BYTES>
__device__ __forceinline__ float element(const Vector<BYTES>& vector, int j) {
    float pair[4 / sizeof(T)];
    word_to_floats(vector.words[j / (4 / sizeof(T))], T(), pair);
    return pair[j % (4 / sizeof(T))];
}

// Return a 32-bit word of two floats of 16 bits, or of the first alone.
template <typename T>
__device__ __forceinline__ unsigned pack_word(float low, float high, T type) {
    return rounded_bits(low, type) | static_cast<unsigned>(rounded_bits(high, type)) << 16;
}

__device__ __forceinline__ unsigned pack_word(float low, float high, float) { return __float_as_uint(low); }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
__device__ __forceinline__ unsigned pack_word(float low, float high, BFloat16) { return two_bfloat16_bits(low, high); }
#endif

// Round each of N floats to T.
template <typename T, int N>
__device__ __forceinline__ Vector<N * sizeof(T)> rounded(const float (&values)[N]) {
    constexpr int PER_WORD = 4 / sizeof(T);
    Vector<N * sizeof(T)> vector;
#pragma unroll
    for (int i = 0; i < (N + PER_WORD - 1) / PER_WORD; ++i) {
        const int last = min(PER_WORD * (i + 1), N) - 1;
        vector.words[i] = pack_word(values[PER_WORD * i], values[last], T());
    }
    return vector;
}

// Return a vector of T times a factor, each product rounded once.
template <typename T, int BYTES>
__device__ __forceinline__ Vector<BYTES> scaled_vector(const Vector<BYTES>& vector, float factor) {
    constexpr int PER_WORD = 4 / sizeof(T);
    Vector<BYTES> product;
#pragma unroll
    for (int i = 0; i < (BYTES + 3) / 4; ++i) {
        float values[PER_WORD];
        word_to_floats(vector.words[i], T(), values);
        product.words[i] = pack_word(values[0] * factor, values[PER_WORD - 1] * factor, T());
    }
    return product;
}

// Add the products of N pairs of elements, a vector of A and one of B, to a dot product.
template <typename A, typename B, int N, int A_BYTES, int B_BYTES>
__device__ __forceinline__ float dot(const Vector<A_BYTES>& a, const Vector<B_BYTES>& b, float sum) {
#pragma unroll
    for (int j = 0; j < N; ++j) sum = fmaf(element<A>(a, j), element<B>(b, j), sum);
    return sum;
}
