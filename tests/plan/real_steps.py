"""A step on real ranks, followed as a dry run is, and a dry run of one of them with the numbers that its host read.

Import it as `real_steps`: tests/conftest.py puts this folder on the path. On gloo ranks every choice by kind of device is that of a
GPU, but for what a CPU cannot do: no Triton kernels (nor in the dry run here), and attention gives zeros, in the memory that GPU
kernels take. Memory of the host cannot be told from that of the device there, so phases that copy from it may have more.
"""

import copy
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import composed_once
import torch
from tokenyard.moe import device as seam
from tokenyard.moe.model import Transformer
from tokenyard.parallel.apply import initialise, parallelize
from tokenyard.parallel.mesh import build_mesh
from tokenyard.plan import rank_step, stand_in
from tokenyard.plan.dry_run import take_step
from tokenyard.plan.ledger import Call, Ledger
from tokenyard.plan.memory_tracker import Point
from tokenyard.plan.rank_step import DryRank, dry_rank
from tokenyard.train.config.compose import compose
from tokenyard.train.derive import DTYPES
from tokenyard.train.setup import build_engine
from tokenyard.train.step import StepInput
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

composed_once.install()


class Reads(list[tuple[str, Any]]):
    """Numbers that the host read, by the name of the place, in order."""


class Followed(NamedTuple):
    """A step of a rank."""

    points: dict[Point, dict[str, int]]
    """Bytes of the peak at each phase and layer, by purpose."""
    calls: dict[Call, int]
    reads: Reads
    """What the host read in the measured step and in the one before, of few micro-batches."""


class RealRank(DryRank):
    """A rank that is there, with tokens that differ from rank to rank."""

    def step(self, micro_batches: int | None = None) -> Any:
        rows = self._rows()[:micro_batches]
        with _disable_current_modes():
            for each in rows:
                each.ids.random_(0, self.config.model.vocabulary)
        return self.engine.step(StepInput(rows, 1e-3, self.config.optimizer.clip_norm, accepts=lambda _: True))


def real_step(words: str) -> Followed:
    """On each rank of a pool: a step after others."""
    config, device, reads = compose(words.split()), torch.device("cpu"), Reads()
    with torch.device("meta"):
        model = Transformer(config.model, DTYPES[config.precision])
    with _like_a_gpu(lambda x, place, _: _noted(reads, place, x.tolist())):
        parallel = parallelize(model, build_mesh(config.parallel), config.parallel, device)
        initialise(parallel, config.seed)
        ledger = Ledger(device.type)
        with stand_in.fused_attention_stand_in(ledger.operators), ledger:
            parallel.model.train()
            torch.manual_seed(1 + parallel.mesh.data.rank)
            rank = RealRank(config, parallel, build_engine(config, parallel), ledger, Counter())
            rank.step()
            reads.clear()
            return _followed(rank, reads)


def dry_step(words: str, rank: int, world: int, reads: Reads) -> Followed:
    """The same step of `rank` without the other ranks, if its host reads the same. As with gloo, messages leave at the end."""
    queues: dict[str, deque[Any]] = defaultdict(deque)
    for place, value in reads:
        queues[place].append(value)
    with _all_replaced(
        (seam, "KERNELS", False),
        (seam, "_read", lambda _, place, __: queues[place].popleft()),
        (rank_step, "messages_leave", nullcontext),
    ):
        with dry_rank(compose(words.split()), rank, world) as dry:
            found = _followed(dry, Reads())
        assert not any(queues.values())
        return found


def _followed(rank: DryRank, reads: Reads) -> Followed:
    record = take_step(rank)
    return Followed({point: dict(peak.by_purpose()) for point, peak in record.peaks.items()}, dict(record.calls), reads)


def _noted(reads: Reads, place: str, value: Any) -> Any:
    reads.append((place, copy.deepcopy(value)))  # the caller may change it
    return value


FUSED = stand_in._Fused


class Zeros(FUSED):
    """Attention of real tensors: its numbers are finite, at least."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        return _zeroed(*FUSED.forward(ctx, *inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        *grads_qkv, output, operators = FUSED.backward(ctx, *grads)
        return *_zeroed(*grads_qkv), output, operators


def _zeroed(*tensors: Any) -> Any:
    with _disable_current_modes():
        for x in tensors:
            x.detach().zero_()
    return tensors


@contextmanager
def _like_a_gpu(read: Callable[..., Any]) -> Iterator[None]:
    """On a CPU: choices by kind of device are those of a GPU, but for kernels; `read` reads numbers."""
    replaced = _all_replaced((seam, "KERNELS", False), (seam, "_read", read), (stand_in, "_Fused", Zeros))
    with seam.dry_run("cuda"), replaced, stand_in.fused_norms_stand_in("CPU"):
        yield


@contextmanager
def _all_replaced(*each: tuple[Any, str, Any]) -> Iterator[None]:
    """Gives attributes of modules other values."""
    before = [(where, name, getattr(where, name)) for where, name, _ in each]
    for where, name, value in each:
        setattr(where, name, value)
    try:
        yield
    finally:
        for where, name, value in before:
            setattr(where, name, value)
