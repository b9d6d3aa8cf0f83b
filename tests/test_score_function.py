# SPDX-License-Identifier: Apache-2.0
"""ScoreFunction: what its CUDA text may be, when that is found out, and whether its two halves agree."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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
    ("x\n/* and so on", 2, "/* is not closed"),
    ("x // )\n)", 2, '")" closes nothing'),
    ("x + ')' )", 1, '")" closes nothing'),
    ("x + '\n", 1, "' is not closed"),
    ('x + "\n)', 1, '" is not closed'),
    ("auto c = u8'{';\nreturn x; } evil { '", 2, '"}" closes nothing'),
    ("x /\\\n/ {\n}", 3, '"}" closes nothing'),
    ("x /\\\r\n* { *\\\r\n/ }", 3, '"}" closes nothing'),
    ("// \\\\\n\n}", 3, '"}" closes nothing'),
    ('f(R"(")", x)', 1, "a raw string is not allowed: write an ordinary one"),
    ('x;\nu8R"(")"', 2, "a raw string is not allowed: write an ordinary one"),
    ('x; R\\\n"(")"', 1, "a raw string is not allowed: write an ordinary one"),
]
DIRECTIVES = [
    ("#define float double\nx", 1),
    ("x\n  # include <cmath>\n", 2),
    ("/* my score */ #define __fadd_rn(a, b) 0.25f\nreturn x;", 1),
    ("#/**/define __fadd_rn(a, b) 0.25f\nreturn x;", 1),
    ("#\\\ndefine __fadd_rn(a, b) 0.25f\nreturn x;", 1),
    ("/**/#undef SPECIALISED\nreturn x;", 1),
    ("x;\v\f#define A", 1),
    ("\n%:define __fadd_rn(a, b) 0.25f\nreturn x;", 2),
    ("%\\\n:define __fadd_rn(a, b) 0.25f\nreturn x;", 1),
    ("#if 0\n{\n#endif\nreturn x; }\n__device__ float other(float y) { return y;\n#if 0\n}\n#endif", 1),
    ("#if __CUDA_ARCH__ >= 900\nreturn x;\n#else\nreturn 2 * x;\n#endif", 1),
    ("#pragma unroll\nfor (int i = 0; i < 2; ++i) x *= x;\nreturn x;", 1),
]


@pytest.mark.usefixtures("no_nvrtc")
@pytest.mark.parametrize(("cuda", "line"), DIRECTIVES)
def test_directives_are_refused(cuda: str, line: int) -> None:
    message = " begins a preprocessor directive, which would change the kernel around the score"
    with pytest.raises(CompileError) as caught:
        make(cuda)
    assert str(caught.value).replace("%:", "#") == f'ScoreFunction mine({line}): error: "#"{message}'


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
    "if (__CUDA_ARCH__ >= 900) return x;\nreturn 2 * x;",
    '_Pragma("unroll") for (int i = 0; i < 2; ++i) x *= x;\nreturn x;',
    'x + sizeof("# } %: R")',
    "x + u8'{' + 0x1p-3f + 1e+2f + .5f  // #define",
    'const char* s = "return";\nreturn x;',
    'x + sizeof("return")',
    "x // \\\n return\n",
    "/\\\n* } return *\\\n/ x",
    "float y = x;\r\nreturn y; /\\\r\n/ }\r\n",
    "static_cast<float>(__reduce_add_sync(0xffffffffu, static_cast<int>(x)))",
    "x < ::fabsf(x) ? x : 0",
    "float y;\nfor (int i = 0; i < 3; ++i) {\n    if (i == 0) y = x; else y *= x;\n}\nreturn y;",
    'float y;\nasm("mov.f32 %0, %1;" : "=f"(y) : "f"(x));\nreturn y;',
]


@pytest.mark.parametrize("cuda", GOOD)
def test_texts_that_are_fine(cuda: str) -> None:
    make(cuda)


@pytest.fixture
def needs_nvrtc() -> None:
    if nvrtc._library() is None:
        pytest.skip("there is no NVRTC that CuPy would use")


def nvrtc_version() -> tuple[int, int]:
    library = nvrtc._library()
    assert library is not None
    major, minor, _ = map(int, library.version.split("."))
    return major, minor


@pytest.mark.usefixtures("needs_nvrtc")
@pytest.mark.parametrize(
    ("cuda", "line", "word"),
    [
        ("totally not CUDA", 1, '"totally" is undefined'),
        ("x *\n\nnonsense(x)", 3, '"nonsense" is undefined'),
        ("float y = 1.0f;\nreturn y + z;", 2, '"z" is undefined'),
        ("if (x > 0)\n    return x;", 3, "missing return statement"),
        ("if (x > 0) return;\nreturn x;", 1, "should return a value"),
        ("float y = x;\nreturn;", 2, "should return a value"),
        ("float y;\nreturn y * x;", 2, "used before its value is set"),
        ('"abc"', 1, "return value type does not match"),
        ("&x", 1, "return value type does not match"),
        ("x; x", 1, "expected"),
        ("x; return x", 2, "expected"),
    ],
)
def test_nvrtc_finds_what_is_wrong_at_once(cuda: str, line: int, word: str) -> None:
    if word in ("missing return statement", "should return a value") and nvrtc_version() < (12, 4):
        pytest.skip("this NVRTC lets a missing return pass")
    with pytest.raises(CompileError) as caught:
        make(cuda)
    assert str(caught.value).startswith(f"ScoreFunction mine({line}): error: ")
    assert word in str(caught.value)
    assert ".cu" not in str(caught.value)


@pytest.mark.usefixtures("no_nvrtc")
def test_without_nvrtc_only_brackets_are_checked() -> None:
    make("totally not CUDA")


def test_an_nvrtc_that_fails_otherwise_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __getattr__(self, name: str) -> Callable[..., object]:
            return lambda *args: b"an internal error" if name == "nvrtcGetErrorString" else 7

    library = object.__new__(nvrtc.Nvrtc)
    library.path, library._library = Path("libnvrtc.so"), Failing()
    monkeypatch.setattr(nvrtc, "_library", lambda: library)
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


@pytest.mark.parametrize("separator", "\r\v\f\x1c\x85\u2028")
def test_the_kernel_has_the_lines_that_were_checked(separator: str) -> None:
    """Python's ends of lines are more than the compiler's: what is a comment to the one has to be one to the other."""
    expanded = compiler.expand(
        "activation_topk", headers=(("routing/score_function.cuh", make(f"x // {separator} + 1").header),)
    )
    assert f"\nx // {separator} + 1\n" in expanded


def test_a_text_includes_nothing() -> None:
    score = make('x /*\n#include "nothing.cuh"\n#include "device/warp.cuh"\n*/')
    assert score.cuda in compiler.expand("activation_topk", headers=(("routing/score_function.cuh", score.header),))


@pytest.mark.slow("process")
@pytest.mark.usefixtures("needs_nvrtc")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_leaves_nvrtc_alone() -> None:
    """Another thread of the parent may have been inside NVRTC, whose locks nobody frees in the child."""
    code = (
        "import os\n"
        "from cupy_router import ScoreFunction, nvrtc\n"
        "def refused(cuda):\n"
        "    try:\n"
        "        ScoreFunction('f', cuda=cuda, numpy=abs)\n"
        "    except Exception as error:\n"
        "        return type(error).__name__\n"
        "def in_child():\n"
        "    child = os.fork()\n"
        "    if child:\n"
        "        os.waitpid(child, 0)\n"
        "        return False\n"
        "    return True\n"
        "if in_child():\n"
        "    print(refused('nonsense(x)'), flush=True)\n"
        "    os._exit(0)\n"
        "print(refused('nonsense(x)'), flush=True)\n"
        "if in_child():\n"
        "    nvrtc._library = None\n"
        "    print(refused('nonsense(x) + 1'), refused('x)'), flush=True)\n"
        "    if in_child():\n"
        "        print(refused('nonsense(x) + 2'), flush=True)\n"
        "    os._exit(0)\n"
        "print(refused('nonsense(x) + 1'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    expected = ["CompileError", "CompileError", "None CompileError", "None", "CompileError"]
    assert (done.returncode, done.stdout.splitlines()) == (0, expected), done.stderr


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
    "sqrtsoftplus": make(  # the exponential underflows long before the root does
        "sqrtf(fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))))", lambda x: np.sqrt(np.logaddexp(0, x))
    ),
    "sigmoid": make("1.0f / (1.0f + expf(-x))", lambda x: 1 / (1 + np.exp(-x))),
    "tanh": make("tanhf(x)", np.tanh, derivative=make("1.0f / (coshf(x) * coshf(x))", lambda x: np.cosh(x) ** -2.0)),
    "crosses 0": make("1.0f / (1.0f + expf(-x)) - 0.5f", lambda x: 1 / (1 + np.exp(-x)) - 0.5),  # digits cancel
    "crosses 0 twice": make("x * x - 1.0f", lambda x: x * x - 1, derivative=make("2.0f * x", lambda x: 2 * x)),
    "small": make("1e-12f * tanhf(x)", lambda x: 1e-12 * np.tanh(x)),
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
    "a small score with the other sign": (
        make("-1e-7f * x / (1.0f + fabsf(x))", lambda x: 1e-7 * x / (1 + abs(x))),
        r"is 2\.439\d+e-09 by CUDA and -2\.439\d+e-09 by NumPy at x = -0\.025",
    ),
    "twice a small score": (
        make("2.0f * expf(-x * x - 14.0f)", lambda x: np.exp(-x * x - 14)),
        r"is 1\.66\d+e-06 by CUDA and 8\.31\d+e-07 by NumPy at x = 0, and differs at 10\d\d of",
    ),
    "where it is small": (make("logf(1.0f + expf(x))", lambda x: np.logaddexp(0, x)), r"by NumPy at x = -\d"),
    "near a pole": (make("x > 0.1f ? 1.0f / x : 2.0f / x", lambda x: 1 / x), "by CUDA and inf|by CUDA and -40"),
    "a small derivative with the other sign": (
        make(
            "1e-7f * tanhf(x)",
            lambda x: 1e-7 * np.tanh(x),
            derivative=ScoreFunction(
                "slope", cuda="-1e-7f / (coshf(x) * coshf(x))", numpy=lambda x: -1e-7 / np.cosh(x) ** 2
            ),
        ),
        r"ScoreFunction\('slope'\) is -",
    ),
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


@pytest.mark.parametrize(
    ("tolerance", "error", "message"),
    [
        ("a", TypeError, "tolerance is 'a', but must be a number"),
        (True, TypeError, "tolerance is True, but must be a number"),
        (float("nan"), ValueError, "tolerance is nan, but must be finite and not negative"),
        (float("inf"), ValueError, "tolerance is inf, but"),
        (-1.0, ValueError, r"tolerance is -1\.0, but"),
    ],
)
def test_a_bad_tolerance(tolerance: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^compare_score: {message}"):
        compare_score(make("x"), tolerance=tolerance)


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
