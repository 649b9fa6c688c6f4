"""`moe-core bench`: every candidate is checked and timed, and the file that it saves ranks candidates."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner, Result

from moe_core import forget_plugins, resolve
from moe_core.cli._app import app
from moe_core.hf import read_config


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("MOE_CORE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("MOE_CORE_PLUGINS", "")
    config = {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    forget_plugins()
    yield str(tmp_path)
    forget_plugins()


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", *args], prog_name="moe-core")


def test_json(small):
    result = call("--model", small, "--tokens", "1,3", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["weight_bytes"] == 4 * 3 * 64 * 128 * 2
    assert {"standard+cpu/fused", "standard+reference/split"} <= {c["candidate"] for c in document["candidates"]}
    for row in document["candidates"]:
        assert row["ok"]
        assert set(row["ms"]) == {"1", "3"}
        assert all(low <= row["ms"][t] <= high for t, (low, high) in row["spread"].items())


def test_80_columns(small):
    result = call("--model", small, "--tokens", "1,3")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "standard+reference/split" in result.stdout


@pytest.mark.parametrize(
    "args",
    [("--dtype", "fp32"), ("--quant", "fp8_block128"), ("--quant", "int4_w4a16", "--group-size", "32"), ("--ep", "2")],
    ids=" ".join,
)
def test_other_layers(small, args):
    result = call("--model", small, "--tokens", "2", "--json", *args)
    assert result.exit_code == 0, result.output


def test_only_one_runner(small):
    document = json.loads(call("--model", small, "--tokens", "1", "--runner", "reference", "--json").stdout)
    assert {c["candidate"] for c in document["candidates"]} == {"standard+reference/split"}
    assert "did you mean 'reference'" in call("--model", small, "--runner", "refrence").stderr


def test_what_is_saved_ranks_candidates(small, tmp_path, monkeypatch):
    file = tmp_path / "times.json"
    assert call("--model", small, "--tokens", "1", "--runner", "cpu", "--save", str(file)).exit_code == 0
    assert call("--model", small, "--tokens", "1", "--runner", "reference", "--save", str(file)).exit_code == 0
    entries = json.loads(file.read_text())["entries"]
    assert len({entry["candidate"] for entry in entries}) == len(entries) >= 2  # the second run kept the first one's
    for entry in entries:
        entry["ms"] = {"1": 0.001 if entry["candidate"] == "standard+reference/split" else 5.0}
    file.write_text(json.dumps({"version": 1, "entries": entries}))
    monkeypatch.setenv("MOE_CORE_MEASUREMENTS", str(file))
    assert resolve(read_config(small)).chosen.id == "standard+reference/split"


def test_a_broken_candidate_is_a_result(small, monkeypatch, tmp_path):
    def explode(*args, **kwargs):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("moe_core.runners.cpu.runner.prepare", explode)
    file = tmp_path / "times.json"
    result = call("--model", small, "--tokens", "1", "--json", "--save", str(file))
    assert result.exit_code == 1
    rows = {row["candidate"]: row for row in json.loads(result.stdout)["candidates"]}
    assert "prepare raised RuntimeError: no such instruction" in rows["standard+cpu/fused"]["detail"]
    assert rows["standard+reference/split"]["ok"]
    assert {entry["candidate"] for entry in json.loads(file.read_text())["entries"]} == {"standard+reference/split"}


def test_a_layer_that_does_not_fit_is_refused_with_bytes(small, monkeypatch):
    monkeypatch.setattr("moe_core.cli._timing.free_bytes", lambda device: 1000)
    result = call("--model", small)
    assert result.exit_code == 2
    assert "error: this layer does not fit: 589,824 bytes" in result.stderr
    assert "1,000 bytes" in result.stderr


def test_free_memory_is_known_here():
    import torch

    from moe_core.cli._timing import free_bytes

    found = free_bytes(torch.device("cpu"))
    assert found is None or found > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tokens", "a"), "not a list of numbers"),
        (("--tokens", "0"), "1 or more"),
        (("--save", "{folder}/missing/x.json"), "cannot be written"),
    ],
)
def test_bad_questions(small, args, message):
    result = call("--model", small, "--runner", "reference", "--tokens", "1", *(a.format(folder=small) for a in args))
    assert result.exit_code == 2
    assert message in result.stderr


def test_nothing_usable_is_exit_code_3(small, monkeypatch):
    monkeypatch.setenv("MOE_CORE_ALLOW_LAST_RESORT", "0")
    result = call("--model", small, "--quant", "fp8_block128")
    assert result.exit_code == 3
    assert "moe-core explain" in result.stdout
