# SPDX-License-Identifier: Apache-2.0
"""A real fork after CUDA was used: every call in the child raises one sentence, none hangs, the parent goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SCRIPT = """
import os, sys
import numpy as np
import cupy_router
from cupy_router import RoutingMethod, Router
framework, parent = sys.argv[1:]

if framework == "torch":
    import torch
    make = lambda *shape, dtype="float32": torch.ones(shape, dtype=getattr(torch, dtype), device="cuda")
    wait, kept = torch.cuda.synchronize, torch.cuda.Stream()
    stream = kept.cuda_stream
else:
    import cupy
    make = lambda *shape, dtype="float32": cupy.ones(shape, dtype)
    wait, kept = (lambda: cupy.cuda.Device().synchronize()), cupy.cuda.Stream(non_blocking=True)
    stream = kept.ptr

scores, many, gate = make(4, 64), make(300, 64), make(8, 64)
none = scores[:0]  # in the child, PyTorch's own slicing fails
out = cupy_router.TopK(make(4, 2), make(4, 2, dtype="int32"))
router = Router(RoutingMethod(8, 2), weight=gate)
calls = {
    "warm": lambda: cupy_router.topk_select(scores, 2),
    "out": lambda: cupy_router.topk_select(scores, 2, out=out),
    "stream": lambda: cupy_router.topk_select(scores, 2, out=out, stream=stream),
    "decode": lambda: router(scores),
    "gemm": lambda: router(many),
    "new": lambda: cupy_router.topk_select(scores, 3),
    "no rows": lambda: cupy_router.topk_select(none, 2),
}
if parent == "used":
    for name in calls.keys() - {"new"}:
        calls[name]()
wait()
sys.stdout.flush()
child = os.fork()
if child == 0:
    for name, call in calls.items():
        try:
            print(name, "|", type(call()).__name__)
        except Exception as error:
            print(name, "|", type(error).__name__, " ".join(str(error).split()))
    print("cpu |", cupy_router.topk_select(np.eye(1, 4, 3, dtype=np.float32), 1).indices.tolist())
    sys.stdout.flush()
    os._exit(0)
os.waitpid(child, 0)
for call in calls.values():
    call()
wait()
print("parent | fine")
"""


@pytest.mark.parametrize("parent", ["used", "only its framework used CUDA"])
@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_a_fork_after_the_first_use(framework: str, parent: str) -> None:
    pytest.importorskip(framework)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", SCRIPT, framework, parent]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(line.split(" | ", 1) for line in done.stdout.splitlines() if " | " in line)
    assert found.pop("parent") == "fine", done.stdout + done.stderr
    assert found.pop("cpu") == "[[3]]", done.stdout
    assert len(found) == 7, done.stdout + done.stderr
    if found["no rows"] == "TopK":  # nothing is launched, so nothing can fail
        del found["no rows"]
    for line in found.values():
        assert line.startswith("RuntimeError "), done.stdout
        assert "spawn" in line, done.stdout
        assert "fork" in line, done.stdout


def test_a_fork_before_the_first_use() -> None:
    script = """
import os, sys
import cupy_router, numpy as np
cupy_router.topk_select(np.eye(2, 4, dtype=np.float32), 1)
child = os.fork()
import cupy
os.write(1, f"{cupy_router.topk_select(cupy.eye(2, 4, dtype='float32'), 1).indices.tolist()}\\n".encode())
if child:
    os.waitpid(child, 0)
else:
    os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert (done.returncode, done.stdout) == (0, "[[0], [1]]\n" * 2), done.stderr
