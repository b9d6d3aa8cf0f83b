// SPDX-License-Identifier: Apache-2.0
// What memory alone costs: kernels that read the bytes that an op has to read and write what it has to write.
//
// read_rows: every 16-byte word of the rows once, WORDS of them in flight per thread; then both outputs.
// read_entries: token id, table entry and logit of each result, one thread each, as hash_router depends on them.
// repeat_rows: rows read once and written several times, in order.

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

// Each row is read once and written `copies` times, one after the other: permute for experts that are already in order.
// A block moves 256 words of a row.
extern "C" __global__ void repeat_rows(const uint4* __restrict__ rows, uint4* __restrict__ repeated, int words,
                                       int copies) {
    const int parts = (words + 255) / 256;
    const long long row = blockIdx.x / parts;
    const int first = blockIdx.x % parts * 256 + threadIdx.x, second = first + 128;
    uint4 a = make_uint4(0, 0, 0, 0), b = a;
    if (first < words) a = __ldg(rows + row * words + first);
    if (second < words) b = __ldg(rows + row * words + second);
    for (int i = 0; i < copies; ++i) {
        uint4* target = repeated + (row * copies + i) * words;
        if (first < words) __stcs(target + first, a);
        if (second < words) __stcs(target + second, b);
    }
}
