"""The kernel sequence of a layer. The runner core and the fused func both run exactly this, and nothing else.

prepare: configuration, rows by expert, quantized input. compute: GEMM1 with the activation, GEMM2. finish: the sum over
the top-k slots. A handful of tokens takes the two kernels of `kernels.decode` instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_core.protocols import Binding, RunnerHooks, RunningState
from moe_core.vocabulary import STANDARD, Step
from moe_core_triton import hopper
from moe_core_triton.calls import Call, ExpertRows
from moe_core_triton.decoding import decode_layer, decodes
from moe_core_triton.hooking import call_hook
from moe_core_triton.inputs import KINDS, input_rows, live_positions, position_experts
from moe_core_triton.kernels.activation import apply_activation
from moe_core_triton.kernels.align import align, cover
from moe_core_triton.kernels.combine import combine, weigh
from moe_core_triton.kernels.quantize import quantize_rows
from moe_core_triton.planning import Planner
from moe_core_triton.products import Epilogue, Rows, grouped_product
from moe_core_triton.row_table import RowTable, most_tiles
from moe_core_triton.weights import Projection, TritonWeights

#: Of a call without hooks; nobody changes it.
_NO_HOOKS = RunnerHooks()


def _takes_rows(given: Tensor) -> bool:
    """Whether kernels can write rows there: any row stride, but columns side by side, and slots as rows."""
    return given.is_contiguous() or (given.dim() == 2 and given.stride(1) == 1)


class LayerSequence:
    """The steps of one layer on one path of a plan; holds no tensors."""

    def __init__(self, binding: Binding) -> None:
        terms, config = binding.terms, binding.config
        if terms is None:
            raise TypeError("a layer is bound with terms")
        self.config, self.dtype = config, binding.dtype
        self.experts, self.top_k = binding.num_local_experts, config.top_k
        self.payload = binding.scheme.activation
        self.weigh_input = config.router_weight_on_input and terms.runner_does(Step.ROUTER_WEIGHT)
        self.weigh = terms.runner_does(Step.ROUTER_WEIGHT) and not config.router_weight_on_input
        self.factor = config.routed_scaling_factor if terms.runner_does(Step.ROUTED_SCALING) else 1.0
        self.sums = binding.format == STANDARD and terms.runner_does(Step.TOPK_SUM)
        self.planner = Planner(binding)

    def prepare(self, rows: ExpertRows, weights: TritonWeights, state: RunningState) -> Call:
        """Everything before GEMM1."""
        if rows.data.stride(-1) != 1:
            rows.data = rows.data.contiguous()
        if rows.scale is not None and rows.scale.stride(-1) != 1:
            rows.scale = rows.scale.contiguous()
        if rows.data.shape[0] == 0 or self.experts == 0:
            return Call(rows, None)
        config = self.planner(rows.tokens)
        if config.path == "tiny":
            if decodes(self, rows, weights, state):
                return Call(rows, config)
            config = self.planner.tiles(rows.tokens)
        if (config.up.specialized or config.down.specialized) and not self._specializes(rows, weights, state):
            config = config.plain
        call = Call(rows, config, self._table(rows, config.block_m))
        call.x, call.weighed_input = input_rows(
            rows, call.table, weights.up, self.payload, self.top_k, weigh=self.weigh_input
        )
        return call

    def _specializes(self, rows: ExpertRows, weights: TritonWeights, state: RunningState) -> bool:
        """Whether the specialized kernels compute this call: the layer is one of theirs, no hook, readable memory."""
        up, down = weights.up, weights.down
        if not self.planner.specialized or state.hooks is not None:
            return False
        if up.pack not in hopper.PACKS or down.pack not in hopper.PACKS:
            return False
        aligned = up.data.data_ptr() % 16 == 0 and down.data.data_ptr() % 16 == 0
        return aligned and hopper.reads(rows.data, gathered=rows.ids is not None)

    def _table(self, rows: ExpertRows, block_m: int) -> RowTable:
        if rows.ids is not None:
            return align(
                rows.ids,
                num_experts=self.experts,
                block_m=block_m,
                expert_map=rows.expert_map,
                num_valid=rows.num_valid,
            )
        positions = rows.data.shape[0]
        if rows.rows_per_expert is None:
            tiles = most_tiles(positions, self.experts, block_m)
        else:
            tiles = self.experts * -(-rows.rows_per_expert // block_m)
        table = cover(rows.starts, rows.ends, positions=positions, block_m=block_m, tiles=tiles)
        if rows.usual_rows is not None:
            table.usual = self.experts * (rows.usual_rows // block_m + 1)
        return table

    def compute(self, call: Call, weights: TritonWeights, state: RunningState) -> Call:
        """GEMM1, activation and GEMM2."""
        if call.config is None:
            return self._nothing(call, state)
        if call.table is None:
            return decode_layer(self, call, weights, state)
        hooks = state.hooks or _NO_HOOKS
        hidden = self._up(call, weights, hooks)
        self._down(call, hidden, weights.down, hooks, state)
        return call

    def _nothing(self, call: Call, state: RunningState) -> Call:
        """No rows, or no experts here: the sum of nothing."""
        call.result = self.output(call.rows, state).zero_()
        call.complete = True
        return call

    def output(self, rows: ExpertRows, state: RunningState) -> Tensor:
        """Where the result goes: the caller's tensor if there is one that kernels can write rows to."""
        given = state.output
        if given is not None and rows.ids is not None and _takes_rows(given):
            return given
        shape = [rows.data.shape[0], self.config.hidden_size]
        if rows.ids is not None and not self.sums:
            shape.insert(1, self.top_k)
        return torch.empty(shape, dtype=self.dtype, device=rows.data.device)

    def _up(self, call: Call, weights: TritonWeights, hooks: RunnerHooks) -> Rows:
        """GEMM1 and the activation; quantized for GEMM2 in the same kernel where a tile holds what that takes."""
        w, table, config = weights.up, call.table, call.config.up
        weighing = "in" if self.weigh_input and not call.weighed_input else ""
        flat = None if call.rows.weights is None else call.rows.weights.reshape(-1)
        epilogue: dict[str, Any] = {"weigh": weighing, "weights": flat if weighing else None}
        if hooks.after_gate_up is not None:
            gate_up = self._rows(table.positions, w.parts * w.n, call)
            grouped_product(call.x, w, table, gate_up, Epilogue(**epilogue), config, prefetch=False)
            call_hook(hooks.after_gate_up, gate_up, call.rows, table, self.top_k)
            hidden = self._rows(table.positions, w.n, call)
            apply_activation(gate_up, hidden, self.config.activation)
            return self._quantized(hidden, call, weights.down)
        activation = self.config.activation
        if self.payload == "fp8_group128" and config.block_n // w.parts == 128:
            hidden = self._rows(table.positions, w.n, call, torch.float8_e4m3fn)
            scale = self._rows(table.positions, -(-w.n // 128), call, torch.float32)
            given = Epilogue(activation, **epilogue, quant="group", scale=scale)
            grouped_product(call.x, w, table, hidden, given, config, prefetch=False)
            return Rows(hidden, 0, scale, "group")
        if self.payload == "fp8_tensor" and weights.down.input_scale is not None:
            hidden = self._rows(table.positions, w.n, call, torch.float8_e4m3fn)
            given = Epilogue(activation, **epilogue, quant="expert", scale=weights.down.input_scale)
            grouped_product(call.x, w, table, hidden, given, config, prefetch=False)
            return Rows(hidden, 0, weights.down.input_scale, "expert")
        hidden = self._rows(table.positions, w.n, call)
        grouped_product(call.x, w, table, hidden, Epilogue(activation, **epilogue), config, prefetch=False)
        if config.specialized and w.pack:
            return Rows(hidden, kind="wide")
        return self._quantized(hidden, call, weights.down)

    def _quantized(self, hidden: Tensor, call: Call, w: Projection) -> Rows:
        if self.payload is None:
            return hopper.wide(hidden) if w.pack and call.config.down.specialized else Rows(hidden)
        if self.payload != "fp8_tensor":
            data, scale = quantize_rows(hidden, self.payload, **call.rows.batches)
            return Rows(data, 0, scale, KINDS[self.payload])
        slots = torch.arange(call.table.positions, device=hidden.device, dtype=torch.int32)
        if w.input_scale is not None:
            data, scale = quantize_rows(
                hidden, "fp8_tensor", slots=slots, scale=w.input_scale, row_experts=position_experts(call.table)
            )
        else:
            data, scale = quantize_rows(hidden, "fp8_tensor", live=live_positions(call.rows, call.table))
        return Rows(data, 0, scale, "expert")

    def _rows(self, rows: int, columns: int, call: Call, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(rows, columns, dtype=dtype or self.dtype, device=call.rows.data.device)

    def _down(self, call: Call, hidden: Rows, w: Projection, hooks: RunnerHooks, state: RunningState) -> None:
        """GEMM2: rows by slot where there are slots, weighed in the epilogue unless a hook has to see them before."""
        table, rows, config = call.table, call.rows, call.config.down
        hooked = hooks.after_down is not None
        weighing = "" if hooked else "out" if self.weigh else "scale" if self.factor != 1.0 else ""
        flat = rows.weights.reshape(-1) if weighing == "out" and rows.weights is not None else None
        by_slot = table.slots is not None and not hooked
        # One slot a token, or rows that are not summed: GEMM2 writes the result itself.
        direct = by_slot and (not self.sums or self.top_k == 1)
        if direct:
            whole = self.output(rows, state).zero_()
            out = whole.view(-1, w.n) if whole.is_contiguous() else whole
        else:
            out = self._rows(table.positions, w.n, call)
        given = Epilogue(weigh=weighing, weights=flat, factor=self.factor, scatter=by_slot)
        grouped_product(hidden, w, table, out, given, config, prefetch=not hooked)
        call.weighed = not hooked
        if hooked:
            call_hook(hooks.after_down, out, rows, table, self.top_k)
            if table.slots is not None:
                by_position, out = out, torch.zeros_like(out)
                live = live_positions(rows, table).nonzero().squeeze(1)
                out[table.slots[live].long()] = by_position[live]
        call.result = whole if direct else out
        call.complete = direct

    def finish(self, call: Call, state: RunningState) -> Tensor:
        """The sum over slots, and the router weight where a hook kept it out of GEMM2. [T, H], [T, K, H] or [R, H]."""
        result = call.result if call.complete else self._summed(call, state)
        if state.output is None or call.rows.ids is None or result is state.output:
            return result
        return state.output.copy_(result)

    def _summed(self, call: Call, state: RunningState) -> Tensor:
        rows = call.rows
        weights = None if call.weighed or not self.weigh else rows.weights
        factor = 1.0 if call.weighed else self.factor
        if rows.ids is None:
            result = call.result
            if weights is not None:
                result = result * (weights.reshape(-1, 1) * factor)
            elif factor != 1.0:
                result = result * factor
            return result.to(self.dtype)
        out = self.output(rows, state)
        if self.sums:
            combine(call.result, out, local_ids=call.table.local_ids, weights=weights, scale=factor)
        else:
            weigh(call.result, out, local_ids=call.table.local_ids, weights=weights, scale=factor)
        return out
