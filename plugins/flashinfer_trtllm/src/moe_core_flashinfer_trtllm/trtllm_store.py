"""What FlashInfer's tuner found under `moe-core tune`: its own file, handed back to it when a plan is bound."""

from __future__ import annotations

import logging

from moe_core.errors import BindError
from moe_core.protocols import Binding
from moe_core.tuning import default_store, named_store
from moe_core_flashinfer_trtllm.library import function

logger = logging.getLogger("moe_core.flashinfer_trtllm")

RUNNER = "flashinfer_trtllm"


def load(binding: Binding) -> None:
    """Give FlashInfer's tuner the file of the setting `tuning`, else this user's where there is one.

    FlashInfer refuses a file of another version or device itself, and says so. A named file that it cannot read is a
    BindError. Its tuner belongs to the process, as everything that it was given before.
    """
    named = named_store(binding.request.settings, RUNNER)
    path = named if named is not None else default_store(RUNNER)
    if not path.exists() and named is None:
        return
    try:
        loaded = path.is_file() and function("AutoTuner", "flashinfer.autotuner").get().load_configs(str(path))  # type: ignore[attr-defined]
    except Exception as error:  # the file is FlashInfer's, and so are its errors
        loaded, why = False, f": {type(error).__name__}: {error}"
    else:
        why = ""
    if loaded:
        return
    message = f"FlashInfer's tuner does not take {str(path)!r}{why}"
    if named is not None:
        raise BindError(message, hint="tune again with this FlashInfer on this device, or leave the setting out")
    logger.warning("%s; tune again with this FlashInfer on this device", message)
