"""`moe-core tune` for `flashinfer_trtllm`: FlashInfer's own tuner, for one layer, into a file that plans read again."""

from __future__ import annotations

import time

from torch import Tensor

from moe_core.errors import MoeCoreError
from moe_core.protocols import RunningState, TuningJob, TuningRow
from moe_core.testing.tolerances import relative_error, tolerance
from moe_core_flashinfer_trtllm.library import bind_call
from moe_core_flashinfer_trtllm.timing import microseconds


def tune(job: TuningJob) -> list[TuningRow]:
    """Let FlashInfer time its kernels for each token count, ascending; after each the file is written.

    Raises MoeCoreError where a call computes something else afterwards.
    """
    autotune = bind_call("autotune", {"cache": str(job.store)}, ("tune_mode",), "flashinfer.autotuner")
    end, rows = time.perf_counter() + job.budget_s, []
    allowed = 2 * tolerance(job.binding.config.dtype, job.binding.scheme.id)
    for count in job.tokens:
        if time.perf_counter() >= end:
            break
        state = RunningState()
        dispatched = job.plan.dispatch(*job.inputs(count, 0), state)

        def call(given: object = dispatched) -> Tensor:
            result: Tensor = job.plan.run(given, RunningState()).hidden_states
            return result

        right = call().clone()
        before = microseconds(call, job.binding.device)
        with autotune(tune_mode=True):
            call()
        if not relative_error(call(), right) <= allowed:
            raise MoeCoreError(f"after tuning, {count} tokens give another result", hint=f"delete {str(job.store)!r}")
        after = microseconds(call, job.binding.device)
        rows.append(
            TuningRow(
                tokens=count,
                default="FlashInfer's default",
                default_us=before,
                tuned="FlashInfer's tuner",
                tuned_us=after,
                source="flashinfer",
            )
        )
        job.progress(f"{count} tokens: {after:.1f} us instead of {before:.1f}")
    return rows
