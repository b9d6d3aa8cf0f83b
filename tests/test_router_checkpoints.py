# SPDX-License-Identifier: Apache-2.0
"""Routers out of state dicts and safetensors files, under the names of DeepSeek and of Hugging Face."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cupy_router import Router, Routing, RoutingMethod, dense_router, hash_router, huggingface
from tests import compare, frameworks, inputs
from tests.backends import DTYPES
from tests.test_router import BIAS, EXPERTS, METHOD, K, assert_same, gate, table, tokens

STYLES = {
    "deepseek": ("layers.3.ffn.gate.weight", "layers.3.ffn.gate.bias", "layers.3.ffn.gate.tid2eid", "layers.3"),
    "hugging face": (
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.3.mlp.gate.tid2eid",
        "model.layers.3",
    ),
    "minimax": (
        "model.layers.3.block_sparse_moe.gate.weight",
        "model.layers.3.block_sparse_moe.e_score_correction_bias",
        "model.layers.3.block_sparse_moe.gate.tid2eid",
        "model.layers.3",
    ),
    "afmoe": (
        "model.layers.3.mlp.router.gate.weight",
        "model.layers.3.mlp.expert_bias",
        "model.layers.3.mlp.router.gate.tid2eid",
        "model.layers.3",
    ),
    "hunyuan": (
        "model.layers.3.mlp.gate.wg.weight",
        "model.layers.3.mlp.gate.e_score_correction_bias",
        "model.layers.3.mlp.gate.tid2eid",
        "model.layers.3",
    ),
    "longcat": (
        "model.layers.3.mlp.router.classifier.weight",
        "model.layers.3.mlp.router.e_score_correction_bias",
        "model.layers.3.mlp.router.tid2eid",
        "model.layers.3",
    ),
    "jetmoe": (
        "model.layers.3.mlp.router.layer.weight",
        "model.layers.3.mlp.router.expert_bias",
        "model.layers.3.mlp.router.tid2eid",
        "model.layers.3",
    ),
    "step": (
        "model.layers.3.moe.gate.weight",
        "model.layers.3.moe.router_bias",
        "model.layers.3.moe.gate.tid2eid",
        "model.layers.3",
    ),
    "laguna": (
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.mlp.experts.e_score_correction_bias",
        "model.layers.3.mlp.gate.tid2eid",
        "model.layers.3",
    ),
    "nemotron": (
        "backbone.layers.3.mixer.gate.weight",
        "backbone.layers.3.mixer.gate.e_score_correction_bias",
        "backbone.layers.3.mixer.gate.tid2eid",
        "backbone.layers.3",
    ),
    "kolibri": (
        "model.layers.3.mlp.gate.weight",
        "model.layers.3.moe.router.expert_bias",
        "model.layers.3.mlp.gate.tid2eid",
        "model.layers.3",
    ),
    "a nested gate by itself": ("proj.weight", "e_score_correction_bias", "tid2eid", ""),
    "a gate by itself": ("weight", "bias", "tid2eid", ""),
}


def prefixes(style: str) -> list[str]:
    """Every folder from the layer's down to that of the gate, with and without the dot."""
    weight, *_, layer = STYLES[style]
    folders, parts = [layer], weight.split(".")
    folders += [".".join(parts[:i]) for i in range(layer.count(".") + 2, len(parts)) if layer]
    return [*folders, f"{folders[-1]}." if layer else ""]


def neighbours(style: str) -> dict[str, np.ndarray]:
    """Keys of other layers and other modules, which must not be mistaken for the router's."""
    weight, bias, tid2eid, layer = STYLES[style]
    wrong = np.zeros(3, np.float32)
    others = {f"{layer}.mlp.experts.0.gate_proj.weight": wrong, f"{layer}.self_attn.gate.weight": wrong}
    for number in (1, 30, 33):
        others |= {key.replace(".3.", f".{number}."): wrong for key in (weight, bias, tid2eid) if ".3." in key}
    return others if layer else {}


