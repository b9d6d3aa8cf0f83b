# SPDX-License-Identifier: Apache-2.0
"""The ops, one file each: check the arguments, choose the kernel, launch."""
