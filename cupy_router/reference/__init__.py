# SPDX-License-Identifier: Apache-2.0
"""The ops in NumPy, one file per op: the specification, and the backend for arrays in CPU memory.

Arithmetic is in float64. Scores are rounded to float32 before they are compared, because selection is defined on
float32. Weights are computed in float64 from the rounded scores and rounded once at the end.

Infinities and NaN are valid inputs, and weights may overflow a 16-bit dtype, so the functions ignore the `errstate`
of NumPy. They take NumPy arrays that are already checked. ``cupy_router.ops`` raises the errors for users.
"""
