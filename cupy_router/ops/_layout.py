# SPDX-License-Identifier: Apache-2.0
"""The former name of `_row_lanes`, for cupy_router/jax/_targets.py until it imports that."""

from cupy_router.ops._row_lanes import fits as fits
