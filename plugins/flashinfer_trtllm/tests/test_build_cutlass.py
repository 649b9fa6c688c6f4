"""The recipe that builds a part of FlashInfer's CUTLASS module: what it picks, writes and refuses."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from moe_core_flashinfer_trtllm import build_cutlass
from moe_core_flashinfer_trtllm.build_cutlass import COMMON, PARTS, absent, instantiation, select, undefined

HAVE_COMPILER = all(shutil.which(tool) for tool in ("g++", "nm"))


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """A module like FlashInfer's, in small."""
    names = [*COMMON, *(kernel for part in PARTS.values() for kernel in part.kernels), "moe_gemm_kernels_fp16_fp16"]
    found = [tmp_path / f"{name}.cu" for name in names]
    pairs = [part.pair for part in PARTS.values() if part.pair] + ["half, half,"]
    for folder in ("gemm_grouped/90", "gemm_grouped/80", "gemm/90"):
        (tmp_path / folder).mkdir(parents=True)
        for index, pair in enumerate(pairs):
            found.append(tmp_path / folder / f"file{index}.generated.cu")
            found[-1].write_text(f"INSTANTIATE(Sm90, {pair} x)")
    for source in found:
        source.touch()
    return found


def test_only_what_the_schemes_need_is_compiled(sources: list[Path]) -> None:
    whole = {source.stem for source in sources}
    chosen = select(sources, ["fp8_block128"])
    assert {source.stem for source in chosen} == {*COMMON, "moe_gemm_kernels_bf16_fp8"} < whole
    more = select(sources, ["bf16", "mxfp4_w4a16"])
    generated = [s for s in more if s.name.endswith(".generated.cu")]
    assert [s.parent.name + "/" + s.name for s in generated] == ["90/file0.generated.cu", "90/file2.generated.cu"]
    assert "gemm_grouped" in str(generated[0])


def test_a_flashinfer_without_a_source_is_named(sources: list[Path]) -> None:
    with pytest.raises(SystemExit, match="no source moe_gemm_kernels_bf16_fp8"):
        select([s for s in sources if s.stem != "moe_gemm_kernels_bf16_fp8"], ["fp8_block128"])
    with pytest.raises(SystemExit, match="generates no kernels"):
        select([s for s in sources if ".generated" not in s.name], ["bf16"])


def test_the_instantiation_names_the_runners_of_the_schemes() -> None:
    text = instantiation(["bf16", "fp8_block128"])
    assert text.count("template class CutlassMoeFCRunner<") == 2
    assert "CutlassMoeFCRunner<__nv_bfloat16, __nv_fp8_e4m3, __nv_bfloat16>;" in text


@pytest.mark.skipif(not HAVE_COMPILER, reason="needs g++ and nm")
def test_what_is_left_out_raises_when_it_is_called(tmp_path: Path) -> None:
    """A library whose kernels are missing loads, and a call of one ends in a C++ exception that can be caught."""
    caller = tmp_path / "caller.cpp"
    caller.write_text(
        "#include <cstdio>\n#include <stdexcept>\n"
        "namespace tensorrt_llm { void missing(int); struct Base { virtual ~Base(); virtual int f(); };\n"
        "struct Here : Base { int f() override { return 7; } }; }\n"
        'extern "C" int ask() { tensorrt_llm::Here* here = nullptr; (void)here;\n'
        "  try { tensorrt_llm::missing(1); } catch (std::exception const& e) { std::puts(e.what()); return 1; }\n"
        "  return 0; }\n"
        'extern "C" int make() { static tensorrt_llm::Here here; return here.f(); }\n'
    )
    gaps, library = tmp_path / "absent.cpp", tmp_path / "part.so"
    gaps.write_text(absent((), ["bf16"]))
    compile_ = ["g++", "-shared", "-fPIC", "-o", str(library), str(caller), str(gaps)]
    subprocess.run(compile_, check=True)
    missing = undefined(library)
    assert any("missing" in name for name in missing)
    assert any(name.startswith("_ZTI") for name in missing), "a class without its key function has no type information"
    gaps.write_text(absent(missing, ["bf16"]))
    subprocess.run(compile_, check=True)
    assert undefined(library) == []
    main = tmp_path / "main.cpp"
    main.write_text('extern "C" int ask(); int main() { return ask() == 1 ? 0 : 1; }')
    program = tmp_path / "program"
    subprocess.run(["g++", "-o", str(program), str(main), str(library), f"-Wl,-rpath,{tmp_path}"], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "not in this build of FlashInfer's CUTLASS module, which has bf16" in done.stdout


def test_the_command_refuses_unknown_schemes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_cutlass.main(["--schemes", "bf16,int3"])
    assert "no recipe for int3" in capsys.readouterr().err
