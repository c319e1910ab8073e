"""A whole run with every tracker at once: each one's files, read back by its own reader, hold what metrics.jsonl holds."""

import json
import math
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_run import TINY_RUN
from tokenyard.train.config.validate import check_rules
from tokenyard.train.logging.environment_info import git_state
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.trackers.sections import charted, is_index, sectioned

KEYS = {"loss", "grad_norm", "moe/load_entropy", "moe/router_entropy", "dropped_fraction", "tokens_per_second"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, then a resume to step six, in processes of their own: two of an account's variables are in the environment."""
    import tokenyard

    base = tmp_path_factory.mktemp("views")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_"))}
    environment |= {"PYTHONPATH": str(Path(tokenyard.__file__).parents[1]), "HOME": str(base), "TRACKIO_DIR": str(base / "trackio")}
    environment |= {"TOKENYARD_CACHE": str(base / "cache"), "WANDB_JOB_TYPE": "pretrain", "WANDB_RUN_GROUP": "views"}
    overrides = [*TINY_RUN, f"run.dir={base / 'run'}", "tracker.names=[wandb,tensorboard,trackio]", "telemetry.tier=detailed"]
    sizes = [
        "evaluate.every=3",
        "evaluate.sequences=4",
        "checkpoint.every=4",
        "telemetry.every=2",
        "sample.tokens=4",
    ]
    for steps in (4, 6):
        command = [sys.executable, "-m", "tokenyard", "train", *overrides, *sizes, f"steps={steps}", "schedule=constant"]
        done = subprocess.run(command, env=environment, cwd=base, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "\ntracker " not in done.stdout, done.stdout
    return base


def test_wandb_has_the_records_the_pictures_and_the_sample(folder: Path):
    truth = {record["step"]: record for record in read_journal(folder / "run" / "metrics.jsonl")}
    (file,) = folder.glob("run/wandb/offline-run-*/run-*.wandb")  # of both starts
    records = inspect(file)
    rows = [item for item in history(records) if "train/loss" in item]
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        record = {sectioned(key): value for key, value in truth[row["global_step"]].items() if key != "step"}
        assert {key: row[key] for key in record} == pytest.approx(record)
    pictures = [item for item in history(records) if item.get("experts/load._type") == "image-file"]
    assert [item["global_step"] for item in pictures] == [2, 3, 4, 6]
    others = {f"experts/{name}._type" for name in ("load_over_even", "grad_norm", "table")}
    assert all(others <= set(item) for item in pictures)
    assert [item["global_step"] for item in history(records) if "sample._type" in item] == [4, 6]
    assert len(list(file.parent.glob("files/media/images/experts/load*.png"))) == 4
    (header,) = [record["run"] for record in records if record["type"] == "run"]
    assert (header["run_group"], header["job_type"]) == ("views", "pretrain")
    update = header["config"]["update"]
    assert update["layout"]["expert"] == 1 and update["config"]["steps"] == 6 and update["git"] == git_state()["git"]


def test_tensorboard_has_the_scalars_and_pictures(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "run" / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    reader.Reload()
    truth = read_journal(folder / "run" / "metrics.jsonl")
    for key in KEYS:
        shown = [(e.step, e.value) for e in reader.Scalars(sectioned(key))]
        assert shown == [(r["step"], pytest.approx(r[key], rel=1e-6)) for r in truth], key
    assert not any(map(is_index, reader.Tags()["scalars"]))
    assert [picture.step for picture in reader.Images("experts/load")] == [2, 3, 4, 6]
    assert [histogram.step for histogram in reader.Histograms("experts/load_over_even")] == [2, 3, 4, 6]
    assert {"run/text_summary", "run", "sample", "outcome"} & set(reader.Tags()["tensors"])


def test_trackio_has_the_scalars(folder: Path):
    (path,) = folder.glob("trackio/*.db")
    rows = sqlite3.connect(path).execute("select step, metrics from metrics order by id").fetchall()
    logged = {step: found for step, text in rows if "train/loss" in (found := json.loads(text))}
    truth = {record["step"]: record for record in read_journal(folder / "run" / "metrics.jsonl")}
    assert logged.keys() == truth.keys()
    for at, record in truth.items():
        assert {key: logged[at][sectioned(key)] for key in KEYS} == pytest.approx({key: record[key] for key in KEYS})
        assert set(logged[at]) == set(charted(record))


def test_what_is_not_installed_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch):
    from tokenyard.train.config.config import Config, ConfigError, TrackerConfig

    monkeypatch.setattr("tokenyard.train.config.rules.rules.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^tracker.names=.*trackio is not installed here, `pip install tokenyard.trackio.`"):
        check_rules(Config(tracker=TrackerConfig(names=["wandb", "trackio"])), 1)


def test_the_commit_is_known_in_a_checkout_only(tmp_path: Path):
    assert git_state(tmp_path) == {}
    assert set(git_state()["git"]) == {"commit", "dirty"} and not math.isnan(len(git_state()["git"]["commit"]))


def inspect(path: Path) -> list[dict[str, Any]]:
    """By wandb's own reader."""
    from wandb.util import get_core_path

    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]
