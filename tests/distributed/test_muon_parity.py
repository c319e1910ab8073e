"""Muon gives the weights of one process on every layout, in fp64, though matrices are cut in every way."""

from typing import Any
from unittest import mock

import pytest
from sameness import (
    VOCABULARY,
    Case,
    Layout,
    assert_equal,
    assert_layout_gives_the_numbers_of_one_process,
    compared_with,
    configured,
    found,
    spread,
    verdict_of,
)
from tokenyard.moe.attention_config import AttentionConfig, AttentionKind, MLAConfig
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.parallel.communicators import communicators
from tokenyard.parallel.config import ContextExchange, PipelineSchedule
from tokenyard.parallel.layout import Digit, members
from tokenyard.parallel.mesh import Mesh
from tokenyard.train.config.config import OptimizerConfig
from tokenyard.train.config.matrices import MuonConfig, OptimizerName

LAYOUTS = {
    "tensor 2": Layout(2, tensor=2),
    "expert 2": Layout(2, expert=2),
    "expert tensor 2": Layout(2, expert_tensor=2),
    "replicate 2": Layout(2),
    "zero 3": Layout(2, shard=2),
    "pipeline 2": Layout(2, pipeline=2),
    "context 2": Layout(2, context=2),
    "zero 1, expert 2": Layout(4, shard=4, zero=1, expert=2),
    "zero 2, tensor 2, experts cut": Layout(4, tensor=2, shard=2, zero=2, expert=2, expert_tensor=2),
    "zero 3 over context, experts replicated": Layout(4, context=2, shard=4, context_exchange=ContextExchange.heads),
    "zbv over tensor 2": Layout(4, pipeline=2, pipeline_schedule=PipelineSchedule.zbv, tensor=2),
    "pipeline 2 over shard 2": Layout(4, pipeline=2, shard=2, expert=2),
}


def case(muon: MuonConfig, qk_clip: float | None = None, **model: Any) -> Case:
    moe = MoEConfig(experts=8, hidden=16, shared_hidden=8)
    sizes: dict[str, Any] = {"layers": 4, "width": 16, "heads": 4, "kv_heads": 2, "hidden": 24, "vocabulary": VOCABULARY}
    optimizer = OptimizerConfig(OptimizerName.muon, lr=0.01, clip_norm=0.5, muon=muon, qk_clip=qk_clip)
    return Case(ModelConfig(**sizes, init_std=0.3, moe=moe, dense_first=1, **model), micro_batches=2, optimizer=optimizer)


MLA = AttentionConfig(AttentionKind.mla, mla=MLAConfig(q_rank=8, kv_rank=8, nope_width=4, rope_width=2, value_width=6))
CASES = {
    "grouped queries": case(MuonConfig(), qk_clip=0.2),
    "latents": case(MuonConfig(router=True), attention=MLA, mtp_depth=1, tie_embeddings=True, qk_clip=0.2),
    "latents, fused": case(MuonConfig(fused=True), attention=MLA),
}
PAIRS = [(layout, list(CASES)[index % 3]) for index, layout in enumerate([*LAYOUTS, *list(LAYOUTS)[7:]])]


@pytest.mark.parametrize(("layout", "name"), PAIRS)
def test_layout_gives_the_weights_of_one_process(ranks, layout: str, name: str) -> None:
    assert_layout_gives_the_numbers_of_one_process(ranks, LAYOUTS[layout], CASES[name])


def test_a_stage_sends_messages_in_the_group_of_all_ranks(ranks: Any) -> None:
    """Ranks get no group for Muon: only those that the layout has without it."""
    layout, these = Layout(8, pipeline=2, tensor=2, shard=2, expert=2), CASES["latents"]._replace(steps=2)
    answers = ranks(layout.world, found_with_groups, layout, these, compared_with(these))
    assert_equal(verdict_of(spread(layout, these.micro_batches), [answer for answer, _ in answers]))
    parallel = configured(layout, these).parallel
    for rank, (_, made) in enumerate(answers):
        known = {each.ranks for each in communicators(these.config, parallel, layout.world, layout.world, rank)}
        assert {each for each in made if len(each) > 2} <= known  # links between stages are of two


def found_with_groups(layout: Layout, case: Case, expected: Any) -> tuple[Any, list[tuple[int, ...]]]:
    """Returns the findings, and the ranks of the groups that this rank has created."""
    made, group = list[tuple[int, ...]](), Mesh.group

    def watched(mesh: Mesh, *dims: Digit) -> Any:
        made.append(members(mesh.rank, dims))
        return group(mesh, *dims)

    with mock.patch.object(Mesh, "group", watched):
        return found(layout, case, expected), made
