"""Read Hugging Face model configurations, without transformers and without torch.

Source of every fact (key names, defaults of missing keys, how the router computes): the modeling and
configuration code of transformers 5.23, `models/<model_type>/`, and the config.json files on the hub. Sizes are
never defaulted: a file that does not state them is refused.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from moe_core.config import Activation, MoeConfig, RoutingConfig
from moe_core.errors import ConfigError, did_you_mean
from moe_core.quant.schemes import BUILTIN_SCHEMES, builtin_scheme

HfSource: TypeAlias = str | os.PathLike[str] | Mapping[str, Any] | object

_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts")  # aliases in transformers 5
_TOP_K: Final = ("num_experts_per_tok", "experts_per_token")
_NESTED: Final = ("text_config", "llm_config", "language_config")
_ACTIVATIONS: Final = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


@dataclass(frozen=True, slots=True)
class _Section:
    """The part that describes the language model; `outer` is the whole configuration."""

    values: Mapping[str, Any]
    outer: Mapping[str, Any]
    label: str
    model_type: str

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of `names` that is set; null counts as missing."""
        return next((self.values[n] for n in names if self.values.get(n) is not None), default)

    def size(self, *names: str, default: int | None = None) -> int:
        value = self.get(*names, default=default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            found = "nothing" if value is None else repr(value)
            raise ConfigError(f"{' or '.join(names)} must be a positive integer, found {found}")
        return value

    def expect(self, name: str, *known: str) -> str:
        """The value of `name` (default: the first), which must be one that the modeling code computes."""
        value = str(self.get(name, default=known[0]))
        if value not in known:
            message = f"{name} is {value!r}, which {self.model_type} does not compute"
            raise ConfigError(message, hint=did_you_mean(value, known))
        return value


_Routing: TypeAlias = Callable[[_Section], RoutingConfig]
_Layers: TypeAlias = Callable[[_Section, int], Collection[int]]


def _softmax(section: _Section) -> RoutingConfig:
    return RoutingConfig(method="softmax", renormalize=bool(section.get("norm_topk_prob", default=False)))


def _deepseek_v2(section: _Section) -> RoutingConfig:
    section.expect("scoring_func", "softmax")
    if section.get("norm_topk_prob", default=False):
        raise ConfigError(
            "norm_topk_prob is true for deepseek_v2: transformers ignores it, DeepSeek's own code then leaves"
            " out routed_scaling_factor, so what is meant is unknown",
            hint="set norm_topk_prob to false, or write the MoeConfig yourself",
        )
    if section.expect("topk_method", "greedy", "group_limited_greedy") == "greedy":
        return RoutingConfig(method="softmax")
    groups, chosen = section.size("n_group"), section.size("topk_group")
    return RoutingConfig(method="softmax", num_groups=groups, topk_groups=chosen, group_score="max")


def _sigmoid_groups(n_group: int, topk_group: int) -> _Routing:
    """DeepSeek-V3 and those built like it, with the defaults of missing keys (a null says "no groups")."""

    def routing(section: _Section) -> RoutingConfig:
        section.expect("scoring_func", "sigmoid")
        section.expect("topk_method", "noaux_tc")
        groups = section.values.get("n_group", n_group) or 1
        return RoutingConfig(
            method="sigmoid",
            renormalize=bool(section.get("norm_topk_prob", default=True)),
            correction_bias=True,
            num_groups=groups,
            topk_groups=1 if groups == 1 else section.size("topk_group", default=topk_group),
            group_score="top2_sum" if groups > 1 else "max",
        )

    return routing


def _minimax_m2(section: _Section) -> RoutingConfig:
    section.expect("scoring_func", "sigmoid")
    bias = bool(section.get("use_routing_bias", default=True))
    return RoutingConfig(method="sigmoid", renormalize=True, correction_bias=bias)


def _fixed(routing: RoutingConfig) -> _Routing:
    return lambda section: routing


def _hidden_act(section: _Section) -> Activation:
    name = str(section.get("hidden_act", default="silu"))
    if name not in _ACTIVATIONS:
        raise ConfigError(f"unknown hidden_act {name!r}", hint=did_you_mean(name, _ACTIVATIONS))
    return Activation(name=_ACTIVATIONS[name])


def _gpt_oss_act(section: _Section) -> Activation:
    # GptOssExperts never looks at hidden_act.
    alpha, limit = section.get("swiglu_alpha", default=1.702), section.get("swiglu_limit", default=7.0)
    return Activation.swiglu_oai(alpha=float(alpha), limit=float(limit))


def _all_layers(section: _Section, layers: int) -> Collection[int]:
    return range(layers)


def _qwen_layers(section: _Section, layers: int) -> Collection[int]:
    step, dense = section.size("decoder_sparse_step", default=1), section.get("mlp_only_layers", default=())
    return [i for i in range(layers) if i not in dense and (i + 1) % step == 0]


def _after_dense(default: int) -> _Layers:
    def layers_of(section: _Section, layers: int) -> Collection[int]:
        first = int(section.get("first_k_dense_replace", default=default))
        step = section.size("moe_layer_freq", default=1)  # of DeepSeek's own code; not in transformers
        return [i for i in range(layers) if i >= first and i % step == 0]

    return layers_of


def _llama4_layers(section: _Section, layers: int) -> Collection[int]:
    step, stated = section.size("interleave_moe_layer_step", default=1), section.get("moe_layers")
    return range(step - 1, layers, step) if stated is None else set(stated) & set(range(layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class _ModelType:
    """How one model_type is read. scaling: default of routed_scaling_factor, None where it has none."""

    routing: _Routing
    layers: _Layers = _all_layers
    activation: Callable[[_Section], Activation] = _hidden_act
    intermediate: str = "intermediate_size"
    scaling: float | None = None
    bias: bool = False
    router_weight_on_input: bool = False


_OWN: Final = "moe_intermediate_size"  # where dense layers (or a shared expert) have another size
_TOPK_SOFTMAX: Final = _fixed(RoutingConfig(method="topk_softmax"))
_TOPK_SIGMOID: Final = _fixed(RoutingConfig(method="topk_sigmoid"))
_LLAMA4: Final = _ModelType(routing=_TOPK_SIGMOID, layers=_llama4_layers, router_weight_on_input=True)
_V3, _GLM4 = _sigmoid_groups(8, 4), _sigmoid_groups(1, 1)
_MODEL_TYPES: Final[dict[str, _ModelType]] = {
    "mixtral": _ModelType(routing=_fixed(RoutingConfig(method="softmax", renormalize=True))),
    "qwen2_moe": _ModelType(routing=_softmax, layers=_qwen_layers, intermediate=_OWN),
    "qwen3_moe": _ModelType(routing=_softmax, layers=_qwen_layers, intermediate=_OWN),
    "olmoe": _ModelType(routing=_softmax),
    "deepseek_v2": _ModelType(routing=_deepseek_v2, layers=_after_dense(0), intermediate=_OWN, scaling=1.0),
    "deepseek_v3": _ModelType(routing=_V3, layers=_after_dense(3), intermediate=_OWN, scaling=2.5),
    "glm4_moe": _ModelType(routing=_GLM4, layers=_after_dense(1), intermediate=_OWN, scaling=1.0),
    "gpt_oss": _ModelType(routing=_TOPK_SOFTMAX, activation=_gpt_oss_act, bias=True),
    "minimax_m2": _ModelType(routing=_minimax_m2),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
}

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
    # Early nvfp4 files call the groups of 16 plain groups.
    strategy = "tensor_group" if (args.get("num_bits"), strategy, size) == (4, "group", 16) else strategy
    return f"{args.get('type', 'int')}{args.get('num_bits', 8)} {strategy}"


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


def _quantization(stated: object) -> tuple[str, int | None]:
    """(scheme, group_size) of a `quantization_config`, None where there is none."""
    if stated is None:
        return "bf16", None
    quant = _mapping(stated)
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


def _mapping(value: object) -> Mapping[str, Any] | None:
    """A mapping, or a configuration object of transformers as one; None for anything else."""
    if not isinstance(value, Mapping) and callable(getattr(value, "to_dict", None)):
        value = value.to_dict()  # type: ignore[attr-defined]
    return value if isinstance(value, Mapping) else None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _load(source: HfSource) -> tuple[Mapping[str, Any], str]:
    if not isinstance(source, (str, os.PathLike)):
        found = _mapping(source)
        if found is None:
            raise ConfigError(
                f"cannot read a model configuration from a {type(source).__name__}",
                hint="give a checkpoint folder, a config.json, its content, or a transformers config object",
            )
        return found, "the mapping" if found is source else type(source).__name__
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ConfigError(
            f"there is no {path}",
            hint="give a checkpoint folder or a config.json on this machine (nothing is downloaded)",
        )
    values, modelopt = _read_json(path), path.with_name("hf_quant_config.json")
    if "quantization_config" not in values and modelopt.is_file():  # older ModelOpt exports
        stated = _read_json(modelopt).get("quantization") or {}
        values = {**values, "quantization_config": {"quant_method": "modelopt", **stated}}
    return values, str(path)


def _section(source: HfSource) -> _Section:
    values, label = _load(source)
    outer = values
    nested = next((key for key in _NESTED if _mapping(values.get(key))), None)
    if nested is not None:
        values, label = _mapping(values[nested]) or {}, f"{nested} of {label}"
    name = values.get("model_type") or outer.get("model_type")
    if str(name) in _MODEL_TYPES:
        return _Section(values, outer, label, str(name))
    known = ", ".join(known_model_types())
    if name is None:
        raise ConfigError(f"{label} has no model_type", hint=f"known model types: {known}")
    if not any("expert" in key for key in values):
        message = f"{label}: model_type {name!r} is a dense model, none of its keys speaks of experts"
        raise ConfigError(message, hint=f"known model types with experts: {known}")
    close = did_you_mean(str(name), _MODEL_TYPES)
    other = "describe the layer with a MoeConfig of your own"
    hint = close if close.startswith("did you mean") else other
    raise ConfigError(f"{label}: unknown model_type {name!r}; known: {known}", hint=hint)


def _build(section: _Section) -> MoeConfig:
    kind = _MODEL_TYPES[section.model_type]
    if not section.get(*_EXPERTS, default=0):
        raise ConfigError(
            f"a dense model: none of {', '.join(_EXPERTS)} is set",
            hint="only layers with experts can be run; is this the configuration of the right model?",
        )
    sections = (section.values, section.outer)
    names = ("quantization_config", "compression_config")
    scheme, group_size = _quantization(next((s[k] for s in sections for k in names if s.get(k)), None))
    dtype = next((s[k] for s in sections for k in ("dtype", "torch_dtype") if s.get(k)), "bfloat16")
    scaling = 1.0 if kind.scaling is None else section.get("routed_scaling_factor", default=kind.scaling)
    return MoeConfig(
        num_experts=section.size(*_EXPERTS),
        top_k=section.size(*_TOP_K),
        hidden_size=section.size("hidden_size"),
        intermediate_size=section.size(kind.intermediate),
        dtype=str(dtype).removeprefix("torch."),
        scheme=scheme,
        group_size=group_size,
        activation=kind.activation(section),
        bias=kind.bias,
        routing=kind.routing(section),
        routed_scaling_factor=float(scaling),
        router_weight_on_input=kind.router_weight_on_input,
    )


def known_model_types() -> tuple[str, ...]:
    """Every `model_type` that can be read, sorted."""
    return tuple(sorted(_MODEL_TYPES))


def read_config(source: HfSource) -> MoeConfig:
    """The MoE layer of a model; `source` as for `MoeConfig.from_hf`. Raises ConfigError: where, and why."""
    section = _section(source)
    try:
        return _build(section)
    except ConfigError as error:
        raise ConfigError(f"{section.label}: {error.message}", hint=error.hint) from None


def count_moe_layers(source: HfSource) -> int:
    """How many of the model's decoder layers have experts (multi-token-prediction layers not counted)."""
    section = _section(source)
    try:
        return len(_MODEL_TYPES[section.model_type].layers(section, section.size("num_hidden_layers")))
    except ConfigError as error:
        raise ConfigError(f"{section.label}: {error.message}", hint=error.hint) from None
