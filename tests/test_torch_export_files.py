# SPDX-License-Identifier: Apache-2.0
"""Exported programs that return what the API returns, saved, and loaded by another process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cupy_router import RoutingMethod, activation_topk, topk_select
from cupy_router.ops import registry
from tests import inputs

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from cupy_router.torch import Gate  # noqa: E402

METHOD = RoutingMethod(16, 2)
X = torch.from_numpy(inputs.normal((5, 16), seed=630))


class Functions(torch.nn.Module):  # type: ignore[misc]
    def forward(self, x: Any) -> Any:
        top = topk_select(x, 3, return_values=False)
        return activation_topk(x, METHOD), {"top": top, "values": topk_select(x, 3)}


LOAD = """
import sys
import torch
import cupy_router.torch
program, x, results = sys.argv[1:]
torch.save(torch.utils._pytree.tree_flatten(torch.export.load(program).module()(torch.load(x)))[0], results)
print(torch.export.load(program).module()(torch.load(x)))
"""


@pytest.mark.slow("process")
@pytest.mark.parametrize("name", ["Gate", "functions"])
def test_a_program_is_saved_and_loaded_by_another_process(name: str, tmp_path: Path) -> None:
    module = Gate(16, METHOD, bias=True) if name == "Gate" else Functions()
    if name == "Gate":
        module.load_state_dict({"weight": X.T @ X, "e_score_correction_bias": X[0]})
    torch.export.save(torch.export.export(module, (X,)), tmp_path / "program.pt2")
    torch.save(X, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("program.pt2", "x.pt", "results.pt")]
    done = subprocess.run([sys.executable, "-c", LOAD, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    want = torch.utils._pytree.tree_flatten(module(X))[0]
    for got, expected in zip(torch.load(tmp_path / "results.pt"), want, strict=True):
        assert torch.equal(got, expected) if expected is not None else got is None
    assert done.stdout.count("Routing(weights=") == 1
    assert done.stdout.count("TopK(values=") == (0 if name == "Gate" else 2)


def test_the_types_of_all_results_can_be_written() -> None:
    for name, kind in registry.RESULTS.items():
        _, spec = torch.utils._pytree.tree_flatten(kind(*[torch.zeros(1) for _ in kind._fields]))
        text = torch.utils._pytree.treespec_dumps(spec)
        assert f"cupy_router.{name}" in text
        assert torch.utils._pytree.treespec_loads(text) == spec
