# SPDX-License-Identifier: Apache-2.0
"""The two halves of a ScoreFunction: its CUDA compiled for all architectures, executed and compared with its NumPy."""

from __future__ import annotations

import numpy as np

from cupy_router.check.backend import executing
from cupy_router.check.runner import Fault, Outcome, compile_all
from cupy_router.method import RoutingMethod
from cupy_router.ops.activation_topk import activation_topk
from cupy_router.score_comparison import compare_score
from cupy_router.score_function import ScoreFunction
from cupy_router.simt import device

TOLERANCE = 5e-5  # so that a factor of 1.0001 is found
NUM_ROWS = 2714  # about as many as are compared, which decides the kernel


def check(score: ScoreFunction) -> Outcome:
    """Compare at x of every kind, as :func:`cupy_router.compare_score` does on a GPU."""
    outcome = Outcome()
    with executing() as backend:
        backend.kernels = []
        for part in filter(None, (score, score.derivative)):
            activation_topk(np.zeros((NUM_ROWS, 1), np.float32), RoutingMethod(1, 1, part, renormalize=False))
        kernels, backend.kernels = backend.kernels, None
        compile_all({kernel: ("", repr(score)) for kernel in kernels}, outcome)
        reason = device.why_not()
        if reason is not None:
            outcome.gaps.append(f"the score was not executed: {reason}")
        elif outcome.is_executable:
            try:
                found = compare_score(score, tolerance=TOLERANCE)
            except (ValueError, device.KernelFault) as error:
                outcome.faults.append(Fault("", repr(score), str(error).removeprefix("compare_score: ")))
            else:
                slopes = f", its derivative at {found.num_slopes}" if found.num_slopes else ""
                outcome.notes.append(
                    f"{score!r} agrees with its NumPy function at {found.num_values} x{slopes}; greatest relative "
                    f"error {found.max_error:.1e}"
                )
    return outcome
