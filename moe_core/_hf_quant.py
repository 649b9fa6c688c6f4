"""The `quantization_config` of a Hugging Face checkpoint as a quant scheme. Torch-free."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from typing import Any, Final

from moe_core.errors import ConfigError
from moe_core.quant.schemes import BUILTIN_SCHEMES, builtin_scheme


def mapping(value: object) -> Mapping[str, Any] | None:
    """A mapping, or a configuration object of transformers as one; None for anything else."""
    if not isinstance(value, Mapping) and callable(getattr(value, "to_dict", None)):
        value = value.to_dict()  # type: ignore[attr-defined]
    return value if isinstance(value, Mapping) else None


# What compressed-tensors states: (weights, activations) -> (scheme, its group size where that is fixed).
_COMPRESSED: Final = {
    ("int4 group", "none"): ("int4_w4a16", None),
    ("int8 channel", "int8 token"): ("int8_channel", None),
    ("int8 channel", "none"): ("int8_w8a16", None),
    ("float8 tensor", "float8 tensor"): ("fp8_tensor", None),
    ("float8 channel", "float8 token"): ("fp8_channel", None),
    ("float8 block", "float8 group"): ("fp8_block128", None),
    ("float8 group", "float8 group"): ("mxfp8", 32),
    ("float4 tensor_group", "float4 tensor_group"): ("nvfp4", 16),
    ("float4 group", "none"): ("mxfp4_w4a16", 32),
    ("float4 group", "float4 group"): ("mxfp4", 32),
}
_MODELOPT: Final = {"NVFP4": "nvfp4", "FP8": "fp8_tensor", "FP8_PER_CHANNEL_PER_TOKEN": "fp8_channel"}
_FIXED_METHODS: Final = {"mxfp4": "mxfp4_w4a16", "fbgemm_fp8": "fp8_channel"}
_LEFT_OUT: Final = ("ignore", "ignored_layers", "modules_to_not_convert", "exclude_modules")
# An up projection under each name in use. Two layers, so that a pattern for one layer does not match.
_AN_EXPERT: Final = (
    ("model.layers.353.mlp.experts.0.up_proj", "model.layers.707.mlp.experts.0.up_proj"),
    ("model.layers.353.block_sparse_moe.experts.0.w3", "model.layers.707.block_sparse_moe.experts.0.w3"),
    ("model.layers.353.feed_forward.experts.0.up_proj", "model.layers.707.feed_forward.experts.0.up_proj"),
)


def _no_scheme(found: str) -> ConfigError:
    known = ", ".join(scheme.id for scheme in BUILTIN_SCHEMES)
    return ConfigError(f"quantization_config: no scheme for {found}", hint=f"moe_core has: {known}")


def _names_experts(pattern: str) -> bool:
    """True where a module pattern ("re:" regex, glob, or a part of the dotted path) takes in the experts."""
    regex = "" if any(c in pattern for c in "*?[") else rf"(.*\.)?{re.escape(pattern)}(\.|$)"
    regex = pattern[3:] if pattern.startswith("re:") else regex or fnmatch.translate(pattern)
    try:
        return any(all(re.match(regex, name) for name in names) for names in _AN_EXPERT)
    except re.error as error:
        raise ConfigError(f"quantization_config: {pattern!r} is no regular expression: {error}") from None


def _describe(args: Mapping[str, Any] | None) -> str:
    if not args:
        return "none"
    size = args.get("group_size")
    strategy = args.get("strategy") or ("tensor" if not size else "channel" if size < 0 else "group")
    text = f"{args.get('type', 'int')}{args.get('num_bits', 8)} {strategy}"
    # Early nvfp4 files call their groups of 16 plain groups.
    return "float4 tensor_group" if (text, size) == ("float4 group", 16) else text


def _compressed_group(group: Mapping[str, Any]) -> tuple[str, int | None]:
    weights, acts = group.get("weights") or {}, group.get("input_activations")
    found = f"compressed-tensors weights {_describe(weights)}, activations {_describe(acts)}"
    scheme, fixed = _COMPRESSED.get((_describe(weights), _describe(acts)), ("", None))
    size, block = weights.get("group_size"), weights.get("block_structure")
    if not scheme or (fixed and size != fixed):
        raise _no_scheme(f"{found} (group_size {size})")
    if scheme == "fp8_block128" and block not in ([128, 128], (128, 128)):
        raise _no_scheme(f"{found} with blocks of {block}: fp8_block128 has [128, 128]")
    if scheme != "int4_w4a16" and weights.get("symmetric") is False:
        raise _no_scheme(f"{found}, asymmetric")
    if weights.get("actorder") in ("group", "dynamic"):
        raise _no_scheme(f"{found} with activation ordering (actorder {weights['actorder']!r})")
    if "token" in _describe(acts) and acts is not None and acts.get("dynamic") is False:
        raise _no_scheme(f"{found}, static")
    return scheme, size if scheme == "int4_w4a16" else None


def _compressed(quant: Mapping[str, Any]) -> tuple[str, int | None]:
    groups = list((quant.get("config_groups") or {}).values())
    if len(groups) > 1:  # one that names the experts goes before one for all linear layers
        named = [g for g in groups if any(_names_experts(str(t)) for t in g.get("targets") or ())]
        groups = named or [g for g in groups if "Linear" in (g.get("targets") or ())]
    schemes = sorted({_compressed_group(group) for group in groups}, key=str)
    if len(schemes) != 1:
        found = " and ".join(name for name, _ in schemes) or "none"
        raise _no_scheme(f"compressed-tensors: its config_groups give the experts {found}, one is needed")
    return schemes[0]


def _int4(method: str, quant: Mapping[str, Any]) -> tuple[str, int | None]:
    bits, size = (
        quant.get("bits", quant.get("w_bit")),
        quant.get("group_size", quant.get("q_group_size", 128)),
    )
    if bits != 4:
        raise _no_scheme(f"{method} with {bits} bits")
    if quant.get("desc_act"):
        raise _no_scheme(f"{method} with activation ordering (desc_act)")
    rules = [str(rule).removeprefix("+:").removeprefix("-:") for rule in quant.get("dynamic") or ()]
    if any(_names_experts(f"re:{rule}") for rule in rules):
        raise _no_scheme(f"{method} with dynamic rules for the experts")
    return "int4_w4a16", size


def _fp8(quant: Mapping[str, Any]) -> tuple[str, int | None]:
    block, fmt = quant.get("weight_block_size"), str(quant.get("fmt") or "e4m3")
    if "e4m3" not in fmt or quant.get("expert_dtype", "fp8") != "fp8":
        raise _no_scheme(f"fp8 with fmt {fmt!r} and expert_dtype {quant.get('expert_dtype', 'fp8')!r}")
    if block not in (None, [128, 128], (128, 128)):
        raise _no_scheme(f"fp8 with weight_block_size {block}: fp8_block128 has [128, 128]")
    return "fp8_tensor" if block is None else "fp8_block128", None


def read_quantization(stated: object) -> tuple[str, int | None]:
    """(scheme, group_size) of a `quantization_config`, None where there is none."""
    if stated is None:
        return "bf16", None
    quant = mapping(stated)
    if quant is None:
        raise _no_scheme(f"a {type(stated).__name__}, which is no mapping")
    method = quant.get("quant_method")
    method = str(getattr(method, "value", method))  # transformers has an enum here
    if any(_names_experts(str(p)) for key in _LEFT_OUT for p in quant.get(key) or ()):
        return "bf16", None
    if method == "fp8":
        return _fp8(quant)
    if method in _FIXED_METHODS:
        return _FIXED_METHODS[method], None
    if method in ("gptq", "awq"):
        scheme, size = _int4(method, quant)
    elif method == "compressed-tensors":
        scheme, size = _compressed(quant)
    elif method in ("modelopt", "modelopt_fp4"):
        algorithm, size = str(quant.get("quant_algo")), None
        if algorithm not in _MODELOPT or (algorithm == "NVFP4" and quant.get("group_size", 16) != 16):
            raise _no_scheme(f"modelopt quant_algo {algorithm!r}, group_size {quant.get('group_size')}")
        scheme = _MODELOPT[algorithm]
    else:
        raise _no_scheme(f"quant_method {method!r}")
    builtin_scheme(scheme).scale_layout(size)
    return scheme, size
