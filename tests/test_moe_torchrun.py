# SPDX-License-Identifier: Apache-2.0
"""examples/moe_torchrun.py: ranks learn what one process learns, to the bit with exact=True."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch has no torch.distributed"),
    pytest.mark.slow("process"),
    pytest.mark.backends("reference"),
]

from tests import expert_parallel_training as training  # noqa: E402

ROOT = Path(__file__).parents[1]
STEPS = 100  # the example below makes 200


def torchrun(num_ranks: int, *command: str) -> str:
    """Return what the ranks print."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks), "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launcher, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ranks_learn_what_one_process_learns(tmp_path: Path) -> None:
    """Three ranks divide neither tokens nor experts evenly."""
    num_ranks, path = 3, tmp_path / "losses.json"
    torchrun(num_ranks, "tests.expert_parallel_training", str(STEPS), str(path))
    found, wanted = json.loads(path.read_text()), training.losses_of_one_process(STEPS, num_ranks)
    assert wanted[-1] < 0.05 * wanted[0]
    for name, losses in found.items():
        if "exact" in name:
            assert losses == wanted, name
        else:
            np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-5, err_msg=name)
    recorded = json.loads((ROOT / "docs" / "examples.json").read_text())["PyTorch"]
    np.testing.assert_allclose(wanted, recorded[:STEPS], rtol=0, atol=0.01)


def test_the_example_runs_with_and_without_torchrun() -> None:
    alone = [sys.executable, "-m", "examples.moe_torchrun"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    one = subprocess.run(alone, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert one.splitlines()[-1] == "step 200: loss 0.106"
    assert torchrun(2, "examples.moe_torchrun") == one
