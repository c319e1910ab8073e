"""The number of sequences of a step, against the steps counted one by one."""

import random

import pytest
from tokenyard.data.batch_sizes import BatchSizes


def one_by_one(sequences: int, schedule: list[float], length: int, steps: int) -> list[int]:
    sizes = list[int]()
    for _ in range(steps):
        trained = sum(sizes) * length
        reached = [size for tokens, size in zip(schedule[::2], schedule[1::2], strict=True) if trained >= tokens]
        sizes.append(int(reached[-1]) if reached else sequences)
    return sizes


@pytest.mark.parametrize("seed", range(20))
def test_a_step_has_the_size_of_the_tokens_before_it(seed: int) -> None:
    drawn = random.Random(seed)
    tokens = sorted(drawn.sample(range(1, 4000), drawn.randrange(5)))
    schedule = [number for each in tokens for number in (float(each), drawn.randrange(1, 30))]
    sequences, length = drawn.randrange(1, 9), drawn.randrange(1, 17)
    sizes, expected = BatchSizes(sequences, schedule, length), one_by_one(sequences, schedule, length, 200)
    assert [sizes.of(step) for step in range(200)] == expected
    assert [sizes.before(step) for step in range(201)] == [sum(expected[:step]) for step in range(201)]


def test_a_trillion_tokens_take_no_loop() -> None:
    sizes = BatchSizes(512, [1e12, 1024], 4096)
    assert sizes.of(476_837) == 512 and sizes.of(476_838) == 1024
    assert sizes.before(10**12) == 476_838 * 512 + (10**12 - 476_838) * 1024
