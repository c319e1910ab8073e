"""No weight is drawn where a checkpoint is read: it has them all. They are NaN here until then."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.checkpoint.store import read_whole
from tokenyard.moe import philox
from tokenyard.moe.model import Transformer
from tokenyard.train.checkpointing import save
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.load import load_model, open_for_evaluation
from tokenyard.train.setup import open_session
from torch import nn


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a new run with expert biases, before its first step."""
    folder = tmp_path_factory.mktemp("first")
    with closing(open_session(configured(folder / "run"), torch.device("cpu"))) as session:
        return save(session)


@pytest.fixture
def nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("weights are drawn")

    def to_nan(model: nn.Module, **device: Any) -> nn.Module:
        nn.Module.to_empty(model, **device)
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach().fill_(torch.nan)
        return model

    monkeypatch.setattr(philox, "random_words", refuse)
    monkeypatch.setattr(Transformer, "to_empty", to_nan)


@pytest.mark.usefixtures("nothing_drawn")
def test_a_resumed_run_reads_all_weights(first: Path) -> None:
    with closing(open_session(configured(first.parents[1]), torch.device("cpu"))) as session:
        assert session.start.startswith("resumed after step 0")
        assert_same(session.parallel.model.state_dict(), first)


@pytest.mark.usefixtures("nothing_drawn")
def test_so_does_a_new_run_from_weights(first: Path, tmp_path: Path) -> None:
    with closing(open_session(configured(tmp_path / "run", f"checkpoint.init={first}"), torch.device("cpu"))) as session:
        assert_same(session.parallel.model.state_dict(), first)


@pytest.mark.usefixtures("nothing_drawn")
def test_so_do_evaluation_and_generation(first: Path) -> None:
    with closing(open_for_evaluation(str(first), [])) as session:
        assert_same(session.parallel.model.state_dict(), first)
    assert_same(load_model(first).state_dict(), first)


@pytest.mark.usefixtures("nothing_drawn")
def test_a_new_run_draws(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="weights are drawn"):
        open_session(configured(tmp_path / "run"), torch.device("cpu"))


def configured(folder: Path, *overrides: str) -> Config:
    words = ["model=tiny_deepseek_v3", "sample.prompt=''", f"run.dir={folder}", f"data.cache={folder.parent / 'cache'}"]
    return compose([*[word for word in TINY_RUN if not word.startswith("model.")], *words, *overrides])


def assert_same(found: dict[str, torch.Tensor], checkpoint: Path) -> None:
    expected = read_whole(checkpoint)
    assert any(name.endswith("expert_bias") for name in expected) and found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
