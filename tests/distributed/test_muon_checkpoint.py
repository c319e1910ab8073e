"""A checkpoint of Muon goes on on any layout: weights and momenta bit for bit, the same step after it, and no other optimizer."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_run import configured, everything, same_tensors
from tokenyard.parallel.apply import local
from tokenyard.train.checkpointing import save
from tokenyard.train.config.config import Config, ConfigError
from tokenyard.train.preflight import check_config
from tokenyard.train.run import single_step
from tokenyard.train.setup import open_session

MUON = ["optimizer=muon", "precision=fp64", "model=tiny_deepseek_v3", "tokenizer=bytes", "optimizer.qk_clip=0.1"]
LAYOUTS: dict[str, list[str]] = {
    "tensor 2 x shard 2": ["parallel.tensor=2", "parallel.shard=2", "parallel.expert=2", "parallel.zero=1"],
    "pipeline 2 x expert tensor 2": ["parallel.pipeline=2", "parallel.expert_tensor=2"],
}


def settings(folder: Path, *more: str) -> Config:
    return configured(folder, *MUON, *more)


def train(folder: Path, overrides: list[str], steps: int, resume: str = "auto") -> tuple[float, Any]:
    """Trains up to a step, saves there, and takes another. Returns its loss, and this rank's weights after it."""
    config = settings(folder, *overrides, f"checkpoint.resume='{resume}'")
    with closing(open_session(config, torch.device("cpu"))) as session:
        while session.step < steps:
            single_step(session)
        save(session)
        loss = single_step(session).cross_entropy.item()
        shards = {name: (one.metadata, local(one.parameter).detach().clone()) for name, one in session.parallel.parameters.items()}
        return loss, shards


def test_any_layout_goes_on(ranks, tmp_path: Path) -> None:
    loss, uninterrupted = train(tmp_path / "one", [], 2)
    checkpoint = tmp_path / "one" / "checkpoints" / "step_00000002"
    saved = everything(checkpoint)
    second = {name.removeprefix("optimizer.").rpartition(".")[0] for name in saved if name.endswith("exp_avg_sq")}
    assert "embedding.weight" in second and any(".router." in name for name in second)
    assert not any(".experts." in name or name.endswith(("q_up.weight", "down")) for name in second)
    again, resumed = train(tmp_path / "two", [], 2, str(checkpoint))
    assert again == loss and all(resumed[name][1].equal(weight) for name, (_, weight) in uninterrupted.items())
    for name, layout in LAYOUTS.items():
        moved = tmp_path / name
        for other, shards in ranks(4, train, moved, layout, 2, str(checkpoint)):
            assert other == pytest.approx(loss, rel=1e-12)
            for parameter, (metadata, weight) in shards.items():
                torch.testing.assert_close(weight, metadata.cut(uninterrupted[parameter][1]), rtol=1e-9, atol=1e-12)
        assert same_tensors(everything(moved / "checkpoints" / "step_00000002"), saved), name


def test_another_optimizer_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", [], 1)
    for change in ("optimizer.name=adamw", "optimizer.muon.router=true"):
        with pytest.raises(ConfigError, match=rf"{change.partition('=')[0]}=.*: the checkpoint .* was made with"):
            check_config(settings(tmp_path / "run", change), 1)
