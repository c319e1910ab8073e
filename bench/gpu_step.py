"""Whole training steps of a model of about 1B active parameters on one device, without data, Hydra or a tracker."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..moe.config import ModelConfig, MoEConfig
from ..moe.count import count, training_flops_per_token
from ..moe.init import reset_expert_biases
from ..moe.model import Transformer
from ..parallel.apply import Parallel, parallelize
from ..parallel.config import ParallelConfig
from ..parallel.mesh import build_mesh
from ..train.config import OptimizerConfig
from ..train.optimizer import build_optimizer
from ..train.peak import peak_flops
from ..train.step import Rows, train_step
from .figures import Spread, spread
from .host_reads import host_reads
from .turns import peak_bytes, take_turns


class Size(NamedTuple):
    """Of a model and its global batch."""

    model: ModelConfig
    sequences: int
    length: int


SIZES = {
    "full": Size(
        ModelConfig(
            layers=16,
            width=2048,
            heads=16,
            kv_heads=16,
            vocabulary=32768,
            moe=MoEConfig(experts=64, top_k=8, hidden=640),
        ),
        sequences=4,
        length=4096,
    ),
    "tiny": Size(ModelConfig(layers=2, width=64, heads=4, kv_heads=2, vocabulary=256, moe=MoEConfig(hidden=64)), 2, 64),
}
"""Full: 0.9B active of 4.4B, which with gradients and both moments in fp32 are 71 GB, and 16384 tokens."""


class StepLine(NamedTuple):
    """A step of forward, backward and AdamW; bf16 activations and fp32 weights."""

    name: str
    seconds: Spread
    mfu: float
    """Of the median: 3 x forward FLOPs of the active parameters, over the device's peak for bf16."""
    tokens_per_second: float
    peak_bytes: int | None
    """Weights, gradients and moments included."""
    host_reads: dict[str, int]
    """How often the host waits for the device in a step, by place."""
    active_parameters: int
    peak_flops: str
    """Where that number is from."""


def measure_steps(size: Size, device: torch.device, repeats: int, warm_up: int, compiled: bool) -> list[StepLine]:
    """A line as it is, and one with the layers compiled (setting `compile`), which take turns on the same weights."""
    parallel, optimizer = _trained(size, device, compiled)
    rows = _random_rows(size, device)
    step = partial(train_step, parallel, optimizer, [rows], 1e-4, 1.0)
    works = {"eager": partial(_with_compiled, parallel.model, False, step)}
    if compiled:
        works["compiled"] = partial(_with_compiled, parallel.model, True, step)
    taken = take_turns(works, device, repeats, warm_up)
    peak = peak_flops(device, torch.bfloat16)
    tokens = size.sequences * size.length
    flops = tokens * training_flops_per_token(size.model, size.length)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    lines = []
    for name, work in works.items():
        seconds, more = spread(taken[name]), peak_bytes(work, device)
        reads: Counter[str] = host_reads(work, device)
        memory = None if more is None else held + more
        rates = flops / seconds.median / peak.flops, tokens / seconds.median
        lines.append(StepLine(name, seconds, *rates, memory, dict(reads), count(size.model).active, peak.source))
    return lines


def _trained(size: Size, device: torch.device, compiled: bool) -> tuple[Parallel, torch.optim.Optimizer]:
    """Random weights are drawn on the device: those of a run are drawn by the host, which takes a minute here."""
    with torch.device("meta"):
        model = Transformer(size.model, torch.bfloat16)
    config = ParallelConfig()
    parallel = parallelize(model, build_mesh(config), config, device, compiled)
    for name, parameter in parallel.model.named_parameters():
        nn.init.ones_(parameter) if "norm" in name else nn.init.normal_(parameter, std=0.02)
    reset_expert_biases(parallel.model)
    parallel.model.train()
    return parallel, build_optimizer(OptimizerConfig(), parallel)


def _random_rows(size: Size, device: torch.device) -> Rows:
    ids = torch.randint(size.model.vocabulary, (size.sequences, size.length + 1), device=device)
    return Rows(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), valid=[size.sequences * size.length])


def _with_compiled(model: nn.Module, on: bool, step: Any) -> Any:
    if on:
        return step()
    with _eager(model):
        return step()


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Modules that were compiled in place run as they were written."""
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl is not None}
    for module in compiled:
        module._compiled_call_impl = None
    yield
    for module, call in compiled.items():
        module._compiled_call_impl = call
