"""The pytest plugin: markers that become skips, the header line, and strict expected failures end to end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
PLUGIN = ("-p", "moe_core.testing.pytest_plugin", "-p", "no:cacheprovider", "--strict-markers")


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> object:
    """Runs pytest in a fresh process with the plugin loaded by hand, installed or not."""
    root = str(Path(__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", root)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def call(source: str, *arguments: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.run(sys.executable, "-m", "pytest", *PLUGIN, "-rs", *arguments)

    return call


MARKED = """
    import pytest

    @pytest.mark.gpu
    def test_gpu(): pass

    @pytest.mark.multigpu(99)
    def test_many(): pass

    @pytest.mark.nvidia
    @pytest.mark.amd
    def test_both(): pass

    @pytest.mark.slow
    def test_slow(): pass

    def test_plain():
        import sys
        assert PLAIN
"""


def test_markers_become_skips_with_a_sentence(run: object) -> None:
    result = run(MARKED.replace("PLAIN", "True"))  # type: ignore[operator]
    result.stdout.fnmatch_lines(["*needs 99 GPUs, torch sees *"])
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] + outcomes["skipped"] == 5
    assert outcomes["skipped"] >= 2
    assert "failed" not in outcomes


def test_slow_tests_are_left_out_on_request(run: object) -> None:
    result = run(MARKED.replace("PLAIN", "True"), "--moe-core-skip-slow")  # type: ignore[operator]
    result.stdout.fnmatch_lines(["*marked as slow*"])


def test_torch_is_not_imported_for_plain_tests(run: object) -> None:
    source = "def test_plain():\n    import sys\n    assert 'torch' not in sys.modules\n"
    run(source).assert_outcomes(passed=1)  # type: ignore[operator]


def test_header_names_version_and_states(
    run: object, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An installed plugin whose module is not there.
    info = pytester.mkdir("acme-1.0.dist-info")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[moe_core.plugins]\nacme = acme_is_not_there:plugin\n")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}:{pytester.path}")
    result = run("def test_plain(): pass")  # type: ignore[operator]
    result.stdout.fnmatch_lines(["moe-core: *, plugins: 1 broken*(acme)"])
    assert "is broken" not in result.stderr.str()
    assert result.ret == 0


def test_header_survives_bad_settings(run: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_CORE_CHECK", "perhaps")
    result = run("def test_plain(): pass")  # type: ignore[operator]
    result.stdout.fnmatch_lines(["moe-core: *, plugins cannot be listed (ConfigError: *"])
    assert result.ret == 0


CONFORMANCE = """
    from moe_core.registry import Registry
    from moe_core.testing import fake_plugin, parametrize_with_checks, runner_like

    parts = runner_like("reference", "acme", formats=("standard",), {changes})
    registry = Registry(plugins=[fake_plugin("acme", **parts)], autoload=False)

    @parametrize_with_checks("acme", registry=registry, expected_failures={{"numerics.bias": "notyet: in acme 2"}})
    def test_conformance(check):
        check()
"""


def test_expected_failure_that_passes_fails_the_run(run: object) -> None:
    result = run(CONFORMANCE.format(changes=""), "-k", "bias")  # type: ignore[operator]
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*XPASS(strict)*notyet: in acme 2*"])


def test_expected_failure_that_fails_is_fine(run: object) -> None:
    result = run(CONFORMANCE.format(changes="factory=lambda binding: None"), "-k", "bias")  # type: ignore[operator]
    result.assert_outcomes(xfailed=1)


def test_unknown_expected_failure_stops_the_collection(run: object) -> None:
    source = CONFORMANCE.format(changes="").replace("numerics.bias", "numerics.bais")
    result = run(source)  # type: ignore[operator]
    assert result.ret == 2
    result.stdout.fnmatch_lines(["*does not have: 'numerics.bais'*", "*did you mean 'numerics.bias'*"])
