"""Passes side by side give the bits of passes one after the other, and the numbers of one process; exchanges overlap with them."""

import itertools
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from sameness import VOCABULARY, Case, Layout, build, compared_with, configured, explained, rows_of, seen, spread, verdict_of
from tokenyard.moe.config import BalanceConfig, CapacityConfig, ModelConfig, MoEConfig, Scope
from tokenyard.parallel.config import ContextExchange, Exchange, PipelineSchedule
from tokenyard.parallel.dispatch.async_collectives import _Running
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parallel.pipeline import overlap
from tokenyard.parity.compare import Reference, compare
from tokenyard.train.config.config import OptimizerConfig
from tokenyard.train.optimizer import build_optimizer
from tokenyard.train.step import StepInput, train_step
from torch.utils._python_dispatch import TorchDispatchMode

SIZES: dict[str, Any] = {"width": 16, "heads": 4, "kv_heads": 4, "hidden": 24, "vocabulary": VOCABULARY, "init_std": 0.3}
MOE = MoEConfig(
    experts=8,
    hidden=16,
    z_coefficient=0.01,
    balance=BalanceConfig(coefficient=0.05, sequence_coefficient=0.02, scope=Scope.batch, bias_rate=0.01),
    capacity=CapacityConfig(factor=0.8, scope=Scope.batch),
    shared_hidden=16,
    dropout=0.125,
)
CASE = Case(ModelConfig(layers=3, **SIZES, tie_embeddings=True, mtp_depth=1, dropout=0.125, moe=MOE), micro_batches=4, steps=1)
PAIRS, PAIRS_OF_V = [3, 3, 5, 5], [1, 1, 5, 5]
"""Of a step with 4 micro-batches, on each rank."""
BESIDE = Layout(4, pipeline=2, expert=2, pipeline_schedule=PipelineSchedule["interleaved"], pipeline_overlap=True)
LAYOUTS = {
    "plain, 2 chunks, recompute": BESIDE._replace(overlap_chunks=2, recompute=True),
    "plain, zero 3, recompute": BESIDE._replace(shard=2, recompute=True),
    "deduplicated, zero 3": BESIDE._replace(exchange=Exchange.deduplicated, shard=2),
    "hierarchical, zero 1": BESIDE._replace(exchange=Exchange.hierarchical, node_ranks=1, shard=2, zero=1),
    "gather, zero 2": BESIDE._replace(exchange=Exchange.gather, shard=2, zero=2),
    "plain, tensor 2": BESIDE._replace(tensor=2),
    "V, zero 3, recompute": BESIDE._replace(pipeline_schedule=PipelineSchedule["zbv"], shard=2, recompute=True),
    "plain, context 2": BESIDE._replace(context=2, context_exchange=ContextExchange.heads),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_are_those_of_passes_one_after_the_other(ranks: Any, layout: str) -> None:
    answers = ranks(4, compared, LAYOUTS[layout], compared_with(CASE))
    assert [pairs for _, pairs, _ in answers] == (PAIRS_OF_V if layout.startswith("V") else PAIRS)
    assert [differing for differing, _, _ in answers] == 4 * [[]]
    verdict = verdict_of(spread(LAYOUTS[layout], CASE.micro_batches), [found for _, _, found in answers])
    assert verdict.equal, "\n".join(explained(verdict, set()))


def compared(layout: Layout, expected: Reference) -> Any:
    """Returns the keys of what differs from passes one after the other, the pairs, and what differs from one process."""
    config = configured(layout, CASE)
    alone = seen(configured(layout._replace(pipeline_overlap=False), CASE), CASE)
    with mock.patch.object(overlap.Overlap, "run", autospec=True, side_effect=overlap.Overlap.run) as run:
        beside = seen(config, CASE)
    one, other = ({(key, shard.offsets): tensor for key, shard, tensor in tensors} for tensors in (alone, beside))
    assert set(one) == set(other)
    differing = [key for key in one if not torch.equal(one[key], other[key])]
    return differing, run.call_count, (compare(beside, expected), build_mesh(config.parallel).sizes)


@pytest.mark.parametrize("exchange", [Exchange.plain, Exchange.deduplicated, Exchange.gather])
def test_the_other_micro_batch_computes_while_rows_travel(ranks: Any, exchange: Exchange) -> None:
    """The passes of a pair take turns, and in a turn the other's exchange has been started and not been waited for."""
    answers = ranks(4, events_of_pairs, BESIDE._replace(exchange=exchange))
    assert [len(pairs) for pairs in answers] == PAIRS
    for turns in (turns_of(events) for pairs in answers for events in pairs):
        assert len(turns) >= 5
        for place, (mine, _) in list(enumerate(turns))[1:-1]:
            others = [what for one, whats in turns[:place] if one != mine for what in whats]
            assert others.count("start") > others.count("wait"), "rows of the other pass travel"
        computing = ["product" in whats for _, whats in turns[2:-2]]  # without the first backward turn and the last forward one
        assert all(computing), "".join(f" {one}:{''.join(what[0] for what in whats)}" for one, whats in turns)
    assert answers[0] == answers[1] and answers[2] == answers[3], "the order is that of all ranks of a group"


def turns_of(events: list[tuple[int, str]]) -> list[tuple[int, list[str]]]:
    """Returns the turns of a pair: whose it is, and what happens in it."""
    return [(one, [what for _, what in turn]) for one, turn in itertools.groupby(events, lambda event: event[0])]


def events_of_pairs(layout: Layout) -> list[list[tuple[int, str]]]:
    """Returns for each pair of a step what its passes (0: forward, 1: backward) do: products, starts of exchanges, and waits."""
    parallel = build(layout, CASE.config)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), parallel)
    events = Events()
    start, wait, run = _Running.start, _Running.wait, overlap.Overlap.run

    def started(self: Any, *arguments: Any, **named: Any) -> None:
        start(self, *arguments, **named)
        events.note("start")

    def waited(self: Any) -> Any:
        rows = wait(self)
        events.note("wait")
        return rows

    def begun(*arguments: Any) -> None:
        events.pairs.append([])
        run(*arguments)

    with ExitStack() as stack:
        for holder, name, new in ((_Running, "start", started), (_Running, "wait", waited), (overlap.Overlap, "run", begun)):
            stack.enter_context(mock.patch.object(holder, name, new))
        stack.enter_context(events)
        train_step(parallel, optimizer, StepInput(rows_of(parallel, 0, CASE), lr=0.01, clip_norm=None))
    return events.pairs


class Events(TorchDispatchMode):
    """Notes what the passes of each pair do. A mode belongs to a thread, and the second pass has those of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[list[tuple[int, str]]] = []

    def note(self, what: str) -> None:
        if overlap._pair is not None:
            self.pairs[-1].append((overlap._pair.running, what))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in ("mm", "bmm", "addmm", "grouped_mm", "grouped_outer"):
            self.note("product")
        return func(*args, **(kwargs or {}))
