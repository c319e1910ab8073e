"""Layouts whose axes give way, and send messages in the group of all ranks, have the numbers of one process, in fp64.

With as few groups as a layout can have, all axes that can give way do, and all links of a pipeline share a group: each exchange of
experts, sums of gradients over replicas, and each schedule.
"""

from typing import Any
from unittest.mock import patch

import pytest
from sameness import Case, Layout, compared_with, explained, spread, verdict_of
from test_pipeline_parity import INTERLEAVED, MODELS, ZBH1, ZBV, all_found
from tokenyard.parallel import communicators
from tokenyard.parallel.config import ContextExchange, Exchange
from tokenyard.parallel.mesh import Mesh

LAYOUTS = {
    "rows and columns": (Layout(8, shard=4, expert=2, expert_tensor=2, overlap_chunks=2), {2}),
    "nodes, two stages": (
        Layout(8, pipeline=2, tensor=2, expert=4, exchange=Exchange.hierarchical, node_ranks=2, **INTERLEAVED),
        {2},
    ),
    "all tokens, two stages": (Layout(8, pipeline=2, tensor=2, expert=4, exchange=Exchange.gather, **ZBV), {2, 4}),
    "context and tensor, two stages": (
        Layout(8, pipeline=2, context=2, shard=2, expert=2, expert_tensor=2, exchange=Exchange.deduplicated, recompute=True),
        {2},
    ),
    "context, two stages, experts by their own memory": (
        Layout(8, pipeline=2, tensor=2, context=2, expert=2, exchange=Exchange.symmetric, recompute=True),
        {2},
    ),
    "heads over context": (
        Layout(
            4, context=2, shard=4, expert=2, expert_tensor=2, exchange=Exchange.symmetric, context_exchange=ContextExchange.heads
        ),
        {2},
    ),
    "four stages with one group": (Layout(4, pipeline=4, **ZBH1), set()),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_numbers_of_one_process(ranks: Any, name: str) -> None:
    """Of one model that has tied embeddings, an expert bias and dense layers."""
    layout, sizes = LAYOUTS[name]
    case = next(name for name in MODELS if "tied" in name)
    cases = {case: MODELS[case]._replace(steps=1)}
    answers = ranks(layout.world, found_with_few_groups, layout, cases, {case: compared_with(cases[case])})
    verdict = verdict_of(spread(layout, cases[case].micro_batches), [answer[case] for answer, _ in answers])
    assert verdict.equal, "\n".join(explained(verdict, set()))
    assert all(found == sizes for _, found in answers)


def found_with_few_groups(layout: Layout, cases: dict[str, Case], expected: Any) -> tuple[Any, set[int]]:
    """Returns the findings, and the sizes of the axes that sent messages."""
    given_way, strided = set[int](), Mesh.strided

    def watched(mesh: Mesh, *dims: Any) -> Any:
        axis = strided(mesh, *dims)
        given_way.update({axis.size} if axis.ranks else ())
        return axis

    with patch.object(communicators, "MOST", 1), patch.object(Mesh, "strided", watched):
        return all_found(layout, cases, expected), given_way
