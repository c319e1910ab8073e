"""Runs the real step of one rank without its device and without other ranks, on tensors without numbers."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from ..moe.device import dry_run
from ..moe.model import Transformer
from ..parallel.apply import Parallel, parallelize
from ..parallel.mesh import build_mesh
from ..parallel.pipeline.p2p import Mail, StageMessage
from ..parallel.pipeline.pairs import Unit
from ..parallel.pipeline.run import Pipeline
from ..parallel.pipeline.schedule import Action
from ..train import step as train_step
from ..train.batch import Rows
from ..train.config.config import Config
from ..train.derive import DTYPES
from ..train.engine import Engine
from ..train.setup import build_engine
from ..train.step import StepInput, StepNumbers
from .ledger import Ledger
from .stand_in import fused_attention_stand_in, fused_norms_stand_in, messages_leave, shared_memory_stand_in, stand_in

BEGIN, END = -1, -2
"""Marks of a step beside its units: before and after the passes through the model."""


@dataclass
class DryRank:
    """A rank with the parts of a run. `ledger` records what it did, and `waits` the host reads by place."""

    config: Config
    parallel: Parallel
    engine: Engine
    ledger: Ledger
    waits: Counter[str]

    def step(self, micro_batches: int | None = None) -> StepNumbers:
        """Takes one optimizer step on rows in which every token is valid: all, or so many micro-batches of this rank."""
        optimizer = self.config.optimizer
        return self.engine.step(StepInput(self._rows()[:micro_batches], 1e-3, optimizer.clip_norm, qk_clip=optimizer.qk_clip))

    @property
    def micro_batches(self) -> int:
        """Of a step of this rank."""
        return len(self._rows())

    def _rows(self) -> list[Rows]:
        """Returns the micro-batches of this rank."""
        config, data = self.config, self.parallel.mesh.data
        micro = config.batch.micro or config.batch.sequences // data.size
        ids_BS = torch.zeros(micro, config.sequence_length, dtype=torch.int64, device=self.parallel.device)
        valid = [ids_BS.numel()] * (1 + config.model.mtp_depth)
        starts = range(data.rank * micro, config.batch.sequences, micro * data.size)
        documents_BS = ids_BS if config.data.mask_documents else None
        return [Rows(ids_BS, ids_BS, start, documents_BS, valid) for start in starts]


@contextmanager
def dry_rank(config: Config, rank: int, world: int, hot: float = 1.0) -> Iterator[DryRank]:
    """Yields rank `rank` of `world`, on a stand-in for a GPU. All tensors created inside are fake.

    `hot`: the rows that the experts of the rank receive, over their number at an even load.
    """
    device = stand_in()
    fake, ledger = FakeTensorMode(allow_non_fake_inputs=True), Ledger(device.type)
    dist.init_process_group(f"cpu:fake,{device.type}:fake", rank=rank, world_size=world, store=FakeStore())
    try:
        with torch.device("meta"):
            model = Transformer(config.model, DTYPES[config.precision])
        with dry_run("cuda", hot) as seam:
            with _Births(fake, device):
                parallel = parallelize(model, build_mesh(config.parallel), config.parallel, device)
            norms, attention = fused_norms_stand_in("PrivateUse1"), fused_attention_stand_in(ledger.operators)
            with norms, attention, shared_memory_stand_in(), messages_leave(), fake, ledger:
                parallel.model.train()
                yield DryRank(config, parallel, build_engine(config, parallel), ledger, seam.waits)
    finally:
        dist.destroy_process_group()


@contextmanager
def units_begin(parallel: Parallel, callback: Callable[[int], None]) -> Iterator[None]:
    """Calls `callback` with the number of each unit of the schedule (plan/depth.py) before it runs, BEGIN before all, and END."""
    begun, accumulate = itertools.count(), train_step.accumulate

    def accumulated(*given: Any) -> Any:
        callback(BEGIN)
        shares = accumulate(*given)
        callback(END)
        return shares

    train_step.accumulate = accumulated
    try:
        with _each_unit(parallel, begun, callback):
            yield
    finally:
        train_step.accumulate = accumulate


@contextmanager
def _each_unit(parallel: Parallel, begun: Iterator[int], callback: Callable[[int], None]) -> Iterator[None]:
    if parallel.pipeline is None:
        hook = parallel.model.register_forward_pre_hook(lambda *_: callback(next(begun)), prepend=True)
        try:
            yield
        finally:
            hook.remove()
        return
    take, first = Mail.take, set[Action]()

    def taken(self: Mail, action: Action) -> StageMessage | None:
        if action in first:
            callback(next(begun))
        return take(self, action)

    def units_of(self: Pipeline, micros: int) -> list[Unit]:
        found = units(self, micros)
        first.update(unit[0] for unit in found)
        return found

    units, Mail.take, Pipeline.units = Pipeline.units, taken, units_of
    try:
        yield
    finally:
        Mail.take, Pipeline.units = take, units


class _Births(TorchDispatchMode):
    """Makes tensors created on the stand-in fake. All others are real, because meshes read numbers of host tensors."""

    def __init__(self, fake: FakeTensorMode, device: torch.device) -> None:
        super().__init__()
        self.fake, self.device = fake, device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self.fake if kwargs.get("device") == self.device else nullcontext():
            return func(*args, **kwargs)
