"""What the watchdogs and the statistics of the experts cost, as the ranks grow."""

import pytest
import torch
from tokenyard.bench.scale import watching
from tokenyard.train.logging.expert_stats.collector import rounded


def test_watchdogs_look_once_a_host_and_share_the_reading_of_a_hang() -> None:
    few, many = watching.watching(64), watching.watching(256)
    for world, found in ((64, few), (256, many)):
        hosts = world / watching.HOST
        assert hosts / (1.3 * watching.TICK) <= found["calls to the run folder, all ranks (1/s)"] <= 1.2 * hosts / watching.TICK
        assert found["calls to memory, a rank (1/s)"] <= 3
        assert found["ranks with the right diagnosis"] == world - 1
        assert found["seconds of a hang from the limit to the end"] <= 10
        assert found["calls to the run folder in a hang, a rank"] <= 20, "a constant: O(N) in all"
    assert many["calls to the run folder in a hang, all ranks"] < 4.2 * few["calls to the run folder in a hang, all ranks"]


def test_statistics_of_many_experts_and_ranks_are_small() -> None:
    found = watching.telemetry(2048)
    assert found["bytes all-reduced a step"] == 8 * (9 + 2048 + 2 + 7 * 61 + 61 * 256 + 5 * 61)
    assert found["bytes all-reduced a record"] == 8 * (61 * 256 + 1 + 2 * 61)
    assert found["share of the link (%)"] < 0.01 and found["share of the run folder (%)"] < 0.01
    counts, similarity, tokens = 61 * 8 * 256 + 2 * 256**2 + 4 * 61, 2 * 256 * 3 * 64**2, 4 * 4096 * (1 + 2 * 8)
    assert found["bytes all-reduced a probe"] == 8 * (counts + similarity) + 4 * tokens, "no matter how many ranks"


def test_biases_and_norms_keep_six_digits() -> None:
    x = torch.tensor([0.0, -2.3456789, 1e-12, 123456789.0, 1 / 3000, float("inf")], dtype=torch.float64)
    assert rounded(x).tolist() == [0.0, -2.34568, 1e-12, 123457000.0, 0.000333333, float("inf")]
    assert rounded(x[:-1]).tolist() == pytest.approx(x[:-1].tolist(), rel=1e-5)
