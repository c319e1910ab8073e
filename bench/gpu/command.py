"""Runs `tokenyard train` to its end, and again with a kill after a checkpoint and a restart. The losses must be the same.

Uses the first GPU, or two GPUs over NCCL if there are two.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic, sleep

import torch

from .machine import has
from .recorder import Recorder, Unavailable

STEPS, EVERY = 90, 30
WORDS = [
    "model=tiny",
    "model.vocabulary=264",
    "data=synthetic",
    "data.synthetic_documents=64",
    "tokenizer=bytes",
    "tracker=jsonl",
    "sequence_length=64",
    "batch.sequences=8",
    "schedule.warmup=10",
    "log.every=1",
    "evaluate.every=0",
    "evaluate.sequences=8",
    "sample.prompt=''",
    f"checkpoint.every={EVERY}",
    f"steps={STEPS}",
]
TWO = ["launch=torchrun", "launch.ranks=2", "parallel.shard=2", "parallel.expert=2"]


def run(recorder: Recorder) -> None:
    require_packages()
    two = recorder.cuda and torch.cuda.device_count() > 1
    words = [*WORDS, f"device={recorder.device.type}", *(TWO if two else [])]
    recorder.fact("ranks", 2 if two else 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words.append(f"data.cache={folder / 'cache'}")
        whole = train(words, folder / "whole", recorder)
        if whole is None:
            return
        killed = start(words, folder / "killed")
        reached = wait_for(folder / "killed" / "checkpoints", killed, recorder)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.communicate()
        recorder.check("a checkpoint before the kill", reached, f"after {len(losses(folder / 'killed'))} steps")
        again = train(words, folder / "killed", recorder)
        if again is not None:
            different = [step for step, loss in whole.items() if again.get(step) != loss]
            text = f"the losses of steps {different[:5]} differ" if different else f"{len(whole)} losses, bit for bit"
            recorder.check("killed and resumed", bool(whole) and not different, text)


def require_packages() -> None:
    """Raises Unavailable if a package that `tokenyard train` needs is missing."""
    for package in ("hydra", "omegaconf", "sentencepiece", "pyarrow"):
        if not has(package):
            raise Unavailable(f"{package} is not installed, nor in .gpu/")


def train(words: list[str], folder: Path, recorder: Recorder) -> dict[int, float] | None:
    """Trains to the end. Returns the loss of each step, or None, with a failed check, if the command failed."""
    begin, process = monotonic(), start(words, folder)
    output = process.communicate()[0].decode(errors="replace")
    if process.returncode == 0:
        recorder.fact(f"seconds of {STEPS} steps, {folder.name}", round(monotonic() - begin, 1))
        return losses(folder)
    recorder.check("tokenyard train", False, f"exit code {process.returncode}: {output.strip()[-400:]}")
    return None


def start(words: list[str], folder: Path) -> subprocess.Popen[bytes]:
    program = [sys.executable, "-P", "-m", "tokenyard", "train", *words, f"run.dir={folder}"]
    # A new session, so that all ranks can be killed together.
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def wait_for(checkpoints: Path, process: subprocess.Popen[bytes], recorder: Recorder) -> bool:
    """Whether a checkpoint appeared while the process ran."""
    while process.poll() is None and recorder.remaining > 0:
        if list(checkpoints.glob("step_????????")):
            return True
        sleep(0.02)
    return False


def losses(folder: Path) -> dict[int, float]:
    """The losses in metrics.jsonl by step; of a step that was trained twice, the last."""
    path = folder / "metrics.jsonl"
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        record = json.loads(line)
        if "loss" in record:
            found[record["step"]] = record["loss"]
    return found
