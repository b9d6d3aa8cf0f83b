# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of a mixture-of-experts model of transformers, before and after `replace_routers`.

    python -m examples.serve_transformers FOLDER    # a model as `save_pretrained` writes it
    python -m examples.serve_transformers qwen3_moe num_hidden_layers=8 head_dim=128    # one with random weights

Prints where the time of a decoded token goes, too: on the host, and on the GPU if there is one.
"""

from __future__ import annotations

import argparse
import bisect
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from cupy_router.torch import replace_routers, restore_routers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OWN, OURS = "own code", "cupy_router"
ROUTER, GEMMS, EXPERTS, ATTENTION, REST = "router", "experts: GEMMs", "experts: the rest", "attention", "the rest"
GEMM_OPS = {"aten::_grouped_mm", "aten::bmm", "aten::linear", "transformers::grouped_mm_fallback"}

Times = dict[str, tuple[float, float]]  # kind of work -> milliseconds on the host and on the GPU


def load(model: str, settings: Sequence[str]) -> Any:
    """Return the model of a folder, or one of a type with random weights; settings: name=value of its configuration.

    Raises:
        ValueError: There is no such folder or type, or a setting has another form.
    """
    if Path(model).is_dir():
        if settings:
            raise ValueError(f"{settings[0]} is for a model with random weights, and {model} is a folder")
        return transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto").to(DEVICE).eval()
    if model not in transformers.CONFIG_MAPPING:
        raise ValueError(f"{model} is neither a folder nor a model type of transformers")
    values = dict(map(value_of, settings))
    config = transformers.AutoConfig.for_model(model, **values)
    with torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def value_of(setting: str) -> tuple[str, Any]:
    """Return name and value of a setting."""
    name, _, value = setting.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        raise ValueError(f"{setting} is not a name and a value as in JSON, such as num_hidden_layers=4") from None


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# -- Tokens per second -------------------------------------------------------------------------------------------------


def generate(model: Any, prompt: Any, number: int) -> tuple[Any, float]:
    """Return the most likely tokens after a prompt, and the seconds that they took."""
    synchronize()
    begin = time.perf_counter()
    tokens = model.generate(prompt, do_sample=False, min_new_tokens=number, max_new_tokens=number)
    synchronize()
    return tokens[:, prompt.shape[1] :], time.perf_counter() - begin


def speeds(model: Any, prompt: Any, number: int) -> tuple[Any, float, float]:
    """Return generated tokens, and how many per second are read and generated."""
    _, first = generate(model, prompt, 1)
    tokens, seconds = generate(model, prompt, number)
    return tokens, prompt.numel() / first, (tokens.numel() - len(prompt)) / (seconds - first)


# -- Where the time goes -----------------------------------------------------------------------------------------------


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
            synchronize()
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


# -- The command -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a model type of transformers")
    parser.add_argument("settings", nargs="*", help="of the configuration of a type, such as num_hidden_layers=4")
    parser.add_argument("--batch", type=int, default=1, help="number of prompts")
    parser.add_argument("--prompt", type=int, default=512, help="length of a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="number of tokens to generate for each prompt")
    parser.add_argument("--turns", type=int, default=5, help="number of measurements, of which medians are printed")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    try:
        model = load(options.model, options.settings)
    except ValueError as error:
        parser.error(str(error))
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    prompt = torch.randint(model.config.get_text_config().vocab_size, (options.batch, options.prompt), device=DEVICE)
    step = decode_step(model, prompt)
    tokens, read, written, times = {}, {OWN: [], OURS: []}, {OWN: [], OURS: []}, {}
    for turn in range(1 + options.turns):  # the first one warms up
        for name in (OWN, OURS):
            if name == OURS:
                swapped = replace_routers(model, experts=True)
            tokens[name], *speed = speeds(model, prompt, options.tokens)
            if turn:
                read[name].append(speed[0])
                written[name].append(speed[1])
            else:
                times[name] = profile(model, step)
        restore_routers(model)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "a CPU"
    print(
        f"{type(model).__name__}, {size:.3g} billion parameters in {model.dtype} on {where}: {swapped} routers swapped"
    )
    print(f"{'tokens per second':28}{OWN:>22}{OURS:>22}{'ratio':>8}")
    for what, found in ((f"prompts, {options.batch} x {options.prompt}", read), ("generated", written)):
        own, ours = (statistics.median(found[name]) for name in (OWN, OURS))
        print(f"{what:28}{own:22,.0f}{ours:22,.0f}{ours / own:8.2f}")
    same = (tokens[OWN] == tokens[OURS]).int().cumprod(dim=1).sum()
    print(f"the first {int(same)} of {tokens[OWN].numel()} tokens are the same\n\nwhere the time of a token goes")
    print(comparison(times))


def decode_step(model: Any, prompt: Any) -> Callable[[], Any]:
    """Return a step that decodes one token after each prompt."""
    cache = transformers.DynamicCache(config=model.config)

    @torch.no_grad()
    def step(tokens: Any = prompt[:, :1]) -> Any:
        return model(tokens, past_key_values=cache, logits_to_keep=1).logits

    step(prompt)
    return step


if __name__ == "__main__":
    main()
