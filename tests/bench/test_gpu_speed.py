"""The parts of `make gpu` that measure, tried on the CPU: all layers do the same, and what a line says is what was measured."""

import io
import json
from typing import Any

import pytest
import torch
from tokenyard.bench.gpu import contenders, kernels, steps
from tokenyard.bench.gpu.contenders import DenseProducts
from tokenyard.bench.gpu.kernels import Busy, busy
from tokenyard.bench.gpu.layers import SHAPES, cells, measure_layer
from tokenyard.bench.gpu.recorder import Recorder
from tokenyard.bench.layer import LayerShape
from tokenyard.bench.timing import take_turns
from tokenyard.moe.param_count import count

CPU = torch.device("cpu")


def told(part: Any, seconds: float = 100.0) -> list[dict[str, Any]]:
    """The records of a part."""
    out = io.StringIO()
    part(Recorder(out, CPU, "tiny", seconds))
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_layers_of_others_give_what_ours_gives(name: str) -> None:
    shape = SHAPES["tiny"][name]
    lines = {line.name: line for line in measure_layer(name, shape, CPU, 2, 1, torch.float32)}
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

    monkeypatch.setattr(contenders, "_transformers", fails)
    lines = {line.name: line for line in measure_layer("olmoe", SHAPES["tiny"]["olmoe"], CPU, 1, 0, torch.float32)}
    assert lines["transformers, grouped_mm"].note == "RuntimeError: no kernel for this device"
    assert cells(lines["transformers, grouped_mm"], 128)["ms (least, most)"] == lines["transformers, grouped_mm"].note
    assert lines["tokenyard"].seconds is not None


def test_layers_without_time_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first takes longer than what is left then: the second is not begun."""
    from tokenyard.bench.gpu import layers

    monkeypatch.setattr(layers, "measure_layer", lambda *_: [])
    clock = iter([0.0, 60.0] + [100.0] * 20)
    monkeypatch.setattr(layers, "monotonic", lambda: next(clock))
    assert [one["kind"] for one in told(layers.run, seconds=30.0)] == ["skip"] * 3


def test_dense_products_have_the_flops_of_the_experts() -> None:
    """torch's own count, with a shared expert and without."""
    from torch.utils.flop_counter import FlopCounterMode

    for shape in (SHAPES["tiny"]["deepseek_v3"], SHAPES["tiny"]["mixtral"]):
        products = DenseProducts(shape, torch.empty(0))
        with FlopCounterMode(display=False) as counter:
            products()
        assert counter.get_total_flops() == shape.flops
    assert LayerShape(width=2, hidden=3, experts=4, top_k=2, shared=0, tokens=5).flops == 3 * 2 * (3 * 2 * 3) * 10


def test_steps_and_their_stages() -> None:
    lines = told(steps.run)
    whole, parts = ([one["cells"] for one in lines if one["table"].startswith(table)] for table in ("steps", "stages"))
    assert [cells["tokens"] for cells in whole] == [cells["tokens"] for cells in parts] == [128, 32]
    assert all(cells["tokens/s"] > 0 and "%" in cells["MFU"] for cells in whole)
    names = ["forward ms", "backward and sums over ranks ms", "norm and numbers ms", "update ms"]
    assert [name for name in parts[0] if name.endswith("ms")] == names and all(parts[0][name] > 0 for name in names)


def test_the_model_fits_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 bytes a parameter in half of the memory: fewer layers on 80 GB than on 141."""

    class Properties:
        total_memory = 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    layers = {}
    for gigabytes in (24, 80, 141):
        Properties.total_memory = gigabytes * 10**9
        model = steps.fitting(torch.device("cuda", 0))
        layers[gigabytes] = model.layers
        assert 16 * count(model).total <= steps.SHARE * Properties.total_memory
    assert layers[24] < layers[80] < layers[141] == steps.WIDE.layers


def test_the_device_is_busy_in_the_union_of_its_kernels() -> None:
    assert busy([]) == Busy(0.0, 0.0, 0, 0.0)
    found = busy([(1.0, 2.0), (1.5, 1.6), (1.9, 3.0), (3.00001, 4.0), (6.0, 7.0)])
    assert found == Busy(6.0, pytest.approx(3.99999), 1, 2.0)


def test_time_by_name() -> None:
    lines = told(kernels.run)
    rows = [one["cells"] for one in lines if one["kind"] == "row" and one["table"] == "time of a step by name, 128 tokens"]
    by_name = {cells["name"]: cells for cells in rows}
    assert by_name["tokenyard::grouped_mm"]["launches"] == 2 * 4  # two layers: gate_up and down, forward and to the rows' gradients
    times = [cells["ms a step"] for cells in rows]
    assert times == sorted(times, reverse=True) and len(rows) <= kernels.MOST_ROWS


def test_works_take_turns() -> None:
    order: list[str] = []
    taken = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, CPU, 2, 1, lambda: order.append("-"))
    assert "".join(order) == "-b-a" + "-a-b" + "-b-a"
    assert [len(times) for times in taken.values()] == [2, 2]
