"""Whole runs of a tiny model: resuming changes no bit, layouts change no number, only rank 0 writes the run folder."""

import functools
import json
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import tokenyard
import torch
from tiny_run import TINY_RUN
from tokenyard.checkpoint.store import read_facts, read_whole
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config, ConfigError
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import run, train_session
from tokenyard.train.setup import open_session

TINY = [
    *TINY_RUN,
    "steps=6",
    "evaluate.every=0",
    "evaluate.sequences=12",
    "checkpoint.every=3",
    "sample.tokens=4",
]
LAYOUTS = {
    "expert 4": ["parallel.expert=4"],
    "tensor 2 x expert 2": ["parallel.tensor=2", "parallel.expert=2"],
    "shard 2 x expert 2": ["parallel.shard=2", "parallel.expert=2"],
    "shard 2 x expert_tensor 2": ["parallel.shard=2", "parallel.expert_tensor=2", "parallel.zero=1"],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of one process: to be read only."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "one"
    assert run(configured(folder)) == 0
    return folder


@pytest.fixture(scope="module")
def spread(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`spread("expert 4")`: the folder of the same run on 4 ranks, made when the first test asks for it."""
    base = tmp_path_factory.mktemp("uninterrupted")

    @functools.cache
    def folder(name: str) -> Path:
        ranks(4, run_on_ranks, configured(base / name, *LAYOUTS[name]))
        return base / name

    return folder


def stopped_in(folder: Path, straight: Path) -> Path:
    """A copy in which the run has come to step 3 only."""
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    return folder


def configured(folder: Path, *overrides: str) -> Config:
    return compose([*TINY, f"run.dir={folder}", f"data.cache={folder.parent / 'cache'}", *overrides])


def losses(folder: Path) -> list[tuple[Any, ...]]:
    return [(r["step"], r["loss"], r["loss_balance"], r["loss_z"], r["grad_norm"]) for r in read_journal(folder / "metrics.jsonl")]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path, precision: str) -> None:
    straight = tmp_path / "straight"
    assert run(configured(straight, f"precision={precision}")) == 0
    stopped = stopped_in(tmp_path / "stopped", straight)
    assert run(configured(stopped, f"precision={precision}")) == 0
    assert losses(stopped) == losses(straight)
    assert_same_checkpoints(straight, stopped)
    resumed = [event for event in read_journal(stopped / "events.jsonl") if event["event"] == "resume"]
    assert [event["step"] for event in resumed] == [3]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_resumed_run_on_ranks_is_bitwise_the_uninterrupted_one(ranks, spread, tmp_path: Path, name: str) -> None:
    straight = spread(name)
    stopped = stopped_in(tmp_path / "stopped", straight)
    starts = ranks(4, run_on_ranks, configured(stopped, *LAYOUTS[name]))
    assert all("resumed after step 3" in start for start in starts)
    assert losses(stopped) == losses(straight)
    assert_same_checkpoints(straight, stopped)


def test_layouts_have_the_losses_of_one_process(spread, one: Path) -> None:
    expected = losses(one)
    for name in LAYOUTS:
        for found, wanted in zip(losses(spread(name)), expected, strict=True):
            assert found == pytest.approx(wanted, rel=1e-5), name
        assert evaluated(spread(name)) == pytest.approx(evaluated(one), rel=1e-5)


def test_a_checkpoint_of_any_layout_opens_on_one_device(spread, one: Path) -> None:
    ids = torch.arange(20).view(1, 20)
    expected = tokenyard.load_model(one)(ids)
    for name in LAYOUTS:
        logits = tokenyard.load_model(spread(name) / "checkpoints" / "step_00000006")(ids)
        assert logits.shape == (1, 20, 264)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", ["tensor 2 x expert 2", "shard 2 x expert_tensor 2"])
def test_another_layout_goes_on_where_the_first_stopped(ranks, spread, one: Path, tmp_path: Path, layout: str) -> None:
    """From one process to ranks, and from ranks to one process."""
    to_ranks, to_one = stopped_in(tmp_path / "to ranks", one), stopped_in(tmp_path / "to one", spread(layout))
    ranks(4, run_on_ranks, configured(to_ranks, *LAYOUTS[layout]))
    assert run(configured(to_one)) == 0
    for moved in (to_ranks, to_one):
        for found, wanted in zip(losses(moved), losses(one), strict=True):
            assert found == pytest.approx(wanted, rel=1e-5)


def test_only_rank_0_writes_and_the_folder_holds_what_it_should(spread) -> None:
    folder = spread("expert 4")
    found = sorted(path.name for path in folder.iterdir())
    assert found == ["begun.json", "checkpoints", "config.yaml", "events.jsonl", "metrics.jsonl", "run_id", "telemetry.jsonl"]
    assert [record["step"] for record in read_journal(folder / "metrics.jsonl")] == list(range(1, 7))
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]
    facts = read_facts(folder / "checkpoints" / "step_00000006")
    assert (facts["step"], facts["tokens"], facts["layout"]["expert"]) == (6, 6 * 8 * 32, 4)


def test_metrics_hold_the_contract(tmp_path: Path) -> None:
    assert run(configured(tmp_path / "run", "batch.micro=2", "model.moe.capacity.factor=0.5")) == 0
    records = read_journal(tmp_path / "run" / "metrics.jsonl")
    wanted = [
        "step",
        "tokens",
        "loss",
        "loss_balance",
        "loss_z",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "step_seconds",
        "mfu",
        "dropped_fraction",
    ]
    assert all(set(wanted) <= set(record) for record in records)
    assert records[-1]["tokens"] == 6 * 8 * 32
    assert all(0 < record["dropped_fraction"] < 1 for record in records)
    assert all(1 <= record["loss_balance"] <= 8 for record in records)
    assert records[-1]["loss"] < records[0]["loss"]


def test_accumulation_changes_nothing(one: Path, tmp_path: Path) -> None:
    assert run(configured(tmp_path / "micro", "batch.micro=2")) == 0
    for found, wanted in zip(losses(tmp_path / "micro"), losses(one), strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)


def test_a_dense_model_trains_and_reports_no_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(configured(tmp_path / "run", "model.moe.experts=0", "model.hidden=64")) == 0
    assert read_journal(tmp_path / "run" / "metrics.jsonl")[-1]["loss_balance"] == 0
    assert "Expert load" not in capsys.readouterr().out


def test_evaluation_during_training_changes_nothing(tmp_path: Path) -> None:
    assert run(configured(tmp_path / "with", "evaluate.every=2", "model.moe.capacity.factor=0.5")) == 0
    assert run(configured(tmp_path / "without", "model.moe.capacity.factor=0.5")) == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


@pytest.mark.parametrize(
    "change, words",
    [
        ("model.moe.top_k=1", "model.moe.top_k=1: the checkpoint"),
        ("seed=2", "seed=2"),
        ("batch.sequences=16", "batch.sequences=16"),
        ("data.synthetic_documents=65", "data="),
        ("checkpoint.resume=never", "checkpoint.resume=never"),
    ],
)
def test_another_run_is_refused_in_the_folder(
    one: Path, tmp_path: Path, change: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(one, tmp_path / "run")
    assert run(configured(tmp_path / "run", change)) == 2
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1


def test_a_changed_learning_rate_goes_on(one: Path, tmp_path: Path) -> None:
    shutil.copytree(one, tmp_path / "run")
    assert run(configured(tmp_path / "run", "optimizer.lr=1e-3", "steps=8")) == 0
    assert [record["step"] for record in read_journal(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 9))


def test_a_path_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="neither a checkpoint nor a run folder"):
        tokenyard.load_model(tmp_path / "empty")


def run_on_ranks(config: Config) -> str:
    """What `run` does after the ranks have met."""
    session = open_session(config, torch.device("cpu"))
    with closing(session), build_run_logger(session) as run_logger:
        assert train_session(session, run_logger) == 0
    return session.start


def evaluated(folder: Path) -> float:
    return next(e["validation_loss"] for e in read_journal(folder / "events.jsonl") if e["event"] == "finished")


def assert_same_checkpoints(one: Path, other: Path) -> None:
    for path in sorted((one / "checkpoints").iterdir()):
        ours, theirs = (read_whole(each / "checkpoints" / path.name, "") for each in (one, other))
        assert ours.keys() == theirs.keys() and any(name.startswith("optimizer.") for name in ours)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        config = json.loads((path / "manifest.json").read_text())["facts"]
        assert config["step"] == int(path.name[-8:])
