"""A checkpoint that an earlier version wrote still opens, and the next five losses are those that it gave then.

`make golden-checkpoint` writes it anew: only when the format changes, and then the old one stays beside it under its version.
"""

import json
import os
import platform
import shutil
from contextlib import closing
from pathlib import Path

import pytest
import torch
from tokenyard.train.checkpointing import save
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.run import single_step
from tokenyard.train.session import Session
from tokenyard.train.setup import open_session

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoint"
STEPS = 5
SETTINGS = """precision=fp64 sequence_length=8 batch.sequences=4 steps=20 schedule=constant model.layers=2 model.width=4
    model.heads=2 model.kv_heads=1 model.vocabulary=260 model.tie_embeddings=true model.dense_first=1 model.hidden=8
    model.moe.experts=4
    model.moe.hidden=4 model.moe.balance.bias_rate=0.01 data=synthetic data.synthetic_documents=16 tokenizer=bytes tracker=jsonl
    evaluate.sequences=4 device=cpu optimizer.epsilon=1e-8"""
"""With AdamW's epsilon of the release that wrote it."""


def configured(folder: Path) -> Config:
    return compose([*SETTINGS.split(), f"run.dir={folder}", f"data.cache={folder.parent / 'cache'}", "checkpoint.resume=auto"])


def next_losses(session: Session) -> list[float]:
    return [single_step(session).cross_entropy.item() for _ in range(STEPS)]


@pytest.mark.fault(9)
def test_the_golden_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property) -> None:
    if os.environ.get("TOKENYARD_GOLDEN") == "write":
        monkeypatch.chdir(tmp_path)
        write()
    golden = json.loads((GOLDEN / "losses.json").read_text())
    shutil.copytree(GOLDEN / "step_00000003", tmp_path / "later" / "checkpoints" / "step_00000003")
    with closing(open_session(configured(tmp_path / "later"), torch.device("cpu"))) as session:
        assert session.step == 3 and session.extra == {"note": "golden"}
        found = next_losses(session)
    same_machine = golden["machine"] == machine()
    assert found == (golden["losses"] if same_machine else pytest.approx(golden["losses"], rel=1e-12, abs=0))
    size = sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.is_file())
    record_property(
        "measured", f"{size / 1e3:.0f} kB; next 5 losses {'bit-identical' if found == golden['losses'] else 'within 1e-12'}"
    )


def machine() -> list[str]:
    """What the last bits of a sum depend on."""
    return [platform.machine(), torch.__version__.partition("+")[0], torch.backends.cpu.get_cpu_capability()]


def write() -> None:
    """With relative paths: the folder of whoever writes it does not matter."""
    with closing(open_session(configured(Path("run")), torch.device("cpu"))) as session:
        while session.step < 3:
            single_step(session)
        session.extra = {"note": "golden"}
        path = save(session)
        losses = next_losses(session)
    shutil.rmtree(GOLDEN, ignore_errors=True)
    GOLDEN.mkdir(parents=True)
    shutil.copytree(path, GOLDEN / path.name)
    (GOLDEN / "losses.json").write_text(json.dumps({"machine": machine(), "losses": losses}, indent=1) + "\n")
