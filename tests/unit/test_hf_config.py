"""Reading Hugging Face configurations: those that transformers writes, those of the hub, and what is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moe_core.config import Activation, MoeConfig, RoutingConfig
from moe_core.errors import ConfigError
from moe_core.hf import count_moe_layers, known_model_types, read_config
from moe_core.presets import PRESETS

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
PACKED_INT4: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True},
            "input_activations": None,
        }
    },
}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "qk_nope_head_dim": 8}
SIGMOID = RoutingConfig(method="sigmoid", renormalize=True, correction_bias=True)
V3_GROUPS = RoutingConfig(method="sigmoid", correction_bias=True, num_groups=4, topk_groups=2, group_score="top2_sum")

# name: (model class, what the config is made with, expected routing, other expected fields, MoE layers)
MODELS: dict[str, tuple[str, dict[str, Any], RoutingConfig, dict[str, Any], int]] = {
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 6, "hidden_act": "gelu"},
        RoutingConfig(method="softmax", renormalize=True),
        {"activation": Activation(name="gelu")},
        4,
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 6, "moe_intermediate_size": 24, "norm_topk_prob": True, "mlp_only_layers": [1]},
        RoutingConfig(method="softmax", renormalize=True),
        {},
        3,
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 6, "moe_intermediate_size": 24, "decoder_sparse_step": 2, "hidden_act": "relu2"},
        RoutingConfig(method="softmax"),
        {"activation": Activation(name="relu2")},
        2,
    ),
    "olmoe": (
        "Olmoe",
        {"num_experts": 6, "norm_topk_prob": True, "hidden_act": "gelu_pytorch_tanh"},
        RoutingConfig(method="softmax", renormalize=True),
        {"activation": Activation(name="gelu_tanh")},
        4,
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **MLA,
            "n_routed_experts": 8,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 16.0,
        },
        RoutingConfig(method="softmax", num_groups=4, topk_groups=2, group_score="max"),
        {"routed_scaling_factor": 16.0},
        3,
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **MLA,
            "n_routed_experts": 8,
            "moe_intermediate_size": 24,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
        },
        V3_GROUPS,
        {"routed_scaling_factor": 2.5},
        1,
    ),
    "glm4_moe": (
        "Glm4Moe",
        {"n_routed_experts": 6, "moe_intermediate_size": 24, "routed_scaling_factor": 1.5},
        SIGMOID,
        {"routed_scaling_factor": 1.5},
        3,
    ),
    "gpt_oss": (
        "GptOss",
        {"num_local_experts": 6, "head_dim": 8, "swiglu_alpha": 1.5, "swiglu_limit": 5.0},
        RoutingConfig(method="topk_softmax"),
        {"activation": Activation.swiglu_oai(alpha=1.5, limit=5.0), "bias": True},
        4,
    ),
    "minimax_m2": ("MiniMaxM2", {"num_local_experts": 6, "head_dim": 8}, SIGMOID, {}, 4),
    "llama4_text": (
        "Llama4Text",
        {"num_local_experts": 6, "head_dim": 8, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 96},
        RoutingConfig(method="topk_sigmoid"),
        {"router_weight_on_input": True},
        2,
    ),
}


def hf_config(name: str) -> Any:
    prefix, values = MODELS[name][:2]
    return getattr(transformers, f"{prefix}Config")(**{**TINY, **values, "dtype": "float16"})


def blocks(name: str, config: Any) -> tuple[list[torch.nn.Module], torch.nn.Module]:
    """The experts of every MoE layer of the real tiny model, and the first router."""
    prefix = MODELS[name][0]
    with torch.device("meta"):
        model = getattr(transformers, f"{prefix}Model")(config)
    experts = [m for m in model.modules() if type(m).__name__.endswith("Experts")]
    routers = [m for m in model.modules() if type(m).__name__.lower().endswith(("router", "topkrouter"))]
    return experts, routers[0]


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_writes(name: str, tmp_path: Path) -> None:
    config = hf_config(name)
    config.save_pretrained(tmp_path)
    read = read_config(tmp_path)
    _, _, routing, others, layers = MODELS[name]
    assert read.routing == routing
    expected = {"activation": Activation(), "bias": False, "routed_scaling_factor": 1.0, **others}
    expected |= {"dtype": "float16", "scheme": "bf16", "router_weight_on_input": name == "llama4_text"}
    assert {key: getattr(read, key) for key in expected} == expected

    experts, router = blocks(name, config)
    w2 = experts[0].down_proj
    transposed = name in ("gpt_oss", "llama4_text")
    shape = (w2.shape[0], w2.shape[2], w2.shape[1]) if transposed else tuple(w2.shape)
    assert (read.num_experts, read.hidden_size, read.intermediate_size) == shape
    assert read.top_k == router.top_k == 2
    assert read.bias == any("bias" in key for key, _ in experts[0].named_parameters())
    assert count_moe_layers(tmp_path) == len(experts) == layers

    forms = [tmp_path / "config.json", str(tmp_path), config, config.to_dict()]
    forms.append(json.loads(config.to_json_string(use_diff=False)))
    assert all(read_config(form) == read for form in forms)
    assert MoeConfig.from_hf(config, top_k=3) == read.replace(top_k=3)


def test_nested_llama4(tmp_path: Path) -> None:
    config = transformers.Llama4Config(
        text_config=hf_config("llama4_text"), vision_config={"num_hidden_layers": 1}, dtype="bfloat16"
    )
    config.save_pretrained(tmp_path)
    read = read_config(tmp_path)
    assert read == read_config(hf_config("llama4_text")).replace(dtype=read.dtype)
    assert count_moe_layers(tmp_path) == 2
    assert count_moe_layers({"text_config": {**config.text_config.to_dict(), "moe_layers": [1, 2, 9]}}) == 2


# Hand-written after the config.json files on the hub, where key names differ from what transformers 5 writes.
QWEN3 = {
    "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_hidden_layers": 48,
}
DEEPSEEK = {
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 27,
}
FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
HUB: dict[str, tuple[dict[str, Any], int]] = {
    "mixtral-8x7b": (
        {
            "model_type": "mixtral",
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
        },
        32,
    ),
    "qwen3-30b-a3b": (QWEN3, 48),
    "olmoe": (
        {
            "model_type": "olmoe",
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "num_hidden_layers": 16,
        },
        16,
    ),
    "deepseek-v2-lite": (
        {
            **DEEPSEEK,
            "model_type": "deepseek_v2",
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
        },
        26,
    ),
    "deepseek-v3": (
        {
            **DEEPSEEK,
            "model_type": "deepseek_v3",
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "num_hidden_layers": 61,
            "quantization_config": {**FP8_BLOCKS, "activation_scheme": "dynamic"},
        },
        58,
    ),
    "glm-4.5-air": (
        {
            "model_type": "glm4_moe",
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 1,
            "num_hidden_layers": 46,
        },
        45,
    ),
    "gpt-oss-20b": (
        {
            "model_type": "gpt_oss",
            "hidden_act": "silu",
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_local_experts": 32,
            "experts_per_token": 4,
            "swiglu_limit": 7.0,
            "num_hidden_layers": 24,
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
            },
        },
        24,
    ),
    "minimax-m2": (
        {
            "model_type": "minimax_m2",
            "hidden_act": "silu",
            "hidden_size": 3072,
            "intermediate_size": 1536,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "num_hidden_layers": 62,
            "quantization_config": {**FP8_BLOCKS, "modules_to_not_convert": ["gate", "lm_head"]},
        },
        62,
    ),
    "llama-4-maverick": (
        {
            "model_type": "llama4",
            "torch_dtype": "bfloat16",
            "vision_config": {"model_type": "llama4_vision_model", "hidden_size": 1408},
            "text_config": {
                "hidden_act": "silu",
                "hidden_size": 5120,
                "intermediate_size": 8192,
                "intermediate_size_mlp": 16384,
                "interleave_moe_layer_step": 2,
                "num_local_experts": 128,
                "num_experts_per_tok": 1,
                "num_hidden_layers": 48,
            },
        },
        24,
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_what_the_hub_has(name: str) -> None:
    values, layers = HUB[name]
    assert read_config(values) == PRESETS[name]
    assert count_moe_layers(values) == layers


def test_qwen2_of_the_hub() -> None:
    read = read_config(
        QWEN3 | {"model_type": "qwen2_moe", "num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": None}
    )
    assert (read.num_experts, read.top_k, read.routing) == (60, 4, RoutingConfig(method="softmax"))


def test_wrapped_models_and_null_groups() -> None:
    wrapped = {"model_type": "some_vl", "dtype": "float16", "language_config": QWEN3 | {"torch_dtype": None}}
    assert read_config(wrapped) == PRESETS["qwen3-30b-a3b"].replace(dtype="float16")
    quantized = wrapped | {"quantization_config": FP8_BLOCKS}
    assert read_config(quantized).scheme == "fp8_block128"
    assert read_config(QWEN3 | {"compression_config": PACKED_INT4}).scheme == "int4_w4a16"
    no_groups = HUB["deepseek-v3"][0] | {"n_group": None, "topk_group": None}
    assert read_config(no_groups).routing == SIGMOID
    assert read_config({k: v for k, v in QWEN3.items() if k != "torch_dtype"}).dtype == "bfloat16"
    assert read_config(QWEN3 | {"torch_dtype": torch.float16}).dtype == "float16"


V2, V3 = HUB["deepseek-v2-lite"][0], HUB["deepseek-v3"][0]
REFUSED: list[tuple[Any, str]] = [
    (
        QWEN3 | {"model_type": "qwen3_mo"},
        "unknown model_type 'qwen3_mo'; known: deepseek_v2, deepseek_v3, glm4_moe, gpt_oss, llama4",
    ),
    (QWEN3 | {"model_type": "qwen3_mo"}, "did you mean 'qwen3_moe'"),
    (QWEN3 | {"model_type": "zzz"}, "a MoeConfig of your own"),
    ({"model_type": "llama", "hidden_size": 8}, "'llama' is a dense model, none of its keys speaks of experts"),
    ({"hidden_size": 8}, "the mapping has no model_type"),
    (QWEN3 | {"num_experts": 0}, "a dense model: none of num_local_experts, num_experts, n_routed_experts"),
    (V3 | {"n_routed_experts": None}, "a dense model"),
    (QWEN3 | {"num_experts_per_tok": None}, "num_experts_per_tok or experts_per_token must be a positive"),
    (QWEN3 | {"moe_intermediate_size": None}, "moe_intermediate_size must be a positive integer, found nothing"),
    (QWEN3 | {"hidden_size": "big"}, "hidden_size must be a positive integer, found 'big'"),
    (QWEN3 | {"num_experts_per_tok": 129}, "top_k is 129, but there are only 128 experts"),
    (QWEN3 | {"hidden_act": "silo"}, "unknown hidden_act 'silo'\n  -> did you mean 'silu'"),
    (QWEN3 | {"torch_dtype": "float8"}, "unknown dtype 'float8'"),
    (V2 | {"norm_topk_prob": True}, "norm_topk_prob is true for deepseek_v2"),
    (V2 | {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc', which deepseek_v2 does not compute"),
    (V2 | {"topk_method": "group_limited_greedy", "n_group": None}, "n_group must be a positive integer"),
    (V3 | {"routed_scaling_factor": "x"}, "a value has the wrong type: could not convert string to float"),
    (QWEN3 | {"quantization_config": PACKED_INT4 | {"config_groups": ["x"]}}, "a value has the wrong type"),
    (V3 | {"scoring_func": "softmax"}, "scoring_func is 'softmax', which deepseek_v3 does not compute"),
    (V3 | {"n_group": 7}, "256 experts cannot be divided into 7 routing groups"),
    ({"text_config": {"model_type": "llama"}}, "text_config of the mapping: model_type 'llama' is a dense model"),
    (7, "cannot read a model configuration from a int"),
]


@pytest.mark.parametrize(("source", "message"), REFUSED)
def test_refused(source: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_config(source)


def test_refused_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no .*config\.json"):
        read_config(tmp_path)
    with pytest.raises(ConfigError, match="there is no mistralai/Mixtral-8x7B"):
        read_config("mistralai/Mixtral-8x7B")
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json: Expecting property name"):
        read_config(file)
    file.write_text("[]")
    with pytest.raises(ConfigError, match="holds a list, not a JSON object"):
        read_config(file)
    file.write_text(json.dumps({k: v for k, v in QWEN3.items() if k != "num_hidden_layers"}))
    with pytest.raises(ConfigError, match=r"config\.json: num_hidden_layers must be a positive integer"):
        count_moe_layers(file)


def test_known_model_types() -> None:
    assert known_model_types() == tuple(sorted([*MODELS, "llama4"]))


def test_reading_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, moe_core.hf as h, moe_core.presets; h.read_config(" + repr(QWEN3) + ");"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
