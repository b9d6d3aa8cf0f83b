# SPDX-License-Identifier: Apache-2.0
"""Routers out of safetensors files, folders and indices, and what is wrong with those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router import Router
from tests import inputs
from tests.backends import DTYPES, Backend
from tests.test_router import BIAS, METHOD, assert_same, gate, table, to_host, tokens
from tests.test_router_checkpoints import STYLES, neighbours


@pytest.fixture
def save() -> Any:
    return pytest.importorskip("safetensors.numpy", reason="safetensors is not installed").save_file


@pytest.mark.parametrize("dtype", inputs.FLOATS)
@pytest.mark.parametrize("style", ["deepseek", "hugging face"])
def test_a_safetensors_file(backend: Backend, style: str, dtype: str, tmp_path: Path, save: Any) -> None:
    """Arrays come to where x lies, so that one Router serves CPU and GPU."""
    weight, bias, tid2eid, prefix = STYLES[style]
    dense = neighbours(style) | {weight: gate(dtype), bias: BIAS.astype(DTYPES[dtype])}
    hashed = {weight: gate(dtype), tid2eid: table("int64")}
    x, ids = backend.array(tokens(9, dtype)), backend.array(np.arange(9))
    for state in (dense, hashed):
        save(state, tmp_path / "file.safetensors")
        from_file = Router.from_safetensors(tmp_path / "file.safetensors", prefix, METHOD)
        on_device = {key: backend.array(value) for key, value in state.items()}
        assert_same(
            to_host(backend, from_file(x, ids)),
            to_host(backend, Router.from_state_dict(on_device, prefix, METHOD)(x, ids)),
        )
        assert str(from_file.weight.dtype) == dtype


def test_checkpoints_of_several_files(tmp_path: Path, save: Any) -> None:
    weight, bias, _, prefix = STYLES["hugging face"]
    save({weight: gate()}, tmp_path / "one.safetensors")
    save({bias: BIAS}, tmp_path / "two.safetensors")
    for path in (tmp_path, str(tmp_path)):
        np.testing.assert_array_equal(Router.from_safetensors(path, prefix, METHOD).bias, BIAS)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {weight: "one.safetensors", bias: "two.safetensors"}}))
    (tmp_path / "broken.safetensors").write_bytes(b"never read, since the index does not name it")
    for path in (tmp_path, index):
        router = Router.from_safetensors(path, prefix, METHOD)
        np.testing.assert_array_equal(router.weight, gate())
        np.testing.assert_array_equal(router.bias, BIAS)


def test_prefixes_without_a_gate_in_a_file(tmp_path: Path, save: Any) -> None:
    save({"gate.bias": BIAS, "layers.1.mlp.gate.weight": gate()}, tmp_path / "biased.safetensors")
    words = r"Router\.from_safetensors: .*biased\.safetensors: no gate at prefix 'layers\.0': .* layers\.1\.mlp\.gate$"
    with pytest.raises(ValueError, match=words):
        Router.from_safetensors(tmp_path / "biased.safetensors", "layers.0", METHOD)


def index(names: Any) -> str:
    return json.dumps({"weight_map": names})


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("{", ValueError, r"index\.json is no JSON file: .*line 1"),
        (b"\xff{}", ValueError, r"index\.json is no JSON file: .*utf-8"),
        ("[]", ValueError, r"index\.json is no index of a checkpoint, which would have a weight_map"),
        ("{}", ValueError, r"index\.json is no index of a checkpoint"),
        (index(["gate.weight"]), ValueError, r"index\.json is no index of a checkpoint"),
        (index({"gate.weight": 3}), ValueError, r"index\.json says that gate\.weight is in 3, which is no name of"),
        (index({"gate.weight": "../good.safetensors"}), ValueError, r"gate\.weight is in '\.\./good\.safetensors'"),
        (index({"gate.weight": "/good.safetensors"}), ValueError, r"gate\.weight is in '/good\.safetensors', which"),
        ("[" * 100_000, ValueError, r"index\.json is no index of a checkpoint: it is nested too deeply"),
        (index({"gate.weight": ""}), ValueError, r"index\.json says that gate\.weight is in '', which is no name of"),
        (
            index({"gate.weight": "."}),
            ValueError,
            r"index\.json says that gate\.weight is in '\.', which is no name of",
        ),
        (index({"gate.weight": "none"}), FileNotFoundError, r"there is no file .*none, which should have gate\.weight"),
        (index({"gate.weight": "folder"}), FileNotFoundError, r"there is no file .*folder, which should have gate"),
        (index({"gate.weight": "cut"}), ValueError, r"cut is no safetensors file, or not the whole of one"),
        (index({"weight": "good.safetensors"}), ValueError, r"good\.safetensors lacks weight, which its index says"),
        (index({}), ValueError, "no gate at prefix '': no key begins with it, but these are there: none"),
    ],
)
@pytest.mark.parametrize("by_folder", [False, True])
def test_an_index_that_is_broken(
    content: str | bytes, error: type, words: str, by_folder: bool, tmp_path: Path, save: Any
) -> None:
    save({"gate.weight": gate()}, tmp_path / "good.safetensors")
    (tmp_path / "cut").write_bytes((tmp_path / "good.safetensors").read_bytes()[:-4])
    (tmp_path / "folder").mkdir()
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=words) as caught:
        Router.from_safetensors(tmp_path if by_folder else path, "", METHOD)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).startswith("Router.from_safetensors: ")


@pytest.mark.parametrize(
    ("left_out", "words"),
    [
        (
            "gate.e_score_correction_bias",
            "has gate.e_score_correction_bias, which the index does not name: mend it",
        ),
        ("gate_scale", "gate_scale is part of the router of gate.weight, but nothing that a Router can take"),
        ("other.weight", None),
    ],
)
def test_a_tensor_that_the_index_leaves_out(left_out: str, words: str | None, tmp_path: Path, save: Any) -> None:
    save({"gate.weight": gate(), left_out: BIAS}, tmp_path / "one.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index({"gate.weight": "one.safetensors"}))
    if words is None:
        assert Router.from_safetensors(path, "", METHOD).bias is None
        return
    with pytest.raises(ValueError, match=f"^Router.from_safetensors: .*{words}"):
        Router.from_safetensors(path, "", METHOD)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("none.safetensors", FileNotFoundError, r"there is no file .*none\.safetensors"),
        ("none.json", FileNotFoundError, r"there is no file .*none\.json"),
        ("", FileNotFoundError, "there is no safetensors file in "),
        ("folder.safetensors", FileNotFoundError, r"there is no safetensors file in .*folder\.safetensors"),
        ("text.bin", ValueError, r"Router\.from_safetensors: .*text\.bin is no safetensors file"),
        ("empty.bin", ValueError, r"Router\.from_safetensors: .*empty\.bin is no safetensors file, or not the whole"),
        ("twice", ValueError, r"Router\.from_safetensors: a is in .*1\.safetensors and in 2\.safetensors: pass"),
    ],
)
def test_files_that_are_missing_or_no_safetensors(
    name: str, error: type, words: str, tmp_path: Path, save: Any
) -> None:
    (tmp_path / "text.bin").write_bytes(b"not at all such a file")
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "twice").mkdir()
    for number in (1, 2):
        save({"a": BIAS}, tmp_path / f"twice/{number}.safetensors")
    with pytest.raises(error, match=words) as caught:
        Router.from_safetensors(tmp_path / name, "", METHOD)
    assert str(caught.value).startswith("Router.from_safetensors: ")


@pytest.mark.parametrize("path", [None, b"model.safetensors", 3])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(TypeError, match=rf"path must be the path of a file or folder, got {type(path).__name__}$"):
        Router.from_safetensors(path, "", METHOD)


BITS = {"F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "F64": 64, "I32": 32}


@pytest.mark.parametrize("dtype", BITS)
@pytest.mark.parametrize("name", ["gate.weight", "gate.e_score_correction_bias"])
def test_dtypes_of_files_that_a_router_cannot_take(name: str, dtype: str, tmp_path: Path, save: Any) -> None:
    """Written by hand: NumPy knows only some of them."""
    state = {"gate.weight": gate(), "gate.e_score_correction_bias": BIAS}
    header, data = {}, b""
    for key, array in state.items():
        own = key == name
        content = bytes(array.size * BITS[dtype] // 8) if own else array.tobytes()
        ends = [len(data), len(data) + len(content)]
        header[key] = {"dtype": dtype if own else "F32", "shape": list(array.shape), "data_offsets": ends}
        data += content
    text = json.dumps(header).encode()
    (tmp_path / "file.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    got = {"F64": "float64", "I32": "int32"}.get(dtype, dtype)
    words = rf"^Router\.from_safetensors: {name} of .*file\.safetensors .*must be float32.*, got {got}.*: convert it to"
    with pytest.raises(TypeError, match=words):
        Router.from_safetensors(tmp_path / "file.safetensors", "", METHOD)
