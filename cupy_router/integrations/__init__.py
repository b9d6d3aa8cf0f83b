# SPDX-License-Identifier: Apache-2.0
"""Routers for inference engines: :mod:`cupy_router.integrations.vllm` and :mod:`cupy_router.integrations.sglang`.

Each needs its engine. Importing it without raises an ImportError that says so.
"""

from __future__ import annotations

import os

VLLM_SWITCH = "CUPY_ROUTER_VLLM"  # environment: 1 swaps the routers of vLLM


def register_vllm() -> None:
    """Swap the routers of vLLM if CUPY_ROUTER_VLLM is set in the environment and not 0.

    vLLM's plugin system calls it in every process, possibly more than once.
    """
    if os.environ.get(VLLM_SWITCH, "0") not in ("", "0"):
        from cupy_router.integrations import vllm

        vllm.swap_routers()
