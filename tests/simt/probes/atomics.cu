// SPDX-License-Identifier: Apache-2.0
// Every atomic on a cell of its own, from every thread of every block; x holds one value per thread. The last cells take
// what a block votes at its barriers.
extern "C" __global__ void __launch_bounds__(64) atomics(const int* x, int* ints, unsigned* words, long long* longs,
                                                         unsigned long long* wides, float* floats, double* doubles) {
    const int value = x[blockIdx.x * blockDim.x + threadIdx.x];
    const unsigned bits = value;
    const unsigned long long wide = static_cast<unsigned long long>(bits) * 0x100000001ull;
    atomicAdd(&ints[0], value);
    atomicSub(&ints[1], value);
    atomicMin(&ints[2], value);
    atomicMax(&ints[3], value);
    atomicAdd(&ints[4], atomicExch(&ints[5], value));
    atomicAdd(&words[0], bits);
    atomicMin(&words[1], bits);
    atomicMax(&words[2], bits);
    atomicAnd(&words[3], bits | 1u);
    atomicOr(&words[4], bits & 0xffu);
    atomicXor(&words[5], bits);
    atomicInc(&words[6], 9u);
    atomicDec(&words[7], 9u);
    for (unsigned seen = words[8]; bits % 1000u > seen;) {
        const unsigned before = atomicCAS(&words[8], seen, bits % 1000u);
        if (before == seen) break;
        seen = before;
    }
    atomicMin(&longs[0], static_cast<long long>(value) << 20);
    atomicMax(&longs[1], static_cast<long long>(value) << 20);
    atomicAdd(&wides[0], wide);
    atomicMin(&wides[1], wide);
    atomicMax(&wides[2], wide);
    atomicAnd(&wides[3], wide | 1ull);
    atomicOr(&wides[4], wide & 0xffffffffffull);
    atomicXor(&wides[5], wide);
    atomicExch(&wides[6], 12ull);
    atomicCAS(&wides[6], 12ull, 13ull);
    atomicAdd(&floats[0], value % 16);
    atomicAdd(&doubles[0], value % 16);
    const int odd = __syncthreads_count(value & 1), negative = __syncthreads_or(value < 0);
    const int all = __syncthreads_and(value > -2000000000);
    if (threadIdx.x == 0) atomicAdd(&ints[6], odd), atomicAdd(&ints[7], negative), atomicAdd(&ints[8], all);
}
