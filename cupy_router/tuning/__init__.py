# SPDX-License-Identifier: Apache-2.0
"""Which launch is fastest on which GPU: a record of the GPU, and tables of measured thresholds by architecture.

A planner takes a :class:`Gpu` and reads the thresholds in `gpu.table`. To add an architecture, add a file
`sm_<major><minor>.py` with a `TABLE` to this folder: tables are found by file name. An architecture without a table
uses the nearest one.
"""

from __future__ import annotations

from cupy_router.tuning.gpu import DEFAULT, Gpu, assume, gpu_of
from cupy_router.tuning.lookup import architectures, nearest
from cupy_router.tuning.schema import Steps, Table

__all__ = ["DEFAULT", "Gpu", "Steps", "Table", "architectures", "assume", "gpu_of", "nearest"]
