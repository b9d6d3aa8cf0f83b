# SPDX-License-Identifier: Apache-2.0
"""The work of ``cupy-router check``: kernels compiled for all architectures, executed on the CPU, and compared."""
