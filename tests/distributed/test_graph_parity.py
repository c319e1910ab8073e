"""Steps with a graph on several ranks are those without, bit for bit: replicas, the sums of losses, the symmetric exchange."""

from typing import Any

import pytest
import torch
from recorded_graph import recording
from sameness import VOCABULARY, Case, Layout, build, rows_of
from tokenyard.moe.config import BalanceConfig, CapacityConfig, ModelConfig, MoEConfig, Scope
from tokenyard.parallel.config import Exchange
from tokenyard.train.config.config import OptimizerConfig
from tokenyard.train.cuda_graph import WARM_STEPS, MicroBatchGraph
from tokenyard.train.optimizer import build_optimizer
from tokenyard.train.step import StepInput, train_step

STEPS = WARM_STEPS + 3
LAYOUTS = {
    "2 replicas": Layout(2),
    "symmetric 2": Layout(2, expert=2, exchange=Exchange.symmetric),
    "symmetric 2, 2 replicas": Layout(4, expert=2, exchange=Exchange.symmetric),
}


def case(**changes: Any) -> Case:
    balance = BalanceConfig(0.05, Scope.batch)
    moe = MoEConfig(**{"experts": 8, "hidden": 16, "shared_hidden": 16, "balance": balance, "z_coefficient": 0.01, **changes})
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 4, "vocabulary": VOCABULARY, "init_std": 0.3}
    return Case(ModelConfig(**sizes, moe=moe), micro_batches=2)


@pytest.mark.parametrize("capacity", [None, 1.0])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_steps_with_a_graph_are_those_without(ranks: Any, layout: Layout, capacity: float | None) -> None:
    changes = {"capacity": CapacityConfig(capacity, pad=layout.expert == 1)} if capacity else {}
    warm = WARM_STEPS + (layout.exchange is Exchange.symmetric)  # it gets its memory in the first step
    for differ, replays in ranks(layout.world, compare, layout, case(**changes)):
        assert not differ and replays == 2 * (STEPS - warm)


def compare(layout: Layout, case: Case) -> tuple[list[str], int]:
    """Returns what differs on this rank between training with a graph and without, and how often the graph was replayed."""
    with recording() as graphs:
        (expected, replays), (found, _) = (train(layout, case, graph, graphs) for graph in (True, False))
    return [name for name, value in found.items() if not torch.equal(value, expected[name])], replays


def train(layout: Layout, case: Case, with_graph: bool, graphs: list[Any]) -> tuple[dict[str, torch.Tensor], int]:
    parallel = build(layout, case.config)
    optimizer = build_optimizer(OptimizerConfig(), parallel)
    accumulate = MicroBatchGraph(parallel).accumulate if with_graph else None
    found = {}
    for step in range(STEPS):
        numbers = train_step(parallel, optimizer, StepInput(rows_of(parallel, step, case), 0.01, 1.0), accumulate)
        found |= {f"{name} of step {step}": x for name, x in numbers._asdict().items() if isinstance(x, torch.Tensor)}
    found |= {name: sharded.parameter.detach() for name, sharded in parallel.parameters.items()}
    return found, sum(graph.replays for graph in graphs)
