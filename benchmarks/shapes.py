"""The layers that the GPU benchmarks measure: makers of `MoeConfig`, and the token counts.

`SHAPES` holds the layers that kernels are tuned on, and layers of other models (`tuned=False`) on which nothing is ever
tuned: they show what a configuration is worth that nobody searched for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from moe_core.config import Activation, MoeConfig
from moe_core.errors import ConfigError
from moe_core.quant import activation_payload, builtin_scheme

TOKENS: Final = (1, 8, 64, 256, 1024, 4096, 16384)


@dataclass(frozen=True, slots=True)
class Shape:
    """One GPU's part of a layer. schemes: those that are measured where nobody names any."""

    name: str
    title: str
    experts: int
    top_k: int
    hidden: int
    inner: int
    schemes: tuple[str, ...] = ("bf16", "fp8_block128")
    oai: bool = False
    tuned: bool = True

    def config(self, scheme: str = "bf16") -> MoeConfig:
        """The layer in a scheme."""
        return MoeConfig(
            num_experts=self.experts,
            top_k=self.top_k,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            scheme=scheme,
            activation=Activation.swiglu_oai() if self.oai else Activation(),
            bias=self.oai,
        )

    def problems(self, scheme: str) -> list[str]:
        """Why this layer cannot be stored or computed in `scheme`; empty where it can."""
        described = builtin_scheme(scheme)
        found = []
        for n, k in ((2 * self.inner, self.hidden), (self.hidden, self.inner)):
            found += described.matrix_problems(n, k)
            if described.activation is not None:
                found += activation_payload(described.activation).problems(k)
        return list(dict.fromkeys(found))

    @property
    def sizes(self) -> str:
        """ "E128 k8 H2048 I768"."""
        return f"E{self.experts} k{self.top_k} H{self.hidden} I{self.inner}"


SHAPES: Final[dict[str, Shape]] = {
    shape.name: shape
    for shape in (
        Shape("qwen3-30b-a3b", "Qwen3-30B-A3B", 128, 8, 2048, 768),
        Shape("mixtral-8x7b", "Mixtral-8x7B", 8, 2, 4096, 14336),
        Shape("deepseek-v3-ep8", "DeepSeek-V3, one of EP8", 32, 8, 7168, 2048),
        Shape("qwen3-235b-a22b", "Qwen3-235B-A22B", 128, 8, 4096, 1536),
        Shape("gpt-oss-120b", "GPT-OSS-120B", 128, 4, 2880, 2880, schemes=("mxfp4_w4a16", "bf16"), oai=True),
        Shape("glm-4.5-air", "GLM-4.5-Air", 128, 8, 4096, 1408),
        Shape("olmoe", "OLMoE", 64, 8, 2048, 1024),
        Shape("lfm2-like", "LFM2-like", 32, 4, 2048, 1792, tuned=False),
        Shape("deepseek-v2-lite", "DeepSeek-V2-Lite", 64, 6, 2048, 1408, tuned=False),
        Shape("minimax-m2-ep4", "MiniMax-M2, one of EP4", 64, 8, 3072, 1536, tuned=False),
    )
}
TUNED: Final = tuple(name for name, shape in SHAPES.items() if shape.tuned)
NEVER_TUNED: Final = tuple(name for name, shape in SHAPES.items() if not shape.tuned)
#: For a run without a GPU: every code path, no meaning.
TINY: Final[dict[str, Shape]] = {
    shape.name: shape
    for shape in (
        Shape("tiny", "tiny", 8, 2, 128, 128),
        Shape("tiny-biased", "tiny, biased", 8, 2, 64, 96, schemes=("mxfp4_w4a16", "bf16"), oai=True),
    )
}


def find(name: str) -> Shape:
    """The shape of that name. Raises ConfigError with the known ones."""
    known = SHAPES | TINY
    if name not in known:
        raise ConfigError(f"unknown shape {name!r}", hint=f"one of {', '.join(SHAPES)}, or tuned, never-tuned, all")
    return known[name]


def select(names: tuple[str, ...]) -> list[Shape]:
    """Shapes by name; `tuned`, `never-tuned` and `all` stand for several."""
    groups = {"tuned": TUNED, "never-tuned": NEVER_TUNED, "all": tuple(SHAPES), "dry": tuple(TINY)}
    wanted = [part for name in names for part in groups.get(name, (name,))]
    return [find(name) for name in dict.fromkeys(wanted)]
