# SPDX-License-Identifier: Apache-2.0
"""Options of NVRTC for the text of a kernel."""

from __future__ import annotations

OPTIONS = ("-std=c++17",)  # CuPy adds the architecture and -ftz=true
_WGMMA, _ITS_ARCHITECTURE = "wgmma.mma_async", "-arch=sm_90a"  # instructions that are in no sm_90
SEVERAL_ARCHITECTURES = (12, 9)  # the first NVRTC that accepts two, of which sm_90a counts beside sm_90


def options(text: str) -> tuple[str, ...]:
    """Return the options for an expanded text that CuPy compiles, which adds the architecture of the device.

    A text with wgmma names its own beside it, which NVRTC refuses before SEVERAL_ARCHITECTURES.
    """
    return (*OPTIONS, _ITS_ARCHITECTURE) if _WGMMA in text else OPTIONS


def architecture_option(text: str, architecture: str) -> str:
    """Return the option for a text that is compiled for one architecture: for this one, or for that of wgmma."""
    return _ITS_ARCHITECTURE if _WGMMA in text else f"-arch={architecture}"