@pytest.mark.parametrize("kind", ["dense", "biased", "hash"])
@pytest.mark.parametrize(("style", "prefix"), [(style, prefix) for style in STYLES for prefix in prefixes(style)])
def test_key_names(style: str, prefix: str, kind: str) -> None:
    weight, bias, tid2eid, _ = STYLES[style]
    state: dict[str, Any] = neighbours(style) | {weight: gate()}
    if kind == "biased":
        state[bias] = BIAS
    elif kind == "hash":
        state[tid2eid] = table("int64")
    router = Router.from_state_dict(state, prefix, METHOD)
    assert router.weight is state[weight]
    assert router.bias is (BIAS if kind == "biased" else None)
    assert router.table is state.get(tid2eid)


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", inputs.FLOATS)
def test_state_dicts_of_any_framework_and_dtype(name: str, dtype: str) -> None:
    framework = frameworks.ON_CPU[name]()
    bias = np.linspace(-1, 1, EXPERTS).astype(DTYPES[dtype])
    state = {"gate.weight": framework.array(gate(dtype)), "gate.bias": framework.array(bias)}
    router = Router.from_state_dict(state, "", METHOD)
    assert router.weight is state["gate.weight"]
    assert (router.bias is state["gate.bias"]) == (dtype == "float32")
    compare.assert_same_bits(framework.numpy(router.bias), bias.astype(np.float32))
    got = Routing(*map(framework.numpy, router(framework.array(tokens(9, dtype)))))
    assert_same(got, dense_router(tokens(9, dtype), gate(dtype), METHOD, bias=bias.astype(np.float32)))


def test_a_bias_with_a_leading_axis() -> None:
    state = {"mlp.gate.weight": gate(), "mlp.moe_statics.e_score_correction_bias": BIAS[None]}
    np.testing.assert_array_equal(Router.from_state_dict(state, "", METHOD).bias, BIAS)


# The names of DeepSeek-V4.1 and V4-Flash-Vision, and of those who rename them for Hugging Face.
OF_IMAGES = {"layers.3.ffn.gate.": ("bias", "bias_vl")}
OF_IMAGES["model.layers.3.mlp.gate."] = "e_score_correction_bias", "e_score_correction_bias_vl"


