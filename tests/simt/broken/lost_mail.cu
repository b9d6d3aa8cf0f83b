// SPDX-License-Identifier: Apache-2.0
// Fault: one thread sends nothing, so that a block waits forever. out = x of the other block of a pair.
#include "device/mailbox.cuh"

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(64)
    lost_mail(const float* x, float* out, int n, int faulty) {
    __shared__ int part[64];
    __shared__ Mailbox mail;
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (threadIdx.x == 0) {
        mail.prepare();
        mail.expect(sizeof(part));
    }
    cluster_arrive_relaxed();
    cluster_wait();
    if (!faulty || i != 5) mail.send(cluster_rank() ^ 1, &part[threadIdx.x], static_cast<int>(__float_as_uint(x[i])));
    mail.wait(0);
    out[i] = __uint_as_float(part[threadIdx.x]);
}
