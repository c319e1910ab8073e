"""What the watchdogs and the statistics of the experts cost, as the ranks grow."""

from tokenyard.bench.scale import watching


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
