// SPDX-License-Identifier: Apache-2.0
// Every integer intrinsic once per pair (x, y), one row of results for each.
extern "C" __global__ void __launch_bounds__(64)
    integers(const unsigned* x, const unsigned* y, unsigned long long* out, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const unsigned a = x[i], b = y[i];
    const int s = static_cast<int>(a), t = static_cast<int>(b);
    const unsigned long long wide = static_cast<unsigned long long>(a) << 32 | b;
    const long long signed_wide = static_cast<long long>(wide);
    unsigned long long* next = out + i;
#define RECORD(result) (*next = (result), next += count)
    RECORD(__popc(a));
    RECORD(__popcll(wide));
    RECORD(__clz(s));
    RECORD(__clzll(signed_wide));
    RECORD(__ffs(s));
    RECORD(__ffsll(signed_wide));
    RECORD(__brev(a));
    RECORD(__brevll(wide));
    RECORD(__byte_perm(a, b, 0x6172));
    RECORD(__funnelshift_l(a, b, t & 63));
    RECORD(__funnelshift_r(a, b, t & 63));
    RECORD(static_cast<unsigned>(__mulhi(s, t)));
    RECORD(__umulhi(a, b));
    RECORD(__umul64hi(wide, wide));
    RECORD(static_cast<unsigned>(min(s, t)));
    RECORD(static_cast<unsigned>(max(s, t)));
    RECORD(min(a, b));
    RECORD(max(a, b));
    RECORD(min(s, b));
    RECORD(max(a, t));
    RECORD(static_cast<unsigned long long>(min(signed_wide, 5ll)));
    RECORD(max(wide, 5ull));
    RECORD(__float_as_uint(__uint_as_float(a & 0x7fffffu | 0x3f800000u)));
    RECORD(static_cast<unsigned>(__float_as_int(__int_as_float(s & 0x7fffff | 0x3f800000))));
    RECORD(static_cast<unsigned long long>(
        __double_as_longlong(__longlong_as_double(signed_wide >> 12 & 0xfffffffffffffll))));
}