@pytest.mark.parametrize("kind", ["dense", "hash", "hash, with the bias of text"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("gate_path", OF_IMAGES)
def test_a_bias_of_images(gate_path: str, name: str, dtype: str, kind: str) -> None:
    """It is row 1; a hash layer may have no other."""
    framework = frameworks.ON_CPU[name]()
    of_text, of_images = (np.roll(BIAS, turn).astype(DTYPES[dtype]) for turn in (0, 3))
    names = [gate_path + bias for bias in OF_IMAGES[gate_path]]
    state = {gate_path + "weight": gate(), names[1]: of_images, names[0]: of_text}
    if kind.startswith("hash"):
        state[gate_path + "tid2eid"] = table()
    if kind == "hash":
        del state[names[0]]
    state = {key: framework.array(array) for key, array in state.items()}
    router = Router.from_state_dict(state, gate_path.partition(".3")[0] + ".3", METHOD)
    bias = np.stack([of_text, of_images]).astype(np.float32)
    compare.assert_same_bits(framework.numpy(router.bias)[1], bias[1])
    is_image, ids = np.array([0, 1, 1, 0, 1], np.int32), np.arange(5, dtype=np.int32)
    got = router(framework.array(tokens(5)), framework.array(ids), bias_index=framework.array(is_image))
    if kind == "dense":
        want = dense_router(tokens(5), gate(), METHOD, bias=bias, bias_index=is_image)
    else:
        given = {"x": tokens(5), "weight": gate(), "bias": bias, "bias_index": is_image}
        want = hash_router(ids, table(), METHOD, **given)
    assert_same(Routing(*map(framework.numpy, got)), want)


def test_a_bias_of_images_alone_is_refused() -> None:
    state = {"a.gate.weight": gate(), "a.gate.bias_vl": BIAS}
    with pytest.raises(ValueError, match=r"a\.gate\.bias_vl is the bias of image tokens, but there is none of the"):
        Router.from_state_dict(state, "a", METHOD)
    with pytest.raises(
        ValueError, match=r"a\.gate\.bias_vl must have shape \[num_experts\] = \[24\], got float32 \[3\]"
    ):
        Router.from_state_dict({**state, "a.gate.bias": BIAS, "a.gate.bias_vl": BIAS[:3]}, "a", METHOD)
    with pytest.raises(ValueError, match=r"a\.gate\.bias must have shape \[num_experts\] = \[24\], got float32 \[3\]"):
        Router.from_state_dict({**state, "a.gate.bias": BIAS[:3]}, "a", METHOD)


@pytest.mark.parametrize(
    ("state", "prefix", "error", "words"),
    [
        ({}, "layers.3", ValueError, r"no gate at prefix 'layers\.3': no key begins with it, but .* there: none$"),
        ({"layers.30.gate.weight": gate()}, "layers.3", ValueError, r"there are routers at layers\.30\.gate$"),
        ({"a.gate.bias": BIAS}, "a", ValueError, r"no gate at prefix 'a': .* the keys there are a\.gate\.bias"),
        ({"a.gate.weight": gate()[:3]}, "a", ValueError, r"a\.gate\.weight is the weight: .* got float32 \[3, 40\]"),
        ({"a.gate.weight": gate(), "a.gate.bias": BIAS[:3]}, "a", ValueError, r"a\.gate\.bias is the bias: .*\[3\]"),
        (
            {"a.gate.weight": gate(), "a.gate.bias": BIAS.astype(np.int32)},
            "a",
            TypeError,
            r"a\.gate\.bias must be float32 or float16 or bfloat16, got int32",
        ),
        (
            {"a.gate.weight": gate(), "a.gate.tid2eid": table()[:, 1:]},
            "a",
            ValueError,
            r"a\.gate\.tid2eid is the table: .* got int32 \[50, 3\]",
        ),
        (
            {"a.router.proj.weight": gate(), "a.router.per_expert_scale": BIAS[:3]},
            "a",
            ValueError,
            r"a\.router\.per_expert_scale is the expert_scale: .*\[3\]",
        ),
        ({"b.c.weight": BIAS}, "a", ValueError, r"no key begins with it, but these are there: b\.c\.weight"),
        (
            {f"layers.{n}.{name}": gate() for n in range(11) for name in ("mlp.gate.weight", "attn.gate.weight")},
            "model.layers.2",
            ValueError,
            "there are routers at layers.0.mlp.gate, layers.1.mlp.gate, layers.2.mlp.gate, layers.3.mlp.gate, 7 more$",
        ),
        (
            {f"{layer}.{part}_moe.gate.weight": gate() for layer in "ba" for part in ("text", "vision")},
            "b",
            ValueError,
            r"there are routers at b\.text_moe\.gate, b\.vision_moe\.gate, a\.text_moe\.gate, a\.vision_moe\.gate$",
        ),
        (
            {"a.mlp.gate.weight": gate(), "a.moe.router.weight": gate()},
            "a",
            ValueError,
            r"several gates at prefix 'a': a\.mlp\.gate\.weight and a\.moe\.router\.weight",
        ),
        ({3: gate()}, "a", TypeError, "a key of state must be a str, got 3"),
        ({"gate.weight": gate()}, None, TypeError, "prefix must be a str, got None"),
        ([gate()], "", TypeError, r"state must map keys to arrays, as model\.state_dict\(\) does, got list"),
    ],
)
def test_keys_that_are_missing_or_misshapen(state: dict[str, Any], prefix: str, error: type, words: str) -> None:
    with pytest.raises(error, match=f"^Router.from_state_dict: .*{words}") as caught:
        Router.from_state_dict(state, prefix, METHOD)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_factor_of_each_expert(dtype: str) -> None:
    scale = np.linspace(1, 2, EXPERTS).astype(DTYPES[dtype])
    state = {"a.router.proj.weight": gate(), "a.router.per_expert_scale": scale}
    got = Router.from_state_dict(state, "a", METHOD)(tokens(9))
    assert_same(got, dense_router(tokens(9), gate(), METHOD, expert_scale=scale.astype(np.float32)))


AFTER_TOPK = RoutingMethod(EXPERTS, K, "softmax", score_after_topk=True)


@pytest.mark.parametrize("score", ["sigmoid", "sqrtsoftplus"])
def test_the_bias_of_a_gate_only_selects_where_there_are_scores_to_add_it_to(score: str) -> None:
    state = {"a.gate.weight": gate(), "a.gate.bias": BIAS}
    router = Router.from_state_dict(state, "a", RoutingMethod(EXPERTS, K, score))
    assert router.bias is BIAS
    assert router.logit_bias is None


@pytest.mark.parametrize("name", ["gate", "router", "gate.wg", "router.classifier"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_bias_is_part_of_the_logits_where_these_select(name: str, dtype: str) -> None:
    bias = BIAS.astype(DTYPES[dtype])
    router = Router.from_state_dict({f"mlp.{name}.weight": gate(), f"mlp.{name}.bias": bias}, "", AFTER_TOPK)
    assert router.bias is None
    want = dense_router(tokens(9), gate(), AFTER_TOPK, logit_bias=bias.astype(np.float32))
    assert_same(router(tokens(9)), want)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gate", {"score": "softmax"}),
        ("gate", {"score": "identity"}),
        ("gate", {"score": "sigmoid", "bias_on": "logits"}),
        ("gate", {"score": "softmax", "bias_on": "logits", "score_after_topk": True}),
        ("router", {"score": "sigmoid"}),
        ("router.gate", {"score": "sigmoid"}),
        ("router.classifier", {"score": "sigmoid"}),
    ],
)
def test_an_ambiguous_bias_is_refused(name: str, fields: dict[str, Any]) -> None:
    state = {f"mlp.{name}.weight": gate(), f"mlp.{name}.bias": BIAS}
    words = (
        rf"mlp\.{name}\.bias may be a bias that only selects \(bias\) or one that is part of the logits \(logit_bias\)"
    )
    with pytest.raises(ValueError, match=f"^Router.from_state_dict: {words}"):
        Router.from_state_dict(state, "", RoutingMethod(EXPERTS, K, **fields))


def test_a_second_bias_is_ambiguous() -> None:
    state = {"gate.weight": gate(), "gate.bias": BIAS, "gate.e_score_correction_bias": BIAS}
    with pytest.raises(ValueError, match=r"gate\.bias may be a bias that only selects"):
        Router.from_state_dict(state, "", METHOD)


@pytest.mark.slow("seconds")
@pytest.mark.parametrize(("prefix", "of_file"), [("", False), ("model.layers.0.mlp.router", True)])
def test_gpt_oss(prefix: str, of_file: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = frameworks.transformers_with_models()
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    config = transformers.GptOssConfig(hidden_size=64, num_local_experts=16, num_experts_per_tok=4)
    theirs = GptOssTopKRouter(config)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(20261125)
        theirs.weight.normal_(std=0.25)
        theirs.bias.normal_(std=1)
        x = torch.randn(40, 64)
        _, weights, indices = theirs(x)
    state = {f"{prefix}.{key}".lstrip("."): value.detach() for key, value in theirs.state_dict().items()}
    method = RoutingMethod.from_config(config)
    if of_file:
        path = tmp_path / "file.safetensors"
        pytest.importorskip("safetensors.torch").save_file(state, path)
        got = Router.from_safetensors(path, prefix, method)(x)
    else:
        got = Router.from_state_dict(state, prefix, method)(x)
    torch.testing.assert_close(got.indices.long(), indices)
    torch.testing.assert_close(got.weights, weights)


def test_transformers_state_dicts() -> None:
    """The names under which transformers itself keeps the routers of DeepSeek-V3 and DeepSeek-V4."""
    pytest.importorskip("torch")
    transformers = frameworks.transformers_with_models()
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4

    config = transformers.DeepseekV4Config(
        vocab_size=20, hidden_size=32, n_routed_experts=8, num_experts_per_tok=2, num_hidden_layers=4,
        mlp_layer_types=["hash_moe", "moe", "moe", "moe"],
    )  # fmt: skip
    blocks = [v4.DeepseekV4SparseMoeBlock(config, layer) for layer in (0, 1)]
    small = transformers.DeepseekV3Config(hidden_size=32, n_routed_experts=8, moe_intermediate_size=16)
    blocks.append(v3.DeepseekV3MoE(small))
    found = [huggingface.router_keys(block.state_dict(), "", METHOD) for block in blocks]
    assert found[0] == huggingface.Keys("gate.weight", table="gate.tid2eid")
    assert found[1] == found[2] == huggingface.Keys("gate.weight", bias="gate.e_score_correction_bias")
