"""What stages need of each other beside the residual stream: the numbers are those of one process, in fp64, in every schedule.

Four stages on four ranks, eight in a V, and two of each of two ranks, also with passes side by side.
"""

from typing import Any

import pytest
from sameness import Case, Layout, compared_with, explained, spread, verdict_of
from test_pipeline_parity import INTERLEAVED, SIZES, ZBH1, ZBV, all_found, moe
from tokenyard.moe.config import ModelConfig, RouterConfig, Scope, Score

POOLED_BY_SEQUENCE = {"pool_layers": True, "sequence_coefficient": 0.0}
POOLED_BY_BATCH = {"pool_layers": True, "scope": Scope.batch, "bias_rate": 0.01}
MODELS = {
    "experts on a shortcut behind each border, one balance loss of all layers over sequences": Case(
        ModelConfig(layers=7, **SIZES, dense_first=1, moe=moe(shortcut=True, balance=POOLED_BY_SEQUENCE)), micro_batches=4, steps=1
    ),
    "one balance loss of all layers over the batch, a null expert, tied, multi-token prediction": Case(
        ModelConfig(
            layers=7,
            **SIZES,
            tie_embeddings=True,
            mtp_depth=1,
            moe=moe(router=RouterConfig(Score.sigmoid, null_experts=1), balance=POOLED_BY_BATCH),
        ),
        micro_batches=4,
        steps=1,
    ),
}
SIDE_BY_SIDE = Layout(4, pipeline=2, expert=2, pipeline_overlap=True)
LAYOUTS = {
    "1f1b x tensor 2": Layout(4, pipeline=2, tensor=2, expert=2),
    "zbh1 of 4 stages": Layout(4, pipeline=4, **ZBH1),
    "zbv of 8 stages": Layout(4, pipeline=4, **ZBV),
    "interleaved x shard 2, zero 3, recompute": Layout(4, pipeline=2, shard=2, recompute=True, **INTERLEAVED),
    "interleaved x context 2, side by side": SIDE_BY_SIDE._replace(context=2, **INTERLEAVED),
    "zbv x shard 2, zero 1, side by side": SIDE_BY_SIDE._replace(shard=2, zero=1, **ZBV),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_numbers_of_one_process(ranks: Any, layout: str) -> None:
    """All models in one call of the ranks."""
    expected = {name: compared_with(case) for name, case in MODELS.items()}
    answers = ranks(4, all_found, LAYOUTS[layout], MODELS, expected)
    for name, case in MODELS.items():
        verdict = verdict_of(spread(LAYOUTS[layout], case.micro_batches), [answer[name] for answer in answers])
        assert verdict.equal, (name, "\n".join(explained(verdict, set())))
