# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: one script per op, each run as `python -m benchmarks.bench_<op>` on a machine with a GPU."""
