"""Joining the process group: world from the environment, backend from the device."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from tokenyard.parallel import process_group
from tokenyard.parallel.meeting import Rendezvous
from tokenyard.parallel.process_group import join, leave, pick_device, wait_for_all


def test_the_cpu_is_what_there_is_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")


def test_each_rank_of_a_host_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 3)
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match=r"^launch\.ranks=5: this host has 4 GPUs, .*; nearest valid: launch\.ranks=4$"):
        pick_device("auto")


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"^device=cuda: torch .* here; nearest valid: device=cpu$"):
        pick_device("cuda")


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    join(torch.device("cpu"), 1.0)
    assert not dist.is_initialized()
    wait_for_all()
    leave()


@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "nccl")])
def test_the_device_decides_the_backend(device: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(process_group, "meet", lambda *_: (mock.Mock(), Rendezvous(1, 2, "host", 1)))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: calls.append((backend, settings["timeout"])))
    join(torch.device(device), 30.0)
    assert calls[-1][0] == backend and calls[-1][1].total_seconds() == 30
    assert (torch.device(device) in calls) == (device == "cuda")
