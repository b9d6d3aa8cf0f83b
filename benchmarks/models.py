# SPDX-License-Identifier: Apache-2.0
"""Mixture-of-experts models of transformers with the widths of known ones, few layers and random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers

from cupy_router.torch import replace_routers

VOCAB_SIZE = 4096  # a head of the real size would be too large a part of a few layers
PROMPT = 128  # cached positions before the first step of a decode
POSITIONS = 384  # of a static cache
# Name -> class of configuration, number of layers, and what differs from its defaults.
WIDTHS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "qwen3": ("Qwen3MoeConfig", 8, {  # Qwen3-30B-A3B
        "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
    }),
    "deepseek": ("DeepseekV3Config", 6, {  # DeepSeek-V3, widths halved
        "hidden_size": 3584, "num_attention_heads": 64, "num_key_value_heads": 64, "q_lora_rank": 768,
        "kv_lora_rank": 256, "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 1024,
        "n_group": 8, "topk_group": 4, "first_k_dense_replace": 0,
    }),
    "gpt-oss": ("GptOssConfig", 4, {  # GPT-OSS-20B
        "hidden_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4, "intermediate_size": 2880,
    }),
    "mixtral": ("MixtralConfig", 4, {  # Mixtral-8x7B
        "hidden_size": 4096, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336,
    }),
    "glm": ("Glm4MoeConfig", 4, {  # GLM-4.5-Air
        "hidden_size": 4096, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
        "n_routed_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "first_k_dense_replace": 0,
    }),
}  # fmt: skip

Step = Callable[[], Any]


def build(name: str, layers: int | None = None) -> Any:
    """Return a model in bfloat16 on the GPU, with its experts by grouped_mm."""
    config_class, standard, widths = WIDTHS[name]
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    sizes = {"vocab_size": VOCAB_SIZE, "num_hidden_layers": layers or standard}
    config = getattr(transformers, config_class)(**widths, **sizes, **tokens)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.set_experts_implementation("grouped_mm")
    return model


def twin(model: Any, **options: Any) -> Any:
    """Return a copy of a model with the same parameters and buffers and swapped routers; options of replace_routers."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, shared)
    if not replace_routers(copied, **options):
        raise ValueError("no router was swapped")
    return copied


def tokens(batch: int, length: int) -> Any:
    return torch.randint(VOCAB_SIZE, (batch, length), device="cuda")


def decode(model: Any, batch: int) -> Step:
    """Return a step that decodes the first token after the prompt of each sequence.

    The cache grows by it, and loses it before the next step: PyTorch plans attention anew for each number of positions,
    at the cost of the variant that comes first.
    """
    cache = transformers.DynamicCache(config=model.config)
    step = _decode(model, model, batch, cache)
    layers = [(layer, dict(vars(layer))) for layer in cache.layers]

    def first_token() -> Any:
        for layer, after_prompt in layers:
            vars(layer).update(after_prompt)
        return step()

    return first_token


def compiled(model: Any, batch: int) -> Step:
    """Return a step that decodes the next token with a static cache, compiled with CUDA graphs as by `generate`."""
    cache = transformers.StaticCache(model.config, max_cache_len=POSITIONS)
    forward = torch.compile(model, mode="reduce-overhead", fullgraph=True, dynamic=False)
    return _decode(model, forward, batch, cache)


@contextmanager
def _read_by_grouped_mm(model: Any) -> Iterator[None]:
    """Read a prompt as `generate` does: batched_mm would copy the weights of an expert for each of its tokens."""
    chosen = model.config._experts_implementation
    if chosen != "batched_mm":
        yield
        return
    model.set_experts_implementation("grouped_mm")
    yield
    model.set_experts_implementation(chosen)


def _decode(model: Any, forward: Any, batch: int, cache: Any) -> Step:
    model.eval()
    prompt, token = tokens(batch, PROMPT), tokens(batch, 1)
    with torch.no_grad(), _read_by_grouped_mm(model):
        model(prompt, past_key_values=cache, logits_to_keep=1)

    @torch.no_grad()
    def step() -> Any:
        return forward(token, past_key_values=cache, logits_to_keep=1).logits

    return step


def prefill(model: Any, length: int) -> Step:
    """Return a step that reads a prompt into a new cache."""
    model.eval()
    prompt = tokens(1, length)

    @torch.no_grad()
    def step() -> Any:
        return model(prompt, logits_to_keep=1).logits

    return step


def train(model: Any, length: int) -> Step:
    """Return a step with the gradients of all parameters."""
    model.train()
    prompt = tokens(1, length)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(prompt, labels=prompt, use_cache=False).loss.backward()

    return step
