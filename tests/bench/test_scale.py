"""The frame of the counting of costs by world: its topics, its table and its errors."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenyard.bench.scale.__main__ import collect, main, parse, table, topics

SCALE = Path(sys.modules["tokenyard.bench.scale"].__file__ or "").parent


def figures(world: int) -> dict[str, float]:
    """Stands in for a topic; small worlds have no second figure."""
    return {"calls": world / 64, **({"seconds": 2.5} if world > 64 else {})}


def test_topics_are_the_modules_beside_the_frame() -> None:
    assert topics() == sorted(path.stem for path in SCALE.glob("[!_]*.py"))


def test_a_topic_is_called_for_each_world_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenyard.bench.scale.made_up", SimpleNamespace(figures=pid_of))  # pyright: ignore[reportArgumentType]
    found = collect("made_up", [1, 2])
    first, second = found["process"]
    assert first != second and found["world"] == [1, 2]


def pid_of(world: int) -> dict[str, float]:
    return {"world": world, "process": os.getpid()}


def test_groups_of_2048_ranks(apart: Callable[..., dict[str, float]]) -> None:
    """Under the fake process group: one creation for each axis and each direction of messages, within 2 seconds."""
    from tokenyard.bench.scale import groups  # with torch, which the other tests do not need

    found = apart(groups.figures, 2048)
    links = "communicators of a rank for links to other stages alone, at most"
    assert found["communicators of a rank for collectives, at most"] + found[links] == 6
    assert found["groups of a rank, of several ranks"] == found["group creations of a rank"] + 1 == 6  # the world's is given
    assert found["seconds for mesh and groups"] < 2


def test_a_rank_that_is_told_opens_few_files() -> None:
    """Of 50 shards none, until it reads rows of them; of a tokenized corpus its two files, and of packed rows four more."""
    from tokenyard.bench.scale import small_files

    found = small_files.figures(1)
    opened = {name: found[f"data={name}: files that a rank opens"] for name in ("text", "stream", "prepared", "mix")}
    assert opened == {"text": 2, "stream": 0, "prepared": 0, "mix": 0}
    assert all(found[f"data={name}: files that rank 0 opens"] > 50 for name in opened)


def test_the_table_has_a_row_for_each_figure_and_a_column_for_each_world() -> None:
    of_topic = {"calls": [1.0, 32.0, 12345.6], "seconds, with a long name": [None, 2.5, 0.01234]}
    assert table({"groups": of_topic, "none": {}}, [64, 2048, 4096]).splitlines() == [
        "                             64 ranks  2,048 ranks  4,096 ranks",
        "groups",
        "  calls                             1           32       12,346",
        "  seconds, with a long name         -          2.5       0.0123",
        "none",
    ]


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([]).topics == topics() and parse([]).worlds == [64, 512, 2048]
    assert parse(["--worlds", "8,16"]).worlds == [8, 16]
    with pytest.raises(SystemExit):
        parse(["no_such"])
    assert "TOPIC=no_such: must be one of " in capsys.readouterr().err


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("tokenyard.bench.scale.__main__.topics", lambda: ["made_up"])
    monkeypatch.setattr(
        "tokenyard.bench.scale.__main__.collect", lambda topic, worlds: {topic: [figures(w)["calls"] for w in worlds]}
    )
    main(["made_up", "--worlds", "64,128", "--json"])
    assert json.loads(capsys.readouterr().out) == {"worlds": [64, 128], "made_up": {"made_up": [1, 2]}}
