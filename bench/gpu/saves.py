"""Checkpoints on the device: compares asynchronous with synchronous saves, and a resumed run with an uninterrupted one, bit for
bit.

With two GPUs the process uses the second, because copies must not depend on the default device of a thread.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ...checkpoint.saver import Saver
from ...data.config import Corpus, DataConfig, TokenizerConfig, TokenizerKind
from ...moe.config import ModelConfig, MoEConfig
from ...parallel.apply import local
from ...train.checkpointing import write_checkpoint
from ...train.config.config import BatchConfig, Config, EvaluateConfig, Precision, RunConfig, TrackerConfig
from ...train.run import single_step
from ...train.session import Session
from ...train.setup import open_session
from .machine import has
from .recorder import Recorder, Unavailable

SHARD = ".safetensors"
MODELS = {
    "full": ModelConfig(layers=4, width=512, vocabulary=512, moe=MoEConfig(experts=8, hidden=512)),
    "tiny": ModelConfig(layers=2, width=64, heads=4, kv_heads=2, vocabulary=512, moe=MoEConfig(hidden=64)),
}
"""The full model has 29M parameters, 0.35 GB to copy, which takes about as long as a step."""


def run(recorder: Recorder) -> None:
    for package in ("omegaconf", "sentencepiece", "pyarrow"):
        if not has(package):
            raise Unavailable(f"{package} is not installed, nor in .gpu/: a session cannot be opened")
    device = recorder.device
    if recorder.cuda:
        device = torch.device("cuda", min(1, torch.cuda.device_count() - 1))
        torch.cuda.set_device(device)
    recorder.fact("device of the process", str(device))
    for precision in (Precision.fp32, Precision.bf16):
        with tempfile.TemporaryDirectory() as folder:
            check_resume(recorder, configured(recorder.scale, precision, Path(folder)), device)
    with tempfile.TemporaryDirectory() as folder:
        check_async_save(recorder, configured(recorder.scale, Precision.bf16, Path(folder)), device)
    if recorder.cuda:
        torch.cuda.set_device(0)


def configured(scale: str, precision: Precision, folder: Path) -> Config:
    """A short run on synthetic text in `folder`."""
    return Config(
        steps=6,
        sequence_length=64,
        precision=precision,
        batch=BatchConfig(4),
        model=MODELS[scale],
        run=RunConfig(dir=str(folder / "run")),
        data=DataConfig(corpus=Corpus.synthetic, synthetic_documents=64, cache=str(folder / "cache")),
        tokenizer=TokenizerConfig(kind=TokenizerKind.bytes),
        tracker=TrackerConfig(names=[]),
        evaluate=EvaluateConfig(every=0, sequences=4),
    )


def check_resume(recorder: Recorder, config: Config, device: torch.device) -> None:
    """Compares six steps with three steps, a checkpoint, and three more in a new session, bit for bit."""
    whole, again = (replace(config, run=RunConfig(dir=f"{config.run.dir}-{name}")) for name in ("whole", "again"))
    expected = trained(whole, device, 6)
    session = opened(again, device)
    steps(session, 3)
    write_checkpoint(session, asynchronous=False)
    session.close()
    found = trained(again, device, 6, begins=3)
    name = f"resume, {config.precision.value}"
    for key, value in expected.items():
        if not torch.equal(found[key], value):
            worst = (found[key].double() - value.double()).abs().max().item()
            recorder.check(name, False, f"{key} differs by {worst:.1e}")
            return
    recorder.check(name, True, f"{len(expected)} tensors, bit for bit")


def check_async_save(recorder: Recorder, config: Config, device: torch.device) -> None:
    """Compares a synchronous with an asynchronous save of the same state, three times, so that staging memory is reused."""
    session = opened(config, device)
    for _ in range(3):
        steps(session, 1)
        at, saver = session.step, session.saver
        session.saver = Saver(Path(f"{config.run.dir}-waited"))
        waited = write_checkpoint(session, asynchronous=False)
        session.saver = saver
        ended = write_checkpoint(session, asynchronous=True)
        steps(session, 1)
        ended = ended or saver.wait()
        for outcome in (waited, ended):
            assert outcome is not None
            if outcome.error is not None:
                recorder.check(f"save at step {at}", False, outcome.error)
                return
        assert waited is not None and ended is not None
        other = different_files(waited.path, ended.path)
        text = ", ".join(other) or f"{ended.bytes / 1e6:.0f} MB, blocked {ended.blocked_seconds:.3f} s of {ended.seconds:.2f} s"
        recorder.check(f"asynchronous save at step {at} has the bytes of a synchronous one", not other, text)
    session.close()


def different_files(one: Path, other: Path) -> list[str]:
    """The shards that differ between two checkpoints, or that only one has."""
    names = sorted({path.name for folder in (one, other) for path in folder.glob(f"*{SHARD}")})
    assert names, f"{one} has no shards"
    return [name for name in names if _bytes(one / name) != _bytes(other / name)]


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def opened(config: Config, device: torch.device) -> Session:
    session = open_session(config, device)
    session.parallel.model.train()
    return session


def steps(session: Session, number: int) -> None:
    for _ in range(number):
        single_step(session)


def trained(config: Config, device: torch.device, until: int, begins: int = 0) -> dict[str, Tensor]:
    """Weights and moments after step `until`, on the host. The session must begin at step `begins`."""
    session = opened(config, device)
    assert session.step == begins
    steps(session, until - session.step)
    found = {name: local(one.tensor).detach().cpu().clone() for name, one in session.engine.state_to_save().items()}
    session.close()
    return found
