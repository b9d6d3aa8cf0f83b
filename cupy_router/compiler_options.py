# SPDX-License-Identifier: Apache-2.0
"""What NVRTC is given beside a kernel's text. Knows nothing of routing."""

from __future__ import annotations

OPTIONS = ("-std=c++17",)  # CuPy adds the architecture and -ftz=true
_WGMMA, _ITS_ARCHITECTURE = "wgmma.mma_async", "-arch=sm_90a"  # instructions that are in no sm_90


def options(text: str) -> tuple[str, ...]:
    """Return the options for an expanded text. An architecture among them takes the place of one that follows."""
    return (*OPTIONS, _ITS_ARCHITECTURE) if _WGMMA in text else OPTIONS
