"""FlashInfer's enums as the plugin uses them; tests/test_trtllm_signatures.py compares them with the installed ones."""

from __future__ import annotations

from enum import IntEnum


class ActivationType(IntEnum):
    Gelu, Relu, Silu, Swiglu, Geglu, SwigluBias, Relu2, SwigluStep, GegluTanh, Identity = range(10)


class RoutingMethodType(IntEnum):
    Default, Renormalize, DeepSeekV3, Llama4, RenormalizeNaive, TopK, SigmoidRenorm, MiniMax2, Sigmoid, TopKSigmoid = (
        range(10)
    )


class WeightLayout(IntEnum):
    MajorK, MajorMn, BlockMajorK = range(3)


class SfLayout(IntEnum):
    layout_128x4, layout_8x4, layout_linear = range(3)


class Fp8QuantizationType(IntEnum):
    NoneFp8, DeepSeekFp8, MxFp8, PerTensorFp8, PerChannelFp8 = range(5)
