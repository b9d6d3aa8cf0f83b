# SPDX-License-Identifier: Apache-2.0
"""expert_layout and permute as one cached call, with CPU memory in place of a GPU's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cupy_router import expert_layout, permute
from tests import inputs
from tests.recorder import recording

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from cupy_router.arrays import _torch  # noqa: E402
from cupy_router.ops import _cached  # noqa: E402
from cupy_router.torch._experts_launch import layout_and_rows  # noqa: E402

STREAM, EXPERTS, TOP_K, HIDDEN = 7, 8, 3, 40
WANT = ("ends", "order", "positions"), ("ends", "order", "positions", "row_experts")


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors have a stream."""
    _cached.forget()
    monkeypatch.setattr(_torch.PyTorch, "current_stream", lambda self, array: STREAM)
    yield
    _cached.forget()


def arrays(num_tokens: int, seed: int = 0) -> tuple[Any, Any]:
    generator = inputs.rng(700 + seed, num_tokens)
    ids = torch.from_numpy(generator.integers(0, EXPERTS + 1, (num_tokens, TOP_K)))  # the last is elsewhere
    return torch.from_numpy(inputs.normal((num_tokens, HIDDEN), seed=710 + seed)).bfloat16(), ids


def test_a_cpu_has_no_launches() -> None:
    assert layout_and_rows(*arrays(5), EXPERTS, WANT[0]) is None


@pytest.mark.parametrize("want", WANT)
def test_launches(want: tuple[str, ...], as_on_a_gpu: None) -> None:
    with recording() as recorder:
        for seed in range(2):  # prepared, then cached
            x, ids = arrays(5, seed)
            rows, layout = layout_and_rows(x, ids, EXPERTS, want)
            first, second = recorder.launches[-2:]
            assert len(recorder.launches) == 2 * (seed + 1)
            assert (first.kernel, second.kernel) == ("expert_layout_few", "permute")
            assert first.stream == second.stream == STREAM
            assert {name: array for name, array in layout._asdict().items() if isinstance(array, int)} == {
                "num_tokens": 5, "top_k": TOP_K, "alignment": 1, "capacity": 15,
            }  # fmt: skip
            given = {"indices": ids, "x": x, "rows": rows} | {name: getattr(layout, name) for name in want}
            for launch, names in ((first, ("indices", *want)), (second, ("x", "order", "positions", "rows"))):
                pointers = {name: value for name, value in launch.arguments.items() if value > 1 << 20}
                assert pointers == {name: given[name].data_ptr() for name in names}
            assert first.arguments["num_valid_value"] == -1
        assert len(recorder.sources) == 2


def test_what_is_wrong_is_named(as_on_a_gpu: None) -> None:
    x, ids = arrays(5)
    with recording() as recorder:
        with pytest.raises(TypeError, match=r"^expert_layout: indices must be .*, got"):
            layout_and_rows(x, ids.float(), EXPERTS, WANT[0])
        with pytest.raises(ValueError, match=r"^permute: x must have a row for each of the 5 tokens"):
            layout_and_rows(x[:4], ids, EXPERTS, WANT[0])
        assert not recorder.launches


@pytest.mark.backends("simt")
@pytest.mark.parametrize("want", WANT)
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 40])
def test_values(num_tokens: int, want: tuple[str, ...], backend: Any, as_on_a_gpu: None) -> None:
    x, ids = arrays(num_tokens)
    rows, layout = layout_and_rows(x, ids, EXPERTS, want)
    expected = expert_layout(ids.numpy(), EXPERTS, want=want)
    for name, value in expected._asdict().items():
        found = getattr(layout, name)
        assert type(value) is int or value is None or (found.numpy() == value).all()
        assert type(value) is not int or found == value
    assert torch.equal(rows.float(), torch.from_numpy(permute(x.float().numpy(), expected)))
