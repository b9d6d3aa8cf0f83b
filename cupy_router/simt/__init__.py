# SPDX-License-Identifier: Apache-2.0
"""Kernels executed on the CPU, for ``cupy-router check`` and for tests. Importing cupy_router does not import it."""
