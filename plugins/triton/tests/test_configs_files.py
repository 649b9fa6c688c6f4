"""Files of tuned configurations: what is written is read, and what is not ours is refused with a reason."""

from __future__ import annotations

import json
import os

import pytest
from moe_core_triton.configs.candidates import candidates
from moe_core_triton.configs.config import Problem
from moe_core_triton.configs.device import known
from moe_core_triton.configs.files import SHIPPED, Entry, Store, Where, add, triton_version

from moe_core.errors import ConfigError, MoeCoreError

QWEN, SMALL = Problem(128, 8, 2048, 768), Problem(4, 2, 64, 32, scheme="mxfp4_w4a16", group_size=32)
HERE, OLD = Where("NVIDIA H200", "sm_90", "3.6"), Where("NVIDIA H200", "sm_90", "3.4")
H200 = known("NVIDIA H200")


def entry(tokens: int, us: float = 100.0, problem: Problem = QWEN) -> Entry:
    return Entry(candidates(problem, tokens, H200)[0], us, 120.0)


def test_what_is_written_is_read_and_can_be_compared(tmp_path):
    path = tmp_path / "new" / "store.json"
    rows = [(HERE, QWEN, 64), (HERE, QWEN, 1), (OLD, QWEN, 8), (HERE, SMALL, 1)]
    store = Store()
    for where, problem, tokens in rows:
        add(path, where, problem, tokens, entry(tokens, problem=problem))
        store = store.with_entry(where, problem, tokens, entry(tokens, problem=problem))
    assert Store.read(path) == store
    backwards = Store()
    for where, problem, tokens in reversed(rows):
        backwards = backwards.with_entry(where, problem, tokens, entry(tokens, problem=problem))
    assert backwards.text() == path.read_text() == store.text()
    lines = path.read_text().splitlines()
    assert sum('"config"' in line for line in lines) == len(rows)  # one line each
    assert os.listdir(path.parent) == ["store.json"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_later_entries_win(tmp_path):
    path = tmp_path / "store.json"
    add(path, HERE, QWEN, 8, entry(8, 200.0))
    add(path, HERE, QWEN, 8, entry(8, 90.0))
    assert Store.read(path).sections[HERE][QWEN.key][8].us == 90
    merged = Store.read(path).merged(Store().with_entry(HERE, QWEN, 1, entry(1)))
    assert sorted(merged.sections[HERE][QWEN.key]) == [1, 8]
    assert Store().with_entry(HERE, QWEN, 1, Entry(entry(1).config, 1.0)).text().count("default_us") == 0


GOOD = json.loads(Store().with_entry(HERE, QWEN, 8, entry(8)).text())
ROW = GOOD["sections"][0]["entries"][QWEN.key]["8"]


def _broken(change) -> str:
    document = json.loads(json.dumps(GOOD))
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "for runner None"),
        (_broken(lambda d: d.update(runner="cutedsl")), r"(?s)for runner 'cutedsl', not for 'triton'.*folder"),
        (_broken(lambda d: d.update(format=2)), r"(?s)format version 2, this version reads 1.*moe-core tune"),
        (_broken(lambda d: d.pop("sections")), "KeyError"),
        (_broken(lambda d: d["sections"][0].pop("arch")), "KeyError"),
        (_broken(lambda d: d["sections"][0].update(arch=3)), "not made of text"),
        (_broken(lambda d: d["sections"][0].update(entries=[])), "AttributeError"),
        (_broken(lambda d: d["sections"][0]["entries"].update(x={})), "not the key of a problem"),
        (_broken(lambda d: d["sections"][0].update(entries={QWEN.key: {"0": ROW}})), "with 0 tokens"),
        (_broken(lambda d: d["sections"][0]["entries"][QWEN.key]["8"]["config"].update(path="x")), "unknown path 'x'"),
        (_broken(lambda d: d["sections"][0]["entries"][QWEN.key]["8"]["config"]["up"].update(more=1)), "more"),
    ],
)  # fmt: skip
def test_what_is_not_ours_is_refused_and_never_overwritten(text, message, tmp_path):
    path = tmp_path / "store.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Store.read(path)
    with pytest.raises(ConfigError):
        add(path, HERE, QWEN, 8, entry(8))
    assert path.read_text() == text


def test_a_missing_file_and_a_folder_that_cannot_be(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Store.read(tmp_path / "none.json")
    (tmp_path / "file").touch()
    with pytest.raises(MoeCoreError, match="cannot be written"):
        Store().write(tmp_path / "file" / "store.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(MoeCoreError, match="cannot be written"):
        Store().write(tmp_path / "folder")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.json")), ids=lambda file: file.name)
def test_shipped_files_are_in_order(file):
    store = Store.read(file)
    assert store.text() == file.read_text()
    for where, table in store.sections.items():
        assert where.device.lower().replace(" ", "_") == file.stem
        assert all(entry.us > 0 for row in table.values() for entry in row.values())


def test_the_version_is_major_and_minor():
    assert triton_version() == "none" or len(triton_version().split(".")) == 2
