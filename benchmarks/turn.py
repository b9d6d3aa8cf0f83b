# SPDX-License-Identifier: Apache-2.0
"""One turn of compare_trees.py: time the checkout in whose folder this script is run, whichever it is.

So it imports nothing of its own checkout but timing.py, by its path, and uses public API alone.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

PRESETS = {"deepseek-v4-flash": 4096, "deepseek-v4-pro": 7168}  # and their hidden sizes
VOCAB_SIZE = 129_280
COLD_FROM = 65536  # rows that do not fit into L2
ROUNDS, REPLAYS = 2, 8  # of a row on the GPU in a turn

# The sizes of each part, then those of --quick.
ACTIVATION_TOPK = (1, 16, 64, 1024, 8192, 65536), (64, 8192)
NARROW = ((64, 256, 8), (8192, 256, 8), (65536, 256, 8), (64, 384, 6), (8192, 384, 6))
LONG = ((1, 32_768, 512), (64, 32_768, 512), (256, 32_768, 2048), (1, 131_072, 2048), (64, 262_144, 1024))
TOPK_SELECT = (*NARROW, *LONG), (*NARROW[:2], LONG[1])
HASH_ROUTER = (1, 64, 1024, 8192), (64,)
DENSE_ROUTER = (("decode", 1), ("decode", 4), ("decode", 16), ("decode", 64), ("prefill", 8192)), (("decode", 16),)
BACKWARD = (64, 8192), (64,)

Cell = dict[str, Any]


class Case(NamedTuple):
    """A row on the GPU: the call with the i-th of `rotation` inputs, captured by PyTorch or by CuPy."""

    cell: Cell
    call: Callable[[int], Any]
    rotation: int = 1
    torch: bool = False


def normal(*shape: int, dtype: str = "float32", scale: float = 1.0) -> Any:
    import cupy

    return (cupy.random.standard_normal(shape, dtype=cupy.float32) * scale).astype(dtype)


# -- On the GPU --------------------------------------------------------------------------------------------------------


def gpu_parts(timing: Any, quick: bool) -> list[Callable[[], Iterator[Case]]]:
    """Functions whose cases are made one by one, so that the inputs of one are gone when the next is made."""
    parts = (activation_topk, topk_select, hash_router, dense_router, backward)
    return [partial(part, timing, int(quick)) for part in parts]


def activation_topk(timing: Any, quick: int) -> Iterator[Case]:
    import cupy_router

    for preset in PRESETS:
        method = cupy_router.presets()[preset]
        experts = method.num_experts
        bias = normal(experts)
        for n in ACTIVATION_TOPK[quick]:
            make = partial(normal, n, experts)
            logits = timing.cold_inputs(make, 4 * n * experts) if n >= COLD_FROM else [make()]
            out = cupy_router.activation_topk(logits[0], method, bias=bias)
            cell = {"op": "activation_topk", "E": experts, "k": method.top_k, "n": n}

            def call(i: int, logits: Any = logits, method: Any = method, bias: Any = bias, out: Any = out) -> None:
                cupy_router.activation_topk(logits[i % len(logits)], method, bias=bias, out=out)

            yield Case(cell | {"cache": "cold" if len(logits) > 1 else "warm"}, call, len(logits))


def topk_select(timing: Any, quick: int) -> Iterator[Case]:
    import cupy_router

    for n, columns, k in TOPK_SELECT[quick]:
        scores = timing.cold_inputs(partial(normal, n, columns), 4 * n * columns)
        out = cupy_router.topk_select(scores[0], k)

        def call(i: int, scores: Any = scores, k: int = k, out: Any = out) -> None:
            cupy_router.topk_select(scores[i % len(scores)], k, out=out)

        yield Case({"op": "topk_select", "E": columns, "k": k, "n": n, "cache": "cold"}, call, len(scores))


def hash_router(timing: Any, quick: int) -> Iterator[Case]:
    import cupy_router

    for preset in PRESETS:
        method = cupy_router.presets()[preset]
        for n in HASH_ROUTER[quick]:
            token_ids, table = token_ids_and_table(n, method)
            logits = normal(n, method.num_experts)
            out = cupy_router.hash_router(token_ids, table, method, logits=logits)
            cell = {"op": "hash_router", "E": method.num_experts, "k": method.top_k, "n": n}
            route = partial(cupy_router.hash_router, token_ids, table, method, logits=logits, out=out)
            yield Case(cell, ignoring_number(route))


def dense_router(timing: Any, quick: int) -> Iterator[Case]:
    import cupy_router

    for preset, hidden in PRESETS.items():
        method = cupy_router.presets()[preset]
        experts = method.num_experts
        weight, bias = normal(experts, hidden, dtype="bfloat16", scale=hidden**-0.5), normal(experts)
        for path, n in DENSE_ROUTER[quick]:
            x = normal(n, hidden, dtype="bfloat16")
            out = cupy_router.dense_router(x, weight, method, bias=bias, path=path)
            route = partial(cupy_router.dense_router, x, weight, method, bias=bias, path=path, out=out)
            yield Case({"op": "dense_router", "path": path, "E": experts, "H": hidden, "n": n}, ignoring_number(route))


def backward(timing: Any, quick: int) -> Iterator[Case]:
    """From the gradient of the weights to that of the logits, by PyTorch's autograd."""
    import torch

    import cupy_router

    for preset in PRESETS:
        method = cupy_router.presets()[preset]
        for n in BACKWARD[quick]:
            logits = torch.randn(n, method.num_experts, device="cuda", requires_grad=True)
            upstream = torch.randn(n, method.top_k, device="cuda")
            weights: dict[Any, Any] = {}  # autograd goes back on the stream of the way forward, that of the capture

            def call(
                i: int, method: Any = method, logits: Any = logits, upstream: Any = upstream, weights: Any = weights
            ) -> None:
                stream = torch.cuda.current_stream()
                if stream not in weights:
                    weights[stream] = cupy_router.activation_topk(logits, method).weights
                torch.autograd.grad(weights[stream], logits, upstream, retain_graph=True)

            cell = {"op": "activation_topk_backward", "E": method.num_experts, "k": method.top_k, "n": n}
            yield Case(cell, call, torch=True)


