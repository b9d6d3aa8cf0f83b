# SPDX-License-Identifier: Apache-2.0
"""Where the time of a model of transformers goes: routers, GEMMs of experts, the rest of them, attention, all else."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

ROUTER, GEMMS, EXPERTS, ATTENTION, REST = "router", "experts: GEMMs", "experts: the rest", "attention", "the rest"
GEMM_OPS = {"aten::_grouped_mm", "aten::bmm", "aten::linear", "transformers::grouped_mm_fallback"}

Times = dict[str, tuple[float, float]]  # kind of work -> milliseconds on the host and on the GPU


def kind_of(path: str, module: Any) -> str | None:
    """Return the kind of work of a module, by its name or class."""
    kinds = {"gate": ROUTER, "router": ROUTER, "experts": EXPERTS}
    attends = type(module).__name__.endswith(("Attention", "DeltaNet"))
    return kinds.get(path.rpartition(".")[2], ATTENTION if attends else None)


@contextmanager
def marked(model: Any) -> Iterator[None]:
    """Mark the work of each module that has a kind in profiles."""
    handles, ranges = [], []

    def enter(kind: str) -> None:
        ranges.append(torch.profiler.record_function(kind))
        ranges[-1].__enter__()

    for path, module in model.named_modules():
        if kind := kind_of(path, module):
            handles.append(module.register_forward_pre_hook(lambda *_, kind=kind: enter(kind)))
            handles.append(module.register_forward_hook(lambda *_: ranges.pop().__exit__(None, None, None)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def profile(model: Any, step: Callable[[], Any], steps: int = 3) -> Times:
    """Return the time of a step by kind of work. The profiler makes the host slower."""
    step()
    with marked(model), torch.profiler.profile(acc_events=True) as profiler:
        for _ in range(steps):
            with torch.profiler.record_function(REST):
                step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return {kind: (host / steps, gpu / steps) for kind, (host, gpu) in by_kind(profiler.events()).items()}


def by_kind(events: Sequence[Any]) -> Times:
    """Sum the events of a profile: those on the GPU belong to the innermost kind in which they were launched."""
    cpu = torch.autograd.DeviceType.CPU
    on_host = [event for event in events if event.device_type == cpu]
    on_gpu = [event for event in events if event.device_type != cpu and not event.is_user_annotation]
    host, gpu = (dict.fromkeys((ROUTER, GEMMS, EXPERTS, ATTENTION, REST), 0.0) for _ in range(2))
    spans: list[tuple[float, float, str, int]] = []  # begin, end, kind, number of the span around it or -1

    def innermost(moment: float) -> int:
        number = bisect.bisect_right(spans, moment, key=lambda span: span[0]) - 1
        while number >= 0 and spans[number][1] < moment:
            number = spans[number][3]
        return number

    for event in sorted(on_host, key=lambda event: (event.time_range.start, -event.time_range.end)):
        begin, end, outer = event.time_range.start, event.time_range.end, innermost(event.time_range.start)
        is_gemm = event.name in GEMM_OPS and outer >= 0 and spans[outer][2] == EXPERTS
        kind = GEMMS if is_gemm else event.name
        if kind in host:
            host[kind] += (end - begin) / 1000
            if outer >= 0:
                host[spans[outer][2]] -= (end - begin) / 1000
            spans.append((begin, end, kind, outer))
    launches = {event.id: event.time_range.start for event in on_host if event.name.startswith("cu")}
    for event in on_gpu:
        number = innermost(launches[event.id]) if event.id in launches else -1
        if number >= 0:
            gpu[spans[number][2]] += event.time_range.elapsed_us() / 1000
    return {kind: (host[kind], gpu[kind]) for kind in host}


def comparison(found: dict[str, Times]) -> str:
    """Return times of several variants as a table, with a line for each kind of work."""
    lines = [["milliseconds on host / GPU", *found]]
    for kind in (ROUTER, GEMMS, EXPERTS, ATTENTION, REST):
        lines.append([kind, *("{:.3f} / {:.3f}".format(*times[kind]) for times in found.values())])
    totals = [[sum(each) for each in zip(*times.values(), strict=True)] for times in found.values()]
    lines.append(["together", *("{:.3f} / {:.3f}".format(*total) for total in totals)])
    return "\n".join(f"{line[0]:28}" + "".join(f"{text:>22}" for text in line[1:]) for line in lines)
