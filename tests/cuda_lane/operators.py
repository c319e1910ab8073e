"""How many operators a MoE layer of one rank runs, counted on fake tensors: shapes without numbers, as on a GPU and without one.

Import it as `operators`: tests/conftest.py puts this folder on the path. Bound by the host, what a layer takes is its launches.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from tokenyard.moe.config import ModelConfig
from tokenyard.moe.device import DryRun, dry_run
from tokenyard.moe.dispatch import Dispatcher
from tokenyard.moe.layer import MoELayer
from tokenyard.moe.token_info import BatchPosition, TokenInfo, build_token_info
from tokenyard.parallel.config import Exchange
from tokenyard.parallel.dispatch import async_collectives
from tokenyard.parallel.dispatch.all_gather import AllGatherDispatcher
from tokenyard.parallel.dispatch.all_to_all import AllToAllDispatcher
from tokenyard.parallel.dispatch.deduplicated import DeduplicatedDispatcher
from tokenyard.parallel.dispatch.symmetric import SymmetricDispatcher
from tokenyard.parallel.mesh import Axis
from tokenyard.plan.stand_in import shared_memory_stand_in
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

SILENT = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"})
"""Operators that launch nothing, beside views."""
NONE = frozenset({"promote_types", "is_same_size"})
"""Questions about types and shapes: no operators."""
INSIDE = {"grouped_outer": ("zero_empty_groups",), "count_rows": ("scan_counts",), "route": ("sum_chunks",)}
"""What the project's own operators launch on CUDA beside their first kernel; fake tensors do not enter them."""
DISPATCHERS: dict[Exchange, Callable[[int, Axis], Dispatcher]] = {
    Exchange.plain: AllToAllDispatcher,
    Exchange.deduplicated: lambda experts, axis: DeduplicatedDispatcher(experts, [axis]),
    Exchange.gather: AllGatherDispatcher,
    Exchange.symmetric: lambda experts, axis: SymmetricDispatcher(experts, axis, 2.0),
}


class Operators(TorchDispatchMode):
    """Inside, operators are recorded by name, in their order."""

    def __init__(self, dry: DryRun) -> None:
        super().__init__()
        self.dry, self.seen = dry, dry.waits.copy()
        self.all: list[str] = []
        self.launching: list[str] = []
        """Those that launch a kernel (or several, as a sort does): neither views nor allocations."""
        self.events: list[str] = []
        """The same, and between them `wait: PLACE` where the host waits, and `arrived` where the device waits for an exchange."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.events += [f"wait: {place}" for place in (self.dry.waits - self.seen).elements()]
        self.seen = self.dry.waits.copy()
        space, name = func._schema.name.split("::")
        if space != "prim" and name not in NONE:
            self.all.append(name)
            if not func.is_view and name not in SILENT:
                self.launching += [name, *INSIDE.get(name, ())]
                self.events.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def recorded(dry: DryRun) -> Iterator[Operators]:
    operators = Operators(dry)

    def arrived(_: str) -> AbstractContextManager[None]:
        operators.events.append("arrived")
        return nullcontext()

    with mock.patch.object(async_collectives, "waiting", arrived), operators:
        yield operators


class Passes(NamedTuple):
    forward: Operators
    backward: Operators
    waits: Counter[str]


@contextmanager
def fake_ranks(ranks: int) -> Iterator[Axis]:
    """This process as rank 0 of so many, of which there are no others."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield Axis(ranks, 0, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def layer_operators(
    config: ModelConfig,
    ranks: int,
    collects_metrics: bool = False,
    sequences: int = 1,
    length: int = 4096,
    exchange: Exchange = Exchange.plain,
    recompute: bool = False,
) -> Passes:
    """Forward and backward pass of a layer in bf16 with fp32 weights, the experts shared out over `ranks`, as on CUDA."""
    with fake_ranks(ranks) as axis, dry_run("cuda") as dry, shared_memory_stand_in(), FakeTensorMode():
        layer = rank_layer(config, axis, exchange)
        layer.router.collects_metrics = collects_metrics
        x_BSD = torch.empty(sequences, length, config.width, dtype=torch.bfloat16, requires_grad=True)
        tokens = some_tokens(sequences, length)
        with recorded(dry) as forward:
            y_BSD, stats = checkpoint(layer, x_BSD, tokens, use_reentrant=False) if recompute else layer(x_BSD, tokens)
        outputs = [output for output in (y_BSD, stats.scores_BE, stats.z) if output.requires_grad]
        gradients = [torch.empty_like(output) for output in outputs]
        with recorded(dry) as backward:
            torch.autograd.backward(outputs, gradients)
    return Passes(forward, backward, dry.waits)


def rank_layer(config: ModelConfig, axis: Axis, exchange: Exchange) -> MoELayer:
    """One rank's part."""
    layer = MoELayer(config, seed=None)
    layer.dispatcher = DISPATCHERS[exchange](config.moe.experts, axis)
    for name, weight in layer.experts.named_parameters():
        setattr(layer.experts, name, torch.nn.Parameter(weight.detach()[: config.moe.experts // axis.size]))
    return layer.train()


def some_tokens(sequences: int, length: int) -> TokenInfo:
    """As in a training step, where targets decide which tokens count."""
    ids_BS = torch.zeros(sequences, length, dtype=torch.int64)
    return build_token_info(ids_BS, torch.ones_like(ids_BS, dtype=torch.bool), BatchPosition())
