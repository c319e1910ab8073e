"""Where the host waits is found: on a CPU by the operators, on a GPU as torch tells it."""

import warnings

import pytest
import torch
from tokenyard.bench.host_reads import host_reads
from tokenyard.moe.device import host_read
from tokenyard.parallel.streams import on_device

CPU = torch.device("cpu")


def test_reads_are_found() -> None:
    x = torch.arange(4.0)
    reads = host_reads(lambda: (x.sum().item(), x.tolist(), x[x > 1], x.nonzero(), bool(x[0] == 0)), CPU)
    assert reads.total() == 5 and all(place.startswith("tests/bench/test_host_reads.py:") for place in reads)
    counts = torch.tensor([1, 2])
    assert host_reads(lambda: counts.repeat_interleave(counts), CPU).total() == 1
    assert host_reads(lambda: counts.repeat_interleave(counts, output_size=3), CPU).total() == 0
    assert host_reads(lambda: torch.nonzero_static(x, size=3), CPU).total() == 0


def test_what_torch_tells_is_told_by_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where torch warns of each call that waits; a `host_read` is told as the place that called it."""
    for name in ("synchronize", "get_sync_debug_mode", "set_sync_debug_mode"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)

    class OnGpu(torch.Tensor):
        def tolist(self) -> None:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    found = host_reads(lambda: host_read(torch.ones(1).as_subclass(OnGpu), "here", list), torch.device("cuda"))
    assert [place.partition(":")[0] for place in found] == ["tests/bench/test_host_reads.py"] and found.total() == 1


def test_copies_of_unpinned_memory_are_found() -> None:
    x = torch.arange(4.0)
    assert (
        host_reads(lambda: (torch.tensor([1], device=CPU), x.new_tensor([1]), torch.as_tensor([1], device=CPU)), CPU).total() == 3
    )
    on_the_host = lambda: (torch.tensor([1]), torch.as_tensor(x, device=CPU), on_device(torch.tensor([1]), CPU))  # noqa: E731
    assert host_reads(on_the_host, CPU).total() == 0


def test_a_check_of_numbers_is_found() -> None:
    x, lengths = torch.arange(4.0), torch.tensor([1, 3])
    assert host_reads(lambda: torch.segment_reduce(x, "sum", lengths=lengths), CPU).total() == 1
    assert host_reads(lambda: torch.segment_reduce(x, "sum", lengths=lengths, unsafe=True), CPU).total() == 0
