"""Where a setting comes from, what it may be, and what a person reads when it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from moe_core.errors import ConfigError
from moe_core.settings import CONFIG_FILE_VARIABLE, ENVIRONMENT, Settings, override
from moe_core.vocabulary import Maturity

WriteFile = Callable[..., Path]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (*ENVIRONMENT.values(), CONFIG_FILE_VARIABLE):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def settings_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteFile:
    def write(text: str, name: str = "moe_core.toml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        monkeypatch.setenv(CONFIG_FILE_VARIABLE, str(path))
        return path

    return write


def test_code_beats_context_beats_environment_beats_file(
    settings_file: WriteFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings_file('[moe_core]\nrunner = "from_file"\n')
    assert Settings.load().runner == "from_file"
    monkeypatch.setenv("MOE_CORE_RUNNER", "from_environment")
    assert Settings.load().runner == "from_environment"
    with override(runner="from_context") as inside:
        assert inside.runner == "from_context"
        assert Settings.load().runner == "from_context"
        assert Settings.load(runner="from_code").runner == "from_code"
        with override(runner="inner"):
            assert Settings.load().runner == "inner"
        assert Settings.load().runner == "from_context"
    assert Settings.load().runner == "from_environment"


def test_sources_are_merged_setting_by_setting(settings_file: WriteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_file('[moe_core]\ndispatcher = "deepep"\nstrict = true\n')
    monkeypatch.setenv("MOE_CORE_STRICT", "0")
    with override(path="split"):
        found = Settings.load(runner="triton")
    assert (found.dispatcher, found.strict, found.path, found.runner) == ("deepep", False, "split", "triton")


def test_code_can_undo_what_the_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_CORE_RUNNER", "triton")
    assert Settings.load(runner=None).runner is None


def test_an_override_ends_with_its_block_even_when_it_raises() -> None:
    with pytest.raises(RuntimeError, match="inside"), override(runner="triton"):
        raise RuntimeError("inside")
    assert Settings.load().runner is None


EXAMPLES = {
    "plugins": (" triton, deepep ,", ("triton", "deepep")),
    "disable": ("aiter", ("aiter",)),
    "strict": ("1", True),
    "check": ("yes", True),
    "runner": (" triton ", "triton"),
    "dispatcher": ("deepep", "deepep"),
    "path": ("split", "split"),
    "measurements": ("/tmp/times.json", "/tmp/times.json"),
    "tuning": ("/tmp/tuned.json", "/tmp/tuned.json"),
    "min_maturity": ("compiled", Maturity.COMPILED),
    "allow_last_resort": ("off", False),
}


def test_every_variable_has_an_example_here() -> None:
    assert set(EXAMPLES) == set(ENVIRONMENT) == {f.name for f in fields(Settings)} - {"options"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_variable_sets_its_setting(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, value = EXAMPLES[name]
    assert getattr(Settings.load(), name) != value
    monkeypatch.setenv(ENVIRONMENT[name], text)
    assert getattr(Settings.load(), name) == value


@pytest.mark.parametrize("name", sorted(set(ENVIRONMENT) - {"plugins"}))
def test_an_empty_variable_is_not_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT[name], "  ")
    assert getattr(Settings.load(), name) == getattr(Settings(), name)


@pytest.mark.parametrize("text", ["", "  ", ","])
def test_an_empty_allow_list_means_no_plugin(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load().plugins is None
    monkeypatch.setenv("MOE_CORE_PLUGINS", text)
    assert Settings.load().plugins == ()


@pytest.mark.parametrize(("text", "value"), [("TRUE", True), ("On", True), ("No", False), ("false", False)])
def test_switches_are_read_in_any_case(text: str, value: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_CORE_ALLOW_LAST_RESORT", text)
    assert Settings.load().allow_last_resort is value


@pytest.mark.parametrize(
    ("variable", "text", "message"),
    [
        ("MOE_CORE_STRICT", "maybe", r"MOE_CORE_STRICT sets strict to 'maybe'\n  -> use 1 or 0"),
        ("MOE_CORE_CHECK", "2", r"MOE_CORE_CHECK sets check to '2'"),
        ("MOE_CORE_MIN_MATURITY", "executd", r"(?s)MOE_CORE_MIN_MATURITY .* 'executd'.*did you mean 'executed'\?"),
        ("MOE_CORE_PATH", "fuzed", r"(?s)unknown path 'fuzed'.*did you mean 'fused'"),
        (CONFIG_FILE_VARIABLE, "/nowhere/settings.toml", r"names '/nowhere/settings.toml', which cannot be read: No "),
    ],
)
def test_a_bad_variable_is_named_with_its_value(
    variable: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigError, match=message):
        Settings.load()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"runer": "triton"}, r"(?s)unknown setting 'runer'.*did you mean 'runner'\?"),
        ({"path": "Split"}, "unknown path 'Split'"),
        ({"min_maturity": "bogus"}, r"(?s)sets min_maturity to 'bogus'.*known: compiled, contract, emulated, executed"),
        ({"check": "perhaps"}, "sets check to 'perhaps'"),
        ({"plugins": 3}, r"(?s)sets plugins to 3.*list names of plugins"),
        ({"disable": [1]}, r"sets disable to \[1\]"),
        ({"runner": 7}, r"(?s)sets runner to 7.*give a name"),
        ({"options": {"cpu": 1}}, r"(?s)sets options to {'cpu': 1}.*write \{'cpu': \{"),
        ({"options": "pack_weights"}, "sets options to 'pack_weights'"),
    ],
)
def test_bad_values_in_code_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Settings.load(**values)


def test_an_override_refuses_bad_values_where_they_are_written() -> None:
    with pytest.raises(ConfigError, match=r"(?s)'dispacher'.*did you mean 'dispatcher'"), override(dispacher="x"):
        pytest.fail("the block must not run")
    assert Settings.load() == Settings()


def test_code_may_write_what_a_file_may() -> None:
    assert Settings(disable="triton, aiter").disable == ("triton", "aiter")
    assert Settings(plugins=["triton"]).plugins == ("triton",)
    assert Settings(min_maturity="executed").min_maturity is Maturity.EXECUTED
    assert Settings(measurements=Path("times.json")).measurements == "times.json"


def test_settings_are_hashable_whatever_their_options() -> None:
    one = Settings(options={"cpu": {"pack_weights": False}, "deepep": {"num_sms": 20}})
    two = Settings(options={"deepep": {"num_sms": 20}, "cpu": {"pack_weights": False}})
    assert one == two
    assert hash(one) == hash(two)
    assert one != Settings(options={"cpu": {"pack_weights": True}, "deepep": {"num_sms": 20}})


def test_later_changes_of_the_callers_options_do_not_reach_the_settings() -> None:
    given = {"cpu": {"pack_weights": False}}
    settings = Settings(options=given)
    given["cpu"]["pack_weights"] = True
    given["more"] = {}
    assert settings.options == {"cpu": {"pack_weights": False}}


@pytest.mark.parametrize("table", ["moe_core", "tool.moe_core"])
def test_the_file_is_a_toml_table_or_part_of_a_pyproject(table: str, settings_file: WriteFile) -> None:
    settings_file(
        f'[{table}]\nplugins = ["triton"]\ndisable = "aiter, mori"\nmin_maturity = "contract"\ncheck = true\n'
        f"[{table}.options.cpu]\npack_weights = false\n"
    )
    found = Settings.load()
    assert (found.plugins, found.disable, found.check) == (("triton",), ("aiter", "mori"), True)
    assert found.min_maturity is Maturity.CONTRACT
    assert found.options == {"cpu": {"pack_weights": False}}


def test_a_file_without_our_table_sets_nothing(settings_file: WriteFile) -> None:
    settings_file('[project]\nname = "other"\n', "pyproject.toml")
    assert Settings.load() == Settings()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[moe_core]\nrunnr = 'x'\n", r"(?s)unknown setting 'runnr' in .*moe_core.toml.*did you mean 'runner'\?"),
        ("[moe_core\n", r"moe_core.toml', which is not valid TOML"),
        ("[moe_core]\nstrict = 'often'\n", r"moe_core.toml sets strict to 'often'"),
        ("[moe_core]\nrunner = 3\n", r"moe_core.toml sets runner to 3"),
        ("[moe_core]\ndisable = [1, 2]\n", r"moe_core.toml sets disable to \[1, 2\]"),
        ("[moe_core]\noptions = 3\n", r"moe_core.toml sets options to 3"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(text: str, message: str, settings_file: WriteFile) -> None:
    settings_file(text)
    with pytest.raises(ConfigError, match=message):
        Settings.load()
