# SPDX-License-Identifier: Apache-2.0
"""The ops, one file each: declaration, checks, choice of the kernel, call of the reference."""
