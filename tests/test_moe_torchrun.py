# SPDX-License-Identifier: Apache-2.0
"""examples/moe_torchrun.py: ranks learn what one process learns, to the bit with exact=True."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch has no torch.distributed"),
    pytest.mark.slow("process"),
    pytest.mark.backends("reference", "gpu"),
]

from tests import expert_parallel_training as training  # noqa: E402

ROOT = Path(__file__).parents[1]
STEPS = 200


@pytest.fixture
def visible(backend: Any) -> dict[str, str]:
    """Return the environment of processes that see the devices of the backend."""
    if backend.name != "gpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return {}


def torchrun(visible: dict[str, str], num_ranks: int, *command: str) -> str:
    """Return what the ranks print."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | visible
    done = subprocess.run([*launcher, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ranks_learn_what_one_process_learns(visible: dict[str, str], backend: Any, tmp_path: Path) -> None:
    """Three ranks, where there are as many devices, divide neither tokens nor experts evenly."""
    num_ranks, path = 2 if backend.name == "gpu" else 3, tmp_path / "losses.json"
    torchrun(visible, num_ranks, "tests.expert_parallel_training", str(STEPS), str(path))
    found, wanted = json.loads(path.read_text()), training.losses_of_one_process(STEPS, num_ranks)
    assert wanted[-1] < 0.05 * wanted[0]
    for name, losses in found.items():
        if "exact" in name:
            assert losses == wanted, name
        else:
            np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-5, err_msg=name)
    recorded = json.loads((ROOT / "docs" / "examples.json").read_text())["PyTorch"]
    np.testing.assert_allclose(wanted, recorded[:STEPS], rtol=0, atol=0.01)


def test_the_example_runs_with_and_without_torchrun(visible: dict[str, str]) -> None:
    alone = [sys.executable, "-m", "examples.moe_torchrun"]
    environment = os.environ | visible
    one = subprocess.run(alone, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert one.splitlines()[-1] == "step 200: loss 0.106"
    assert torchrun(visible, 2, "examples.moe_torchrun") == one
