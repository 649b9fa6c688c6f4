"""Read Hugging Face model configurations, without transformers and without torch.

Source of every fact (key names, defaults of missing keys, how the router computes): the modeling and
configuration code of transformers 5.23, `models/<model_type>/`, and the config.json files on the hub.
Sizes are never defaulted: a file that does not state them is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

from moe_core._hf_quant import mapping, read_quantization
from moe_core.config import Activation, MoeConfig, RoutingConfig
from moe_core.errors import ConfigError, did_you_mean

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
        found = mapping(source)
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
    nested = next((key for key in _NESTED if mapping(values.get(key))), None)
    if nested is not None:
        values, label = mapping(values[nested]) or {}, f"{nested} of {label}"
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
    scheme, group_size = read_quantization(next((s[k] for s in sections for k in names if s.get(k)), None))
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


@contextmanager
def _placed(label: str) -> Iterator[None]:
    """Say in every error where it was found, also where a value has a type that no check foresaw."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{label}: {error.message}", hint=error.hint) from None
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{label}: a value has the wrong type: {error}") from error


def known_model_types() -> tuple[str, ...]:
    """Every `model_type` that can be read, sorted."""
    return tuple(sorted(_MODEL_TYPES))


def read_config(source: HfSource) -> MoeConfig:
    """The MoE layer of a model; `source` as for `MoeConfig.from_hf`. Raises ConfigError: where, and why."""
    section = _section(source)
    with _placed(section.label):
        return _build(section)


def count_moe_layers(source: HfSource) -> int:
    """How many of the model's decoder layers have experts (multi-token-prediction layers not counted)."""
    section = _section(source)
    with _placed(section.label):
        return len(_MODEL_TYPES[section.model_type].layers(section, section.size("num_hidden_layers")))
