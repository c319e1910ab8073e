"""Tests exchanges and FSDP2 in a world of one rank over NCCL (gloo on a CPU), where a GPU sends to itself.

A layout of one rank does not communicate, so the mesh here has axes with the process group of the whole world.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...moe.config import ModelConfig, MoEConfig
from ...moe.model import Transformer
from ...parallel.apply import Parallel, build_dispatcher, initialise, parallelize
from ...parallel.collectives import all_gather, max_over, stack_over, sum_over
from ...parallel.config import OWN_EXCHANGES, Exchange, ParallelConfig
from ...parallel.fsdp import apply_fsdp
from ...parallel.layout import DENSE, EXPERTS, mesh_sizes
from ...parallel.mesh import Axis, Mesh
from ...parity.compare import assemble
from ...parity.observe import observe_model
from ...train.config.config import Precision
from ...train.derive import DTYPES
from .choices import ChoiceLog, record_choices, replay_choices
from .presets import LIMITS, configured, furthest
from .recorder import Recorder

STEPS = 3
EXACT = dict.fromkeys(LIMITS[Precision.bf16], 1e-9)
MODEL = ModelConfig(layers=2, width=64, heads=4, kv_heads=2, vocabulary=256, moe=MoEConfig(experts=8, top_k=4, hidden=64))


def run(recorder: Recorder) -> None:
    with world_of_one(recorder.device):
        collectives(recorder)
        for precision, limits in ((Precision.fp64, EXACT), (Precision.bf16, LIMITS[Precision.bf16])):
            compare(recorder, precision, limits)


def compare(recorder: Recorder, precision: Precision, limits: dict[str, float]) -> None:
    """Compares training with each exchange, and under FSDP2, with plain training."""
    choices = ChoiceLog()
    with record_choices(choices):
        reference = trained(recorder.device, precision)
    works = {f"{one.value} exchange": partial(trained, exchange=one) for one in OWN_EXCHANGES}
    works["plain exchange in 2 chunks"] = partial(trained, exchange=Exchange.plain, chunks=2)
    for zero in (3, 2, 1):
        works[f"FSDP2 as ZeRO-{zero}"] = partial(trained, zero=zero)
    for name, work in works.items():
        with replay_choices(choices):
            found = work(recorder.device, precision)
        for column, (value, key) in furthest(found, reference).items():
            where = f"step {key.step}, {key.kind} {key.name}".strip()
            recorder.below(f"{name}, {precision.value}, {column}", value, limits[column], where)


def trained(
    device: torch.device, precision: Precision, exchange: Exchange | None = None, zero: int = 0, chunks: int = 1
) -> dict[Any, torch.Tensor]:
    """What parity observes in three steps."""
    config = configured(MODEL, precision)
    parallel = build_single_rank(MODEL, device, DTYPES[precision], exchange, zero, chunks)
    initialise(parallel, config.seed)
    seen = observe_model(parallel, config, STEPS)
    return assemble(one._replace(tensor=one.tensor.cpu()) for one in seen)


def build_single_rank(
    model_config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    exchange: Exchange | None,
    zero: int = 0,
    chunks: int = 1,
    compiled: bool = False,
) -> Parallel:
    """A model on one rank, without weights. `exchange` and `zero` use the group of the whole world; None and 0 turn them off."""
    config = ParallelConfig(overlap_chunks=chunks, node_ranks=1)
    mesh = whole_world(config) if exchange or zero else Mesh(1, 0, mesh_sizes(config, 1))
    with torch.device("meta"):
        model = Transformer(model_config, dtype)
    if zero:
        apply_fsdp(model, mesh, device, zero)
    if exchange:
        config.exchange = exchange
        dispatcher = build_dispatcher(model_config.moe.experts, mesh, config)
        for block in model.blocks:
            if block.moe is not None:
                block.moe.dispatcher = dispatcher
    parallel = parallelize(model, mesh, config, device, compiled)
    parallel.zero = zero or parallel.zero
    return parallel


def whole_world(config: ParallelConfig) -> Mesh:
    """A mesh of one rank whose axes all have a process group."""
    mesh = Mesh(1, 0, mesh_sizes(config, 1))
    names = [(name,) for name in DENSE + EXPERTS] + [DENSE, ("replicate", "shard")]
    mesh.axes = {key: Axis(1, 0, dist.group.WORLD) for key in names}
    return mesh


def collectives(recorder: Recorder) -> None:
    """Each collective of one rank must return its input."""
    axis = Axis(1, 0, dist.group.WORLD)
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8):
        x = torch.arange(24, device=recorder.device).to(dtype).view(6, 4)
        gathered, sent = torch.empty_like(x), torch.empty_like(x)
        all_gather(gathered, x)
        dist.all_to_all_single(sent, x, [6], [6])
        found = {"all-reduce": sum_over(x.clone(), axis), "maximum": max_over(x.clone(), axis), "stack": stack_over(x, axis)[0]}
        for name, value in (found | {"all-gather": gathered, "all-to-all": sent}).items():
            recorder.check(f"{name}, {dtype}", torch.equal(value.cpu(), x.cpu()))
    empty = torch.empty(0, 4, device=recorder.device)
    dist.all_to_all_single(torch.empty_like(empty), empty, [0], [0])
    dist.barrier()
    recorder.check("all-to-all of nothing, and a barrier", True)


@contextmanager
def world_of_one(device: torch.device) -> Iterator[None]:
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder, world(device, 0, 1, Path(folder) / "meeting"):
        yield


@contextmanager
def world(device: torch.device, rank: int, size: int, meeting: Path) -> Iterator[None]:
    """A process group of `size` ranks that meet through a file, with NCCL on GPUs and gloo on CPUs."""
    cuda = device.type == "cuda"
    if cuda:
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
        device_id=device if cuda else None,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
