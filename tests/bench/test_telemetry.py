"""The benchmark of the tiers measures what it says."""

from pathlib import Path

import pytest
from tiny_run import TINY_RUN
from tokenyard.bench.telemetry import measure, parse, table


def test_a_line_for_each_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path))
    lines = measure([*TINY_RUN, "telemetry.every=2", "evaluate.sequences=8"], rounds=2, steps=2)
    assert [line.tier for line in lines] == ["none", "brief", "detailed"]
    none, brief, detailed = lines
    assert none.over_none == 0 and none.calls > 0
    assert all(none.calls < tier.calls < tier.step for tier in (brief, detailed))  # these two differ by less than a machine's noise
    assert none.probe < brief.probe
    assert len(table(lines).splitlines()) == 4
    assert parse(["--rounds", "7", "steps=3"]).overrides == ["steps=3"]
