# SPDX-License-Identifier: Apache-2.0
"""Configurations of models whose code is not in transformers, with the keys that they are published with.

What their code computes is written down here once more, in PyTorch and from the code of each model, and compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from cupy_router import RoutingMethod, activation_topk  # noqa: E402

TOKENS = 64
Config = dict[str, Any]

LING_2: Config = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "num_experts": 256,
    "num_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "router_dtype": "fp32",
    "moe_router_enable_expert_bias": True,
    "moe_intermediate_size": 512,
    "first_k_dense_replace": 1,
}
LING_LITE: Config = {
    "architectures": ["BailingMoeForCausalLM"],
    "model_type": "bailing_moe",
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 1408,
    "num_experts": 64,
    "num_shared_experts": 2,
    "norm_topk_prob": True,
    "num_experts_per_tok": 6,
    "norm_head": False,
    "norm_softmax": False,
    "output_router_logits": False,
}
LLADA_2: Config = {
    "architectures": ["LLaDA2MoeModelLM"],
    "model_type": "llada2_moe",
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 512,
    "moe_router_enable_expert_bias": True,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "output_router_logits": False,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
}
# It repeats the language model's values beside the parts.
OCR_LANGUAGE: Config = {
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 896,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "topk_group": 1,
    "topk_method": "greedy",
    "use_mla": False,
}
OCR: Config = {
    "architectures": ["DeepseekOCRForCausalLM"],
    "model_type": "deepseek_vl_v2",
    "language_config": {"architectures": ["DeepseekV2ForCausalLM"], **OCR_LANGUAGE},
    "projector_config": {"model_type": "mlp_projector", "projector_type": "linear"},
    "vision_config": {"model_type": "vision", "image_size": 1024},
    **OCR_LANGUAGE,
}
MINIMAX_M1: Config = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "model_type": "minimax_m1",
    "num_experts_per_tok": 2,
    "num_local_experts": 32,
    "output_router_logits": False,
    "postnorm": True,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
}
MINIMAX_TEXT: Config = {
    "architectures": ["MiniMaxText01ForCausalLM"],
    "model_type": "minimax_text_01",
    "num_experts_per_tok": 2,
    "num_local_experts": 32,
    "postnorm": True,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_moe_mode": "sigmoid",
}
STEP_3_TEXT: Config = {
    "model_type": "step3_text",
    "moe_intermediate_size": 5120,
    "moe_num_experts": 48,
    "moe_top_k": 3,
    "moe_layers_enum": "4,5,6",
    "norm_expert_weight": False,
    "share_expert_dim": 5120,
}
STEP_3: Config = {
    "architectures": ["Step3VLForConditionalGeneration"],
    "model_type": "step3_vl",
    "text_config": STEP_3_TEXT,
    "vision_config": {"model_type": "step3_vision_encoder", "hidden_size": 1792},
}
ERNIE_VL: Config = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "model_type": "ernie4_5_moe_vl",
    "moe_capacity": [128, 128, 128],
    "moe_gate": "topk",
    "moe_intermediate_size": [1536, 512],
    "moe_k": 6,
    "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1,
    "moe_layer_start_index": [1, 1],
    "moe_num_experts": [64, 64],
    "moe_num_shared_experts": 2,
    "moe_use_aux_free": True,
    "vision_config": {"model_type": "DFNRope_vision_transformer", "depth": 32},
}
LONGCAT_LITE: Config = {
    "architectures": ["LongcatFlashNgramForCausalLM"],
    "model_type": "longcat_flash_ngram",
    "expert_ffn_hidden_size": 1024,
    "n_routed_experts": 256,
    "moe_topk": 12,
    "routed_scaling_factor": 6.0,
    "zero_expert_num": 128,
    "zero_expert_type": "identity",
    "ngram_vocab_size_ratio": 78,
}
MISTRAL_LARGE_3: Config = {  # params.json
    "dim": 7168,
    "n_layers": 61,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8192},
    "moe": {
        "expert_hidden_dim": 4096,
        "expert_model_parallel": 1,
        "expert_parallel": 1,
        "first_k_dense_replace": 3,
        "num_expert_groups": 1,
        "num_expert_groups_per_tok": 1,
        "num_experts": 128,
        "num_experts_per_tok": 4,
        "num_shared_experts": 1,
        "route_every_n": 1,
        "routed_scale": 1.0,
    },
}
ARIA: Config = {
    "architectures": ["AriaForConditionalGeneration"],
    "model_type": "aria",
    "text_config": {
        "model_type": "aria_moe_lm",
        "moe_intermediate_size": 1664,
        "moe_num_experts": 64,
        "moe_num_shared_experts": 2,
        "moe_topk": 6,
        "num_experts_per_tok": 2,  # a leftover that no code reads
    },
    "vision_config": {"model_type": "aria_vision_model"},
}


# -- The routers: logits and bias to a weight for each expert, 0 for those that are not chosen -------------------------


def chosen(weights: Any, indices: Any, like: Any) -> Any:
    return torch.zeros_like(like).scatter(1, indices, weights)


def ling_2(logits: Any, bias: Any, top_k: int = 8) -> Any:
    """Sigmoid; 4 of 8 groups by the two best biased scores; always divided by the sum; 2.5."""
    score = logits.sigmoid()
    biased = (score + bias).unflatten(1, (8, -1))
    best = biased.topk(2).values.sum(2).topk(4).indices
    closed = torch.ones_like(biased, dtype=torch.bool).scatter(1, best[:, :, None].expand(-1, -1, biased.shape[2]), 0)
    indices = biased.masked_fill(closed, -torch.inf).flatten(1).topk(top_k).indices
    weights = score.gather(1, indices)
    if top_k > 1:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return chosen(2.5 * weights, indices, logits)


def softmax(top_k: int, *, normalised: bool, biased: bool = False, scale: float = 1.0, least: float = 0.0) -> Any:
    """Softmax over all experts, then the best."""

    def route(logits: Any, bias: Any) -> Any:
        score = logits.softmax(1)
        indices = (score + bias if biased else score).topk(top_k).indices
        weights = score.gather(1, indices)
        if normalised:
            weights = weights / weights.sum(1, keepdim=True).clamp(min=least)
        return chosen(weights * scale, indices, logits)

    return route


def aria(logits: Any, bias: Any) -> Any:
    """The best logits, then softmax over these."""
    best = logits.topk(6)
    return chosen(best.values.softmax(1), best.indices, logits)


class Case(NamedTuple):
    config: Config
    method: RoutingMethod
    route: Callable[[Any, Any], Any]
    biased: bool = False


LING_2_METHOD = RoutingMethod(
    256, 8, "sigmoid", num_groups=8, top_groups=4, group_score="top2", renormalize_eps=1e-20, scale=2.5
)
CASES: dict[str, Case] = {
    "Ling and Ring 2.0": Case(LING_2, LING_2_METHOD, ling_2, True),
    "Ming-flash-omni": Case({"llm_config": LING_2 | {"model_type": "bailing_moe_v2"}}, LING_2_METHOD, ling_2, True),
    "LLaDA 2": Case(LLADA_2, LING_2_METHOD, ling_2, True),
    "Ring-linear 2.0": Case(LING_2 | {"model_type": "bailing_moe_linear"}, LING_2_METHOD, ling_2, True),
    "one expert of Ling 2.0": Case(
        LING_2 | {"num_experts_per_tok": 1},
        RoutingMethod(256, 1, "sigmoid", num_groups=8, top_groups=4, group_score="top2", renormalize=False, scale=2.5),
        lambda logits, bias: ling_2(logits, bias, 1),
        True,
    ),
    "Ling-lite-1.5": Case(LING_LITE, RoutingMethod(64, 6, "softmax"), softmax(6, normalised=True)),
    "DeepSeek-OCR": Case(OCR, RoutingMethod(64, 6, "softmax", renormalize=False), softmax(6, normalised=False)),
    "MiniMax-M1": Case(MINIMAX_M1, RoutingMethod(32, 2, "softmax"), softmax(2, normalised=True)),
    "MiniMax-Text-01": Case(MINIMAX_TEXT, RoutingMethod(32, 2, "softmax"), softmax(2, normalised=True)),
    "Step-3": Case(STEP_3, RoutingMethod(48, 3, "softmax", renormalize=False), softmax(3, normalised=False)),
    "ERNIE-4.5-VL": Case(
        ERNIE_VL,
        RoutingMethod(64, 6, "softmax", renormalize_min=1e-12),
        softmax(6, normalised=True, biased=True, least=1e-12),
        True,
    ),
    "LongCat-Flash-Lite": Case(
        LONGCAT_LITE,
        RoutingMethod(384, 12, "softmax", renormalize=False, scale=6.0),
        softmax(12, normalised=False, biased=True, scale=6.0),
        True,
    ),
    "Mistral Large 3": Case(MISTRAL_LARGE_3, RoutingMethod(128, 4, "softmax"), softmax(4, normalised=True)),
    "Aria": Case(ARIA, RoutingMethod(64, 6, "softmax", score_after_topk=True, renormalize=False), aria),
}


@pytest.mark.parametrize("name", CASES)
def test_the_method_and_its_weights(name: str) -> None:
    case = CASES[name]
    method = RoutingMethod.from_config(case.config)
    assert method == case.method
    random = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(TOKENS, method.num_experts, generator=random)
    bias = 0.1 * torch.randn(method.num_experts, generator=random) if case.biased else None
    got = activation_topk(logits, method, bias=bias)
    want = case.route(logits, bias)
    torch.testing.assert_close(chosen(got.weights, got.indices.long(), logits), want, rtol=1e-6, atol=1e-7)
    if case.biased:
        assert not torch.equal(want != 0, case.route(logits, 0 * bias) != 0), "the bias changes no pick"


def vl2(**changed: Any) -> Config:
    return {"model_type": "deepseek_vl_v2", "language_config": OCR_LANGUAGE | changed}


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (vl2(), RoutingMethod(64, 6, "softmax", renormalize=False)),
        (
            vl2(scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True, routed_scaling_factor=2.0),
            RoutingMethod(64, 6, "sigmoid", renormalize_eps=1e-20, scale=2.0),
        ),
        (
            vl2(topk_method="group_limited_greedy", n_group=8, topk_group=3),
            RoutingMethod(64, 6, "softmax", num_groups=8, top_groups=3, renormalize=False),
        ),
        (LING_LITE | {"norm_topk_prob": False}, RoutingMethod(64, 6, "softmax", renormalize=False)),
        (LONGCAT_LITE | {"zero_expert_num": None}, RoutingMethod(256, 12, "softmax", renormalize=False, scale=6.0)),
    ],
    ids=lambda value: str(value)[:60],
)
def test_other_settings(config: Config, method: RoutingMethod) -> None:
    assert RoutingMethod.from_config(config) == method


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LING_2 | {"score_function": "softmax"}, "bailing_moe: score_function is 'softmax', but"),
        (
            {k: v for k, v in LING_2.items() if k != "score_function"} | {"model_type": "bailing_moe_linear"},
            "bailing_moe_linear: score_function is None, but what its routers do is known only for 'sigmoid'",
        ),
        (
            {k: v for k, v in LING_2.items() if k != "score_function"},
            "bailing_moe: moe_router_enable_expert_bias is True, but it has no score_function",
        ),
        ({k: v for k, v in LLADA_2.items() if k != "n_group"}, "llada2_moe: does not say num_groups"),
        (vl2(topk_method="noaux_tc", n_group=8, topk_group=4), "deepseek_vl_v2: .* outside the best groups count 0"),
        (vl2(topk_method="gready"), "deepseek_vl_v2: topk_method is 'gready', but"),
        (
            STEP_3 | {"text_config": STEP_3_TEXT | {"norm_expert_weight": True}},
            "norm_expert_weight is True, but of its two published",
        ),
        (ERNIE_VL | {"moe_num_experts": [64, 32]}, "moe_num_experts differs between layers"),
        (
            ERNIE_VL | {"moe_group_experts": True},
            "moe_group_experts is True, but what its routers do is known only for None or False",
        ),
        ({k: v for k, v in LONGCAT_LITE.items() if k != "zero_expert_num"}, "does not say zero_expert_num"),
        ({"moe": MISTRAL_LARGE_3["moe"] | {"num_expert_groups": 8}}, "config: has groups of experts"),
        ({"moe": {"num_experts": 8, "num_experts_per_tok": 2}}, "config: does not say score"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_their_code_does_not_settle_is_refused(config: Config, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RoutingMethod.from_config(config)
