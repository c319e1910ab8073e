"""The benchmark of one GPU, its code tried on the CPU: all layers do the same, and what a line says is what was measured."""

import json
import warnings

import pytest
import torch
from tokenyard.bench import gpu_layers
from tokenyard.bench.gpu import SHAPES, as_json, main, measure_layer, table
from tokenyard.bench.gpu_layers import DenseProducts
from tokenyard.bench.gpu_step import SIZES, measure_steps
from tokenyard.bench.host_reads import host_reads
from tokenyard.bench.shapes import Shape
from tokenyard.bench.turns import take_turns
from tokenyard.moe import dispatch
from tokenyard.moe.device import host_read
from tokenyard.parallel.streams import on_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_layers_of_others_give_what_ours_gives(name: str) -> None:
    shape = SHAPES["tiny"][name]
    lines = {line.name: line for line in measure_layer(name, shape, CPU, 2, 1, False, torch.float32)}
    theirs = lines["transformers, grouped_mm"]
    assert theirs.off is not None and theirs.off < 1e-5
    for line in lines.values():
        assert (line.seconds is None) == bool(line.note)
    assert lines["SonicMoE"].note == lines["MegaBlocks"].note == "not installed"
    ours = lines["tokenyard"]
    assert ours.seconds is not None and ours.teraflops == shape.flops / ours.seconds.median / 1e12
    assert ours.host_reads == {}
    assert ours.of_dense < 1 == lines["dense products"].of_dense


def test_a_layer_that_fails_has_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no kernel\nfor this device")

    monkeypatch.setattr(gpu_layers, "_transformers", fails)
    lines = {line.name: line for line in measure_layer("olmoe", SHAPES["tiny"]["olmoe"], CPU, 1, 0, False)}
    assert lines["transformers, grouped_mm"].note == "RuntimeError: no kernel for this device"
    assert lines["tokenyard"].seconds is not None


def test_dense_products_have_the_flops_of_the_experts() -> None:
    """torch's own count, with a shared expert and without."""
    from torch.utils.flop_counter import FlopCounterMode

    for shape in (SHAPES["tiny"]["deepseek_v3"], SHAPES["tiny"]["mixtral"]):
        products = DenseProducts(shape, torch.empty(0))
        with FlopCounterMode(display=False) as counter:
            products()
        assert counter.get_total_flops() == shape.flops
    assert Shape(width=2, hidden=3, experts=4, top_k=2, shared=0, tokens=5).flops == 3 * 2 * (3 * 2 * 3) * 10


def test_a_step_reads_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropping, on one device: loss and norm, before the update."""
    monkeypatch.setattr(dispatch, "alignment", lambda _: 1)  # as on a GPU
    (line,) = measure_steps(SIZES["tiny"], CPU, 1, 0, compiled=False)
    assert [(place.partition(":")[0], count) for place, count in line.host_reads.items()] == [("train/survival/flags.py", 1)]
    assert line.mfu > 0 and line.peak_bytes is None
    assert line.tokens_per_second == 128 / line.seconds.median


def test_reads_are_found() -> None:
    x = torch.arange(4.0)
    reads = host_reads(lambda: (x.sum().item(), x.tolist(), x[x > 1], x.nonzero(), bool(x[0] == 0)), CPU)
    assert reads.total() == 5 and all(place.startswith("tests/bench/test_gpu.py:") for place in reads)
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
    assert [place.partition(":")[0] for place in found] == ["tests/bench/test_gpu.py"] and found.total() == 1


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


def test_works_take_turns() -> None:
    order: list[str] = []
    taken = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, CPU, 2, 1, lambda: order.append("-"))
    assert "".join(order) == "-b-a" + "-a-b" + "-b-a"
    assert [len(times) for times in taken.values()] == [2, 2]


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--device cpu --scale tiny --shapes olmoe --no-compile --repeats 1 --warm-up 0"
    monkeypatch.setattr("sys.argv", ["gpu", *words.split()])
    main()
    shown = capsys.readouterr().out
    assert shown.startswith("CPU, ") and "| olmoe | SonicMoE | not installed |" in shown and "| eager | " in shown
    monkeypatch.setattr("sys.argv", ["gpu", *words.split(), "--json"])
    main()
    found = json.loads(capsys.readouterr().out)
    assert [line["name"] for line in found["layers"]][:2] == ["dense products", "tokenyard"]
    assert table([], []) == "" and json.loads(as_json([], [], CPU))["steps"] == []


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="no GPU"):
        main()
