"""The benchmark of context ranks trains on the same sequence on every number of ranks."""

import pytest
from tokenyard.bench.long_sequence import MIB, measure, table


def test_two_ranks_need_less_memory_for_the_same_step() -> None:
    one, two = measure(1, 4096), measure(2, 4096)
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    assert MIB < two.peak < 0.95 * one.peak
    assert table([one, two]).count("|") == 4 * 6
