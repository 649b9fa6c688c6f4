"""Hugging Face `quantization_config`s as quant schemes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from moe_core.errors import ConfigError
from moe_core.hf import read_config

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

FP8_BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
FP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}


def packed(weights: dict[str, Any], acts: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": acts}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **more}


TWO_GROUPS = {
    "a": {"targets": ["Linear"], "weights": INT8 | {"strategy": "channel"}},
    "b": {"targets": [r"re:.*mlp\.experts\..*"], "weights": INT4},
}
TOKEN: dict[str, Any] = {"strategy": "token", "dynamic": True}
GOOD: list[tuple[dict[str, Any], str, int | None]] = [
    ({}, "bf16", None),
    (FP8_BLOCKS, "fp8_block128", None),
    (transformers.FineGrainedFP8Config().to_dict(), "fp8_block128", None),
    ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8_tensor", None),
    ({"quant_method": "fbgemm_fp8"}, "fp8_channel", None),
    (transformers.Mxfp4Config().to_dict(), "mxfp4_w4a16", None),
    ({"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}, "int4_w4a16", 64),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {r"-:.*mlp\.gate$": {}}}, "int4_w4a16", 128),
    (transformers.AwqConfig(group_size=32).to_dict(), "int4_w4a16", 32),
    (packed(INT4), "int4_w4a16", 32),
    (packed(INT4 | {"strategy": None, "actorder": "weight"}), "int4_w4a16", 32),
    (packed(INT8 | {"strategy": "channel"}, INT8 | TOKEN), "int8_channel", None),
    (packed(INT8 | {"group_size": -1}), "int8_w8a16", None),
    (packed(FP8 | {"strategy": "tensor"}, FP8 | {"strategy": "tensor", "dynamic": False}), "fp8_tensor", None),
    (packed(FP8 | {"strategy": "channel"}, FP8 | TOKEN), "fp8_channel", None),
    (
        packed(FP8 | {"strategy": "block", "block_structure": [128, 128]}, FP8 | {"group_size": 128}),
        "fp8_block128",
        None,
    ),
    (packed(FP4, FP4 | {"dynamic": "local"}, ignore=["lm_head", r"re:.*mlp.gate$"]), "nvfp4", None),
    (packed(FP4 | {"strategy": "group"}, FP4), "nvfp4", None),
    (packed(FP4 | {"strategy": "group", "group_size": 32}), "mxfp4_w4a16", None),
    ({"quant_method": "compressed-tensors", "config_groups": TWO_GROUPS}, "int4_w4a16", 32),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*shared_expert*"]}, "nvfp4", None),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8_tensor", None),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["model.layers.3*"]}, "nvfp4", None),
    # The experts themselves were left alone.
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["*.mlp.experts*"]}, "bf16", None),
    (FP8_BLOCKS | {"modules_to_not_convert": ["mlp.experts"]}, "bf16", None),
    (packed(INT4, ignore=[r"re:.*\.experts\..*"]), "bf16", None),
]


@pytest.mark.parametrize(("quant", "scheme", "group_size"), GOOD)
def test_quantization(quant: dict[str, Any], scheme: str, group_size: int | None) -> None:
    read = read_config(QWEN3 | {"quantization_config": quant})
    assert (read.scheme, read.group_size) == (scheme, group_size)


def test_modelopt_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    stated = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(stated))
    assert read_config(tmp_path).scheme == "nvfp4"


BAD: list[tuple[Any, str]] = [
    ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "weight_block_size [64, 64]: fp8_block128 has"),
    ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 with fmt 'e5m2'"),
    ({"quant_method": "fp8", "expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "no scheme for quant_method 'bitsandbytes'"),
    ({"bits": 4}, "quant_method 'None'"),
    ("fp8", "no scheme for a str, which is no mapping"),
    ({"quant_method": "gptq", "bits": 8}, "gptq with 8 bits"),
    ({"quant_method": "gptq", "bits": 4, "desc_act": True}, "gptq with activation ordering (desc_act)"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*up_proj": {"bits": 8}}}, "dynamic rules"),
    ({"quant_method": "awq", "bits": 4, "group_size": -1}, "does not allow group size -1"),
    (packed(INT4 | {"group_size": 16}), "does not allow group size 16"),
    (packed(INT4 | {"group_size": -1, "strategy": None}), "weights int4 channel, activations none"),
    (packed(INT4, INT8 | TOKEN), "weights int4 group, activations int8 token"),
    (packed(INT4 | {"actorder": "group"}), "activation ordering (actorder 'group')"),
    (packed(INT8 | {"strategy": "channel", "symmetric": False}), "int8 channel, activations none, asymmetric"),
    (packed(FP8 | {"strategy": "channel"}, FP8 | TOKEN | {"dynamic": False}), "float8 token, static"),
    (packed(FP8 | {"strategy": "block", "block_structure": [64, 64]}, FP8 | {"group_size": 128}), "of [64, 64]"),
    (packed(FP4), "weights float4 tensor_group, activations none"),
    (packed(FP4 | {"strategy": "group", "group_size": 64}), "(group_size 64)"),
    ({"quant_method": "compressed-tensors"}, "config_groups give the experts none"),
    (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {k: v | {"targets": ["Linear"]} for k, v in TWO_GROUPS.items()},
        },
        "give the experts int4_w4a16 and int8_w8a16, one is needed",
    ),
    ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "modelopt quant_algo 'MIXED_PRECISION'"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32}, "group_size 32"),
    (FP8_BLOCKS | {"ignored_layers": ["re:*"]}, "'re:*' is no regular expression"),
]


@pytest.mark.parametrize(("quant", "message"), BAD)
def test_quantization_that_is_refused(quant: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        read_config(QWEN3 | {"quantization_config": quant})
    assert str(caught.value).startswith("the mapping: ")
