"""tokenyard checkpoint inspect, verify and diff: what they print and their exit codes."""

import json
from pathlib import Path

import pytest
import torch
from tokenyard.checkpoint.store import save_checkpoint
from tokenyard.launch.main import main
from tokenyard.parallel.shard import LocalShard, whole
from tokenyard.train.config.compose import compose
from tokenyard.train.config.serialize import plain_config

FACTS = {"tokens": 4096, "ranks": 1, "layout": {"expert": 1}, "torch": "2.13", "validation_loss": 1.5}


def save(folder: Path, step: int, change: float = 0.0) -> Path:
    tensors = {
        "model.layers.0.moe.experts.down": torch.arange(48.0).view(4, 3, 4),
        "optimizer.layers.0.moe.experts.down.exp_avg": torch.ones(4, 3, 4),
        "model.embedding.weight": torch.ones(5, 4, dtype=torch.bfloat16),
        "random.cpu.rank_0": torch.zeros(8, dtype=torch.uint8),
    }
    for expert in (1, 2) if change else ():
        tensors["model.layers.0.moe.experts.down"][expert, 0, 0] += change
    facts = FACTS | {"config": plain_config(compose([]))}
    return save_checkpoint(folder, step, {name: LocalShard(whole(one.shape), one) for name, one in tensors.items()}, facts)


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "checkpoints", 5)
    path = save(tmp_path / "checkpoints", 7)
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert f"checkpoint  {path}" in text and "step        7, 4,096 tokens, validation loss 1.5000" in text
    assert "experts     4 in 1 layers" in text and "torch 2.13 on 1 ranks: one rank" in text
    assert main(["checkpoint", "inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"]["weights"] == {"tensors": 2, "elements": 68, "bytes": 232}
    assert found["tensors"]["exp_avg"]["bytes"] == 192 and found["experts"] == {"layers.0.moe.experts": 4}
    assert found["config"]["model"]["moe"]["experts"] == 8


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "checkpoints", 5)
    shard = save(tmp_path / "checkpoints", 7) / "shard_00000.safetensors"
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["step_00000007", "step_00000005"]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "step_00000007: DAMAGED, shard_00000.safetensors: " in text and "step_00000005: whole; 1 files" in text
    assert main(["checkpoint", "verify", str(tmp_path / "nowhere")]) == 2
    assert "is neither a checkpoint nor a run folder" in capsys.readouterr().err


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, same, other = (str(save(tmp_path / name, 7, change)) for name, change in (("a", 0.0), ("b", 0.0), ("c", 0.5)))
    assert main(["checkpoint", "diff", one, same]) == 0
    assert "no tensor differs" in capsys.readouterr().out
    assert main(["checkpoint", "diff", one, other]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "1 tensors differ"
    norm = torch.arange(48.0).double().square().sum().sqrt().item()
    assert lines[4].split() == ["model.layers.0.moe.experts.down", "0.5", f"{0.5 * 2**0.5 / norm:.3g}", "experts", "1-2"]
    assert main(["checkpoint", "diff", one, other, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["experts"] == [1, 2]


@pytest.mark.parametrize("words", [["checkpoint"], ["checkpoint", "look", "x"]])
def test_wrong_words_are_refused_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