def token_ids_and_table(n: int, method: Any) -> tuple[Any, Any]:
    import cupy

    table = cupy.random.randint(0, method.num_experts, (VOCAB_SIZE, method.top_k)).astype(cupy.int32)
    return cupy.random.randint(0, VOCAB_SIZE, n).astype(cupy.int32), table


def ignoring_number(function: Callable[[], Any]) -> Callable[[int], Any]:
    return lambda i: function()


# -- On the host -------------------------------------------------------------------------------------------------------


def host_calls(convert: Callable[[Any], Any]) -> dict[str, Callable[..., Any]]:
    """A call of every op, which takes `out`; `convert` makes a framework's array of one of CuPy."""
    import cupy_router

    method = cupy_router.presets()["deepseek-v4-flash"]
    experts, hidden = method.num_experts, 4096
    token_ids, table = map(convert, token_ids_and_table(64, method))
    logits, bias, x = convert(normal(64, experts)), convert(normal(experts)), convert(normal(16, hidden))
    weight = convert(normal(experts, hidden))
    return {
        "activation_topk": partial(cupy_router.activation_topk, logits, method, bias=bias),
        "topk_select": partial(cupy_router.topk_select, logits, 8),
        "hash_router": partial(cupy_router.hash_router, token_ids, table, method, logits=logits),
        "dense_router": partial(cupy_router.dense_router, x, weight, method, bias=bias, path="decode"),
    }


def tensor(array: Any) -> Any:
    """A tensor on the same memory."""
    import torch

    return torch.from_dlpack(array)


CONVERTERS: dict[str, Callable[[Any], Any]] = {"torch": tensor, "cupy": lambda array: array}


def host_actions(framework: str) -> dict[tuple[str, str], Callable[[], Any]]:
    """Each op of a framework's arrays, with and without `out`."""
    actions: dict[tuple[str, str], Callable[[], Any]] = {}
    for op, call in host_calls(CONVERTERS[framework]).items():
        actions[op, framework] = call
        actions[op, f"{framework}, out="] = partial(call, out=call())
    return actions


# -- The turn ----------------------------------------------------------------------------------------------------------


def host_rows(timing: Any, left_out: list[str]) -> list[dict[str, Any]]:
    actions: dict[tuple[str, str], Callable[[], Any]] = {}
    for framework in CONVERTERS:
        try:
            actions |= host_actions(framework)
        except Exception as error:
            left_out.append(f"host, {framework}: {reason(error)}")
    gc.collect()
    gc.freeze()  # or each count of garbage would look through all of PyTorch
    return [
        {
            "cell": {"what": "host", "op": op, "call": call},
            "samples": [time for times in rounds for time in times],
            "garbage": timing.garbage(actions[op, call]),
        }
        for (op, call), rounds in timing.host_rounds(actions).items()
    ]


def gpu_rows(timing: Any, quick: bool, left_out: list[str]) -> list[dict[str, Any]]:
    rows = []
    for part in gpu_parts(timing, quick):
        try:
            for case in part():
                rounds = timing.graph_rounds(case.call, case.rotation, torch=case.torch, rounds=ROUNDS, replays=REPLAYS)
                samples = [time for times in rounds for time in times]
                rows.append({"cell": {"what": "gpu"} | case.cell, "samples": samples})
        except Exception as error:
            left_out.append(f"gpu, {part.func.__name__}: {reason(error)}")  # type: ignore[attr-defined]
    return rows


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def stop_watching() -> bool:
    """Do as an installed wheel does, which does not ask before each call whether a kernel file has changed."""
    from cupy_router import compiler

    known = hasattr(compiler, "WATCHING")  # no public name: compare_trees tells if only one tree has it
    compiler.WATCHING = False
    return known


def clockwork() -> Any:
    """timing.py beside this file, not that of the checkout that is timed."""
    spec = importlib.util.spec_from_file_location("timing", Path(__file__).with_name("timing.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("host", "gpu"))
    parser.add_argument("result", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    sys.path[0] = os.getcwd()  # in place of this file's folder
    import cupy_router

    if Path(cupy_router.__file__).resolve().parent != Path.cwd().resolve() / "cupy_router":
        raise SystemExit(f"{Path.cwd()} was to be timed, but {cupy_router.__file__} was imported")
    timing, left_out = clockwork(), list[str]()
    off = stop_watching()
    timing.warm_up()
    rows = host_rows(timing, left_out) if options.kind == "host" else gpu_rows(timing, options.quick, left_out)
    options.result.write_text(json.dumps({"not_watching": off, "rows": rows, "left_out": left_out}))


if __name__ == "__main__":
    main()
