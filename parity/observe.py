"""Observes the first steps of a run on one rank: outputs, losses, counts, gradients, norm and weights, in order of computation.

Each tensor comes with its rectangle of the global tensor, so that a rank can compare it with that of one process.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.batches import IGNORE
from ..moe.init import expert_biases
from ..moe.token_info import BatchPosition, documents_of
from ..parallel.apply import Parallel, gradient_of, local
from ..parallel.context import own_runs
from ..parallel.gradients import clip_factor
from ..parallel.mesh import Mesh
from ..parallel.shard import ShardMetadata, whole
from ..parallel.streams import on_device
from ..train.batch import Rows
from ..train.config.config import Config
from ..train.optimizer import build_optimizer
from ..train.setup import build_parallel
from ..train.step import StepInput, StepNumbers, train_step
from .finding import Key


class ObservedTensor(NamedTuple):
    """A tensor of this rank, and its rectangle of the global tensor."""

    key: Key
    shard: ShardMetadata
    tensor: Tensor


FIELD_OF_LOSS = {
    "count per expert": "counts_LE",
    "dropped": "dropped_L",
    "balance loss": "balance_L",
    "sequence balance loss": "sequence_L",
    "device balance loss": "device_L",
    "communication balance loss": "communication_L",
    "importance loss": "importance_L",
    "z-loss": "z_L",
}
"""The fields of `StepNumbers` with a number for each layer, by the kind of finding."""

END = 7
"""The token that ends documents."""

Batch = Callable[[Config, int], tuple[Tensor, Tensor]]
"""From the configuration and the step (from 0) to the global batch: ids and targets, both (B, S)."""


def observe(
    config: Config,
    steps: int,
    prepare: Callable[[Parallel], None] | None = None,
    batch: Batch | None = None,
    device: torch.device | None = None,
) -> list[ObservedTensor]:
    """Trains on this rank of the current world, on `device` (None: the CPU). Collective.

    `prepare` may change the initial weights, and `batch` gives the data (None: random tokens). Gradients are observed in the first
    step, before clipping, and weights after the last.
    """
    parallel = build_parallel(config, device or torch.device("cpu"))
    if prepare is not None:
        prepare(parallel)
    return observe_model(parallel, config, steps, batch)


def observe_model(parallel: Parallel, config: Config, steps: int, batch: Batch | None = None) -> list[ObservedTensor]:
    """Returns `observe` for a model that is already spread over the ranks."""
    optimizer, seen = build_optimizer(config.optimizer, parallel), []
    clip_norm, qk_clip = config.optimizer.clip_norm, config.optimizer.qk_clip
    for step in range(1, steps + 1):
        rows = rows_of(parallel, config, *(batch or random_batch)(config, step - 1))
        with record_outputs(parallel, rows, step) as outputs:
            position = BatchPosition(config.seed, step)
            step_input = StepInput(rows, config.optimizer.lr, clip_norm, position, qk_clip=qk_clip)
            numbers = train_step(parallel, optimizer, step_input)
        seen += [*(outputs if step == 1 else []), *observe_numbers(parallel, numbers, step)]
        if step == 1:
            factor = 1.0 if clip_norm is None else clip_factor(numbers.gradient_norm, clip_norm)
            seen += gradients(parallel, factor)
        seen.append(_whole(Key(step, "gradient norm", ""), numbers.gradient_norm))
        seen += [_whole(Key(step, "expert bias", name), bias.clone()) for name, bias in expert_biases(parallel.model).items()]
    return seen + [
        ObservedTensor(Key(steps, "weight", name), sharded.metadata, local(sharded.parameter).detach().clone())
        for name, sharded in parallel.parameters.items()
    ]


def random_batch(config: Config, step: int) -> tuple[Tensor, Tensor]:
    """Returns random tokens; a tenth of the targets is ignored."""
    generator = torch.Generator().manual_seed(config.seed + step)
    shape = (config.batch.sequences, config.sequence_length)
    ids, targets = (torch.randint(config.model.vocabulary, shape, generator=generator) for _ in range(2))
    targets[torch.rand(shape, generator=generator) < 0.1] = IGNORE
    return ids, targets


def rows_of(parallel: Parallel, config: Config, ids_BS: Tensor, targets_BS: Tensor) -> list[Rows]:
    """Returns the micro-batches of this rank.

    As in training, micro-step m of all ranks covers the m-th part of the global batch. If attention stays inside documents, END
    ends one.
    """
    data, sequences = parallel.mesh.data, len(ids_BS)
    micro = config.batch.micro or sequences // data.size
    starts = range(data.rank * micro, sequences, micro * data.size)
    documents: list[Tensor | None] = [None] * len(starts)
    if config.data.mask_documents:
        documents_BS, targets_BS = documents_of(ids_BS, targets_BS, END, IGNORE)
        documents = [on_device(documents_BS[start : start + micro], parallel.device) for start in starts]
    ids_BS, targets_BS = (on_device(x, parallel.device) for x in (ids_BS, targets_BS))
    return [
        Rows(ids_BS[start : start + micro], targets_BS[start : start + micro], start, of_rows)
        for start, of_rows in zip(starts, documents, strict=True)
    ]


@contextmanager
def record_outputs(parallel: Parallel, micro_batches: list[Rows], step: int) -> Iterator[list[ObservedTensor]]:
    """Collects the outputs of attention and feed-forward of each block. With recomputation only the first output counts."""
    seen: dict[tuple[str, int, int], ObservedTensor] = {}
    started: list[Rows] = []
    rows_of_ids = {rows.ids.data_ptr(): rows for rows in micro_batches}
    length = micro_batches[0].ids.shape[1]
    sequences = sum(len(rows.ids) for rows in micro_batches) * parallel.mesh.data.size

    def hook(name: str) -> Any:
        def keep(_module: Any, _inputs: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() >= 0:  # a recomputation, maybe of a micro-batch before the one that started last
                return
            value, first = output[0] if isinstance(output, tuple) else output, started[-1].first
            runs = runs_of(parallel.mesh, length, value.shape[1])
            for run, part in zip(runs, value.detach().split([len(run) for run in runs], dim=1), strict=True):
                shard = ShardMetadata((sequences, length, value.shape[2]), (first, run.start, 0), tuple(part.shape))
                seen.setdefault((name, first, run.start), ObservedTensor(Key(step, "output", name), shard, part))

        return keep

    parts = ("attention", "moe", "dense")
    modules = [(name, module) for name, module in parallel.model.named_modules() if name.rpartition(".")[2] in parts]
    handles = [module.register_forward_hook(hook(name)) for name, module in modules]
    handles.append(parallel.model.register_forward_pre_hook(lambda _, inputs: started.append(rows_of_ids[inputs[0].data_ptr()])))
    collected: list[ObservedTensor] = []
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
    collected += seen.values()


def runs_of(mesh: Mesh, length: int, here: int) -> list[range]:
    """Returns the positions of this rank's `here` tokens in a sequence of `length`: of a slice, or of a context rank's chunks."""
    runs = own_runs(length, mesh.context) if mesh.context.size > 1 else [range(length)]
    first = mesh.tensor.rank * here if here < sum(map(len, runs)) else 0
    before = [0, *itertools.accumulate(map(len, runs))]
    cut = [run[max(0, first - done) : max(0, first + here - done)] for run, done in zip(runs, before[:-1], strict=True)]
    return [run for run in cut if run]


def observe_numbers(parallel: Parallel, numbers: StepNumbers, step: int) -> Iterator[ObservedTensor]:
    """Yields the numbers of the step without its norm; those of MoE layers have the names of the layers."""
    config = parallel.model.config
    layers = [f"layers.{index}.moe" for index in range(config.layers) if config.moe_layer(index)]
    layers += [f"mtp.{depth}.block.moe" for depth in range(config.mtp_depth) if config.moe_layer(config.layers + depth)]
    for kind, field in FIELD_OF_LOSS.items():
        for name, value in zip(layers, getattr(numbers, field), strict=True):
            yield _whole(Key(step, kind, name), value)
    yield _whole(Key(step, "cross entropy", ""), numbers.cross_entropy)
    for depth, value in enumerate(numbers.mtp_D):
        yield _whole(Key(step, "mtp cross entropy", f"mtp.{depth}"), value)
    yield _whole(Key(step, "tokens", ""), torch.tensor(numbers.tokens))


def gradients(parallel: Parallel, factor: Tensor | float) -> Iterator[ObservedTensor]:
    """Yields the gradients before clipping by `factor`, in the order of the backward pass: those of the last layers first."""
    for name, sharded in reversed(parallel.parameters.items()):
        yield ObservedTensor(Key(1, "gradient", name), sharded.metadata, gradient_of(sharded) / factor)


def _whole(key: Key, tensor: Tensor) -> ObservedTensor:
    return ObservedTensor(key, whole(tensor.shape), tensor)
