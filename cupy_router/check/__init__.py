# SPDX-License-Identifier: Apache-2.0
"""What ``cupy-router check`` does: kernels compiled for all architectures, executed on the CPU, and compared."""
