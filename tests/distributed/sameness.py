"""What the tests of layouts share: train one model on a layout, and compare it with one process as `tokenyard parity` does.

Some targets are not counted, and one expert never gets a token.
Import it as `sameness`: tests/conftest.py puts this folder on the path, of ranks too.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from tokenyard.moe.config import ModelConfig
from tokenyard.parallel.apply import Parallel, local
from tokenyard.parallel.config import (
    ContextExchange,
    Exchange,
    ExchangeDtype,
    Overflow,
    ParallelConfig,
    PipelineSchedule,
    Recompute,
)
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parity import choose_layouts as layouts
from tokenyard.parity import observe
from tokenyard.parity.command import explained
from tokenyard.parity.compare import Reference, compare, reference_of
from tokenyard.parity.diagnose import Verdict, judge, place
from tokenyard.parity.finding import Finding, Key
from tokenyard.train.batch import Rows
from tokenyard.train.config.config import BatchConfig, Config, OptimizerConfig, Precision
from tokenyard.train.setup import build_parallel

STEPS, SEQUENCES, LENGTH, VOCABULARY, TOLERANCE = 3, 8, 12, 40, 1e-9


class Layout(NamedTuple):
    world: int
    tensor: int = 1
    shard: int = 1
    expert: int = 1
    expert_tensor: int = 1
    zero: int = 3
    exchange: Exchange = Exchange.plain
    exchange_rows: float = 2.0
    exchange_overflow: Overflow = Overflow.fatal
    node_ranks: int | None = None
    overlap_chunks: int = 1
    recompute: Recompute | bool = False
    """True: by the block."""
    context: int = 1
    context_exchange: ContextExchange = ContextExchange.gather
    pipeline: int = 1
    pipeline_schedule: PipelineSchedule = PipelineSchedule["1f1b"]
    pipeline_chunks: int | None = None
    pipeline_layers: list[int] | None = None
    pipeline_overlap: bool = False


class Case(NamedTuple):
    """A model (of VOCABULARY rows) and what happens to it."""

    config: ModelConfig
    micro_batches: int = 1
    equal_scores: bool = False
    """All tokens choose the same expert in the first step; else expert 2 is starved."""
    idle_rows: int = 0
    """Rows of each global batch whose targets are all ignored: on some layouts a rank has no token."""
    steps: int = STEPS
    length: int = LENGTH
    documents: bool = False
    exchange_dtype: ExchangeDtype = ExchangeDtype.wide
    optimizer: OptimizerConfig = OptimizerConfig(lr=0.01, clip_norm=None)


def assert_layout_gives_the_numbers_of_one_process(ranks: Callable[..., list[Any]], layout: Layout, case: Case) -> None:
    expected = compared_with(case)
    answers = [found(layout, case, expected)] if layout.world == 1 else ranks(layout.world, found, layout, case, expected)
    assert_equal(verdict_of(spread(layout, case.micro_batches), answers))


def assert_equal(verdict: Verdict) -> None:
    assert verdict.equal, "\n".join(explained(verdict, set()))


def verdict_of(layout: layouts.Layout, answers: list[tuple[list[Finding], dict[str, int]]]) -> Verdict:
    places = [place(sizes, rank) for rank, (_, sizes) in enumerate(answers)]
    return judge(layout, [findings for findings, _ in answers], places)


def found(layout: Layout, case: Case, expected: Reference) -> tuple[list[Finding], dict[str, int]]:
    """Runs on a rank; returns the findings of its comparison, and the sizes of the mesh."""
    config = configured(layout, case)
    return compare(seen(config, case), expected), build_mesh(config.parallel).sizes


def seen(config: Config, case: Case) -> list[observe.ObservedTensor]:
    prepare = favour_one_expert if case.equal_scores else starve_expert
    return observe.observe(config, case.steps, prepare, functools.partial(global_batch, case))


def compared_with(case: Case) -> Reference:
    """Returns the reference of one process."""
    if repr(case) not in _references:
        _references[repr(case)] = reference_of(seen(configured(Layout(1), case), case))
    return _references[repr(case)]


_references: dict[str, Reference] = {}


def reference(case: Case) -> dict[str, Any]:
    """Trains in one process; returns the numbers of its steps, its first gradients and last weights, by name."""
    tensors = compared_with(case).tensors
    weights = {key.name: value for key, value in tensors.items() if key.kind == "weight" or key[:2] == (case.steps, "expert bias")}
    return {
        "steps": [numbers(tensors, step) for step in range(1, case.steps + 1)],
        "gradients": {key.name: value for key, value in tensors.items() if key.kind == "gradient"},
        "weights": weights,
    }


def numbers(tensors: dict[Key, torch.Tensor], step: int) -> Any:
    """Returns the numbers of one step, named as in StepNumbers."""

    def of(kind: str) -> torch.Tensor:
        values = [value for key, value in tensors.items() if key[:2] == (step, kind)]
        return torch.stack(values) if values else torch.empty(0)

    layers = {field: of(kind) for kind, field in observe.FIELD_OF_LOSS.items()}
    rest = {"tokens": int(of("tokens")), "mtp_D": of("mtp cross entropy"), "gradient_norm": of("gradient norm")[0]}
    return SimpleNamespace(**layers, **rest, cross_entropy=of("cross entropy")[0])


def spread(layout: Layout, micro_batches: int = 1) -> layouts.Layout:
    settings = {name: value for name, value in layout._asdict().items() if name != "world"}
    if isinstance(layout.recompute, bool):
        settings["recompute"] = Recompute.block if layout.recompute else Recompute.none
    return layouts.Layout(layout.world, ParallelConfig(**settings), micro_batches)


def configured(layout: Layout, case: Case) -> Config:
    config = Config(
        seed=3,
        sequence_length=case.length,
        precision=Precision.fp64,
        batch=BatchConfig(SEQUENCES),
        model=case.config,
        optimizer=case.optimizer,
    )
    config.data.mask_documents = case.documents
    config.parallel.exchange_dtype = case.exchange_dtype
    return spread(layout, case.micro_batches).applied(config)


def build(layout: Layout, config: ModelConfig, precision: Precision = Precision.fp64) -> Parallel:
    return build_parallel(replace(configured(layout, Case(config)), precision=precision), torch.device("cpu"))


def starve_expert(parallel: Parallel) -> None:
    """Expert 2's logit is the mean of those of 0 and 1 and of those of 3 and 4: two others are larger, for every token."""
    for weight in router_weights(parallel):
        weight[4] = weight[0] + weight[1] - weight[3]
        weight[2] = (weight[0] + weight[1]) / 2


def favour_one_expert(parallel: Parallel) -> None:
    """All logits are equal, and all tokens choose the same expert; the other ranks get none in the first step."""
    for weight in router_weights(parallel):
        weight.zero_()


def router_weights(parallel: Parallel) -> list[torch.Tensor]:
    return [local(p.parameter).data for name, p in parallel.parameters.items() if name.endswith("router.weight")]


def rows_of(parallel: Parallel, step: int, case: Case) -> list[Rows]:
    """Returns this rank's rows of a global batch."""
    config = configured(Layout(1), case)
    config.batch.micro = SEQUENCES // case.micro_batches // parallel.mesh.data.size
    return observe.rows_of(parallel, config, *global_batch(case, config, step))


def global_batch(case: Case, config: Config, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, targets = observe.random_batch(config, step)
    targets[: case.idle_rows] = -100
    return ids, targets


def assert_close(value: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert value.shape == expected.shape, what
    if not value.numel():
        return
    error = (value - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= TOLERANCE, f"{what}: relative difference {error:.2e}"
