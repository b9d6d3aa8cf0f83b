# SPDX-License-Identifier: Apache-2.0
"""The quick loop of kernel work: the next call uses an edited kernel or header; errors in it name file and line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from cupy_router import activation_topk, compiler, declarations, topk_select
from tests import inputs, oracle
from tests.backends import Backend

pytestmark = [pytest.mark.needs_kernels, pytest.mark.acceptance("an edited kernel is used by the next call")]

SCORES = inputs.normal((3, 256))
K = 8
KERNEL = FUNCTION = "topk_select"
HEADER = "select/order_key.cuh"
OWN = compiler.kernel_folders()[-1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose kernel files take precedence."""
    monkeypatch.setenv("CUPY_ROUTER_KERNELS", str(tmp_path))
    monkeypatch.setattr(compiler, "WATCHING", True)
    return tmp_path


def first_index(backend: Backend) -> int:
    return int(backend.numpy(topk_select(backend.array(SCORES), K).indices)[0, 0])


def works(backend: Backend) -> bool:
    indices = backend.numpy(topk_select(backend.array(SCORES), K).indices)
    return bool((indices == oracle.topk(SCORES, K)[1]).all())


def kernel_that_writes(number: int) -> str:
    """Our kernel, but all that it does is to put a number into the first index."""
    text = (OWN / f"{KERNEL}.cu").read_text()
    found = declarations.declaration(text, FUNCTION)
    assert found is not None
    body = text.index("{", found.end) + 1
    return f"{text[:body]} if (blockIdx.x == 0 && threadIdx.x == 0) indices[0] = {number}; return; {text[body:]}"


def test_the_next_call_uses_an_edited_kernel(backend: Backend, folder: Path) -> None:
    assert works(backend)
    ours = folder / f"{KERNEL}.cu"
    for number in (4711, 4712, 4711):
        ours.write_text(kernel_that_writes(number))
        assert first_index(backend) == number
        assert first_index(backend) == number
    ours.unlink()
    assert works(backend)


def test_the_next_call_uses_an_edited_header(backend: Backend, folder: Path) -> None:
    """Files take precedence one by one: the header is the folder's, the kernel that includes it is not."""
    assert works(backend)
    header = (OWN / HEADER).read_text()
    (folder / HEADER).parent.mkdir()
    (folder / HEADER).write_text(header + "\n// a remark\n")
    assert works(backend)
    lines = header.splitlines()
    lines.insert(4, "#error edited")
    (folder / HEADER).write_text("\n".join(lines))
    with pytest.raises(compiler.CompileError, match=r"kernels/select/order_key\.cuh[(:]5\b"):
        topk_select(backend.array(SCORES), K)
    (folder / HEADER).unlink()
    assert works(backend)


@pytest.mark.parametrize("op", ["topk_select", "activation_topk"])
def test_an_error_names_file_and_line_and_leaves_the_process_usable(backend: Backend, folder: Path, op: str) -> None:
    text = (OWN / f"{op}.cu").read_text().splitlines()
    last_include = max(i for i, line in enumerate(text) if line.startswith("#include"))
    text.insert(last_include + 1, "int broken = this_name_is_unknown;")
    ours = folder / f"{op}.cu"
    ours.write_text("\n".join(text) + "\n")
    calls = {
        "topk_select": lambda: topk_select(backend.array(SCORES), K).values,
        "activation_topk": lambda: activation_topk(backend.array(inputs.normal((3, 256))), "deepseek-v4-flash").weights,
    }
    with pytest.raises(compiler.CompileError) as caught:
        calls[op]()
    assert re.search(rf"kernels/{op}\.cu[(:]{last_include + 2}\b", str(caught.value)), caught.value
    assert "this_name_is_unknown" in str(caught.value)

    other = "activation_topk" if op == "topk_select" else "topk_select"
    assert np.isfinite(backend.numpy(calls[other]())).all()
    ours.unlink()
    assert np.isfinite(backend.numpy(calls[op]())).all()
    assert works(backend)


def test_a_kernel_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(compiler.CompileError, match=r"no_such_kernel\.cu.*kernels"):
        compiler.expand("no_such_kernel")
