# SPDX-License-Identifier: Apache-2.0
"""Run chains of tensor-core products on the GPU, and record what they give.

python -m tests.gpu.mma_chains FILE.npz

tests/mma_h200.npz was made by this command on an H200; tests/test_mma_model.py compares the model with it.
"""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.mma_probes import COLUMNS, ROWS, Tiles, probes

TILES = 16  # of each kind of probe

SOURCE = r"""
extern "C" __global__ void chain_DTYPE(const unsigned* a, const unsigned* b, const float* c, float* d, int words) {
    const int lane = threadIdx.x, row = lane / 4, column = lane % 4;  // in words of two
    a += (blockIdx.x * 16LL + row) * words + column;
    b += (blockIdx.x * 8LL + row) * words + column;
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = c[blockIdx.x * 128 + (row + i / 2 * 8) * 8 + column * 2 + i % 2];
    for (int step = 0; step < words; step += 8) {
        const unsigned rows[4] = {a[step], a[8 * words + step], a[step + 4], a[8 * words + step + 4]};
        const unsigned columns[2] = {b[step], b[step + 4]};
        mma_DTYPE(sums, rows, columns);
    }
    for (int i = 0; i < 4; ++i) d[blockIdx.x * 128 + (row + i / 2 * 8) * 8 + column * 2 + i % 2] = sums[i];
}
"""


def source(dtype: str) -> str:
    """Return CUDA C++ of a kernel with one tile for each warp."""
    header = Path(__file__).parents[2] / "kernels" / "device" / "mma.cuh"
    return header.read_text(encoding="utf-8") + SOURCE.replace("DTYPE", dtype)


@cache
def _kernel(dtype: str) -> Any:
    import cupy

    return cupy.RawKernel(source(dtype), f"chain_{dtype}")


def multiply(tiles: Tiles) -> np.ndarray:
    """Return a times b plus c [tiles, 16, 8] float32 by mma.sync, one step of 16 after the other."""
    import cupy

    count, _, k = tiles.a.shape
    a, b = (cupy.asarray(np.ascontiguousarray(array).view(np.uint16)) for array in tiles[:2])
    d = cupy.empty((count, ROWS, COLUMNS), cupy.float32)
    _kernel(tiles.a.dtype.name)((count,), (32,), (a, b, cupy.asarray(tiles.c), d, np.int32(k // 2)))
    return cupy.asnumpy(d)


def record() -> dict[str, np.ndarray]:
    """Return the bits of tiles a, b, c and their products d [tiles, ...] for each dtype and length of chain up to 64.

    Of each kind of probe there are the last 8 rows of one tile, another one in turn.
    """
    found: dict[str, list[np.ndarray]] = {}
    for dtype in ("bfloat16", "float16"):
        for number, (_name, tiles) in enumerate(probes(dtype, TILES)):
            k = tiles.a.shape[-1]
            for part, array in zip("abcd", (*tiles, multiply(tiles)), strict=True):
                tile = array[number % TILES, -8:].view(f"u{array.itemsize}")
                found.setdefault(f"{dtype}, chain of {k}: {part}", []).append(tile)
    return {name: np.stack(tiles) for name, tiles in found.items() if "512" not in name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    np.savez_compressed(parser.parse_args().file, **record())


if __name__ == "__main__":
    main()
