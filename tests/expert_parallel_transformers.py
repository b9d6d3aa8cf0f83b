# SPDX-License-Identifier: Apache-2.0
"""One rank of the test of transformers' expert parallelism: see tests/rank_processes.py.

Every rank has the whole model, too, and computes by itself what one process returns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DeepseekV3Config, GptOssConfig, MixtralConfig
from transformers.distributed import DistributedConfig

from cupy_router.torch import _experts, replace_routers, restore_routers
from tests import rank_processes

EXPERTS, EXACT = 8, 1e-5  # of the largest entry: sums in another order
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "vocab_size"), 32),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "n_group"), 2),
    **dict.fromkeys(("num_local_experts", "n_routed_experts"), EXPERTS),
    **dict.fromkeys(("topk_group", "first_k_dense_replace"), 1),
    "num_experts_per_tok": 3,
}
CONFIGS = {"mixtral": MixtralConfig, "gpt_oss, with biases": GptOssConfig, "deepseek_v3, with groups": DeepseekV3Config}
# Whether ranks have the same tokens, or shards of the batch and of all other parameters (FSDP).
PLANS = {
    "all_reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "all_to_all": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "all_to_all, fsdp": {"fsdp_size": 2, "ep_size": 2},
}

Values = dict[str, Any]


def model_of(name: str) -> Any:
    """Return a model with the same random weights on all ranks."""
    config = CONFIGS[name](**{key: size for key, size in _SIZES.items() if hasattr(CONFIGS[name], key)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=max(parameter.shape) ** -0.5)  # biases, too
    return model


def distributed(name: str, plan: str) -> Any:
    """Return the model with the experts of this rank, as `from_pretrained(distributed_config=...)` makes it."""
    model = model_of(name)
    config, _, mesh = model.prepare_distribute_model(DistributedConfig(**PLANS[plan]))
    return model.maybe_distribute_model(model, config, mesh)


def values(model: Any, parameters: dict[str, Any], batches: list[Any]) -> Values:
    """Return logits of inference, and those and the gradients of training, of the mean loss of all batches."""
    with torch.no_grad():
        found = {"inference": torch.cat([model(batch).logits for batch in batches])}
    for parameter in parameters.values():
        parameter.grad = None
    outputs = [model(batch, labels=batch) for batch in batches]
    torch.stack([output.loss for output in outputs]).mean().backward()
    found["training"] = torch.cat([output.logits.detach() for output in outputs])
    for path, parameter in parameters.items():
        if parameter.grad is not None:
            found[path] = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    return found


def compare(name: str, plan: str) -> None:
    """Compare a model on ranks with that of one process: as it is, with swapped routers, with the experts, restored."""
    rank, shares = dist.get_rank(), "fsdp" not in plan
    batches = torch.arange(28).mul(11).remainder(_SIZES["vocab_size"]).view(2, 2, 7).unbind()
    one, model = model_of(name), distributed(name, plan)
    want = values(one, dict(one.named_parameters()), [batches[0]] if shares else list(batches))
    if not shares:
        want |= {key: want[key][2 * rank : 2 * rank + 2] for key in ("inference", "training")}
    parameters = dict(model.named_parameters())  # before FSDP puts others there for a while

    def check(step: str) -> None:
        found = values(model, parameters, [batches[0 if shares else rank]])
        assert found.keys() == want.keys()
        for key, value in found.items():
            error = (value - want[key]).abs().max() / want[key].abs().max()
            assert error <= EXACT, f"{step}: {key} {error}"

    check("before")
    number = len([path for path in parameters if path.endswith("experts.down_proj")])
    assert swapped(model) == number
    check("routers")
    assert swapped(model, experts=True) == 0
    calls = recorded(partial(check, "experts"))
    assert len(calls) == 2 * number
    assert all(local == EXPERTS // 2 for local, _ in calls)
    elsewhere = any((ids == EXPERTS // 2).any() for _, ids in calls)
    assert elsewhere == (plan == "all_reduce"), "ids of other ranks' experts"
    assert restore_routers(model) == number
    check("restored")
    assert recorded(partial(check, "restored")) == []


def swapped(model: Any, **options: bool) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return replace_routers(model, **options)


def recorded(run: Callable[[], None]) -> list[tuple[int, Any]]:
    """Return the number of experts and the ids of each call of our experts."""
    calls: list[tuple[int, Any]] = []
    kept = _experts.expert_layout, _experts.layout_and_rows

    def noting(ids: Any, num_experts: int, **options: Any) -> Any:
        calls.append((num_experts, ids))
        return kept[0](ids, num_experts, **options)

    _experts.expert_layout, _experts.layout_and_rows = noting, lambda *call: None
    try:
        run()
    finally:
        _experts.expert_layout, _experts.layout_and_rows = kept
    return calls


def compiled() -> None:
    """torch.compile(fullgraph=True) finds the nodes that were prepared for the experts of a rank."""
    model, ids = distributed("mixtral", "all_reduce"), torch.arange(14).view(2, 7)
    replace_routers(model, experts=True)
    assert {number for number, _ in _experts._nodes} == {EXPERTS // 2}
    with torch.no_grad():
        want = model_of("mixtral")(ids).logits
        got = torch.compile(model, backend="eager", fullgraph=True)(ids).logits
    torch.testing.assert_close(got, want, rtol=EXACT, atol=EXACT)


def cases(num_ranks: int, backend: str) -> dict[str, Callable[[], None]]:
    """Return all cases by name. Ranks run them in this order."""
    found = {f"{name}, {plan}": partial(compare, name, plan) for name in CONFIGS for plan in PLANS}
    return {"compiled": compiled, **found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_processes.main(cases)
