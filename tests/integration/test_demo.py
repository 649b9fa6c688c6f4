"""`moe_core.demo`: the main job from a checkpoint on disk to generated text, and what goes wrong on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import moe_core.integrations.transformers as bridge
from moe_core import demo
from moe_core.errors import ConfigError
from moe_core.integrations.random_checkpoint import write_random_checkpoint
from moe_core.runners.cpu import weights as cpu_weights

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("random"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """One layer, in bfloat16, without a tokenizer."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        eos_token_id=None,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


@pytest.fixture(autouse=True)
def _forget_names(register: Make) -> None:
    """The demo registers; the fixture takes its name away again."""


def test_the_random_checkpoint_end_to_end(random_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(str(random_checkpoint), max_new_tokens=4) == 0
    out = capsys.readouterr().out
    for expected in (
        "the plan of the first MoE layer",
        "runner:cpu",
        "eager   the same tokens",
        "prefill",
        "4 MoE layers in float32",
        "the two agree",
        "transformers' own grouped_mm differs",
    ):
        assert expected in out


def test_numbers(random_checkpoint: Path) -> None:
    result, report = demo.measure(str(random_checkpoint), "Hello", 5, None)
    assert result.ok
    assert (result.model, result.dtype, result.layers) == (str(random_checkpoint), "float32", 4)
    assert result.plan == "standard+cpu/fused"
    assert result.fingerprint in report
    assert result.layout in ("onednn_blocked", "rows")
    assert result.tokens == result.eager_tokens
    assert 1 <= len(result.tokens) <= 5
    assert isinstance(result.text, str)
    assert result.max_logit > 1
    assert result.max_logit_difference < 1e-4 * result.max_logit
    assert min(result.prefill_s, result.eager_prefill_s, result.generate_s, result.eager_generate_s) > 0


def test_without_a_model_a_random_one_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.run(None, max_new_tokens=1, json=True, scratch=tmp_path / "made") == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(tmp_path / "made")
    assert (tmp_path / "made" / "model.safetensors").is_file()
    assert (tmp_path / "made" / "tokenizer.json").is_file()


def test_json_is_all_that_is_printed(small: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert demo.run(str(small), max_new_tokens=3, json=True) == 0
    out, _ = capfd.readouterr()
    found = json.loads(out)
    assert found["ok"] is True
    assert found["dtype"] == "bfloat16"
    assert "runner:cpu" in found["report"]
    assert len(found["tokens"]) == 3


def test_a_checkpoint_without_a_tokenizer_shows_ids(small: Path) -> None:
    result, _ = demo.measure(str(small), "any prompt: \N{SNOWMAN}", 3, None)
    assert result.text == " ".join(map(str, result.tokens))


def test_tokenizers_that_are_of_no_use(small: Path, random_checkpoint: Path) -> None:
    (small / "tokenizer.json").write_text("{")
    (small / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ConfigError, match="transformers cannot load the tokenizer of"):
        demo.measure(str(small), "x", 1, None)
    with pytest.raises(ConfigError, match="makes no token of the prompt ''"):
        demo.measure(str(random_checkpoint), "", 1, None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(small: Path, dtype: str) -> None:
    result, _ = demo.measure(str(small), "x", 2, dtype)
    assert result.dtype == dtype
    assert result.ok


def test_unknown_dtype(small: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown dtype 'bfloat61'[\s\S]*did you mean 'bfloat16'"):
        demo.run(str(small), dtype="bfloat61")


@pytest.mark.parametrize(("wrong", "number"), [(1.0, "finite"), (float("nan"), "null"), (float("inf"), "null")])
def test_exit_code_where_logits_differ(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: float, number: str
) -> None:
    forward = bridge.experts_forward
    monkeypatch.setattr(bridge, "experts_forward", lambda *args: forward(*args) + wrong)
    assert demo.run(str(small), max_new_tokens=1, dtype="float32", json=True) == 1
    out = capsys.readouterr().out
    found = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["ok"] is False
    assert (found["max_logit_difference"] is None) == (number == "null")
    assert demo.run(str(small), max_new_tokens=1, dtype="float32") == 1
    assert "the two DIFFER by more than rounding explains" in capsys.readouterr().out


def test_folders_that_are_no_checkpoint(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing' is no folder[\s\S]*downloaded checkpoint"):
        demo.run(str(tmp_path / "missing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty' holds no config\.json: it is not a Hugging Face checkpoint"):
        demo.run(str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="is no folder"):
        demo.run(str(small / "config.json"))


def test_checkpoints_that_transformers_cannot_load(small: Path, tmp_path: Path) -> None:
    def damaged(name: str, file: str, content: bytes | None) -> str:
        folder = Path(shutil.copytree(small, tmp_path / name))
        (folder / file).unlink()
        if content is not None:
            (folder / file).write_bytes(content)
        return str(folder)

    for folder in (
        damaged("unfinished", "config.json", b'{"model_type": "qwen3_moe",'),
        damaged("unknown", "config.json", b'{"model_type": "no_such_model"}'),
        damaged("no_weights", "model.safetensors", None),
        damaged("half_weights", "model.safetensors", (small / "model.safetensors").read_bytes()[:-100]),
    ):
        with pytest.raises(ConfigError, match=f"transformers cannot load '{folder}': "):
            demo.run(folder)


def test_a_dense_model(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM ran no layer through moe_core[\s\S]*mixture-of-experts"):
        demo.run(str(tmp_path))


def test_a_second_copy_of_the_experts_that_does_not_fit(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = 4 * 3 * 16 * 32 * 2
    for available, layout in ((2 * experts, None), (experts, "rows"), (0, "rows")):
        monkeypatch.setattr(cpu_weights, "available_bytes", lambda available=available: available)
        result, _ = demo.measure(str(small), "x", 1, None)
        assert result.ok
        assert layout in (None, result.layout)


def test_one_packed_copy_at_a_time(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager and grouped_mm run from the model's own weights, after the packed copy is gone."""
    held: dict[str, int] = {}
    measure_time = demo._time

    def spy(model: Any, *args: Any) -> Any:
        held[model.config._experts_implementation] = len(bridge.plans(model))
        return measure_time(model, *args)

    monkeypatch.setattr(demo, "_time", spy)
    demo.measure(str(small), "x", 1, None)
    assert held == {"moe_core": 1, "eager": 0}


def test_what_transformers_logs_is_as_before(small: Path) -> None:
    logging = transformers.utils.logging
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    demo.measure(str(small), "x", 1, None)
    with pytest.raises(ConfigError):
        demo.measure("/no/such/folder", "x", 1, None)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"this needs transformers[\s\S]*moe-core\[transformers\]"):
        demo.run("anything")
