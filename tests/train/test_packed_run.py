"""Whole runs on packed rows: resumed, also on context ranks, they are the same run; other packing is other data."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from tiny_run import TINY_RUN
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config, ConfigError
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.preflight import check_config
from tokenyard.train.run import run

PACKED = [
    "steps=4",
    "sequence_length=64",
    "precision=fp64",
    "schedule=constant",
    "data.packing=best_fit",
    "data.mask_documents=true",
    "evaluate.every=0",
    "evaluate.sequences=8",
    "checkpoint.every=2",
    "sample.prompt=",
]


def configured(folder: Path, *overrides: str) -> Config:
    return compose([*TINY_RUN, *PACKED, f"run.dir={folder}", f"data.cache={folder.parent / 'cache'}", *overrides])


def run_on_ranks(folder: str, overrides: list[str]) -> int:
    """In a rank of the pool, which keeps its process group."""
    with patch("tokenyard.train.run.leave"), patch("tokenyard.train.run.join"):
        return run(configured(Path(folder), *overrides))


def losses(folder: Path) -> list[float]:
    """Returns the loss of each step, and the validation loss after the last."""
    records = read_journal(folder / "metrics.jsonl")
    return [*(record["loss"] for record in records), records[-1]["validation_loss"]]


def test_resumed_also_on_context_ranks_it_is_the_same_run(ranks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert run(configured(straight, "log.every=1")) == 0
    padding = {record["padding_fraction"] for record in read_journal(straight / "metrics.jsonl")}
    assert len(padding) == 1 and 0 < padding.pop() < 0.2
    assert run(configured(stopped, "log.every=1", "steps=2")) == 0
    assert run(configured(stopped, "log.every=1", "data.packing=concat")) == 2
    assert "data=" in capsys.readouterr().err
    assert ranks(2, run_on_ranks, str(stopped), ["log.every=1", "parallel.context=2"]) == [0, 0]
    assert losses(stopped) == pytest.approx(losses(straight), rel=1e-10)
    again = tmp_path / "again"
    assert run(configured(again, "log.every=1", "steps=2")) == 0
    assert run(configured(again, "log.every=1")) == 0
    assert losses(again) == losses(straight)


def test_streamed_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    config = configured(tmp_path / "run", "data=jsonl", f"data.path={tmp_path}/rows.jsonl")
    with pytest.raises(ConfigError, match=r"data.packing=best_fit: must be concat with data.corpus=jsonl.* data.packing=concat"):
        check_config(config, 1)
