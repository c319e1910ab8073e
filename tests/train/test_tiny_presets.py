"""Every tiny model trains to the same losses on one rank and on four (expert 2 x tensor 2), in fp32.

By hand with 30 steps: TINY_STEPS=30 pytest tests/train/test_tiny_presets.py
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenyard.train.compose import CONF, compose
from tokenyard.train.journal import read_journal
from tokenyard.train.reporter import build_reporter
from tokenyard.train.run import train
from tokenyard.train.session import open_session

NAMES = sorted(path.stem for path in (CONF / "model").glob("tiny_*.yaml"))
STEPS = int(os.environ.get("TINY_STEPS", "5"))
SHORT = [
    f"steps={STEPS}",
    "sequence_length=16",
    "batch.sequences=4",
    "data=synthetic",
    "data.synthetic_documents=64",
    "tokenizer=bytes",
    "tracker=jsonl",
    "evaluate.every=0",
    "evaluate.sequences=4",
    "checkpoint.every=0",
    "sample.tokens=0",
]
LAYOUT = ["parallel.expert=2", "parallel.tensor=2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_four_ranks_have_the_losses_of_one(ranks, name: str, tmp_path: Path) -> None:
    expected = trained(name, tmp_path / "one", [])
    found = ranks(4, trained, name, tmp_path / "four", LAYOUT, limit_seconds=200)[0]
    assert len(expected) == STEPS
    for ours, theirs in zip(found, expected, strict=True):
        for key in theirs:
            # One near-tied choice that rounding makes otherwise moves the routing losses by more than it moves the loss.
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5 if key in ("loss", "loss_mtp") else 1e-4), key
    assert expected[-1]["loss"] < expected[0]["loss"] or STEPS < 10


def trained(name: str, folder: Path, layout: list[str]) -> list[dict[str, Any]]:
    """The losses of each step of a run on the ranks that there are."""
    config = compose([f"model={name}", *SHORT, *layout, f"run.dir={folder}", f"data.cache={folder.parent / 'cache'}"])
    session = open_session(config, torch.device("cpu"))
    with build_reporter(session) as reporter:
        train(session, reporter)
    records = read_journal(folder / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key.startswith("loss")} for record in records]
