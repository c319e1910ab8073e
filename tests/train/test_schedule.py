"""The learning rate at steps that were computed by hand."""

import math
from copy import deepcopy

import pytest
from tokenyard.train.config.config import Config, DecayCurve, ScheduleConfig, ScheduleUnit, Shape
from tokenyard.train.learning_rate import learning_rate_factor


def factor(schedule: ScheduleConfig, step: int, steps: int) -> float:
    return learning_rate_factor(Config(steps=steps, schedule=schedule), step)


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
    assert {step: factor(config, step, 110) for step in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", Shape)
@pytest.mark.parametrize("warmup", [0, 1, 7, 50, 80])
def test_rises_to_the_peak_and_never_above_it_nor_up_again(shape: Shape, warmup: int) -> None:
    factors = [factor(ScheduleConfig(shape=shape, warmup=warmup), step, 50) for step in range(1, 51)]
    assert all(0 < each <= 1 for each in factors)
    top = min(warmup, 50)
    assert factors[:top] == pytest.approx([step / warmup for step in range(1, top + 1)])
    assert factors[top:] == sorted(factors[top:], reverse=True)


@pytest.mark.parametrize("steps", [2, 13, 1000])
def test_the_last_step_has_the_final_value(steps: int) -> None:
    for shape, last in ((Shape.cosine, 0.1), (Shape.wsd, 0.1), (Shape.multistep, 0.1), (Shape.constant, 1.0)):
        assert factor(ScheduleConfig(shape=shape, warmup=1), steps, steps) == pytest.approx(last)


def test_wsd_decays_over_a_fifth_of_the_run() -> None:
    factors = [factor(ScheduleConfig(shape=Shape.wsd, warmup=0), step, 100) for step in range(1, 101)]
    assert factors[:80] == [1.0] * 80 and all(each < 1 for each in factors[80:])


def test_wsd_decays_from_a_step_by_one_minus_the_root() -> None:
    config = ScheduleConfig(shape=Shape.wsd, warmup=0, decay_from=84, decay_curve=DecayCurve.sqrt, final=0.0)
    expected = {84: 1.0, 85: 1 - 1 / 4, 88: 1 - 2 / 4, 93: 1 - 3 / 4, 100: 0.0}
    assert {step: factor(config, step, 100) for step in expected} == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("shape", Shape)
def test_by_tokens_the_rate_is_that_of_the_step_in_which_as_many_tokens_were_trained(shape: Shape) -> None:
    """Batches of 2 sequences, and of 4 and 6 from the step on before which 40 and 112 tokens are trained: 99 pairs in all."""
    steps = Config(steps=99, sequence_length=4, schedule=ScheduleConfig(shape=shape, warmup=12, decay=20))
    steps.batch.sequences = 2
    tokens = deepcopy(steps)
    tokens.batch.schedule, tokens.steps = [40, 4, 112, 6], 5 + 5 + 28
    assert tokens.batch.sizes(4).before(38) == 2 * 5 + 4 * 5 + 6 * 28 == 198
    tokens.schedule.unit, tokens.schedule.warmup, tokens.schedule.decay = ScheduleUnit.tokens, 12 * 2 * 4, 20 * 2 * 4
    pairs = [sum([1] * min(step, 5) + [2] * min(max(0, step - 5), 5) + [3] * max(0, step - 10)) for step in range(1, 39)]
    assert pairs[-1] == 99
    found = [learning_rate_factor(tokens, step) for step in range(1, 39)]
    assert found == pytest.approx([learning_rate_factor(steps, pair) for pair in pairs], rel=1e-12)
