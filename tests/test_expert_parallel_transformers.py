# SPDX-License-Identifier: Apache-2.0
"""replace_routers on models whose experts transformers spreads over two ranks, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import frameworks

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
frameworks.transformers_with_models()
pytest.importorskip("transformers.distributed.expert_parallel", reason="transformers has no expert parallelism")

from tests import expert_parallel_transformers as ranks  # noqa: E402  # it needs transformers
from tests import rank_processes  # noqa: E402  # after importorskip


@pytest.mark.slow("process")
@pytest.mark.backends("reference", "gpu")
def test_two_ranks_do_what_one_process_does(backend: Any, tmp_path: Path) -> None:
    """With FSDP, ranks have different tokens."""
    rank_processes.assert_all_pass(ranks.__name__, 2, ranks.cases, tmp_path, backend.name)
