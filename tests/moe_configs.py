# SPDX-License-Identifier: Apache-2.0
"""Which MoE models the installed transformers package has, and small configurations of them.

The list comes from the package: every folder of models whose code or configuration mentions experts.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cupy_router.torch import _replace, _swapped

FOLDER = Path(transformers.__file__).parent / "models"

NUM_EXPERTS, TOP_K, TOKENS = 24, 4, 24
MAX_PARAMETERS = 30_000_000

# The names of sizes in configurations, the same for all models.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "unpadded_vocab_size"), 128),
    "max_position_embeddings": 256,
    **dict.fromkeys(("hidden_size", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("head_dim", "v_head_dim", "kv_lora_rank", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), NUM_EXPERTS),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"), TOP_K),
    "n_group": 4,
    "topk_group": 2,
    **dict.fromkeys(("linear_num_heads", "linear_num_key_heads", "linear_num_value_heads", "mamba_n_heads"), 2),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "first_k_dense_replace": 0,
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor"), 1.75),  # where it is not 1
}
# What single configurations need besides: other sizes, and layers that have experts.
_SPARSE = ["sparse", "sparse"]
_HYBRID = ["linear_attention", "full_attention"]  # models that generate need a layer with a cache of positions
OVERRIDES: dict[str, dict[str, Any]] = {
    "BailingHybridConfig": {"layer_types": _HYBRID},
    "BeamConfig": {"mlp_layer_types": _SPARSE},
    "DbrxAttentionConfig": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": _SPARSE},
    "DeepseekV4Config": {"mlp_layer_types": ["hash_moe", "moe"]},
    "DogeConfig": {"is_moe": True},
    "Dots1Config": {"n_shared_experts": 1},
    "Dots3NoteVisionConfig": {"pyramid_num_routed": [24, 12], "adapter_in_dim": 64, "adapter_out_dim": 64},
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [32, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [3, 3, 2]},
    },
    "FlintConfig": {"mlp_only_layers": []},
    "Gemma4TextConfig": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 16,
    },
    "Glm5NextTextConfig": {"qk_rope_head_dim": 0, "mlp_layer_types": _SPARSE},
    "Glm4vMoeTextConfig": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "GraniteMoeHybridConfig": {"layer_types": _HYBRID},
    "HYV4VLTextConfig": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "mlp_layer_types": _SPARSE,
    },
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "KimiLinearConfig": {"layer_types": _HYBRID},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0},
    "LongcatFlashConfig": {"head_dim": 8, "zero_expert_num": 8, "n_routed_experts": 16},
    "MiMoV2FlashConfig": {"head_dim": 24, "num_attention_heads": 16},
    "NllbMoeConfig": {
        **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 2),
        **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
        **dict.fromkeys(("encoder_sparse_step", "decoder_sparse_step"), 1),
    },
    "Qwen3NextConfig": {"layer_types": _HYBRID},
    "Qwen3_5MoeTextConfig": {"layer_types": _HYBRID},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 32},
    "Qwen4ExpTextConfig": {
        "layer_types": _HYBRID,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "Step3p7TextConfig": {"mlp_layer_types": _SPARSE, "share_expert_dim": 32, "sliding_window": 16},
    "VitPoseBackboneConfig": {"num_experts": 6, "part_features": 16},
    "ZayaConfig": {"num_experts_per_tok": 1},
}
# Router classes, or blocks of experts without one, that are left as they are -> what the reason has to say.
LEFT = {
    "AXK2TopkRouter": "experts outside the best groups count 0",
    "DogeCDMoE": "product keys",
    "NllbMoeTop2Router": "capacity",
    "PhimoeTopKRouter": "SparseMixer",
    "SwitchTransformersTop1Router": "capacity",
    "VitPoseBackboneMoeMLP": "without a router",
    "ZayaRouter": "can skip all experts",
}
# Reasons why routers are left if a configuration has other settings; some implementations ignore these settings.
LEFT_IF_VARIED = {
    "DeepseekV2TopkRouter": "has norm_topk_prob = True, but its routers have renormalize = False",
    "DeepseekV4HashRouter": "has norm_topk_prob = False, but its routers have renormalize = True",
    "DeepseekV4TopKRouter": "has norm_topk_prob = False, but its routers have renormalize = True",
}

# Other settings of fields that change the routing, in all configurations that have them.
VARIANTS: dict[str, dict[str, Any]] = {
    "renormalized": {"norm_topk_prob": True},
    "not renormalized": {"norm_topk_prob": False},
    "without groups": {"n_group": 1, "topk_group": 1},
    "groups by max": {"topk_method": "group_limited_greedy"},
    "sigmoid of the chosen": {"expert_selection_fn": "sigmoid"},
    "sigmoid": {"scoring_func": "sigmoid"},
    "soft cap": {"moe_router_logit_softcapping": 2.0},
    "without a bias": {"use_expert_bias": False},
}


# -- Which models ------------------------------------------------------------------------------------------------------


def sources(family: str) -> dict[str, str]:
    """The files of a folder that define models or configurations, by name."""
    paths = sorted((FOLDER / family).glob("*.py"))
    return {path.stem: path.read_text() for path in paths if path.stem.startswith(("modeling_", "configuration_"))}


def families() -> list[str]:
    """All folders whose files mention experts."""
    folders = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
    return [name for name in folders if any("experts" in text for text in sources(name).values())]


def routing_classes(family: str) -> set[str]:
    """The classes of a family whose code chooses experts, and which its models use."""
    found = set()
    for name, text in sources(family).items():
        for match in re.finditer(r"^class (\w+)\(.*?(?=^\S)", text + "\nend", re.MULTILINE | re.DOTALL):
            chooses = name.startswith("modeling_") and re.search(r"\btopk\(|argmax\(|sparsemixer\(|tid2eid\[", match[0])
            used = re.search(rf"(?<!class ){match[1]}\(", text)
            if chooses and used and "expert" in match[0] and "For" not in match[1]:
                found.add(match[1])
    return found


def has_experts(family: str) -> bool:
    """Return True if the code of a family has experts or chooses some."""
    return bool(routing_classes(family)) or any("self.experts = " in text for text in sources(family).values())


def model_classes(family: str) -> Iterator[type]:
    """One model for each configuration class of a family: those that have experts themselves first."""
    for name in sources(family):
        if not name.startswith("modeling_"):
            continue
        module = importlib.import_module(f"transformers.models.{family}.{name}")
        by_config: dict[type, list[type]] = {}
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if (
                own
                and issubclass(value, transformers.PreTrainedModel)
                and not value.__name__.endswith("PreTrainedModel")
            ):
                by_config.setdefault(value.config_class, []).append(value)
        by_config.pop(None, None)  # type: ignore[call-overload]
        endings = ("ForCausalLM", "ForConditionalGeneration", "Model", "")
        for config in sorted(by_config, key=lambda config: not _fields(config) & set(SIZES_OF_EXPERTS)):
            yield next(c for ending in endings for c in by_config[config] if c.__name__.endswith(ending))


SIZES_OF_EXPERTS = [name for name, value in SIZES.items() if value in (NUM_EXPERTS, TOP_K) and "expert" in name]


def _fields(config_class: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(config_class)}


def small(config_class: Any, variant: str | None = None) -> Any:
    """A configuration with small sizes, and otherwise the defaults of its class, or a variant of them."""
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        if field.name in SIZES:
            chosen[field.name] = SIZES[field.name]
        elif (
            field.name.endswith("token_id") and isinstance(field.default, int) and field.default >= SIZES["vocab_size"]
        ):
            chosen[field.name] = 3
    for name, part in (config_class.sub_configs or {}).items():
        if dataclasses.is_dataclass(part):
            chosen[name] = small(part, variant)
    varied = {name: value for name, value in VARIANTS.get(variant or "", {}).items() if name in _fields(config_class)}
    return config_class(**{**chosen, **OVERRIDES.get(config_class.__name__, {}), **varied})


def varies(family: str, variant: str) -> bool:
    """Return True if configurations of a family have the fields that a variant sets."""
    return any(set(VARIANTS[variant]) <= _fields(model_class.config_class) for model_class in model_classes(family))


def build(model_class: Any, variant: str | None = None) -> Any:
    """A small model with its own initial weights."""
    config = small(model_class.config_class, variant)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{model_class.__name__} has {size / 1e6:.0f} million parameters")
    return model_class(config).eval()


@contextmanager
def seeded_on_one_thread() -> Iterator[None]:
    """Seed PyTorch and use one thread: workers of pytest-xdist would compete for the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(20261125)
        yield
    torch.set_num_threads(threads)


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count calls of ops by swapped modules, without those of the trial before the swap."""
    found: list[str] = []
    verify = _replace.verify

    def verified(*args: Any) -> Any:
        proved = verify(*args)
        found.clear()
        return proved

    monkeypatch.setattr(_replace, "verify", verified)

    run = _swapped.run

    def counting(op: Any, *args: Any) -> Any:
        found.append(op.name)
        return run(op, *args)

    monkeypatch.setattr(_swapped, "run", counting)
    return found
