"""What the suites of this plugin share: the interpreter where there is no GPU, and `lab`, which judges layers.

MOE_CORE_TEST_RUNNER=reference   run the suites with another runner (lanes that it has not are skipped)
MOE_CORE_TEST_SHARD=2/8          run the third of eight parts: several processes on one GPU, without xdist
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import pkgutil
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_core
from moe_core import CanonicalWeights, MoeConfig, ParallelConfig
from moe_core.errors import UnsupportedOverride
from moe_core.protocols import RunningState
from moe_core.registry import Registry
from moe_core.settings import Settings
from moe_core.testing import assert_close, fake_plugin, make_layer, make_routing
from moe_core.testing.dispatchers import TESTING_STANDARD
from moe_core.testing.dispatchers import plugin as testing_plugin
from moe_core.testing.layers import Layer
from moe_core.vocabulary import STANDARD, IdSpace

HERE = Path(__file__).parent
#: Nearly everything here imports kernels, and Triton is made for Linux alone.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
FORCED = os.environ.get("MOE_CORE_TEST_RUNNER")
ON_GPU = torch.cuda.is_available() and FORCED not in ("triton_interpreter", "cpu")
#: Sizes that leave a remainder in every tile, as far as the scheme can store them. Some K scales where it has any.
SIZES = {
    "fp8_block128": (192, 160),
    "int4_w4a16": (256, 128),
    "mxfp4_w4a16": (96, 64),
}


def _interpret() -> None:
    """Kernels are decorated for the interpreter or the compiler when their modules are imported, once a process.

    The whole repository may be tested in one process: other tests have then imported Triton already, so what
    `triton.language` decorated is decorated again.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton.language as tl
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        return
    made: dict[JITFunction[Any], Any] = {}
    places = [module for name, module in sorted(sys.modules.items()) if name.startswith("triton.language")]
    for place in (*places, tl.tensor):
        for name, value in list(vars(place).items()):
            if isinstance(value, JITFunction):
                setattr(place, name, made.setdefault(value, InterpretedFunction(value.fn)))
    package = importlib.import_module("moe_core_triton")
    for found in pkgutil.walk_packages(package.__path__, "moe_core_triton."):
        # One that cannot be imported fails the tests that need it, with the reason.
        with contextlib.suppress(Exception):
            importlib.import_module(found.name)


if not ON_GPU:
    _interpret()


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """Several processes may share the GPU: what a test took goes back to the device where it was much."""
    yield
    if ON_GPU and torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**31:
        torch.cuda.empty_cache()


def pytest_configure(config: pytest.Config) -> None:
    """The markers, where moe-core is on the path without being installed."""
    from moe_core.testing import pytest_plugin

    if not config.pluginmanager.is_registered(pytest_plugin):
        config.pluginmanager.register(pytest_plugin, "moe_core")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Numpy's warnings about NaN and overflow are the interpreter's, not ours; and only this process's part is kept."""
    mine = [item for item in items if item.path.is_relative_to(HERE)]
    for item in mine:
        item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
    shard = os.environ.get("MOE_CORE_TEST_SHARD")
    if shard:
        part, _, parts = shard.partition("/")
        # By the name, not the position: the parts stay balanced and disjoint whatever else was selected.
        drop = {id(i) for i in mine if zlib.crc32(i.nodeid.encode()) % int(parts) != int(part)}
        config.hook.pytest_deselected(items=[item for item in items if id(item) in drop])
        items[:] = [item for item in items if id(item) not in drop]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests of other folders run without the interpreter's variable, and so do their subprocesses."""
    if not ON_GPU:
        os.environ.pop("TRITON_INTERPRET", None)


@pytest.fixture(autouse=True, scope="module")
def _interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if not ON_GPU:
            patch.setenv("TRITON_INTERPRET", "1")
        yield


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@lru_cache(maxsize=1)
def _registry() -> Registry:
    from moe_core_triton import plugin as triton_plugin

    offers = replace(TESTING_STANDARD.offers[STANDARD], id_spaces=frozenset({IdSpace.GLOBAL}))
    spec = replace(TESTING_STANDARD, name="testing_global", offers={STANDARD: offers})
    more = fake_plugin("testing_global", dispatchers=(spec,))
    return Registry(plugins=[triton_plugin.plugin, testing_plugin, more], autoload=False, settings=Settings())


