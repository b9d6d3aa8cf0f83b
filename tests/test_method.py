# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ast
import copy
import gc
import os
import pickle
import re
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router import ScoreFunction, activation_topk
from cupy_router.method import MAX_EXPERTS, SCORES, RoutingMethod, from_text, presets, resolve


def documented() -> dict[str, Any]:
    """Return the fields and their defaults by the table in docs/methods.md."""
    document = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    table = document.partition("## Fields")[2].partition("\n## ")[0]
    found: dict[str, Any] = {}
    for names, defaults in re.findall(r"^\| (`.*?) \| (.*?) ?\| .* \|$", table, re.M)[1:]:  # the first have none
        values = ast.literal_eval(f"({defaults.replace('`', '')},)")
        found |= zip(re.findall(r"`(\w+)`", names), values, strict=True)
    return found


DEFAULTS = documented()


def test_fields_and_defaults_are_those_of_the_documentation() -> None:
    method = RoutingMethod(8, 2)
    assert {f.name: getattr(method, f.name) for f in fields(method)} == {"num_experts": 8, "top_k": 2, **DEFAULTS}
    assert RoutingMethod(num_experts=8, top_k=2, **DEFAULTS) == method


def test_only_the_first_three_fields_are_positional() -> None:
    assert RoutingMethod(8, 2, "softmax").score == "softmax"
    with pytest.raises(TypeError, match="positional"):
        RoutingMethod(8, 2, "softmax", 1.0)  # type: ignore[call-arg]


def _living_methods() -> int:
    gc.collect()
    return sum(isinstance(found, RoutingMethod) for found in gc.get_objects())


@pytest.mark.slow("seconds")
def test_no_method_is_kept_for_ever() -> None:
    """A scale that is annealed makes a method per step."""
    logits, kept = np.zeros((1, 4), np.float32), []
    gone = weakref.finalize(RoutingMethod(4, 2, logit_scale=1.5), kept.append, "gone")
    gc.collect()
    assert kept == ["gone"]
    assert not gone.alive
    before = _living_methods()
    for step in range(6000):
        activation_topk(logits, RoutingMethod(4, 2, logit_scale=1.0 + step / 7000))
        from_text(RoutingMethod(4, 2, logit_scale=3.0 + step / 7000).text)
    assert _living_methods() < before + 9_500  # what bounded caches hold


def test_a_custom_score_returns_from_its_text() -> None:
    score = ScoreFunction("mine", cuda="x", numpy=lambda x: x)
    text = RoutingMethod(4, 2, score).text
    gc.collect()
    assert from_text(text).score is score
    assert from_text(text) == RoutingMethod(4, 2, score)


def test_methods_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        RoutingMethod(8, 2).top_k = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(1, 1), (256, 256), (MAX_EXPERTS, 7), (np.int64(8), np.uint8(2)), (np.array(8), 2)]
)
def test_integers_are_plain_ints(num_experts: Any, top_k: Any) -> None:
    method = RoutingMethod(num_experts, top_k)
    assert (method.num_experts, method.top_k) == (int(num_experts), int(top_k))
    assert type(method.num_experts) is type(method.top_k) is int


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int32(2), Fraction(2)])
def test_numbers_are_plain_floats(value: Any) -> None:
    method = RoutingMethod(8, 2, renormalize_eps=value, scale=value)
    assert method == RoutingMethod(8, 2, renormalize_eps=2.0, scale=2.0)
    assert type(method.renormalize_eps) is type(method.scale) is float
    assert type(RoutingMethod(8, 2, renormalize_min=value).renormalize_min) is float


