"""A micro-batch as a CUDA graph gives the numbers of steps without one, bit for bit, on a double of CUDA's graphs."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from recorded_graph import Recorded, recording
from tokenyard.data.batches import IGNORE
from tokenyard.moe.config import BalanceConfig, CapacityConfig, ModelConfig, MoEConfig
from tokenyard.moe.model import Transformer
from tokenyard.moe.token_info import BatchPosition
from tokenyard.parallel.apply import Parallel, initialise, parallelize
from tokenyard.parallel.config import ParallelConfig, Recompute
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train.batch import Rows
from tokenyard.train.config.config import OptimizerConfig
from tokenyard.train.cuda_graph import WARM_STEPS, MicroBatchGraph
from tokenyard.train.optimizer import build_optimizer
from tokenyard.train.step import StepInput, StepNumbers, train_step
from torch import Tensor

STEPS = WARM_STEPS + 4


@pytest.fixture
def graphs() -> Iterator[list[Recorded]]:
    """All graphs that are captured."""
    with recording() as made:
        yield made


@pytest.mark.parametrize(
    ("micro_batches", "recompute", "changes"),
    [
        (1, Recompute.none, {}),
        (2, Recompute.none, {"shared_hidden": 8}),
        (2, Recompute.block, {"capacity": CapacityConfig(0.7, pad=True)}),
        (1, Recompute.selective, {}),
    ],
)
def test_steps_with_a_graph_are_those_without(
    graphs: list[Recorded], micro_batches: int, recompute: Recompute, changes: dict[str, Any]
) -> None:
    expected, found = (run(build(recompute, **changes), graph, micro_batches) for graph in (False, True))
    assert len(graphs) == 1 and graphs[0].replays == (STEPS - WARM_STEPS) * micro_batches
    assert_same(found, expected)
    losses = [numbers.cross_entropy.item() for numbers in found[0]]
    assert len(set(losses)) == STEPS, "rows and weights differ in each step"


def test_what_the_host_decides_anew_is_captured_anew(graphs: list[Recorded]) -> None:
    """Coefficients change after a step, and in another step the routers collect metrics: without the graph until it fits again."""
    changes = {"balance": BalanceConfig(0.05, schedule=[1, 1.0, WARM_STEPS + 3, 4.0])}

    def collect(parallel: Parallel, step: int) -> None:
        for block in parallel.model.blocks:
            block.moe.router.collects_metrics = step == WARM_STEPS + 2

    steps = 2 * WARM_STEPS + 4
    expected, found = (run(build(**changes), graph, steps=steps, before=collect) for graph in (False, True))
    assert_same(found, expected)
    assert [graph.replays for graph in graphs] == [1, 2]


def test_attention_logits_are_watched_without_a_graph(graphs: list[Recorded]) -> None:
    largest: list[Tensor] = []

    def watch(parallel: Parallel, step: int) -> None:
        if step > WARM_STEPS + 1:
            largest.append(torch.full((4,), -torch.inf, dtype=torch.float64))
            attention = parallel.model.blocks[0].attention
            attention.softmax = attention.softmax._replace(largest_H=largest[-1])

    for graph in (False, True):
        run(build(), graph, before=watch)
    half = len(largest) // 2
    assert torch.equal(torch.stack(largest[:half]), torch.stack(largest[half:])) and torch.stack(largest).isfinite().all()
    assert graphs[0].replays == 1


def test_rows_without_tokens_and_steps_without_an_update(graphs: list[Recorded]) -> None:
    changes = {"accepts": lambda step: step % 2 == 0, "empty": WARM_STEPS + 2}
    expected, found = (run(build(), graph, **changes) for graph in (False, True))
    assert_same(found, expected)
    assert found[0][WARM_STEPS + 1].cross_entropy == 0 and graphs[0].replays == STEPS - WARM_STEPS


def test_a_graph_that_cannot_be_captured_is_told_in_a_line(graphs: list[Recorded], caplog: pytest.LogCaptureFixture) -> None:
    """Dropping choices without padding reads the number of rows in each layer."""
    changes = {"capacity": CapacityConfig(0.7)}
    expected, found = (run(build(**changes), graph) for graph in (False, True))
    assert_same(found, expected)
    [record] = caplog.records
    says = (
        "cuda_graph=true: no graph could be captured, steps run kernel by kernel: operation not permitted when stream is capturing"
    )
    assert record.getMessage() == says
    assert len(graphs) == 1 and not graphs[0].replays


Trained = tuple[list[StepNumbers], Parallel]


def run(
    parallel: Parallel,
    graph: bool,
    micro_batches: int = 1,
    steps: int = STEPS,
    before: Callable[[Parallel, int], None] = lambda *_: None,
    accepts: Callable[[int], bool] = lambda _: True,
    empty: int | None = None,
) -> Trained:
    optimizer = build_optimizer(OptimizerConfig(), parallel)
    accumulate = MicroBatchGraph(parallel).accumulate if graph else None
    numbers = []
    for step in range(1, steps + 1):
        before(parallel, step)
        rows = [rows_of(step, micro, step == empty) for micro in range(micro_batches)]
        step_input = StepInput(rows, 0.01, 1.0, BatchPosition(1, step), accepts=lambda _, step=step: accepts(step))
        numbers.append(train_step(parallel, optimizer, step_input, accumulate))
    return numbers, parallel


def assert_same(found: Trained, expected: Trained) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        for name, value in one._asdict().items():
            same = torch.equal(value, getattr(other, name)) if isinstance(value, Tensor) else value == getattr(other, name)
            assert same, name
    for (name, parameter), other in zip(found[1].model.named_parameters(), expected[1].model.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def rows_of(step: int, micro: int, empty: bool) -> Rows:
    generator = torch.Generator().manual_seed(10 * step + micro)
    ids, targets = torch.randint(40, (2, 2, 10), generator=generator)
    uncounted = torch.rand(2, 10, generator=generator) < (2 if empty else 0.3)
    return Rows(ids, targets.masked_fill(uncounted, IGNORE))


def build(recompute: Recompute = Recompute.none, **changes: Any) -> Parallel:
    moe = MoEConfig(**{"experts": 4, "hidden": 8, "balance": BalanceConfig(0.05), "z_coefficient": 0.01, **changes})
    config = ModelConfig(layers=2, width=16, heads=4, kv_heads=2, hidden=8, vocabulary=40, init_std=0.3, moe=moe)
    with torch.device("meta"):
        model = Transformer(config, torch.float64)
    spread = ParallelConfig(recompute=recompute)
    parallel = parallelize(model, build_mesh(spread), spread, torch.device("cpu"))
    initialise(parallel, seed=1)
    return parallel
