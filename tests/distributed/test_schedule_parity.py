"""Schedules of batch size, learning rate and loss coefficients: the same numbers on any layout, and those of changes by hand."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.train.config.compose import compose
from tokenyard.train.run import single_step
from tokenyard.train.setup import open_session

LOSSES = [
    *TINY_RUN,
    "precision=fp64",
    "steps=6",
    "batch.micro=2",
    "checkpoint.every=0",
    "model.moe.router.score=sigmoid",
    "model.moe.balance.coefficient=0.1",
    "model.moe.balance.sequence_coefficient=0.2",
    "model.moe.balance.bias_rate=0.01",
    "model.moe.z_coefficient=0.05",
]
SCHEDULES = [
    "model.moe.balance.schedule=[3,0.5,5,0]",
    "model.moe.balance.bias_schedule=[0,2,4,0]",
    "model.moe.z_schedule=[2,0,4,3]",
]
GROWING = ["batch.schedule=[500,16,1500,24]", "schedule=wsd", "schedule.unit=tokens", "schedule.warmup=300", "schedule.decay=1000"]
LAYOUTS = {
    "shard 2 x expert 2": (2, "parallel.shard=2 parallel.expert=2"),
    "pipeline 2": (2, "parallel.pipeline=2"),
    "tensor 2 x pipeline 2 zbv": (
        4,
        "model.layers=4 parallel.tensor=2 parallel.pipeline=2 parallel.pipeline_schedule=zbv",
    ),
}


def trained(folder: Path, words: list[str], by_hand: bool = False) -> list[tuple[Any, ...]]:
    """Returns loss, norm and tokens of each step. `by_hand`: the coefficients of SCHEDULES are set before the steps."""
    session = open_session(
        compose([*LOSSES, *words, f"run.dir={folder}/run", f"data.cache={folder.parent}/cache"]), torch.device("cpu")
    )
    session.parallel.model.train()
    found, moe = [], session.parallel.model.config.moe
    for step in range(1, session.config.steps + 1):
        if by_hand:
            factor, bias, z = (
                1 if step < 3 else 0.5 if step < 5 else 0,
                2 if step < 4 else 0,
                1 if step < 2 else 0 if step < 4 else 3,
            )
            moe.balance.coefficient, moe.balance.sequence_coefficient = 0.1 * factor, 0.2 * factor
            moe.balance.bias_rate, moe.z_coefficient = 0.01 * bias, 0.05 * z
        numbers = single_step(session)
        found.append((numbers.cross_entropy.item(), numbers.gradient_norm.item(), numbers.tokens))
    session.close()
    return found


def test_coefficients_are_those_of_changes_by_hand(tmp_path: Path) -> None:
    scheduled, by_hand = trained(tmp_path / "a", SCHEDULES), trained(tmp_path / "b", [], by_hand=True)
    assert scheduled == by_hand != trained(tmp_path / "c", [])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path: Path, ranks: Callable[..., list[Any]], layout: str) -> None:
    world, words = LAYOUTS[layout]
    layers = [word for word in words.split() if word.startswith("model.")]
    expected = trained(tmp_path / "one", [*SCHEDULES, *GROWING, *layers])
    assert [tokens for _, _, tokens in expected] == [32 * size for size in (8, 8, 16, 16, 24, 24)]
    for found in ranks(world, trained, tmp_path / "all", [*SCHEDULES, *GROWING, *words.split()]):
        for step, reference in zip(found, expected, strict=True):
            assert step == pytest.approx(reference, rel=1e-9)
