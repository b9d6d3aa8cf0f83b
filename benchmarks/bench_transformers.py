# SPDX-License-Identifier: Apache-2.0
"""Steps of models of transformers by their own code and after replace_routers.

The variants of a model share its parameters and take turns in one process. A ratio compares neighbouring turns, because
the clock of a host wanders by more than the variants differ. Results are written after each model and mode.

    python -m benchmarks.bench_transformers --models qwen3 glm --modes decode prefill
    python -m benchmarks.bench_transformers --models qwen3 --modes decode --profile    # where the time goes
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch._inductor.async_compile import maybe_warm_pool

from benchmarks import models, steps, timing
from benchmarks import rows as results
from benchmarks.bars import MODEL_ROUTER, MODEL_ROUTER_HOST_RATIO
from benchmarks.harness import attempt, barred, environment, gpu_row, host_rows
from benchmarks.models import Step
from benchmarks.rows import OURS, Row
from benchmarks.steps import EXPERTS, OWN, ROUTERS
from cupy_router import compiler
from examples.time_by_kind import comparison, profile

LENGTH = 4096  # of a prefill and of a training step
TRAINED_LAYERS = 4
BATCHES = 1, 16
QUICK = 4, 2  # turns, and steps of each
SWAPS: dict[str, dict[str, Any]] = {ROUTERS: {}, EXPERTS: {"experts": True}}  # options of replace_routers


class Model:
    """The variants of one model. With `look`, profiles of its steps are printed and no rows measured."""

    def __init__(self, name: str, layers: int | None, quick: bool, look: bool) -> None:
        self.name, self.quick, self.look = name, quick, look
        self.variants = {OWN: models.build(name, layers)}
        for swapped, options in SWAPS.items():
            copied = attempt(f"{name}, {swapped}", partial(models.twin, self.variants[OWN], **options))
            self.variants |= {} if copied is None else {swapped: copied}

    def rows(
        self, mode: str, make: Callable[[Any], Step], n: int, swaps: tuple[str, ...] = (ROUTERS, EXPERTS)
    ) -> list[Row]:
        """Return the rows of a step, which `make` makes of a model; n: tokens of the step."""
        own = self.variants[OWN]
        cell = {"what": "step", "model": self.name, "layers": own.config.num_hidden_layers, "mode": mode, "n": n}
        cell |= {"experts": own.config._experts_implementation}
        made: dict[str, Step] = {}
        for name in (OWN, *swaps):
            if name in self.variants:
                step = attempt(f"{results.label(cell)} {name}", partial(_ready, make, self.variants[name]))
                made |= {} if step is None else {name: step}
        if self.look:
            found = {name: profile(self.variants[name], step) for name, step in made.items()}
            print(f"\n{results.label(cell)}\n{comparison(found)}", flush=True)
            return []
        return steps.rows_of(timing.step_turns(made, *(QUICK if self.quick else ())), cell)

    @contextmanager
    def experts_by(self, implementation: str) -> Iterator[None]:
        """Run experts by another implementation of transformers, except where they are ours."""
        chosen = [self.variants[name] for name in (OWN, ROUTERS)]
        for variant in chosen:
            variant.set_experts_implementation(implementation)
        yield
        for variant in chosen:
            variant.set_experts_implementation("grouped_mm")


def _ready(make: Callable[[Any], Step], model: Any) -> Step:
    """Return a step that is compiled and warm."""
    begin = time.perf_counter()
    step = make(model)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    print(f"warm after {time.perf_counter() - begin:.1f} s", flush=True)
    return step


# -- Modes -------------------------------------------------------------------------------------------------------------


def decode(model: Model) -> Iterator[Row]:
    for batch in BATCHES:
        yield from model.rows("decode", partial(models.decode, batch=batch), batch)


def batched(model: Model) -> Iterator[Row]:
    """Experts by batched_mm, which swapped routers have to leave as fast as they were."""
    with model.experts_by("batched_mm"):
        for batch in BATCHES:
            yield from model.rows("decode", partial(models.decode, batch=batch), batch, (ROUTERS,))


def compiled(model: Model) -> Iterator[Row]:
    """Compiling takes most of the time, so experts by batched_mm run with one batch alone."""
    for batch in BATCHES:
        yield from model.rows("compiled decode", partial(models.compiled, batch=batch), batch, (EXPERTS,))
    with model.experts_by("batched_mm"):
        yield from model.rows("compiled decode", partial(models.compiled, batch=batch), batch, (ROUTERS,))


def prefill(model: Model) -> Iterator[Row]:
    yield from model.rows("prefill", partial(models.prefill, length=LENGTH), LENGTH)


def train(model: Model) -> Iterator[Row]:
    yield from model.rows("training", partial(models.train, length=LENGTH), LENGTH)


def router(model: Model) -> Iterator[Row]:
    """Calls of one router, which returns its logits too."""
    modules = {
        by: model.variants[name].model.layers[0].mlp.gate for by, name in (("transformers", OWN), (OURS, ROUTERS))
    }
    for n, bar in MODEL_ROUTER.items():
        cell: Row = {"op": "router", "model": model.name, "n": n}
        x = torch.randn(n, modules[OURS].weight.shape[1], device="cuda", dtype=torch.bfloat16)
        calls = {by: torch.no_grad()(partial(module, x)) for by, module in modules.items()}
        for by, call in calls.items():
            row = gpu_row(lambda i, call=call: call(), cell, by, torch=True)
            yield barred(row, bar if by == OURS else None)
        if n == 1:
            own, ours = host_rows({(by, "a model"): call for by, call in calls.items()}, cell)
            ours["ratio"] = round(ours["us"] / own["us"], 2)
            yield from (own, barred(ours, round(MODEL_ROUTER_HOST_RATIO * own["us"], 3)))


MODES: dict[str, Callable[[Model], Iterator[Row]]] = {
    "router": router, "decode": decode, "prefill": prefill, "batched": batched, "train": train, "compiled": compiled,
}  # fmt: skip
OF_EVERY_MODEL = ("decode", "prefill")  # the others are for the widths of Qwen3
OF_FEW_LAYERS = ("train",)  # gradients take the memory of a smaller model


# -- The command -------------------------------------------------------------------------------------------------------


def sections(names: Sequence[str], modes: Sequence[str]) -> Iterator[tuple[str, int | None, list[str]]]:
    """Yield each model with a number of layers, None for the usual one, and its modes."""
    for layers in (None, TRAINED_LAYERS):
        for name in names:
            chosen = [mode for mode in MODES if mode in modes and (mode in OF_EVERY_MODEL or name == "qwen3")]
            if chosen := [mode for mode in chosen if (mode in OF_FEW_LAYERS) == (layers is not None)]:
                yield name, layers, chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=models.WIDTHS, default=list(models.WIDTHS))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--layers", type=int, help=f"of each model; default: {TRAINED_LAYERS} to 8")
    parser.add_argument("--output", type=Path, help="write the rows into this folder")
    parser.add_argument("--quick", action="store_true", help="few turns")
    parser.add_argument(
        "--profile", action="store_true", help="print where the time of each step goes; measure nothing"
    )
    options = parser.parse_args()
    compiler.WATCHING = False  # as in harness.main
    torch._dynamo.config.recompile_limit = 64  # variants and batches share their code
    timing.warm_up()
    facts, rows = environment(), list[Row]()
    begin = time.perf_counter()
    for name, layers, modes in sections(options.models, options.modes):
        if "compiled" in modes:
            maybe_warm_pool()  # of processes that compile; not earlier, since they would disturb the host
        model = Model(name, options.layers or layers, options.quick, options.profile)
        print(f"{name}: made after {time.perf_counter() - begin:.0f} s", flush=True)
        for mode in modes:
            measured = MODES[mode](model)
            while row := attempt(f"{name} {mode}", partial(next, measured, None)):
                rows.append(row)
                figures = (f"{figure}={row[figure]}" for figure in ("us", "spread_us", "ratio") if figure in row)
                print(results.label(row), *figures, flush=True)
                if options.output is not None:
                    results.save(options.output / "transformers.json", facts, rows)
            print(f"{name}: {mode} after {time.perf_counter() - begin:.0f} s", flush=True)
        del model
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print(f"\n{steps.table(rows)}\n\n{results.bars_table(rows)}")


if __name__ == "__main__":
    main()
