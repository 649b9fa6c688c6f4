"""The built-in layers, and what `--model` accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_core.config import MoeConfig
from moe_core.errors import ConfigError
from moe_core.presets import PRESETS, load_model, preset
from moe_core.quant.schemes import builtin_scheme

SIZES = {
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-235b-a22b": (128, 8, 4096, 1536),
    "deepseek-v3": (256, 8, 7168, 2048),
    "deepseek-v2-lite": (64, 6, 2048, 1408),
    "gpt-oss-120b": (128, 4, 2880, 2880),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "glm-4.5-air": (128, 8, 4096, 1408),
    "olmoe": (64, 8, 2048, 1024),
    "minimax-m2": (256, 8, 3072, 1536),
    "llama-4-scout": (16, 1, 5120, 8192),
    "llama-4-maverick": (128, 1, 5120, 8192),
}
MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def sizes(config: MoeConfig) -> tuple[int, int, int, int]:
    return (config.num_experts, config.top_k, config.hidden_size, config.intermediate_size)


def test_sizes() -> None:
    assert {name: sizes(config) for name, config in PRESETS.items()} == SIZES


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_stored_in_its_scheme(name: str) -> None:
    config = preset(name)
    scheme, inner = builtin_scheme(config.scheme), config.intermediate_size
    assert not scheme.matrix_problems(config.gate_up_factor * inner, config.hidden_size, config.group_size)
    assert not scheme.matrix_problems(config.hidden_size, inner, config.group_size)


def test_what_sets_a_model_apart() -> None:
    deepseek, oss, llama = preset("deepseek-v3"), preset("gpt-oss-120b"), preset("llama-4-scout")
    assert (deepseek.scheme, deepseek.routed_scaling_factor) == ("fp8_block128", 2.5)
    assert (deepseek.routing.num_groups, deepseek.routing.topk_groups) == (8, 4)
    assert (oss.scheme, oss.bias, oss.activation.name) == ("mxfp4_w4a16", True, "swiglu_oai")
    assert (llama.router_weight_on_input, llama.routing.method) == (True, "topk_sigmoid")


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="unknown model preset 'gpt-oss-12b'\n  -> did you mean 'gpt-oss-120b'"):
        preset("gpt-oss-12b")


def test_load_model(tmp_path: Path) -> None:
    folder = tmp_path / "tiny-mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    other = tmp_path / "layer.json"
    other.write_text(json.dumps(MIXTRAL))
    assert load_model("olmoe") == ("olmoe", PRESETS["olmoe"])
    for source, name in ((folder, "tiny-mixtral"), (folder / "config.json", "tiny-mixtral"), (other, "layer")):
        found, config = load_model(str(source))
        assert (found, sizes(config)) == (name, (4, 2, 64, 96))


def test_a_folder_of_a_preset_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("olmoe").mkdir()
    assert load_model("olmoe") == ("olmoe", PRESETS["olmoe"])
    Path("olmoe/config.json").write_text(json.dumps(MIXTRAL))
    assert sizes(load_model("olmoe")[1]) == (4, 2, 64, 96)
    monkeypatch.chdir("olmoe")
    assert load_model(".")[0] == "olmoe"


def test_load_model_refuses(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file or folder, and no preset") as caught:
        load_model("mixtral-8x7")
    hint = str(caught.value.hint)
    for form in ("(DIR)", "config.json", "preset", "did you mean 'mixtral-8x7b'"):
        assert form in hint
    with pytest.raises(ConfigError, match=r"a folder without a config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read"):
        load_model(str(tmp_path))
