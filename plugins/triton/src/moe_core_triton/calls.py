"""One call of a layer, as data: what the adapters hand to the runner and the runner hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_core_triton.configs.config import LayerConfig
from moe_core_triton.products import Rows
from moe_core_triton.row_table import RowTable


@dataclass(slots=True)
class ExpertRows:
    """The tokens of a call, whatever format they came in.

    data: [R, H]; scale: that of a quantized payload. Either ids (int [T, K], R = T, with weights float32 [T, K],
    expert_map for global ids and num_valid) or starts and ends (int32 [E]: rows of each expert, weights float32 [R]).
    rows_per_expert: the bound of a batched format. live: bool [R], rows that count, where not all between start and end
    do. tokens: the usual number of tokens, by which configurations are chosen. usual_rows: of an expert, where the
    format holds room for many more.
    """

    data: Tensor
    tokens: int
    scale: Tensor | None = None
    weights: Tensor | None = None
    ids: Tensor | None = None
    expert_map: Tensor | None = None
    num_valid: Tensor | None = None
    starts: Tensor | None = None
    ends: Tensor | None = None
    rows_per_expert: int | None = None
    usual_rows: int | None = None
    live: Tensor | None = None

    @property
    def batches(self) -> dict[str, Any]:
        """Arguments of `quantize_rows` that leave out rows behind an expert's own, where the format has many."""
        if self.rows_per_expert is None:
            return {}
        return {"ends": self.ends, "rows_per_expert": self.rows_per_expert}


@dataclass(slots=True)
class Call:
    """A prepared call. config: how it will be computed. table, x: None for the decode path, which needs neither.

    Of the result: rows by slot (standard) or by row, until `finish`; complete: nothing is left to do. layer:
    the sequence that prepared it.
    """

    rows: ExpertRows
    config: LayerConfig | None
    table: RowTable | None = None
    x: Rows | None = None
    weighed_input: bool = False
    result: Tensor | None = None
    weighed: bool = False
    complete: bool = False
    layer: Any = None
    handle: Any = None
