"""`moe-core tune` for `flashinfer_cutlass`: every kernel of GEMM1, then every one of GEMM2, timed in the whole call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from torch import Tensor

from moe_core.errors import MoeCoreError
from moe_core.protocols import RunningState, TuningJob, TuningRow
from moe_core.testing.tolerances import relative_error, tolerance
from moe_core_flashinfer_trtllm.cutlass import CutlassRunner, Tokens
from moe_core_flashinfer_trtllm.cutlass_store import merge, problem
from moe_core_flashinfer_trtllm.routing import topk_reader
from moe_core_flashinfer_trtllm.timing import microseconds

#: More kernels of a GEMM than any build has.
MOST = 1000


def tune(job: TuningJob) -> list[TuningRow]:
    """Time the kernels for each token count and keep the best. Raises MoeCoreError where there is nothing to choose."""
    binding = job.binding
    if binding.scheme.id == "fp8_block128":
        raise MoeCoreError(
            "flashinfer_cutlass has one kernel for fp8_block128, which FlashInfer sizes itself", hint="nothing to tune"
        )
    end, rows = time.perf_counter() + job.budget_s, []
    key = problem(binding, fused_finalize=bool(binding.options.get("fused_finalize", False)))
    for count in job.tokens:
        if time.perf_counter() >= end:
            break
        found = _Search(job, count).run(end)
        if found is None:
            break
        ids, row = found
        merge(job.store, key, {count: ids})
        rows.append(row)
        job.progress(f"{count} tokens: {row.tuned}, {row.tuned_us:.1f} us instead of {row.default_us:.1f}")
    return rows


class _Search:
    """The kernels of one token count."""

    def __init__(self, job: TuningJob, count: int) -> None:
        self._job, self._count = job, count
        self._runner: CutlassRunner = job.binding.runner
        state = RunningState()
        dispatched = job.plan.dispatch(*job.inputs(count, 0), state)
        self._tokens = Tokens(dispatched.hidden_states, *topk_reader(job.binding)(dispatched))
        self._right = self._compute([-1, -1])().clone()
        self._allowed = 2 * tolerance(job.binding.config.dtype, job.binding.scheme.id)

    def _compute(self, ids: list[int]) -> Callable[[], Tensor]:
        return lambda: self._runner.compute(self._tokens, self._job.quant_info, RunningState(), ids)

    def run(self, end: float) -> tuple[list[int], TuningRow] | None:
        """The best pair, or None where time ended before all were tried."""
        default_us = self._time([-1, -1])
        if default_us is None:
            raise MoeCoreError("FlashInfer's own choice of kernels does not run")
        best, best_us, tried, first = [-1, -1], default_us, 1, 0
        for gemm in (0, 1):
            numbers = list(self._numbers(gemm, first))
            for number in numbers:
                if time.perf_counter() >= end:
                    return None
                ids = [*best[:gemm], number, *best[gemm + 1 :]]
                microseconds = self._time(ids)
                tried += 1
                if microseconds is not None and microseconds < best_us:
                    best, best_us = ids, microseconds
            first += len(numbers)  # GEMM2's numbers go on where GEMM1's end
        row = TuningRow(
            tokens=self._count,
            default="FlashInfer's",
            default_us=default_us,
            tuned=f"kernels {best[0]} and {best[1]}",
            tuned_us=best_us,
            source="flashinfer",
            tried=tried,
        )
        return best, row

    def _numbers(self, gemm: int, first: int) -> Iterator[int]:
        """The numbers of a GEMM's kernels: FlashInfer tells their end by refusing the first that is none."""
        for number in range(first, first + MOST):
            ids = [-1, -1]
            ids[gemm] = number
            try:
                self._compute(ids)()
            except Exception as error:
                if f"Invalid gemm{gemm + 1} profile id" in str(error):
                    return
            yield number

    def _time(self, ids: list[int]) -> float | None:
        """Microseconds; None for one that fails (it may not be built, or fit the device) or computes something else."""
        call = self._compute(ids)
        try:
            if not relative_error(call(), self._right) <= self._allowed:  # NaN is not right either
                return None
            return microseconds(call, self._job.binding.device)
        except (RuntimeError, ValueError):
            return None
