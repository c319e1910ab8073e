"""Pipelines give the numbers of one process, in fp64, as every layout does: schedules, cuts, and each other kind of parallelism."""

from typing import Any

import pytest
from sameness import VOCABULARY, Case, Layout, compared_with, explained, found, spread, verdict_of
from tokenyard.moe.config import (
    AttentionConfig,
    AttentionKind,
    BalanceConfig,
    CapacityConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    Scope,
)
from tokenyard.parallel.config import Exchange, PipelineSchedule

INTERLEAVED = {"pipeline_schedule": PipelineSchedule["interleaved"]}
ZBH1, ZBV = ({"pipeline_schedule": PipelineSchedule[name]} for name in ("zbh1", "zbv"))
SIZES: dict[str, Any] = {"width": 16, "heads": 4, "kv_heads": 4, "hidden": 24, "vocabulary": VOCABULARY, "init_std": 0.3}


def moe(**changes: Any) -> MoEConfig:
    balance = {"coefficient": 0.05, "sequence_coefficient": 0.02} | changes.pop("balance", {})
    return MoEConfig(experts=8, hidden=16, z_coefficient=0.01, balance=BalanceConfig(**balance), **changes)


MODELS = {
    "drops and balance over the batch": Case(
        ModelConfig(
            layers=3, **SIZES, moe=moe(capacity=CapacityConfig(factor=0.8, scope=Scope.batch), balance={"scope": Scope.batch})
        ),
        micro_batches=2,
        steps=2,
    ),
    "tied, first layer dense, shared expert, expert bias": Case(
        ModelConfig(
            layers=4, **SIZES, tie_embeddings=True, dense_first=1, moe=moe(shared_hidden=16, top_k=1, balance={"bias_rate": 0.01})
        ),
        micro_batches=2,
        steps=2,
    ),
    "latent attention, two modules of multi-token prediction": Case(
        ModelConfig(
            layers=3,
            **SIZES,
            mtp_depth=2,
            moe=moe(),
            attention=AttentionConfig(
                kind=AttentionKind.mla, mla=MLAConfig(q_rank=12, kv_rank=12, nope_width=8, rope_width=4, value_width=8)
            ),
        ),
        micro_batches=2,
        steps=2,
    ),
}
LAYOUTS = {
    "pipeline 2": Layout(2, pipeline=2),
    "pipeline 4": Layout(4, pipeline=4),
    "pipeline 2 of 2 stages, head alone": Layout(2, pipeline=2, **INTERLEAVED),
    "pipeline 2 x expert 2, recompute": Layout(4, pipeline=2, expert=2, recompute=True),
    "pipeline 2 x tensor 2 x expert_tensor 2": Layout(4, pipeline=2, tensor=2, expert_tensor=2),
    "pipeline 2 of 2 stages x shard 2, zero 3": Layout(4, pipeline=2, shard=2, **INTERLEAVED),
    "pipeline 2 of 2 stages x shard 2, zero 1": Layout(4, pipeline=2, shard=2, zero=1, expert=2, **INTERLEAVED),
    "pipeline 2 x shard 2, zero 2": Layout(4, pipeline=2, shard=2, zero=2, exchange=Exchange.gather, expert=2),
    "all axes": Layout(8, pipeline=2, context=2, shard=2, tensor=2, expert=2, expert_tensor=2),
    "all axes, pipeline 2 of 2 stages, zero 2, recompute": Layout(
        8, pipeline=2, context=2, shard=2, tensor=2, expert=4, zero=2, exchange=Exchange.deduplicated, recompute=True, **INTERLEAVED
    ),
    "pipeline 2 x symmetric 2": Layout(4, pipeline=2, exchange=Exchange.symmetric, expert=2, recompute=True),
    "pipeline 2 x replicate 2": Layout(4, pipeline=2, exchange=Exchange.deduplicated, expert=2),
    "zbh1, pipeline 2 x expert 2, recompute": Layout(4, pipeline=2, expert=2, recompute=True, **ZBH1),
    "zbv, pipeline 2 x tensor 2 x expert_tensor 2": Layout(4, pipeline=2, tensor=2, expert_tensor=2, **ZBV),
    "zbv, pipeline 2 x shard 2, zero 3, recompute": Layout(4, pipeline=2, shard=2, recompute=True, **ZBV),
    "zbv, pipeline 2 x shard 2, zero 1": Layout(4, pipeline=2, shard=2, zero=1, expert=2, exchange=Exchange.gather, **ZBV),
    "zbv, pipeline 2 x replicate 2": Layout(4, pipeline=2, expert=2, overlap_chunks=2, exchange=Exchange.deduplicated, **ZBV),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_numbers_of_one_process(ranks: Any, layout: str) -> None:
    """All models in one call of the ranks."""
    expected = {name: compared_with(case) for name, case in MODELS.items()}
    answers = ranks(LAYOUTS[layout].world, all_found, LAYOUTS[layout], MODELS, expected)
    for name, case in MODELS.items():
        verdict = verdict_of(spread(LAYOUTS[layout], case.micro_batches), [answer[name] for answer in answers])
        assert verdict.equal, (name, "\n".join(explained(verdict, set())))


def all_found(layout: Layout, cases: dict[str, Case], expected: Any) -> Any:
    return {name: found(layout, case, expected[name]) for name, case in cases.items()}