@pytest.mark.parametrize("score", SCORES)
def test_every_score_is_accepted(score: str) -> None:
    assert RoutingMethod(8, 2, score).score == score
    assert type(RoutingMethod(8, 2, np.str_(score)).score) is str


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_experts": 0}, ValueError, "num_experts is 0, but must be from 1 to 2**31 - 1"),
    ({"num_experts": -3}, ValueError, "num_experts is -3, but must be from 1 to 2**31 - 1"),
    ({"num_experts": 2**31}, ValueError, "num_experts is 2147483648, but must be from 1 to 2**31 - 1"),
    ({"num_experts": 8.0}, TypeError, "num_experts is 8.0, but must be an int"),
    ({"num_experts": "8"}, TypeError, "num_experts is '8', but must be an int"),
    ({"num_experts": None}, TypeError, "num_experts is None, but must be an int"),
    ({"num_experts": True}, TypeError, "num_experts is True, but must be an int"),
    ({"top_k": 0}, ValueError, "top_k is 0, but must be from 1 to num_experts = 8"),
    ({"top_k": 9}, ValueError, "top_k is 9, but must be from 1 to num_experts = 8"),
    ({"top_k": np.int64(-1)}, ValueError, "top_k is -1, but must be from 1 to num_experts = 8"),
    ({"top_k": 2.0}, TypeError, "top_k is 2.0, but must be an int"),
    ({"top_k": True}, TypeError, "top_k is True, but must be an int"),
    ({"top_k": np.True_}, TypeError, "top_k is "),
    ({"score": "relu"}, ValueError, "score is 'relu', but must be one of 'sqrtsoftplus', 'sigmoid', 'softmax', 'ident"),
    ({"renormalize": 1}, TypeError, "renormalize is 1, but must be True or False"),
    ({"renormalize": None}, TypeError, "renormalize is None, but must be True or False"),
    ({"renormalize_eps": -1e-20}, ValueError, "renormalize_eps is -1e-20, but must be a non-negative number"),
    ({"renormalize_eps": float("nan")}, ValueError, "renormalize_eps is nan, but must be a non-negative number"),
    ({"renormalize_eps": float("inf")}, ValueError, "renormalize_eps is inf, but must be a non-negative number"),
    ({"renormalize_eps": 1e-39}, ValueError, "renormalize_eps is 1e-39, but must be a non-negative number that is"),
    ({"renormalize_eps": 1e39}, ValueError, "renormalize_eps is 1e+39, but must be a non-negative number that is"),
    (
        {"renormalize_min": 3e38},
        ValueError,
        "renormalize_min is 3e+38, but must be a non-negative number that is 0 or no",
    ),
    ({"renormalize_eps": "1e-20"}, TypeError, "renormalize_eps is '1e-20', but must be a number"),
    ({"renormalize_eps": None}, TypeError, "renormalize_eps is None, but must be a number"),
    ({"renormalize_min": -1.0}, ValueError, "renormalize_min is -1.0, but must be a non-negative number"),
    ({"renormalize_min": float("nan")}, ValueError, "renormalize_min is nan, but must be a non-negative number"),
    ({"renormalize_min": False}, TypeError, "renormalize_min is False, but must be a number"),
    (
        {"renormalize_eps": 1e-20, "renormalize_min": 1e-12},
        ValueError,
        "renormalize_eps is 1e-20 and renormalize_min is 1e-12, but only one of them may be set",
    ),
    ({"scale": float("inf")}, ValueError, "scale is inf, but must be a number that is 0 or normal in float32"),
    ({"scale": 10**400}, ValueError, "scale is 1000"),
    ({"scale": 1j}, TypeError, "scale is 1j, but must be a number"),
    ({"scale": True}, TypeError, "scale is True, but must be a number"),
    (
        {"score": None},
        TypeError,
        "score is None, but must be one of 'sqrtsoftplus', 'sigmoid', 'softmax', 'identity' or a",
    ),
    ({"score": ["softmax"]}, TypeError, "score is ['softmax'], but must be one of 'sqrtsoftplus'"),
    ({"logit_scale": "2"}, TypeError, "logit_scale is '2', but must be a number"),
    ({"logit_scale": float("nan")}, ValueError, "logit_scale is nan, but must be a number that is 0 or normal in"),
    ({"logit_softcap": 0.0}, ValueError, "logit_softcap is 0, but must be more than 0, or None"),
    ({"logit_softcap": -30.0}, ValueError, "logit_softcap is -30.0, but must be a non-negative number"),
    ({"logit_softcap": True}, TypeError, "logit_softcap is True, but must be a number"),
    ({"score_after_topk": 1}, TypeError, "score_after_topk is 1, but must be True or False"),
    ({"bias_on": "weights"}, ValueError, "bias_on is 'weights', but must be one of 'score', 'logits'"),
    ({"num_groups": 0}, ValueError, "num_groups is 0, but must be from 1 to num_experts = 8"),
    ({"num_groups": 3}, ValueError, "num_groups is 3, but must divide num_experts = 8 evenly"),
    ({"num_groups": 9}, ValueError, "num_groups is 9, but must be from 1 to num_experts = 8"),
    ({"top_groups": 2}, ValueError, "top_groups is 2, but must be from 1 to num_groups = 1"),
    ({"num_groups": 4, "top_groups": 5}, ValueError, "top_groups is 5, but must be from 1 to num_groups = 4"),
    ({"num_groups": 8}, ValueError, "top_k is 2, but the best 1 of 8 groups have only 1 of the 8 experts"),
    ({"group_score": "top3"}, ValueError, "group_score is 'top3', but must be one of 'max', 'top2'"),
    ({"num_shared_experts": -1}, ValueError, "num_shared_experts is -1, but must be from 0 to 2**31 - 1 - num_experts"),
    ({"shared_weight": None}, TypeError, "shared_weight is None, but must be a number"),
    ({"shared_in_normalizer": True}, ValueError, "shared_in_normalizer needs score = 'sigmoid', got 'sqrtsoftplus'"),
    (
        {"score": "sigmoid", "shared_in_normalizer": True},
        ValueError,
        "shared_in_normalizer needs num_shared_experts of 1 or more, got 0",
    ),
    (
        {"score": "sigmoid", "shared_in_normalizer": True, "num_shared_experts": 1, "renormalize_eps": 1e-20},
        ValueError,
        "shared_in_normalizer needs renormalize_eps = 0.0, got 1e-20",
    ),
    ({"weight_dtype": "float64"}, ValueError, "weight_dtype is 'float64', but must be one of 'float32', 'float16', 'b"),
    (
        {"num_experts": 255, "num_shared_experts": 1, "index_dtype": "uint8"},
        ValueError,
        "index_dtype is 'uint8', which holds the ids of at most 255 experts, but num_experts + num_shared_experts "
        "is 256: use 'int16'",
    ),
    (
        {"num_experts": 2**16, "index_dtype": "uint16"},
        ValueError,
        "index_dtype is 'uint16', which holds the ids of at most 65535 experts, but num_experts + num_shared_experts "
        "is 65536: use 'int32'",
    ),
    (
        {"num_experts": 2**15 + 1, "index_dtype": "int16"},
        ValueError,
        "index_dtype is 'int16', which holds the ids of at most 32768 experts, but num_experts + num_shared_experts "
        "is 32769: use 'int32'",
    ),
    ({"index_dtype": np.int64}, TypeError, "index_dtype is <class 'numpy.int64'>, but must be one of 'int32', 'int64'"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_fields(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        RoutingMethod(**{"num_experts": 8, "top_k": 2, **changes})
    assert str(caught.value).startswith(f"RoutingMethod: {message}")
    assert "\n" not in str(caught.value)


def test_equality_and_hash_are_those_of_the_fields() -> None:
    method = RoutingMethod(8, 2, renormalize_eps=1e-20)
    numpy_8: Any = np.int32(8)
    again = RoutingMethod(numpy_8, 2, renormalize_eps=np.float64(1e-20), logit_scale=1)
    assert method == again
    assert hash(method) == hash(again)
    assert method != (8, 2)
    changes: list[dict[str, Any]] = [
        {"num_experts": 9},
        {"top_k": 3},
        {"score": "softmax"},
        {"renormalize": False},
        {"renormalize_eps": 0.0},
        {"renormalize_eps": 0.0, "renormalize_min": 1e-12},
        {"scale": 2.0},
    ]
    variants = [method, *(replace(method, **change) for change in changes)]
    assert len(set(variants)) == len(variants)
    assert RoutingMethod(8, 2, scale=-0.0) == RoutingMethod(8, 2, scale=0.0)
    assert str(RoutingMethod(8, 2, scale=-0.0).scale) == "0.0"


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal(duplicate: Callable[[RoutingMethod], RoutingMethod]) -> None:
    method = RoutingMethod(8, 2, "softmax", scale=2.5)
    assert {method: "found"}[duplicate(method)] == "found"


@pytest.mark.slow("process")
def test_a_pickle_is_found_in_the_dictionaries_of_another_process() -> None:
    method = RoutingMethod(8, 2, "softmax", scale=2.5)
    script = f"""
import pickle
from cupy_router.method import RoutingMethod
print(pickle.loads({pickle.dumps(method)!r}) in {{RoutingMethod(8, 2, "softmax", scale=2.5)}})
"""
    for seed in "1", "2":  # strings hash differently under them, and under one at least not as here
        assert run(script, PYTHONHASHSEED=seed) == "True"


def run(script: str, **variables: str) -> str:
    """What a new Python process prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_repr_shows_what_differs_and_can_be_evaluated() -> None:
    method = RoutingMethod(8, 2, "sigmoid", renormalize=False, scale=2.5)
    assert repr(method) == "RoutingMethod(num_experts=8, top_k=2, score='sigmoid', renormalize=False, scale=2.5)"
    assert eval(repr(method)) == method


def test_presets_of_deepseek_v4() -> None:
    found = {name: method for name, method in presets().items() if name.startswith("deepseek-v4")}
    assert found == {
        "deepseek-v4-flash": RoutingMethod(256, 6, "sqrtsoftplus", renormalize_eps=1e-20, scale=1.5),
        "deepseek-v4-pro": RoutingMethod(384, 6, "sqrtsoftplus", renormalize_eps=1e-20, scale=2.5),
    }


def test_presets_returns_a_copy() -> None:
    presets().clear()
    assert "deepseek-v4-pro" in presets()


def test_resolve() -> None:
    method = RoutingMethod(8, 2)
    assert resolve(method) is method
    for name, preset in presets().items():
        assert resolve(name) is preset
    for name, near in (
        ("deepseek-v4", "'deepseek-v4-flash', 'deepseek-v4-pro'"),
        ("deepseek_v3", "'deepseek-v3', 'deepseek-v2', 'deepseek-v4-pro'"),
    ):
        with pytest.raises(ValueError) as unknown:  # noqa: PT011  # the message is compared below
            resolve(name)
        assert str(unknown.value) == (
            f"method is '{name}', but must be the name of a preset, the nearest are {near} "
            "(cupy_router.presets() lists all)"
        )
    with pytest.raises(ValueError, match=r"method is '', but must be the name of a preset \(cupy_router"):
        resolve("")
    with pytest.raises(TypeError) as no_method:
        resolve({"num_experts": 8})  # type: ignore[arg-type]
    assert str(no_method.value) == "method must be a RoutingMethod or the name of a preset, got dict"


@pytest.mark.slow("process")
def test_nothing_but_the_standard_library_is_imported() -> None:
    assert run("import sys, cupy_router.method; print('numpy' in sys.modules)") == "False"
