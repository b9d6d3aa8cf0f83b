# SPDX-License-Identifier: Apache-2.0
"""ScoreFunction: what its CUDA text may be, when that is found out, and whether its two halves agree."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cupy_router import RoutingMethod, ScoreFunction, activation_topk, compare_score, compiler, nvrtc
from cupy_router.compiler import CompileError
from cupy_router.score_comparison import ScoreComparison
from tests.backends import Backend
from tests.methods import SOFTSIGN, SQUARE


def make(cuda: str, numpy: Callable[[Any], Any] = np.asarray, **fields: Any) -> ScoreFunction:
    return ScoreFunction("mine", cuda=cuda, numpy=numpy, **fields)


@pytest.fixture
def no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_library", lambda: None)
    nvrtc.errors.cache_clear()


# -- The text ----------------------------------------------------------------------------------------------------------

BEYOND = [
    ("totally not CUDA (", 1, '"(" is not closed'),
    ("x) + (1", 1, '")" closes nothing'),
    ("x\n+\n)\n(", 3, '")" closes nothing'),
    ("(x]", 1, '"]" closes nothing'),
    ("{x", 1, '"{" is not closed'),
    ("x; } evil {", 1, '"}" closes nothing'),
    ("return x;\n} __device__ float other() {\nreturn 1.0f;", 2, '"}" closes nothing'),
    ("x; %> evil <%", 1, '"%>" closes nothing'),
    ("x\n/* and so on", 2, '"/*" is not closed'),
    ("x // )\n)", 2, '")" closes nothing'),
    ("x + ')' )", 1, '")" closes nothing'),
    ("#define float double\nx", 1, '"#define" would change the kernel around the score'),
    ("x\n  # include <cmath>\n", 2, '"#include" would change the kernel around the score'),
]


@pytest.mark.usefixtures("no_nvrtc")
@pytest.mark.parametrize(("cuda", "line", "message"), BEYOND)
def test_a_text_that_reaches_beyond_its_place_is_refused(cuda: str, line: int, message: str) -> None:
    with pytest.raises(CompileError) as caught:
        make(cuda)
    assert str(caught.value) == f"ScoreFunction mine({line}): error: {message}"


GOOD = [
    "x",
    "x / (1.0f + fabsf(x))  // (",
    "x /* ) } */ + 1",
    "x * 1'000.0f * (2)",
    "x + ')'",
    "x \\\n + 1",
    "// \\\n ) \nx",
    "float s[2] = {x, 1.0f};\nreturn s[0];",
    "auto f = [](float y) { return y; };\nreturn f(x);",
    'printf("%f}\\")", x), x',
    "#if __CUDA_ARCH__ >= 900\nreturn x;\n#else\nreturn 2 * x;\n#endif",
    "#pragma unroll\nfor (int i = 0; i < 2; ++i) x *= x;\nreturn x;",
    "static_cast<float>(__reduce_add_sync(0xffffffffu, static_cast<int>(x)))",
    "x < ::fabsf(x) ? x : 0",
]


@pytest.mark.parametrize("cuda", GOOD)
def test_texts_that_are_fine(cuda: str) -> None:
    make(cuda)


@pytest.fixture
def needs_nvrtc() -> None:
    if nvrtc._library() is None:
        pytest.skip("there is no NVRTC that CuPy would use")


def nvrtc_version() -> tuple[int, int]:
    library, major, minor = nvrtc._library(), ctypes.c_int(), ctypes.c_int()
    assert library is not None
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@pytest.mark.usefixtures("needs_nvrtc")
@pytest.mark.parametrize(
    ("cuda", "line", "word"),
    [
        ("totally not CUDA", 1, '"totally" is undefined'),
        ("x *\n\nnonsense(x)", 3, '"nonsense" is undefined'),
        ("float y = 1.0f;\nreturn y + z;", 2, '"z" is undefined'),
        ("if (x > 0)\n    return x;", 3, "missing return statement"),
        ("x; x", 1, "expected"),
        ("x; return x", 2, "expected"),
    ],
)
def test_nvrtc_finds_what_is_wrong_at_once(cuda: str, line: int, word: str) -> None:
    if "missing" in word and nvrtc_version() < (12, 4):
        pytest.skip("this NVRTC lets a missing return pass")
    with pytest.raises(CompileError) as caught:
        make(cuda)
    assert str(caught.value).startswith(f"ScoreFunction mine({line}): error: ")
    assert word in str(caught.value)


@pytest.mark.usefixtures("no_nvrtc")
def test_without_nvrtc_only_brackets_are_checked() -> None:
    make("totally not CUDA")


def test_an_nvrtc_that_fails_otherwise_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *args: 7

    monkeypatch.setattr(nvrtc, "_library", Failing)
    nvrtc.errors.cache_clear()
    make("totally not CUDA")
    nvrtc.errors.cache_clear()


@pytest.mark.slow("process")
def test_making_a_score_imports_no_framework_and_text_is_compiled_once() -> None:
    code = (
        "import sys\n"
        "from cupy_router import ScoreFunction, nvrtc\n"
        "for _ in range(3):\n"
        "    ScoreFunction('f', cuda='x * x', numpy=abs)\n"
        "assert nvrtc.errors.cache_info().misses == 1\n"
        "print(*sorted({'cupy', 'jax', 'torch'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


# -- The NumPy half ---------------------------------------------------------------------------------------------------


@pytest.mark.backends("reference")
def test_complex_scores_are_refused() -> None:
    """NumPy would drop their imaginary part with a warning."""
    wrong = RoutingMethod(4, 2, make("sqrtf(x)", np.emath.sqrt))
    with pytest.raises(
        TypeError, match=r"^activation_topk: ScoreFunction\('mine'\) made complex numbers, but must make r"
    ):
        activation_topk(np.full((2, 4), -1, np.float32), wrong)


# -- The two halves ----------------------------------------------------------------------------------------------------


@pytest.mark.needs_kernels
@pytest.mark.parametrize("score", [SOFTSIGN, SQUARE])
def test_halves_that_agree(backend: Backend, score: ScoreFunction) -> None:
    found = compare_score(score)
    assert isinstance(found, ScoreComparison)
    assert found.num_values > 5000
    assert found.num_slopes > 900
    assert found.max_error < 1e-5


def relu(x: Any) -> Any:
    return np.where(x > 0, x, 0 * x)


AGREE = {
    "relu": make("x > 0 ? x : 0.0f * x", relu, derivative=make("x > 0", lambda x: x > 0)),  # a kink at 0
    "log": make("logf(x)", np.log),  # NaN below 0, -inf at 0 and at subnormals
    "inverse": make("1.0f / x", lambda x: 1 / x),
    "sign": make("copysignf(1.0f, x)", lambda x: np.copysign(1.0, x)),  # differs at -0.0 if that were lost
    "exp": make("expf(x)", np.exp, derivative=make("expf(x)", np.exp)),
    "softplus": make("fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)))", lambda x: np.logaddexp(0, x)),
}


@pytest.mark.needs_kernels
@pytest.mark.parametrize("name", AGREE)
def test_more_halves_that_agree(backend: Backend, name: str) -> None:
    compare_score(AGREE[name])


DIFFER = {
    "another formula": (
        make("x * x", lambda x: x),
        r"ScoreFunction\('mine'\) is 0\.0006\d+ by CUDA and -0\.025\d* by NumPy at x = -0\.025",
    ),
    "at NaN": (
        make("fmaxf(x, 0.0f)", lambda x: np.maximum(x, 0)),
        "is 0 by CUDA and nan by NumPy at x = nan, and differs at 1 of",
    ),
    "another function": (make("x / (1.0f + fabsf(x))", np.tanh), "by CUDA and"),
    "only when large": (
        make("sqrtf(x * x)", np.abs),
        r"is inf by CUDA and 1.8\d+e\+19 by NumPy at x = 1.8\d+e\+19",
    ),
    "by half a percent": (make("1.005f * x", lambda x: x), "by CUDA"),
    "in the derivative's halves": (
        make("x * x", np.square, derivative=make("2.0f * x + 1.0f", lambda x: 2 * x)),
        r"ScoreFunction\('mine'\) is 1 by CUDA and 0 by NumPy at x = 0",
    ),
    "a wrong derivative": (
        make("x * x", np.square, derivative=ScoreFunction("slope", cuda="3.0f * x", numpy=lambda x: 3 * x)),
        r"ScoreFunction\('slope'\) is -60 at x = -20, where ScoreFunction\('mine'\) has the slope -40, and differs at",
    ),
}


@pytest.mark.needs_kernels
@pytest.mark.parametrize("name", DIFFER)
def test_halves_that_differ(backend: Backend, name: str) -> None:
    score, message = DIFFER[name]
    with pytest.raises(ValueError, match=message):
        compare_score(score)


@pytest.mark.needs_kernels
def test_the_tolerance_is_chosen(backend: Backend) -> None:
    near = make("1.005f * x", lambda x: x)
    assert 4e-3 < compare_score(near, tolerance=1e-2).max_error < 6e-3


def test_without_a_gpu_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(compiler.BACKENDS, "cpu", raising=False)
    monkeypatch.setattr(compiler, "why_no_cuda", lambda: "no CUDA device is visible: check nvidia-smi.")
    with pytest.raises(
        RuntimeError, match=r"^compare_score: ScoreFunction\('mine'\) is compared on a GPU, and no CUDA de"
    ):
        compare_score(make("x"))


def test_what_is_no_score_is_refused() -> None:
    with pytest.raises(TypeError, match="compare_score: score must be a ScoreFunction, got str"):
        compare_score("sigmoid")  # type: ignore[arg-type]
