// SPDX-License-Identifier: Apache-2.0
// Every float intrinsic once per pair (x, y), one row of results for each; integers as their bits.
extern "C" __global__ void __launch_bounds__(64) floats(const float* x, const float* y, float* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const float a = x[i], b = y[i];
    float* next = out + i;
#define RECORD(result) (*next = (result), next += count)
#define RECORD_INTEGER(result) RECORD(__int_as_float(static_cast<int>(result)))
    RECORD(__fadd_rn(a, b));
    RECORD(__fsub_rn(a, b));
    RECORD(__fmul_rn(a, b));
    RECORD(__fdiv_rn(a, b));
    RECORD(__frcp_rn(a));
    RECORD(__fsqrt_rn(a));
    RECORD(__frsqrt_rn(a));
    RECORD(__fmaf_rn(a, b, a));
    RECORD(__saturatef(a));
    RECORD(fminf(a, b));
    RECORD(fmaxf(a, b));
    RECORD(min(a, b));
    RECORD(max(a, b));
    RECORD(rsqrtf(a));
    RECORD(__expf(a));
    RECORD(__exp10f(a));
    RECORD(__logf(a));
    RECORD(__log2f(a));
    RECORD(__log10f(a));
    RECORD(__powf(a, b));
    RECORD(__sinf(a));
    RECORD(__cosf(a));
    RECORD(__tanf(a));
    RECORD(__fdividef(a, b));
    RECORD_INTEGER(__float2int_rn(a));
    RECORD_INTEGER(__float2int_rz(a));
    RECORD_INTEGER(__float2int_rd(a));
    RECORD_INTEGER(__float2int_ru(a));
    RECORD_INTEGER(__float2uint_rn(a));
    RECORD_INTEGER(__float2uint_rz(a));
    RECORD_INTEGER(__float2ll_rn(a) >> 32);
    RECORD_INTEGER(__float2ull_rz(a) >> 32);
    RECORD(__int2float_rn(__float_as_int(a)));
    RECORD(__uint2float_rn(__float_as_uint(a)));
    RECORD(__ll2float_rn(static_cast<long long>(__float_as_int(a)) << 20));
    RECORD(__ull2float_rn(static_cast<unsigned long long>(__float_as_uint(a)) << 20));
}
