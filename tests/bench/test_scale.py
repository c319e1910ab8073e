"""The frame of the counting of costs by world: its topics, its table and its errors."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenyard.bench.scale.__main__ import collect, main, parse, table, topics
from tokenyard.train.config.compose import compose
from tokenyard.train.config.matrices import newton_schulz_flops

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


def test_a_rank_that_is_told_opens_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 50 shards none, until it reads rows of them; of a tokenized corpus its two files, and of packed rows one more."""
    from tokenyard.bench.scale import small_files

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    found = small_files.figures(1)
    kinds = ("text", "text, best fit", "stream", "prepared", "mix", "hub, jsonl")
    opened = {name: found[f"data={name}: files that a rank opens"] for name in kinds}
    assert opened == {"text": 2, "text, best fit": 3, "stream": 0, "prepared": 0, "mix": 0, "hub, jsonl": 0}
    assert found["data=hub, csv: files that a rank opens"] <= 3  # by `datasets`
    assert all(found[f"data={name}: files that rank 0 opens"] > 50 for name in opened)


def test_packing_a_trillion_tokens_holds_a_window() -> None:
    """Rank 0 has arrays of the documents of one window, and tables of pieces are as large as counted."""
    from tokenyard.bench.scale import samples

    found = samples.packing()
    assert found["packing: MB of rank 0 for 1T tokens"] < 200 < 100_000 < found["before: packing: MB of rank 0 for 1T tokens"]
    assert found["packing: % of padding"] < 0.1
    pieces = (10**12 / samples.MEAN_DOCUMENT) * 12 + samples.CORPUS_ROWS * 8  # and one more for some documents that are cut
    assert pieces < 1e9 * found["packing: GB of the table of 1T tokens"] < 1.25 * pieces


MUON = (
    "precision=bf16 sequence_length=64 batch.micro=1 batch.sequences=8 launch=torchrun launch.ranks=8 model=tiny_kimi_k2 "
    "tokenizer=bytes optimizer=muon parallel.tensor=2 parallel.shard=4 parallel.expert=2"
)


def test_muon_sends_what_is_counted(apart: Callable[..., Any]) -> None:
    """The bytes of the exchanges of a real step without other ranks, and the FLOPs of all ranks against those of all matrices."""
    from dry_steps import facts_of
    from tokenyard.bench.scale import muon_costs

    config, world = compose(MUON.split()), 8
    for rank in (0, 5):
        plan = muon_costs.plan_of(config, world, 0, rank)
        counted = [muon_costs.traffic(bucket) for bucket in plan if bucket.travels]
        expected = sum(max(each.to_owners, each.received) + max(each.from_owners, each.taken) for each in counted)
        [call] = [call for call in apart(facts_of, MUON, rank, world).traffic if (call.phase, call.kind) == ("update", "alltoall")]
        assert (call.bytes, call.count, call.dtype) == (muon_costs.BYTES * expected, 2 * len(counted), "bfloat16")
    plans = [muon_costs.plan_of(config, world, 0, rank) for rank in range(world)]
    own = [sum(newton_schulz_flops(shape) for bucket in plan for shape in bucket.shapes) for plan in plans]
    assert sum(own) == muon_costs.all_flops(config, 0) and max(own) < 1.2 * sum(own) / world


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
