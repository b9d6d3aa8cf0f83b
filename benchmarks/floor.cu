// SPDX-License-Identifier: Apache-2.0
// What memory alone costs: kernels that read the bytes that an op has to read and write what it has to write.
//
// read_rows: every 16-byte word of the rows once, WORDS of them in flight per thread; then both outputs.
// read_entries: token id, table entry and logit of each result, one thread each, as hash_router depends on them.

#ifndef WORDS
#define WORDS 1
#endif

extern "C" __global__ void read_rows(const uint4* __restrict__ rows, float* __restrict__ weights,
                                     int* __restrict__ indices, long long num_words, long long num_results) {
    const long long threads = static_cast<long long>(gridDim.x) * blockDim.x;
    const long long thread = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    uint4 words[WORDS];
#pragma unroll
    for (int i = 0; i < WORDS; ++i) {
        const long long word = thread + i * threads;
        words[i] = word < num_words ? rows[word] : make_uint4(0, 0, 0, 0);
    }
    unsigned all = 0;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) all += words[i].x ^ words[i].y ^ words[i].z ^ words[i].w;
    // The outputs depend on what was read, so that no load can be left out; they are finite for any input.
    for (long long i = thread; i < num_results; i += threads) {
        weights[i] = static_cast<float>(all);
        indices[i] = static_cast<int>(all);
    }
    if (thread >= num_results && all == 0x9e3779b9u) weights[0] = 1.0f;
}

extern "C" __global__ void read_entries(const int* __restrict__ token_ids, const int* __restrict__ table,
                                        const float* __restrict__ logits, float* __restrict__ weights,
                                        int* __restrict__ indices, long long num_results, int top_k, int num_experts) {
    const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= num_results) return;
    const long long row = i / top_k;
    const int expert = table[static_cast<long long>(token_ids[row]) * top_k + i % top_k];
    weights[i] = logits[row * num_experts + expert];
    indices[i] = expert;
}
