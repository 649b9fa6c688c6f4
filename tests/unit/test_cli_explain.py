"""`moe-core explain`: questions, answers and exit codes."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner, Result

from moe_core import Registry, Requires, Support, forget_plugins, hookimpl
from moe_core.cli._app import app
from moe_core.specs import AdapterSpec, PluginInfo, RunnerSpec, Wants
from moe_core.vocabulary import STANDARD

HINT = "pip install 'a-vendor-package-that-nobody-has' from the index of the vendor, which needs an account"


class Fast:
    """A runner for NVIDIA GPUs that needs a package that nobody has."""

    @hookimpl
    def moe_core_plugin_info(self):
        return PluginInfo(name="fast", summary="fast")

    @hookimpl
    def moe_core_runners(self):
        support = Support(
            devices={"cuda": (">=sm_90",)},
            schemes=frozenset({"bf16", "fp8_block128", "int4_w4a16"}),
            dtypes=frozenset({"bfloat16"}),
            activations=frozenset({"silu"}),
            gated=frozenset({True}),
            features=frozenset({"lora"}),
            hooks=frozenset({"after_down"}),
            group_sizes=frozenset({64}),
            host_sync=frozenset({"prefill"}),
            requires=(Requires(module="nobody_has_this_module", hint=HINT),),
        )
        targets = {"factory": "moe_core.runners.reference:a", "prepare": "moe_core.runners.reference:b"}
        return (RunnerSpec(name="fast", summary="s", layouts=frozenset({"x"}), support=support, **targets),)

    @hookimpl
    def moe_core_adapters(self):
        targets = {"pre": "moe_core.runners.reference:a", "post": "moe_core.runners.reference:b"}
        return (AdapterSpec(runner="fast", format=STANDARD, wants=Wants(), **targets),)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MOE_CORE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("MOE_CORE_PLUGINS", "")
    forget_plugins()
    made = Registry([Fast()], autoload=False)
    monkeypatch.setattr("moe_core.cli.explain.default_registry", lambda: made)
    yield made
    forget_plugins()


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["explain", *args], prog_name="moe-core")


def ask(*args: str) -> dict:
    result = call(*args, "--json")
    assert result.exit_code in (0, 3), result.output
    return json.loads(result.stdout)


def codes(document: dict, component: str) -> list[str]:
    row = next(c for c in document["components"] if c["component"] == component)
    return [reason["code"] for reason in row["reasons"]]


def squeeze(text: str) -> str:
    return " ".join(text.split())


def test_the_report_has_every_part():
    result = call("--model", "mixtral-8x7b", "--hardware", "h200")
    assert result.exit_code == 0, result.output
    text = squeeze(result.stdout)
    assert "NVIDIA H200 sm_90 141 GiB (profile, not this machine)" in text
    assert "yes dispatcher:standard core 100 executed" in text
    assert "no runner:fast" in text
    assert "[dep.missing] 'nobody_has_this_module' is not installed" in text
    assert f"-> {HINT}" in text
    assert "yes 1 standard+reference/split" in text
    assert "dropped slots: negative" in text
    assert "router_weight: runner, topk_sum: runner" in text
    assert "correct but slow" in text
    assert "--assume-installed takes them for granted" in text


@pytest.mark.parametrize("everything", [(), ("--all",)])
def test_80_columns_hold_every_reason(everything):
    result = call("--model", "deepseek-v3", "--hardware", "cpu", "--ep", "8", *everything)
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "…" not in result.stdout
    text = squeeze(result.stdout)
    assert "[device.type] made for cuda, this is cpu" in text
    assert ("[dep.missing]" in text) == bool(everything)
    assert ("more reason" in text) == (not everything)


def test_assume_installed():
    document = ask("--model", "mixtral-8x7b", "--hardware", "h200", "--assume-installed")
    assert document["chosen"] == "standard+fast/split"
    assert any("taken for granted" in note for note in document["notes"])
    text = squeeze(call("--model", "mixtral-8x7b", "--hardware", "h200", "--assume-installed").stdout)
    assert "candidate standard+fast/split" in text


def test_everything_that_is_asked_reaches_the_request():
    document = ask(
        *("--model", "deepseek-v3", "--hardware", "b200", "--ep", "8", "--tp", "2", "--placement", "round_robin"),
        *("--phase", "decode", "--feature", "lora", "--hook", "after_down", "--graph", "--no-host-sync"),
        *("--max-tokens", "64", "--runner", "reference", "--dispatcher", "standard", "--path", "split"),
    )
    request = document["request"]
    assert request["parallel"]["ep_size"] == 8
    assert request["parallel"]["tp_size"] == 2
    assert request["parallel"]["placement"] == "round_robin"
    assert request["phases"] == ["decode"]
    assert request["features"] == ["lora"]
    assert request["hooks"] == ["after_down"]
    assert request["graph_capture"] == ["decode"]
    assert request["no_host_sync"] == ["decode"]
    assert request["max_tokens"] == 64
    assert request["settings"]["runner"] == "reference"
    assert request["settings"]["path"] == "split"
    assert request["config"]["scheme"] == "fp8_block128"
    assert document["model"] == "deepseek-v3"


def test_nothing_usable_is_exit_code_3():
    result = call("--model", "olmoe", "--hardware", "cpu", "--graph")
    assert result.exit_code == 3
    assert "nothing: no installed backend can serve this request" in squeeze(result.stdout)
    document = ask("--model", "olmoe", "--hardware", "cpu", "--graph")
    assert (document["chosen"], document["fingerprint"]) == (None, None)


def test_scheme_group_size_and_dtype():
    base = ("--model", "olmoe", "--hardware", "h200", "--assume-installed")
    four_bit = ask(*base, "--quant", "int4_w4a16", "--group-size", "64")["request"]["config"]
    assert (four_bit["scheme"], four_bit["group_size"]) == ("int4_w4a16", 64)
    assert ask(*base, "--dtype", "fp16")["request"]["config"]["dtype"] == "float16"
    assert "dtype" in codes(ask(*base, "--dtype", "fp16"), "runner:fast")


def test_a_settings_override_of_the_environment_is_kept(monkeypatch):
    monkeypatch.setenv("MOE_CORE_RUNNER", "reference")
    result = call("--model", "olmoe", "--hardware", "cpu")
    assert "asked for runner reference" in squeeze(result.stdout)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--quant", "fp8_blok128"), "did you mean 'fp8_block128'"),
        (("--quant", "int4_w4a16", "--group-size", "48"), "does not allow group size 48"),
        (("--dtype", "bfloat"), "did you mean 'bfloat16'"),
        (("--runner", "fats"), "did you mean 'fast'"),
        (("--dispatcher", "standart"), "did you mean 'standard'"),
        (("--placement", "round-robin"), "did you mean 'round_robin'"),
        (("--ep", "1000"), "larger than the number of experts"),
        (("--tp", "7"), "cannot be divided by tp_size 7"),
        (("--phase", "prefill", "--graph"), "--graph is about decode"),
    ],
)
def test_questions_that_make_no_sense_are_exit_code_2(args, message):
    result = call("--model", "olmoe", "--hardware", "cpu", *args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_feature_that_nobody_declares_is_probably_a_typing_error():
    document = ask("--model", "olmoe", "--hardware", "cpu", "--feature", "lorra", "--hook", "after_dwn")
    assert any("did you mean 'lora'" in warning for warning in document["warnings"])
    assert any("did you mean 'after_down'" in warning for warning in document["warnings"])


def test_a_config_file(tmp_path):
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
    for source in (tmp_path, tmp_path / "config.json"):
        assert ask("--model", str(source), "--hardware", "cpu")["request"]["config"]["num_experts"] == 4


def test_this_machine_is_the_default():
    document = ask("--model", "olmoe")
    assert document["request"]["hardware"]["present"] is True


def test_noise_of_a_plugin_stays_out_of_the_json(monkeypatch, registry, capfd):
    def noisy():
        print("a banner")
        os.write(1, b"a banner from C\n")
        return registry

    monkeypatch.setattr("moe_core.cli.explain.default_registry", noisy)
    result = call("--model", "olmoe", "--hardware", "cpu", "--json")
    assert json.loads(result.stdout)["chosen"] == "standard+cpu/fused"
    assert "a banner" in result.stderr
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "a banner from C\n")
