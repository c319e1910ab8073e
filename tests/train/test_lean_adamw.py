"""Lean optimizer states in a run: those on the host change no bit, a resumed run goes on, any states open with any others."""

from contextlib import closing
from pathlib import Path

import cuda_double
import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.checkpoint.store import read_whole
from tokenyard.parallel.streams import host_buffer
from tokenyard.train import moments
from tokenyard.train.checkpointing import save
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.lean_adamw import LeanAdamW, _Offload
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.stability import StabilityStats
from tokenyard.train.run import single_step
from tokenyard.train.session import Session
from tokenyard.train.setup import open_session

STATES = ["fp32", "bf16", "int8"]


def configured(folder: Path, *words: str) -> Config:
    return compose([*TINY_RUN, "steps=20", "precision=bf16", f"run.dir={folder}", f"data.cache={folder.parent}/cache", *words])


def opened(folder: Path, *words: str) -> Session:
    return open_session(configured(folder, *words), torch.device("cpu"))


def state_after(steps: int, folder: Path, *words: str) -> dict[str, torch.Tensor]:
    """Trains up to so many steps, saves, and returns copies of weights and moments."""
    with closing(opened(folder, *words)) as session:
        while session.step < steps:
            single_step(session)
        save(session)
        return {name: shard.tensor.detach().clone() for name, shard in session.engine.state_to_save().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize("states", STATES)
def test_moments_on_the_host_change_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: str) -> None:
    """In chunks of 64 rows, several for each tensor; fp32 without offload is torch's own AdamW."""
    here = state_after(3, tmp_path / "here", f"optimizer.states={states}")
    monkeypatch.setitem(moments.CHUNKS, "cpu", 64)
    host = state_after(3, tmp_path / "host", f"optimizer.states={states}", "optimizer.offload=true")
    assert_same(here, host)


@pytest.mark.parametrize("states", ["bf16", "int8"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, states: str) -> None:
    words = f"optimizer.states={states}"
    whole = state_after(4, tmp_path / "whole", words)
    state_after(2, tmp_path / "cut", words)
    assert_same(whole, state_after(4, tmp_path / "cut", words))


@pytest.mark.parametrize("before", STATES)
def test_any_states_open_with_any_others(tmp_path: Path, before: str) -> None:
    """The weights are the same, the moments differ by what each keeps of them, and one line says that the setting changed."""
    saved = state_after(2, tmp_path / "before", f"optimizer.states={before}")
    checkpoint = tmp_path / "before" / "checkpoints" / "step_00000002"
    assert read_whole(checkpoint, "optimizer.").keys() == {
        name.removeprefix("optimizer.") for name in saved if name.startswith("optimizer.")
    }
    for now in STATES:
        folder = tmp_path / now
        with closing(opened(folder, f"optimizer.states={now}", f"checkpoint.resume={checkpoint}")) as session:
            held = {name: shard.tensor.detach() for name, shard in session.engine.state_to_save().items()}
            assert all(torch.equal(held[name], saved[name]) for name in saved if name.startswith("model."))
            if now == before:
                assert_same(held, saved)
            elif (before, now) == ("bf16", "fp32"):
                name = "optimizer.layers.1.moe.experts.down.exp_avg"
                assert torch.equal(held[name], saved[name].float())
            elif (before, now) == ("fp32", "bf16"):
                name = "optimizer.layers.1.moe.experts.down.exp_avg_sq"
                error = (held[name].float() - saved[name]).abs()
                assert held[name].dtype == torch.bfloat16 and (error <= saved[name].abs() * 2**-7).all()
            single_step(session)
        journal = folder / "events.jsonl"
        events = read_journal(journal) if journal.exists() else []
        changed = [each["changed"] for each in events if each["event"] == "settings_changed"]
        assert changed == ([] if now == before else [{"optimizer.states": {"before": before, "now": now}}])


def test_the_ratio_of_updates_is_that_of_wide_moments(tmp_path: Path) -> None:
    """The stability record computes the last update from rounded moments: within what bf16 loses."""
    found = []
    for states in ("fp32", "bf16"):
        with closing(opened(tmp_path / states, f"optimizer.states={states}")) as session:
            single_step(session)
            assert isinstance(session.engine.optimizer, LeanAdamW) == (states == "bf16")
            found.append(StabilityStats(session).tensors(1.0)["norms_K3"])
    torch.testing.assert_close(found[1], found[0], rtol=0.01, atol=1e-12)


@pytest.mark.parametrize("count", [1, 5])
def test_chunks_on_a_gpu_are_there_when_they_are_used(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Copies run when somebody waits for them (cuda_double.py): who does not, updates what is not there, or saves what was.

    The copy of the next chunk is queued before the one here is updated, and that of the one after it not yet.
    """
    cuda = cuda_double.installed(monkeypatch)
    device, values = torch.device("cuda", 1), [torch.full((4,), float(place)) for place in range(count)]
    cuda.set_device(1)
    offload, host = _Offload(device), [host_buffer(16, device).view(torch.float32).copy_(each) for each in values]
    for update in (1, 2):
        for place, chunk in enumerate(offload.ahead({"exp_avg": each} for each in host)):
            cuda.current_stream(device).synchronize()
            assert chunk["exp_avg"].as_subclass(torch.Tensor).tolist() == [place + update - 1] * 4
            assert sum(call.what == "copy to device" for call in cuda.calls) == count * (update - 1) + min(place + 2, count)
            chunk["exp_avg"].add_(1)
            offload.give_back({"exp_avg": host[place]}, chunk)
    offload.returned.wait()
    assert [each.tolist() for each in host] == [[place + 2] * 4 for place in range(count)]
