// SPDX-License-Identifier: Apache-2.0
// The threshold that a row's sample gives, by a block of 256 threads that look at two vectors each: its key, and whether
// too many scores may tie with it for a list of `room`.
#include "long_rows/sample.cuh"

extern "C" __global__ void __launch_bounds__(256)
    threshold(const float* row, unsigned* result, int length, int target, int room) {
    typedef RowPiece<0, 256, 1> Piece;
    __shared__ int counts[33];
    if (threadIdx.x < 33) counts[threadIdx.x] = 0;
    __syncthreads();
    const Piece piece(row, length, 0, 1);
    RowSample<Piece, 0, 256, 2> sample;
    sample.load(piece);
    const Threshold found = sample.threshold(target, sample.most(room, length), counts);
    if (threadIdx.x == 0) {
        result[0] = found.key;
        result[1] = found.tied;
    }
}
