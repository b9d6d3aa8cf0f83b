# SPDX-License-Identifier: Apache-2.0
"""How long NVRTC takes for the kernel of every preset and for kernels of topk_select. Needs CuPy and NVRTC, but no GPU.

python -m benchmarks.compile_methods [--architecture sm_90]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from benchmarks import harness
from benchmarks import rows as results
from benchmarks.bars import COMPILE, COMPILE_TOPK_SELECT
from benchmarks.bench_methods import BIASED, LOGIT_BIASED
from benchmarks.rows import OURS, Row
from cupy_router import RoutingMethod, compiler, presets
from cupy_router.ops import _row_lanes
from cupy_router.ops.activation_topk import method_macros

COMPILES = 5
TOPK_SELECT: dict[str, tuple[str, dict[str, int]]] = {  # the constants of benchmarks, where they are not the defaults
    "narrow rows": ("topk_select", {}),
    "a cluster for each long row, order any": ("topk_select_cluster", {"CLUSTER": 4, "HELD": 8}),
    "a cluster for each long row, order value": ("topk_select_cluster", {"CLUSTER": 4, "HELD": 8, "ORDER": 2}),
    "long row in pieces": ("topk_select_long", {"BLOCK": 768, "BLOCKS": 1, "CAPACITY": 6144, "SPLIT": 1}),
    "long rows of large lists": ("topk_select_long", {"BLOCK": 1024, "BLOCKS": 1, "CAPACITY": 16384, "VECTORS": 4}),
    "few long rows": ("topk_select_long", {"BLOCK": 1024, "BLOCKS": 1, "CAPACITY": 4096}),
    "few rows that fit into a list": ("topk_select_long", {"BLOCK": 1024, "BLOCKS": 1, "CAPACITY": 4096, "FITS": 1}),
    "many long rows": ("topk_select_many", {}),
    "many long rows, order any": ("topk_select_many", {"SORTS": 0}),
    "many rows that fit into a list": ("topk_select_many", {"BLOCK": 128, "BLOCKS": 8, "CAPACITY": 1024, "FITS": 1}),
    "held rows": ("topk_select_held", {}),
    "held rows, order any": ("topk_select_held", {"SORTS": 0}),
    "large k": ("topk_select_large", {}),
}


def topk_select_row(name: str, architecture: str) -> Row:
    """The median of some compilations of a kernel of topk_select."""
    kernel, macros = TOPK_SELECT[name]
    row = time_row("topk_select", name, compiler.expand(kernel, macros), architecture)
    return harness.barred(row, COMPILE_TOPK_SELECT)


def compile_row(name: str, method: RoutingMethod, architecture: str) -> Row:
    """The median of some compilations of activation_topk for few rows of float32, from text to machine code."""
    lanes, columns = _row_lanes.lanes_and_columns(method.num_experts, _row_lanes.lanes_needed(method))
    given = [array for array, families in (("bias", BIASED), ("logit_bias", LOGIT_BIASED)) if name.startswith(families)]
    macros = method_macros(method, given) | {"LANES": lanes, "PER_LANE": columns}
    row = time_row("activation_topk", name, compiler.expand("activation_topk", macros), architecture)
    return harness.barred(row, COMPILE)


def time_row(op: str, name: str, source: str, architecture: str) -> Row:
    """Compile a text several times."""
    times = []
    for _ in range(COMPILES):
        begin = time.perf_counter_ns()
        compile_kernel(source, architecture)
        times.append((time.perf_counter_ns() - begin) / 1000)
    low, median, high = statistics.quantiles(times, n=4)
    row = {"what": "host", "op": op, "by": OURS, "part": f"compile {name}", "architecture": architecture}
    return row | {"us": round(median), "spread_us": round(high - low)}


def compile_kernel(source: str, architecture: str) -> None:
    """From text to machine code."""
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        # Later compilations of a text would otherwise come from a cache of NVRTC.
        nvrtc.compileProgram(program, ("-std=c++17", "-ftz=true", "--no-cache", f"-arch={architecture}"))
        assert nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sm_90")
    parser.add_argument("--output", type=Path, help="write compile_methods.json into this folder")
    options = parser.parse_args()
    rows = [compile_row(name, method, options.architecture) for name, method in presets().items()]
    rows += [topk_select_row(name, options.architecture) for name in TOPK_SELECT]
    if options.output is not None:
        results.save(options.output / "compile_methods.json", harness.environment(), rows)
    print(results.bars_table(rows))


if __name__ == "__main__":
    main()
