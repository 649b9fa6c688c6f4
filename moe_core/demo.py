"""The main job, end to end: a Hugging Face MoE checkpoint on disk generates text through moe_core.

Needs the extra `moe-core[transformers]`. Without a checkpoint, a small random Qwen3-MoE one is written first:
config.json, safetensors and a byte-level tokenizer.
"""

from __future__ import annotations

import json as json_module
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moe_core.errors import ConfigError, did_you_mean

DEFAULT_PROMPT = "Mixture of experts:"
#: Where the random checkpoint is written.
RANDOM_CHECKPOINT = ".demo/random-qwen3-moe"
#: Largest difference of two logits, as a part of the largest logit, that rounding in each dtype explains by itself.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 2e-2}
#: In a half-width dtype a rounding error can turn a router's near tie, and then whole logits move. How far they move
#: for that reason alone is measured, not guessed: transformers' own grouped_mm is compared with its own eager experts.
YARDSTICK = "grouped_mm"
YARDSTICK_FACTOR = 2.0
_TOKENIZER_FILES = ("tokenizer.", "vocab", "tekken", "spiece", "sentencepiece", "tiktoken")


@dataclass(slots=True)
class DemoResult:
    """What `run` measured. Times are seconds of one prefill and of the whole generation (the best of several).

    plan, fingerprint and layout (of its weights) are the first layer's.
    """

    model: str
    dtype: str
    layers: int
    plan: str
    fingerprint: str
    layout: str
    tokens: list[int]
    text: str
    eager_tokens: list[int]
    max_logit_difference: float
    max_logit: float
    yardstick_difference: float | None
    prefill_s: float
    eager_prefill_s: float
    generate_s: float
    eager_generate_s: float
    ok: bool


def run(
    model_dir: str | None,
    *,
    prompt: str | None = None,
    max_new_tokens: int = 16,
    dtype: str | None = None,
    json: bool = False,
    scratch: str | Path = RANDOM_CHECKPOINT,
) -> int:
    """Generate with moe_core and with transformers' own eager experts, and compare. Returns an exit code.

    0: the logits agree; 1: they differ by more than rounding explains. Without `model_dir`, a random checkpoint is
    written to `scratch`.
    """
    result, report = measure(model_dir, prompt or DEFAULT_PROMPT, max_new_tokens, dtype, scratch)
    if json:
        print(json_module.dumps(_finite(asdict(result)) | {"report": report}, indent=1, allow_nan=False))
    else:
        _show(result, report, random=model_dir is None)
    return 0 if result.ok else 1


def measure(
    model_dir: str | None,
    prompt: str,
    max_new_tokens: int,
    dtype: str | None,
    scratch: str | Path = RANDOM_CHECKPOINT,
) -> tuple[DemoResult, str]:
    """The numbers of `run`, and the selection report of the first layer.

    Where one packed copy of the experts does not fit into memory, they run from the model's own weights.
    """
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise ConfigError(f"this needs transformers: {error}", hint="pip install 'moe-core[transformers]'") from error

    from moe_core.integrations import transformers as bridge
    from moe_core.integrations.random_checkpoint import write_random_checkpoint

    if dtype is not None and dtype not in TOLERANCES:
        raise ConfigError(f"unknown dtype {dtype!r}", hint=did_you_mean(dtype, TOLERANCES))
    with _quiet(transformers.utils.logging):
        folder = Path(model_dir) if model_dir else write_random_checkpoint(scratch)
        model = _load(folder, dtype)
        ids, decode = _tokenize(folder, prompt, model.config.get_text_config().vocab_size)
        _warm_up(model, ids)
        plans = bridge.plans(model)
        if not plans:
            hint = "this needs a mixture-of-experts model whose experts transformers can replace"
            raise ConfigError(f"{type(model).__name__} ran no layer through moe_core", hint=hint)
        layers, first = len(plans), next(iter(plans.values()))
        plan, fingerprint, report = first.resolution.require().id, first.fingerprint, first.explain(brief=True)
        layout = str(first.quant_info.layout)
        ours = _time(model, ids, max_new_tokens)
        del plans, first  # the packed copy goes before anything else runs
        bridge.release(model)
        model.set_experts_implementation("eager")
        _warm_up(model, ids)
        eager = _time(model, ids, max_new_tokens)
        yardstick = _yardstick(model, ids, eager.logits)

    difference = float((ours.logits - eager.logits).abs().max())
    largest = float(eager.logits.abs().max())
    name = str(model.dtype).removeprefix("torch.")
    allowed = max(TOLERANCES.get(name, 2e-2) * largest, YARDSTICK_FACTOR * (yardstick or 0.0))
    result = DemoResult(
        model=str(folder),
        dtype=name,
        layers=layers,
        plan=plan,
        fingerprint=fingerprint,
        layout=layout,
        tokens=ours.tokens,
        text=decode(ours.tokens),
        eager_tokens=eager.tokens,
        max_logit_difference=difference,
        max_logit=largest,
        yardstick_difference=yardstick,
        prefill_s=ours.prefill_s,
        eager_prefill_s=eager.prefill_s,
        generate_s=ours.generate_s,
        eager_generate_s=eager.generate_s,
        ok=difference <= allowed,
    )
    return result, report


