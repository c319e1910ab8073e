"""`deepspeed --module tokenyard.train ...`: the launcher of DeepSpeed starts the ranks, on this host and without ssh."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenyard.train.config.compose import compose
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.run import run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install tokenyard[deepspeed]")

TINY = [
    "steps=2",
    "sequence_length=32",
    "batch.sequences=4",
    "model.layers=1",
    "model.width=32",
    "model.heads=4",
    "model.moe.hidden=32",
    "model.vocabulary=264",
    "data=synthetic",
    "data.synthetic_documents=64",
    "tokenizer=bytes",
    "tracker=jsonl",
    "evaluate.sequences=4",
    "sample.tokens=0",
    "device=cpu",
]


def test_the_launcher_starts_ranks_and_they_train_as_one_process(tmp_path: Path) -> None:
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(29000 + os.getpid() % 1000)]
    overrides = [*TINY, "engine=deepspeed", "parallel.expert=2", f"run.dir={tmp_path / 'two'}"]
    started = python(*launcher, "--module", "tokenyard.train", *overrides, cache=tmp_path)
    assert started.returncode == 0, started.stdout + started.stderr
    assert run(compose([*TINY, f"run.dir={tmp_path / 'one'}", f"data.cache={tmp_path / 'cache'}"])) == 0
    found, wanted = ([r["loss"] for r in read_journal(tmp_path / name / "metrics.jsonl")] for name in ("two", "one"))
    assert len(found) == 2 and found == pytest.approx(wanted, rel=1e-5)


def test_a_wrong_setting_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    launcher = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(30000 + os.getpid() % 1000)]
    started = python(*launcher, "--module", "tokenyard.train", *TINY, "engine=deepspeed", "engine.zero=3", cache=tmp_path)
    assert started.returncode == 2, started.stdout + started.stderr
    assert started.stderr.count("engine.zero=3: must be 0, 1 or 2") == 1


def python(*arguments: str, cache: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, sys.path))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENYARD_CACHE": str(cache / "cache")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, cwd=cache)
