"""The MoE layers of well-known models, for trying things out without a checkpoint.

Each is the layer of the published checkpoint: sizes, routing, activation, and the scheme it is stored in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from moe_core.config import Activation, MoeConfig, RoutingConfig
from moe_core.errors import ConfigError, did_you_mean
from moe_core.hf import read_config

_SOFTMAX: Final = RoutingConfig(method="softmax")
_SOFTMAX_NORMALIZED: Final = RoutingConfig(method="softmax", renormalize=True)
_SIGMOID_BIAS: Final = RoutingConfig(method="sigmoid", renormalize=True, correction_bias=True)
_DEEPSEEK_V3: Final = RoutingConfig(
    method="sigmoid",
    renormalize=True,
    correction_bias=True,
    num_groups=8,
    topk_groups=4,
    group_score="top2_sum",
)


def _gpt_oss(num_experts: int) -> MoeConfig:
    return MoeConfig(
        num_experts=num_experts,
        top_k=4,
        hidden_size=2880,
        intermediate_size=2880,
        scheme="mxfp4_w4a16",
        activation=Activation.swiglu_oai(),
        bias=True,
        routing=RoutingConfig(method="topk_softmax"),
    )


def _llama4(num_experts: int) -> MoeConfig:
    return MoeConfig(
        num_experts=num_experts,
        top_k=1,
        hidden_size=5120,
        intermediate_size=8192,
        routing=RoutingConfig(method="topk_sigmoid"),
        router_weight_on_input=True,
    )


PRESETS: Final[dict[str, MoeConfig]] = {
    "mixtral-8x7b": MoeConfig(
        num_experts=8, top_k=2, hidden_size=4096, intermediate_size=14336, routing=_SOFTMAX_NORMALIZED
    ),
    "qwen3-30b-a3b": MoeConfig(
        num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768, routing=_SOFTMAX_NORMALIZED
    ),
    "qwen3-235b-a22b": MoeConfig(
        num_experts=128, top_k=8, hidden_size=4096, intermediate_size=1536, routing=_SOFTMAX_NORMALIZED
    ),
    "deepseek-v3": MoeConfig(
        num_experts=256,
        top_k=8,
        hidden_size=7168,
        intermediate_size=2048,
        scheme="fp8_block128",
        routing=_DEEPSEEK_V3,
        routed_scaling_factor=2.5,
    ),
    "deepseek-v2-lite": MoeConfig(num_experts=64, top_k=6, hidden_size=2048, intermediate_size=1408, routing=_SOFTMAX),
    "gpt-oss-120b": _gpt_oss(128),
    "gpt-oss-20b": _gpt_oss(32),
    "glm-4.5-air": MoeConfig(num_experts=128, top_k=8, hidden_size=4096, intermediate_size=1408, routing=_SIGMOID_BIAS),
    "olmoe": MoeConfig(num_experts=64, top_k=8, hidden_size=2048, intermediate_size=1024, routing=_SOFTMAX),
    "minimax-m2": MoeConfig(
        num_experts=256,
        top_k=8,
        hidden_size=3072,
        intermediate_size=1536,
        scheme="fp8_block128",
        routing=_SIGMOID_BIAS,
    ),
    "llama-4-scout": _llama4(16),
    "llama-4-maverick": _llama4(128),
}


def preset(name: str) -> MoeConfig:
    """The preset of that name. Raises ConfigError, with the closest names, where there is none."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"unknown model preset {name!r}", hint=did_you_mean(name, PRESETS)) from None


def load_model(source: str) -> tuple[str, MoeConfig]:
    """(name, layer) of what a command line's `--model` gives: DIR, config.json, or the name of a preset.

    A folder with a config.json, or a file, wins over a preset of the same name. Raises ConfigError naming the
    three forms where `source` is none of them.
    """
    path = Path(source)
    if path.is_file() or (path / "config.json").is_file():
        folder = path if path.is_dir() else path.parent
        name = folder.resolve().name if path.is_dir() or path.name == "config.json" else path.stem
        return name, read_config(path)
    if source in PRESETS:
        return source, PRESETS[source]
    found = "a folder without a config.json" if path.is_dir() else "no file or folder, and no preset"
    raise ConfigError(
        f"cannot tell a model from {source!r}: {found}",
        hint=f"give a checkpoint folder (DIR), a config.json, or the name of a preset; {did_you_mean(source, PRESETS)}",
    )
