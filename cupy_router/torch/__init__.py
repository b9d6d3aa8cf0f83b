# SPDX-License-Identifier: Apache-2.0
"""The ops as citizens of PyTorch: importing this room registers them with torch.library and with torch.compile.

From then on the public functions and a Router may be called in what `torch.compile(fullgraph=True)` or `torch.export`
traces; arguments that are no tensors travel through the schemas as integer keys. Eager calls do not pass PyTorch's
dispatcher: they ask whether something is being traced, and go on as without this room.

    import cupy_router.torch  # not needed once any op or Router was given a tensor

    router = cupy_router.Router("deepseek-v4-flash", weight=weight, bias=bias)
    route = torch.compile(lambda x: router(x), fullgraph=True)

`replace_routers` gives a Hugging Face model our routers.
"""

from __future__ import annotations

from cupy_router import router
from cupy_router.ops import _call
from cupy_router.torch import _library
from cupy_router.torch._replace import replace_routers, restore_routers

__all__ = ["replace_routers", "restore_routers"]

router.tracer = _call.tracer = _library
