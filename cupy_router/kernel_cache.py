# SPDX-License-Identifier: Apache-2.0
"""Import CuPy with a folder for its compiled kernels that can be used; knows nothing of routing.

CuPy creates that folder when it is imported and writes into it whenever it has compiled, and raises what the file
system says if it cannot. A kernel that cannot be kept can still run. So a folder that cannot be used is replaced for
this process: by a temporary one, and if that does not last, by memory.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import threading
import warnings
from importlib.util import find_spec
from typing import Any

FOLDER, IN_MEMORY = "CUPY_CACHE_DIR", "CUPY_CACHE_IN_MEMORY"  # environment, which CuPy reads

_lock = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.RLock()))  # a thread may have held it
_temporary: str | None = None


def folder() -> str:
    """Return the folder in which CuPy keeps compiled kernels."""
    return os.environ.get(FOLDER, os.path.expanduser("~/.cupy/kernel_cache"))


def try_folder() -> None:
    """Create the folder and a file in it; OSError if that is not possible."""
    if folder().startswith("~"):  # CuPy would create a folder of this name
        raise FileNotFoundError("this user has no home folder")
    os.makedirs(folder(), exist_ok=True)
    with tempfile.TemporaryFile(dir=folder()):
        pass


def prepare() -> None:
    """Replace the folder if it cannot be used, unless CuPy is imported already, or not installed."""
    with _lock:
        if "cupy" in sys.modules or find_spec("cupy") is None:
            return
        try:
            try_folder()
        except OSError as error:
            replace(error, folder())
        for name in [name for name in sys.modules if name.startswith("cupy.")]:
            del sys.modules[name]  # of an import that failed, which would fail again with half of its modules


def replace(error: OSError, unusable: str) -> None:
    """Keep kernels elsewhere than in this folder from now on; raise the error if they are in memory already.

    The first time there is one warning, unless the user has chosen memory. Nothing happens if another thread has
    replaced the folder already.
    """
    with _lock:
        if unusable == folder():
            _replace(error, unusable)


def _replace(error: OSError, unusable: str) -> None:
    in_memory, first = os.environ.get(IN_MEMORY) == "1", _temporary is None
    if in_memory and "cupy" in sys.modules:
        raise error
    instead = _use_temporary() if first else None
    if instead is None:
        os.environ[IN_MEMORY] = "1"  # CuPy reads it for each kernel
        os.environ[FOLDER] = os.sep  # CuPy's import needs one that exists
    if first and not in_memory:
        warnings.warn(
            f"CuPy cannot keep compiled kernels in {unusable!r} ({error}): this process keeps them in "
            f"{instead or 'memory'}; set {FOLDER} to a folder that can be written",
            RuntimeWarning,
            stacklevel=3,
        )


def _use_temporary() -> str | None:
    """Return a new folder that CuPy uses from now on and that is removed at exit; None if that is not possible."""
    global _temporary
    try:
        _temporary = os.environ[FOLDER] = tempfile.mkdtemp(prefix="cupy_router_kernels-")
    except OSError:
        return None
    atexit.register(_remove, _temporary, os.getpid())
    of_cupy: Any = sys.modules.get("cupy.cuda.compiler")
    if of_cupy is not None:  # it read the environment when it was imported, and has no public function for this
        try:
            of_cupy._set_kernel_cache_backend(of_cupy._DiskKernelCacheBackend(_temporary))
        except (AttributeError, TypeError):
            return None
    return _temporary


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # not in a fork of it
        shutil.rmtree(folder, ignore_errors=True)
