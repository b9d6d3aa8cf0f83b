# SPDX-License-Identifier: Apache-2.0
"""Results of a kernel against those of the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

RELATIVE, OF_LARGEST = 1e-5, 2e-6  # rounding of float32, as it comes and where sums cancel
FACTOR = "all by the factor"
_ULP = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


def difference(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> str | None:
    """Return the first array that differs by more than rounding, and by how much; None if all agree."""
    for name, right in expected.items():
        text = _difference(name, found[name], right)
        if text is not None:
            return text
    return None


def _difference(name: str, found: NDArray[Any], right: NDArray[Any]) -> str | None:
    exact = right.dtype.kind in "iub"
    got, want = (array.astype(np.int64 if exact else np.float64) for array in (found, right))
    if exact:
        wrong = got != want
    else:
        with np.errstate(all="ignore"):
            largest = np.abs(want[np.isfinite(want)]).max(initial=0.0)
            relative = RELATIVE + _ULP.get(str(right.dtype), 0.0)
            close = np.abs(got - want) <= relative * np.abs(want) + OF_LARGEST * largest
            wrong = ~(close | (got == want) | (np.isnan(got) & np.isnan(want)))
    if not wrong.any():
        return None
    first = tuple(map(int, np.argwhere(wrong)[0]))
    values = f"{got[first]}, not {want[first]}" if exact else f"{got[first]:.7g}, not {want[first]:.7g}"
    text = f"{name}{[*first]} is {values}; {wrong.sum()} of {wrong.size} differ"
    if exact:
        return text
    with np.errstate(invalid="ignore"):
        ratio = got[wrong] / np.where(want[wrong] == 0, np.nan, want[wrong])
    if np.isfinite(ratio).all() and ratio.any() and len(ratio) > 1 and np.ptp(ratio) <= 4e-6 * abs(ratio.mean()):
        return f"{text}, {FACTOR} {ratio.mean():.6g}"
    if np.isnan(got[wrong]).any():
        return f"{text}, {np.isnan(got[wrong]).sum()} of them NaN, as shared memory is that was not written"
    return f"{text}, by at most {np.abs(got - want)[wrong].max():.3g}"
