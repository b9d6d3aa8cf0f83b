// SPDX-License-Identifier: Apache-2.0
// Copy rows of any float type and stride to dense float32, for GEMMs whose operands differ in type or have strides that
// cuBLAS does not take. One block per row, adjacent threads on adjacent columns.
#include "device/types.cuh"

SPECIALISED int DTYPE = 2;

typedef Scalar<DTYPE>::type scalar_t;

extern "C" __global__ void __launch_bounds__(256)
    to_float32(const scalar_t* __restrict__ source, float* __restrict__ target, long long num_rows,
               long long num_columns, long long source_stride) {
    for (int64_t row = blockIdx.x; row < num_rows; row += gridDim.x) {
        const scalar_t* from = source + row * source_stride;
        float* to = target + row * num_columns;
        for (int64_t column = threadIdx.x; column < num_columns; column += blockDim.x) {
            to[column] = to_float(from[column]);
        }
    }
}
