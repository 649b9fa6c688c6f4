"""`moe-core tune`: the core makes the layer and names the file, the runner measures, everybody sees what came of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moe_core import forget_plugins
from moe_core.cli._app import app
from moe_core.errors import SpecError
from moe_core.protocols import RunningState, TuningRow
from moe_core.registry import Registry
from moe_core.settings import Settings
from moe_core.testing.fakes import fake_plugin, runner_like
from moe_core.tuning import default_store, named_store


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("MOE_CORE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("MOE_CORE_PLUGINS", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
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


@pytest.fixture
def install(monkeypatch):
    """install(tune, base="cpu", **changes): a runner `acme` with that `tune` beside the core's. Gives the jobs."""

    def make(tune, base="cpu", **changes):
        jobs = []

        def recording(job):
            jobs.append(job)
            return tune(job)

        plugin = fake_plugin("acme", **runner_like(base, "acme", tune=recording, **changes))
        made = Registry(plugins=[plugin], autoload=False)
        monkeypatch.setattr("moe_core.cli.tune.default_registry", lambda: made)
        return jobs

    return make


def measured(job):
    """A runner's tune as it should be: it runs the layer, and keeps its results."""
    rows = []
    for tokens in job.tokens:
        hidden, topk = job.inputs(tokens, 7)
        dispatched = job.plan.dispatch(hidden, topk, RunningState())
        assert job.plan.run(dispatched).hidden_states.shape[-1] == hidden.shape[1]
        job.progress(f"{tokens} tokens")
        rows.append(
            TuningRow(
                tokens=tokens, default="slow", default_us=20.0, tuned="fast", tuned_us=16.0, source="model", tried=5
            )
        )
        job.store.write_text(json.dumps([row.tokens for row in rows]))
    return rows


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["tune", *args], prog_name="moe-core")


def test_json(small, install):
    install(measured)
    result = call("--model", small, "--tokens", "8,1", "--runner", "acme", "--budget", "3", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert [row["tokens"] for row in document["rows"]] == [1, 8]
    assert document["rows"][0]["tuned"] == "fast"
    assert (document["runner"], document["budget_s"], document["not_reached"]) == ("acme", 3.0, [])


def test_the_job_is_a_bound_layer_on_this_machine(small, install):
    jobs = install(measured)
    assert call("--model", small, "--tokens", "8,1", "--quant", "fp8_block128", "--runner", "acme").exit_code == 3
    assert not jobs
    assert call("--model", small, "--tokens", "8,1", "--ep", "2").exit_code == 0
    (job,) = jobs
    assert job.tokens == (1, 8)
    assert job.budget_s == 300
    assert job.binding.num_local_experts == 2
    assert job.binding.runner is not None
    assert job.quant_info is job.plan.quant_info
    assert job.plan.resolution.chosen.runner == "acme"
    hidden, topk = job.inputs(3, 0)
    assert job.plan(hidden, topk).shape == hidden.shape


def test_80_columns(small, install):
    install(measured)
    result = call("--model", small, "--tokens", "1,3")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "80" in result.stdout
    assert "- 3: fast" in result.stdout
    assert "every plan of this user reads it" in " ".join(result.stdout.split())


def test_the_store_is_this_users_or_the_one_named(small, install, tmp_path):
    install(measured)
    assert call("--model", small, "--tokens", "1").exit_code == 0
    assert json.loads((tmp_path / "cache/moe_core/tuning/acme.json").read_text()) == [1]
    named = tmp_path / "new folder" / "mine.json"
    result = call("--model", small, "--tokens", "3", "--store", str(named))
    assert json.loads(named.read_text()) == [3]
    assert "MOE_CORE_TUNING=" in result.stdout


def test_an_ended_budget_is_told(small, install):
    install(lambda job: measured(job)[:1])
    result = call("--model", small, "--tokens", "1,3")
    assert result.exit_code == 1
    assert "the budget ended before 3 tokens" in result.stdout
    document = json.loads(call("--model", small, "--tokens", "1,3", "--json").stdout)
    assert document["not_reached"] == [3]


def test_a_runner_without_tune_is_refused(small, install):
    result = call("--model", small, "--runner", "cpu")
    assert result.exit_code == 2
    assert "runner 'cpu' has nothing to tune\n  -> no installed runner can" in result.stderr
    install(measured)
    assert "-> these can: acme" in call("--model", small, "--runner", "cpu").stderr
    assert "did you mean 'acme'" in call("--model", small, "--runner", "acmee").stderr


def test_nothing_tunable_here_is_exit_code_3(small):
    result = call("--model", small)
    assert result.exit_code == 3
    assert "no runner here can" in result.stdout


def test_what_the_runner_raises_names_it(small, install):
    def explode(job):
        raise RuntimeError("no such instruction")

    install(explode)
    result = call("--model", small, "--tokens", "1")
    assert result.exit_code == 2
    assert "error: runner:acme: " in result.stderr
    assert "raised RuntimeError: no such instruction" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--tokens", "a"), "not a list of numbers"),
        (("--budget", "0"), "0"),
        (("--store", "{folder}/config.json/x.json"), "cannot be made"),
    ],
)
def test_bad_questions(small, install, args, message):
    install(measured)
    result = call("--model", small, "--tokens", "1", *(a.format(folder=small) for a in args))
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_layer_that_does_not_fit_is_refused_with_bytes(small, install, monkeypatch):
    install(measured)
    monkeypatch.setattr("moe_core.cli._timing.free_bytes", lambda device: 1000)
    result = call("--model", small)
    assert result.exit_code == 2
    assert "error: this layer does not fit: 393,216 bytes" in result.stderr


def test_where_stores_are(tmp_path, monkeypatch):
    assert default_store("acme") == tmp_path / "cache/moe_core/tuning/acme.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_store("acme") == Path.home() / ".cache/moe_core/tuning/acme.json"
    assert named_store(Settings(), "acme") is None
    assert named_store(Settings(tuning=tmp_path / "x.json"), "acme") == tmp_path / "x.json"
    assert named_store(Settings(tuning=tmp_path), "acme") is None
    (tmp_path / "acme.json").touch()
    assert named_store(Settings(tuning=tmp_path), "acme") == tmp_path / "acme.json"


def test_the_target_is_checked_and_not_needed_to_bind():
    spec = Registry(autoload=False).runner("cpu")
    made = runner_like("cpu", "acme", tune="acme.tuning:tune")["runners"][0]
    assert made.tune == "acme.tuning:tune"
    assert made.targets == spec.targets
    with pytest.raises(SpecError, match=r"write 'package\.module:attribute'"):
        runner_like("cpu", "acme", tune="acme.tuning")
