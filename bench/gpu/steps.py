"""Measures whole training steps on one device, without data, Hydra or trackers: tokens/s, MFU, memory, and the time of each
stage."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch

from ...moe.config import ModelConfig, MoEConfig
from ...moe.init import fill
from ...moe.param_count import count, training_flops_per_token
from ...parallel.apply import Parallel, initialise
from ...parallel.gradients import gradient_all_reduce, squared_norm
from ...train.batch import Rows
from ...train.config.config import Config, OptimizerConfig
from ...train.config.model_summary import rank_bytes
from ...train.cuda_graph import WARM_STEPS, MicroBatchGraph
from ...train.logging.peak_flops import peak_flops
from ...train.loss import Losses
from ...train.optimizer import build_optimizer
from ...train.step import StepInput, add_up, backward, count_totals, forward, train_step, update
from ..host_reads import host_reads
from ..timing import peak_bytes, spread, take_turns, timed
from .exchanges import build_single_rank
from .layers import forget, mebibytes, milliseconds, waits
from .recorder import Recorder
from .waits import random_rows

WIDE = ModelConfig(
    layers=16,
    width=2048,
    heads=16,
    kv_heads=16,
    vocabulary=32768,
    moe=MoEConfig(experts=64, top_k=8, hidden=640),
)
"""0.9B active of 4.4B parameters."""
NARROW = ModelConfig(layers=2, width=64, heads=4, kv_heads=2, vocabulary=256, moe=MoEConfig(hidden=64))
BATCHES = {"full": [(4, 4096), (1, 2048)], "tiny": [(2, 64), (1, 32)]}
"""Sequences and their length: a batch that keeps the device busy, and one for which the device waits for the host."""
REPEATS = {"full": (8, 3), "tiny": (2, 1)}
SHARE = 0.55
"""The share of the device memory for weights, gradients and moments; the rest is for activations."""


class ModelAndOptimizer(NamedTuple):
    """A bf16 model with random fp32 weights, and its optimizer."""

    parallel: Parallel
    optimizer: torch.optim.Optimizer
    graph: MicroBatchGraph | None = None

    def step(self, rows: Rows, micro_batches: int = 1) -> Callable[[], Any]:
        accumulate_fn = self.graph and self.graph.accumulate
        return partial(train_step, self.parallel, self.optimizer, StepInput([rows] * micro_batches, 1e-4, 1.0), accumulate_fn)


def run(recorder: Recorder) -> None:
    initial_weights(recorder)
    model = fitting(recorder.device) if recorder.scale == "full" else NARROW
    trained = build(model, recorder.device)
    for sequences, length in BATCHES[recorder.scale]:
        rows = random_rows(trained.parallel, sequences, length)
        measure(recorder, trained, rows, "eager")
        stages(recorder, trained, rows)
    measure(recorder, trained, random_rows(trained.parallel, *BATCHES[recorder.scale][0]), "eager", micro_batches=4)
    del trained
    forget(recorder.device)
    if recorder.cuda:
        graphs(recorder, model)


def graphs(recorder: Recorder, model: ModelConfig) -> None:
    """Checks that the numbers of steps with a CUDA graph are those without, and reports their times."""
    small, device = replace(model, layers=2), recorder.device
    eager, graphed = build(small, device), with_graph(build(small, device))
    rows = random_rows(eager.parallel, *BATCHES[recorder.scale][1])
    for step in range(WARM_STEPS + 3):
        (expected, found), name = (trained.step(rows, 2)() for trained in (eager, graphed)), f"step {step + 1} with a CUDA graph"
        for column in ("cross_entropy", "gradient_norm"):
            one, other = getattr(expected, column), getattr(found, column)
            recorder.below(f"{name}, {column}", ((one - other).abs() / one).item(), 1e-3)
    assert graphed.graph is not None
    recorder.check("a graph was captured", graphed.graph.captured is not None, "failed" if graphed.graph.failed else "")
    del eager, graphed
    forget(device)
    trained = with_graph(build(model, device))
    for sequences, length in BATCHES[recorder.scale]:
        rows = random_rows(trained.parallel, sequences, length)
        for _ in range(WARM_STEPS + 1):
            trained.step(rows)()
        measure(recorder, trained, rows, "CUDA graph")
    del trained
    forget(device)


def with_graph(trained: ModelAndOptimizer) -> ModelAndOptimizer:
    return trained._replace(graph=MicroBatchGraph(trained.parallel))


def initial_weights(recorder: Recorder) -> None:
    """Checks that the device draws the bits of a CPU, also for a slice of the columns, and reports the rates."""
    name, shape = "layers.0.moe.experts.down", (8, 2048, 1024) if recorder.scale == "full" else (2, 64, 48)
    for columns in (shape[2], shape[2] // 2 - 4):
        here, there = (torch.empty(*shape[:2], columns, device=device) for device in (recorder.device, "cpu"))
        draw = partial(fill, here, name, shape, WIDE, 1, (0, 0, 4 if columns < shape[2] else 0))
        seconds = spread(take_turns({"fill": draw}, recorder.device, *REPEATS[recorder.scale])["fill"])
        fill(there, name, shape, WIDE, 1, (0, 0, 4 if columns < shape[2] else 0))
        recorder.check(f"initial weights are those of a CPU, {columns} columns", torch.equal(here.cpu(), there))
        recorder.row(
            "initial weights", columns=columns, numbers=here.numel(), **{"M/s": round(here.numel() / seconds.median / 1e6)}
        )


def fitting(device: torch.device) -> ModelConfig:
    """WIDE with as many layers as fit into memory."""
    room = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 2**33
    models = (replace(WIDE, layers=layers) for layers in range(WIDE.layers, 1, -1))
    fits = (model for model in models if rank_bytes(Config(model=model), 1)["total"] <= SHARE * room)
    return next(fits, replace(WIDE, layers=1))


def build(model: ModelConfig, device: torch.device, compiled: bool = False) -> ModelAndOptimizer:
    parallel = build_single_rank(model, device, torch.bfloat16, None, compiled=compiled)
    initialise(parallel, 1)
    parallel.model.train()
    return ModelAndOptimizer(parallel, build_optimizer(OptimizerConfig(), parallel))


def measure(recorder: Recorder, trained: ModelAndOptimizer, rows: Rows, name: str, micro_batches: int = 1) -> None:
    """Reports the time of a step. MFU is relative to the bf16 peak of the device."""
    device, model, step = recorder.device, trained.parallel.model.config, trained.step(rows, micro_batches)
    seconds = spread(take_turns({name: step}, device, *REPEATS[recorder.scale])[name])
    held = torch.cuda.memory_allocated(device) if recorder.cuda else 0
    more = peak_bytes(step, device)
    peak, tokens = peak_flops(device, torch.bfloat16), micro_batches * rows.ids.numel()
    flops = tokens * training_flops_per_token(model, rows.ids.shape[1])
    parameters = count(model)
    recorder.row(
        "steps, bf16",
        step=name,
        layers=model.layers,
        parameters=f"{parameters.active / 1e9:.2f}B of {parameters.total / 1e9:.2f}B",
        tokens=tokens,
        **{
            "micro-batches": micro_batches,
            "ms (least, most)": milliseconds(seconds),
            "tokens/s": round(tokens / seconds.median),
            "MFU": f"{flops / seconds.median / peak.flops:.1%} (peak {peak.source})",
            "peak MiB": mebibytes(None if more is None else held + more),
            "waits": waits(host_reads(step, device)),
        },
    )


def stages(recorder: Recorder, trained: ModelAndOptimizer, rows: Rows) -> None:
    """Reports the milliseconds of each stage, each from an idle device, so together they take longer than a step."""
    taken: dict[str, list[float]] = {}
    for _ in range(1 + REPEATS[recorder.scale][0]):
        for name, seconds in _stages(trained, rows, recorder.device):
            taken.setdefault(name, []).append(seconds)
    medians = {f"{name} ms": round(1e3 * spread(times[1:]).median, 3) for name, times in taken.items()}
    recorder.row("stages of a step, bf16", tokens=rows.ids.numel(), **medians)


def _stages(trained: ModelAndOptimizer, rows: Rows, device: torch.device) -> list[tuple[str, float]]:
    """Runs the stages of `train_step` and times each."""
    parallel, optimizer = trained[:2]
    optimizer.zero_grad(set_to_none=True)
    totals, shares, found = count_totals(parallel, [rows]), [], []
    works: dict[str, Callable[[], Any]] = {
        "forward": lambda: shares.append(forward(parallel, rows, totals)),
        "backward and sums over ranks": lambda: reduced_backward(parallel, shares[0]),
        "norm and numbers": lambda: add_up(parallel, shares, totals, squared_norm(parallel)),
        "update": lambda: update(optimizer, 1e-4),
    }
    for name, work in works.items():
        found.append((name, timed(work, device)))
    return found


def reduced_backward(parallel: Parallel, share: Losses) -> None:
    """The backward pass of the only micro-batch, with its gradient sums."""
    with gradient_all_reduce(parallel):
        backward(share)
