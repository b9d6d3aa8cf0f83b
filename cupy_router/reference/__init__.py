# SPDX-License-Identifier: Apache-2.0
"""The ops in NumPy, one file per op: the written-out mathematics, and the backend for arrays in CPU memory.

Arithmetic is in float64. Scores are rounded to float32 before anything is compared, because selection is defined on
float32; weights are computed in float64 from the rounded scores and rounded once at the end.

The functions take NumPy arrays that were checked before; the errors for users are raised in ``cupy_router.ops``.
"""