def _load(folder: Path, dtype: str | None) -> Any:
    """The model on the CPU, with its experts through moe_core."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from moe_core.integrations import transformers as bridge

    if not (folder / "config.json").is_file():
        what = "holds no config.json: it is not a Hugging Face checkpoint" if folder.is_dir() else "is no folder"
        hint = "name the folder of a downloaded checkpoint; without one, a small random model is used"
        raise ConfigError(f"{str(folder)!r} {what}", hint=hint)
    bridge.register()
    kind = getattr(torch, dtype) if dtype else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, experts_implementation=bridge.NAME).eval()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ConfigError(f"transformers cannot load {str(folder)!r}: {error}") from error
    if not _room_for_copy(model):
        bridge.register(options={"cpu": {"pack_weights": False}})
    return model


def _room_for_copy(model: Any) -> bool:
    """Whether a second copy of the experts fits into memory, with a tenth to spare."""
    from moe_core.runners.cpu.weights import available_bytes

    available = available_bytes()
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    return available is None or 1.1 * experts < available


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """transformers without progress bars and warnings, which would stand between the lines of the report."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has neither NaN nor infinity: null stands for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclass(slots=True)
class _Timed:
    logits: Any
    tokens: list[int]
    prefill_s: float
    generate_s: float


def _warm_up(model: Any, ids: Any) -> None:
    """One forward: converts the weights and warms caches up."""
    import torch

    with torch.inference_mode():
        model(ids)


def _time(model: Any, ids: Any, max_new_tokens: int) -> _Timed:
    import torch

    prefill: list[float] = []
    generate: list[float] = []
    began = time.perf_counter()
    with torch.inference_mode():
        # Twice at least; more often where it costs little, since a short time is easily disturbed.
        while len(generate) < 2 or (len(generate) < 8 and time.perf_counter() - began < 2.0):
            start = time.perf_counter()
            logits = model(ids).logits.float()
            prefill.append(time.perf_counter() - start)
            start = time.perf_counter()
            output = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False
            )
            generate.append(time.perf_counter() - start)
    return _Timed(logits, output[0, ids.shape[1] :].tolist(), min(prefill), min(generate))


def _yardstick(model: Any, ids: Any, eager_logits: Any) -> float | None:
    """How far transformers' own implementations are from each other; None where the model has only one."""
    import torch

    try:
        model.set_experts_implementation(YARDSTICK)
        with torch.inference_mode():
            return float((model(ids).logits.float() - eager_logits).abs().max())
    except (ValueError, KeyError, NotImplementedError, RuntimeError):
        return None


def _tokenize(folder: Path, prompt: str, vocabulary: int) -> tuple[Any, Any]:
    """(token ids [1, n], a function from token ids to text)."""
    import torch
    from transformers import AutoTokenizer

    # Without these files transformers makes a tokenizer that knows no word.
    if any(path.name.startswith(_TOKENIZER_FILES) for path in folder.iterdir()):
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, ImportError) as error:
            raise ConfigError(f"transformers cannot load the tokenizer of {str(folder)!r}: {error}") from error
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        if ids.numel() == 0:
            raise ConfigError(f"the tokenizer of {str(folder)!r} makes no token of the prompt {prompt!r}")
        return ids, lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
    # A checkpoint without a tokenizer still runs: bytes serve as ids, and ids are shown instead of text.
    return torch.tensor([[byte % vocabulary for byte in prompt.encode()]]), lambda tokens: " ".join(map(str, tokens))


def _show(result: DemoResult, report: str, *, random: bool) -> None:
    console = Console(highlight=False)
    console.rule("the plan of the first MoE layer")
    console.print(report, markup=False, soft_wrap=True)
    console.rule("generated")
    console.print(f"tokens  {result.tokens}", markup=False)
    note = "  (random weights: the words mean nothing, the numbers below do)" if random else ""
    console.print(f"text    {result.text!r}{note}", markup=False, soft_wrap=True)
    same = "the same tokens" if result.tokens == result.eager_tokens else f"eager gave {result.eager_tokens}"
    console.print(f"eager   {same}", markup=False)
    table = Table("", "moe_core", "transformers eager", "speed-up", title="best time")
    for label, ours, eager in (
        ("prefill", result.prefill_s, result.eager_prefill_s),
        ("generate", result.generate_s, result.eager_generate_s),
    ):
        table.add_row(label, f"{ours * 1e3:.1f} ms", f"{eager * 1e3:.1f} ms", f"{eager / ours:.2f}x")
    console.print(table)
    verdict = "agree" if result.ok else "DIFFER by more than rounding explains"
    console.print(
        f"{result.layers} MoE layers in {result.dtype}: largest logit difference {result.max_logit_difference:.3g} "
        f"(largest logit {result.max_logit:.3g}): the two {verdict}",
        markup=False,
        soft_wrap=True,
    )
    if result.yardstick_difference is not None:
        console.print(
            f"for comparison, transformers' own {YARDSTICK} differs from its eager experts by "
            f"{result.yardstick_difference:.3g}",
            markup=False,
            soft_wrap=True,
        )