@dataclass
class Lab:
    """Makes layers, plans and verdicts for one runner. Dispatchers: `standard`, the kit's, and `testing_global`."""

    device: str
    runner: str
    on_gpu: bool = ON_GPU
    reference_plans: dict[Any, Any] = field(default_factory=dict)

    @property
    def registry(self) -> Registry:
        """The core, this plugin and the kit's dispatchers."""
        return _registry()

    @property
    def dtype(self) -> str:
        """What layers are made in unless a test says otherwise: the interpreter has no bfloat16."""
        return "bfloat16" if self.on_gpu else "float32"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Every dtype that runs here."""
        return ("bfloat16", "float16", "float32") if self.on_gpu else ("float32", "float16")

    def config(self, **changes: Any) -> MoeConfig:
        """A layer that fits nothing: six experts, sizes that no tile divides (see SIZES)."""
        hidden, inner = SIZES.get(changes.get("scheme", ""), (96, 80))
        if changes.get("group_size") in (32, 64):
            hidden, inner = 192, 64
        values: dict[str, Any] = {"num_experts": 6, "top_k": 2, "hidden_size": hidden, "intermediate_size": inner}
        return MoeConfig(**(values | {"dtype": self.dtype} | changes))

    def layer(self, config: MoeConfig, seed: int = 0, *, tokens: int = 5, pattern: str = "uniform") -> Layer:
        """All experts' weights, tokens and a routing; large ones are made on the GPU."""
        experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
        if not self.on_gpu or experts * hidden * inner < 2**22:
            return make_layer(config, seed, tokens=tokens, pattern=pattern, device=self.device)
        random = torch.Generator(self.device).manual_seed(seed)
        dtype = getattr(torch, config.dtype)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=random, device=self.device, dtype=torch.float32) * scale

        rows = config.gate_up_factor * inner
        w13, w2 = normal(experts, rows, hidden, scale=hidden**-0.5), normal(experts, hidden, inner, scale=inner**-0.5)
        biases = {}
        if config.bias:
            biases = {"w13_bias": normal(experts, rows).to(dtype), "w2_bias": normal(experts, hidden).to(dtype)}
        weights = CanonicalWeights.quantize(w13, w2, config, **biases)
        topk = make_routing(pattern, tokens, experts, config.top_k, seed + 1, device=self.device)
        return Layer(weights, normal(tokens, hidden).to(dtype), topk)

    def tokens(self, config: MoeConfig, tokens: int, seed: int = 0, pattern: str = "uniform") -> tuple[Tensor, Any]:
        """Other tokens and another routing for a layer that is there already."""
        random = torch.Generator().manual_seed(seed)
        hidden = torch.randn(tokens, config.hidden_size, generator=random).to(getattr(torch, config.dtype))
        topk = make_routing(pattern, tokens, config.num_experts, config.top_k, seed + 1, device=self.device)
        return hidden.to(self.device), topk

    def plan(
        self,
        config: MoeConfig,
        weights: CanonicalWeights,
        path: str | None = None,
        *,
        dispatcher: str = "standard",
        parallel: ParallelConfig | None = None,
        options: dict[str, Any] | None = None,
        runner: str | None = None,
        **request: Any,
    ) -> moe_core.MoePlan:
        """A plan of the runner under test. weights: this rank's."""
        runner = runner or self.runner
        settings = Settings(runner=runner, dispatcher=dispatcher, path=path, options=options or {})
        try:
            return moe_core.plan(config, weights, parallel, registry=self.registry, settings=settings, **request)
        except UnsupportedOverride as error:
            if FORCED is not None and FORCED != "triton":
                pytest.skip(f"{FORCED} cannot: {str(error).splitlines()[0]}")
            raise

    def expected(
        self,
        config: MoeConfig,
        weights: CanonicalWeights,
        hidden: Tensor,
        topk: Any,
        *,
        parallel: ParallelConfig | None = None,
        state: RunningState | None = None,
        **request: Any,
    ) -> Tensor:
        """What the oracle gives."""
        plan = self.plan(config, weights, "split", parallel=parallel, runner="reference", **request)
        return plan(hidden, topk, state=state)

    def close(self, actual: Tensor, expected: Tensor, config: MoeConfig, what: str = "the result") -> None:
        """Within the kit's tolerance for the layer's dtype and scheme."""
        assert actual.dtype == expected.dtype
        assert_close(actual, expected, config.dtype, config.scheme, what=what)

    def nearer(self, actual: Tensor, wanted: Tensor, other: Tensor) -> None:
        """For values that both lie within the tolerance: `actual` must clearly be the one."""
        right, wrong = (float((actual.double() - tensor.double()).norm()) for tensor in (wanted, other))
        assert right < wrong / 2

    def verify(
        self, config: MoeConfig, layer: Layer | None = None, path: str | None = None, seed: int = 0, **more: Any
    ) -> Tensor:
        """One layer against the oracle; returns the result. more: of `plan`."""
        layer = layer or self.layer(config, seed)
        result = self.plan(config, layer.weights, path, **more)(layer.hidden, layer.topk)
        self.close(result, self.expected(config, *layer), config, f"{self.runner}/{path} of {config.scheme}")
        return result


@pytest.fixture(scope="session")
def device() -> str:
    """Where the suites run."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(scope="session")
def runner_name() -> str:
    """The runner under test."""
    return FORCED or ("triton" if ON_GPU else "triton_interpreter")


@pytest.fixture(scope="session")
def lab(device: str, runner_name: str) -> Lab:
    """See `Lab`."""
    return Lab(device, runner_name)
