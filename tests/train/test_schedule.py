"""The learning rate at steps that were computed by hand."""

import math

import pytest
from tokenyard.train.config.config import ScheduleConfig, Shape
from tokenyard.train.optimizer import learning_rate_factor

COSINE = ScheduleConfig(shape=Shape.cosine, warmup=10, final=0.1)
WSD = ScheduleConfig(shape=Shape.wsd, warmup=10, decay=20, final=0.2)
MULTISTEP = ScheduleConfig(shape=Shape.multistep, warmup=4, final=0.09)
CONSTANT = ScheduleConfig(shape=Shape.constant, warmup=4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (COSINE, {1: 0.1, 5: 0.5, 10: 1.0, 60: 0.55, 110: 0.1, 35: 0.1 + 0.9 * (2 + math.sqrt(2)) / 4}),
        (WSD, {1: 0.1, 10: 1.0, 11: 1.0, 90: 1.0, 91: 0.96, 100: 0.6, 110: 0.2}),
        (MULTISTEP, {1: 0.25, 4: 1.0, 88: 1.0, 89: 0.3, 99: 0.3, 100: 0.09, 110: 0.09}),
        (CONSTANT, {1: 0.25, 3: 0.75, 4: 1.0, 5: 1.0, 110: 1.0}),
    ],
    ids=["cosine", "wsd", "multistep", "constant"],
)
def test_values_by_hand(config: ScheduleConfig, expected: dict[int, float]) -> None:
    assert {step: learning_rate_factor(config, step, 110) for step in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize("warmup", [0, 1, 7, 50, 80])
def test_rises_to_the_peak_and_never_above_it_nor_up_again(shape: Shape, warmup: int) -> None:
    factors = [learning_rate_factor(ScheduleConfig(shape=shape, warmup=warmup), step, 50) for step in range(1, 51)]
    assert all(0 < factor <= 1 for factor in factors)
    top = min(warmup, 50)
    assert factors[:top] == pytest.approx([step / warmup for step in range(1, top + 1)])
    assert factors[top:] == sorted(factors[top:], reverse=True)


@pytest.mark.parametrize("steps", [2, 13, 1000])
def test_the_last_step_has_the_final_value(steps: int) -> None:
    for shape, last in ((Shape.cosine, 0.1), (Shape.wsd, 0.1), (Shape.multistep, 0.1), (Shape.constant, 1.0)):
        assert learning_rate_factor(ScheduleConfig(shape=shape, warmup=1), steps, steps) == pytest.approx(last)


def test_wsd_decays_over_a_fifth_of_the_run_or_not_at_all() -> None:
    usual, never = ScheduleConfig(shape=Shape.wsd, warmup=0), ScheduleConfig(shape=Shape.wsd, warmup=0, decay=0)
    factors = [learning_rate_factor(usual, step, 100) for step in range(1, 101)]
    assert factors[:80] == [1.0] * 80 and all(factor < 1 for factor in factors[80:])
    assert [learning_rate_factor(never, step, 100) for step in (1, 99, 100)] == [1.0, 1.0, 1.0]
