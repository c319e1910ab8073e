"""The stateless generator against Python integers, and its numbers against properties of uniform and normal ones."""

import math

import pytest
import torch
from tokenyard.moe.token_info import BatchPosition, Purpose, fold_in, random_normal, random_uniform, token_keys
from torch import Tensor

WORD = 2**64 - 1
CPU = torch.device("cpu")


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
@pytest.mark.parametrize("value", [0, 1, 7, 2**40, -3])
def test_fold_is_splitmix_in_whole_numbers(key: int, value: int) -> None:
    mixed = (key * 0x9E3779B97F4A7C15 + value) & WORD
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & WORD
    mixed ^= mixed >> 31
    for found in (fold_in(torch.tensor(key), value), fold_in(torch.tensor([key]), torch.tensor([value]))):
        assert int(found) & WORD == mixed


def test_uniform_fills_the_unit_interval_evenly() -> None:
    drawn = draws(Purpose.jitter).flatten()
    counts = torch.histc(drawn, 64, 0.0, 1.0)
    even = len(drawn) / 64
    assert ((counts - even).square() / even).sum() < 120, "chi-square of 63 degrees is above with probability 2e-5"
    assert 0 < drawn.min() < 1e-4 and 1 - 1e-4 < drawn.max() < 1
    assert drawn.unique().numel() == drawn.numel()


def test_draws_of_neighbours_are_independent() -> None:
    """Neighbouring positions, rows, columns and steps, other seeds and purposes: no correlation, all different."""
    first = draws(Purpose.jitter)
    others = {
        "positions": (first[:, :-1], first[:, 1:]),
        "rows": (first[:-1], first[1:]),
        "columns": (first[..., :-1], first[..., 1:]),
        "steps": (first, draws(Purpose.jitter, BatchPosition(3, 8))),
        "seeds": (first, draws(Purpose.jitter, BatchPosition(4, 7))),
        "purposes": (first, draws(Purpose.drop)),
        "radius and angle": (draws(Purpose.radius), draws(Purpose.angle)),
    }
    for name, (one, other) in others.items():
        assert abs(correlation(one, other)) < 5 / math.sqrt(one.numel()), name
        assert not (one == other).any(), name


def test_normal_has_the_moments_and_tails_of_a_normal() -> None:
    drawn = random_normal(token_keys(BatchPosition(3, 7), 32, 64, CPU), 32)
    count = drawn.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(drawn.pow(power).mean() - expected) < 5 * math.sqrt(variance / count), power
    assert abs((drawn > 2).double().mean() - 0.02275) < 5 * math.sqrt(0.02275 / count)
    assert abs(correlation(drawn[..., :-1], drawn[..., 1:])) < 5 / math.sqrt(count)


def test_a_part_of_the_tokens_draws_what_the_whole_draws() -> None:
    """Numbers depend only on (seed, step, row, position, column), whatever rows, slices or columns a rank has."""
    whole_BS = token_keys(BatchPosition(3, 7), 6, 10, CPU)
    rows_BS = token_keys(BatchPosition(3, 7, row=4), 2, 10, CPU)
    assert torch.equal(rows_BS, whole_BS[4:])
    drawn = random_uniform(whole_BS, 5, Purpose.drop)
    assert torch.equal(random_uniform(rows_BS[:, 5:], 3, Purpose.drop), drawn[4:, 5:, :3])


def test_large_seeds_and_steps() -> None:
    keys = [token_keys(BatchPosition(seed, step), 2, 3, CPU) for seed in (0, 1, 2**63 - 1) for step in (1, 2, 10**9)]
    assert torch.stack(keys).unique().numel() == 9 * 6


def draws(purpose: Purpose, position: BatchPosition = BatchPosition(3, 7)) -> Tensor:  # noqa: B008
    return random_uniform(token_keys(position, 32, 64, CPU), 32, purpose)


def correlation(one: Tensor, other: Tensor) -> float:
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].item()
