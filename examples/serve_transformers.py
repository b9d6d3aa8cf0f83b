# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of a mixture-of-experts model of transformers, before and after `replace_routers`.

    python -m examples.serve_transformers FOLDER    # a model as `save_pretrained` writes it
    python -m examples.serve_transformers qwen3_moe num_hidden_layers=8 head_dim=128    # one with random weights

Prints where the time of a decoded token goes, too: on the host, and on the GPU if there is one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers

from cupy_router.torch import replace_routers, restore_routers
from examples.time_by_kind import comparison, profile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OWN, OURS = "own code", "cupy_router"


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


def at_least(lowest: int) -> Callable[[str], int]:
    """Return a function that reads a number from an argument."""

    def number(text: str) -> int:
        if int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be at least {lowest}, got {text}")
        return int(text)

    return number


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


# -- Tokens per second -------------------------------------------------------------------------------------------------


class FirstToken:
    """A criterion that never stops a text, but notes when its first token was there."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self, tokens: Any, scores: Any, **options: Any) -> Any:
        if not self.time:
            synchronize()
            self.time = time.perf_counter()
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


def generate(model: Any, prompt: Any, number: int) -> tuple[Any, float, float]:
    """Return the most likely tokens after a prompt, and how many are read and generated per second."""
    first = FirstToken()
    options = {"do_sample": False, "min_new_tokens": number, "max_new_tokens": number, "stopping_criteria": [first]}
    synchronize()
    begin = time.perf_counter()
    tokens = model.generate(prompt, **options)[:, prompt.shape[1] :]
    synchronize()
    end = time.perf_counter()
    return tokens, prompt.numel() / (first.time - begin), (tokens.numel() - len(tokens)) / (end - first.time)


# -- The command -------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder, or a model type of transformers")
    parser.add_argument("settings", nargs="*", help="of the configuration of a type, such as num_hidden_layers=4")
    parser.add_argument("--batch", type=at_least(1), default=1, help="number of prompts")
    parser.add_argument("--prompt", type=at_least(1), default=512, help="length of a prompt")
    parser.add_argument("--tokens", type=at_least(2), default=64, help="number of tokens to generate for each prompt")
    parser.add_argument("--turns", type=at_least(1), default=5, help="measurements, whose medians are printed")
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
            tokens[name], *speed = generate(model, prompt, options.tokens)
            if turn:
                read[name].append(speed[0])
                written[name].append(speed[1])
            else:
                with as_in_generate(model):
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


def as_in_generate(model: Any) -> AbstractContextManager[Any]:
    """Run experts as `generate` does after the prompt: by batched_mm in place of grouped_mm."""
    found: AbstractContextManager[Any] = getattr(model, "_optimize_model_for_decode", nullcontext)()
    return found


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
