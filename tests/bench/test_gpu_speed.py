"""The parts of `make gpu` that measure, tried on the CPU: all layers do the same, and what a line says is what was measured."""

import io
import json
from typing import Any
from unittest.mock import patch

import pytest
import torch
from recorded_graph import recording
from tokenyard.bench.gpu import attentions, contenders, fused, kernels, steps, trainer
from tokenyard.bench.gpu.contenders import DenseProducts
from tokenyard.bench.gpu.kernels import Busy, busy
from tokenyard.bench.gpu.layers import SHAPES, cells, measure_layer
from tokenyard.bench.gpu.recorder import Recorder
from tokenyard.bench.layer import LayerShape
from tokenyard.bench.timing import take_turns
from tokenyard.moe.attention import attention_mask
from tokenyard.moe.config import Activation
from tokenyard.moe.device import dry_run, uses_kernels
from tokenyard.moe.kernels import operators
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
    whole, parts = ([one["cells"] for one in lines if one.get("table", "").startswith(table)] for table in ("steps", "stages"))
    assert [cells["tokens"] for cells in whole] == [*(cells["tokens"] for cells in parts), 4 * 128] == [128, 32, 512]
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


def test_each_kernel_and_what_it_replaces_are_called_alike() -> None:
    """In Triton's interpreter, on the CPU as if it were a GPU; bf16 needs a real one."""
    recorder = Recorder(out := io.StringIO(), CPU, "tiny", 100.0)
    with dry_run("cuda"):
        fused.compare(recorder, torch.float32)
    checks = [json.loads(line) for line in out.getvalue().splitlines()]
    assert len(checks) == 16 + 2 * len(Activation) and all(one["ok"] for one in checks)
    with dry_run("cuda"), patch.object(operators, "sum_rows", lambda y_RD, slot_TK, weights_TK: y_RD[slot_TK[:, 0]]):
        fused.compare(Recorder(out := io.StringIO(), CPU, "tiny", 100.0), torch.float32)
    wrong = [one["name"] for one in map(json.loads, out.getvalue().splitlines()) if not one["ok"]]
    assert wrong == ["weighted sum of rows, float32", "sum of rows, float32"]


def test_without_kernels_the_code_that_they_replace_runs() -> None:
    x = torch.ones(2, 4)
    with dry_run("cuda"):
        assert uses_kernels(x)
        assert contenders.without_kernels(lambda: uses_kernels(x))() is False
        assert uses_kernels(x) and not uses_kernels(x.double())
    assert not uses_kernels(x)


def test_attention_counts_the_visible_pairs_of_tokens() -> None:
    """Against masks: windows and documents."""
    for heads in attentions.MODELS.values():
        _, pairs = attentions.attention(heads, 64, CPU)
        documents = None if heads.documents is None else torch.arange(64)[None] * heads.documents // 64
        assert pairs == attention_mask(64, 64, heads.window, CPU, documents).sum()
    rows = [one["cells"] for one in told(attentions.run) if one["kind"] == "row"]
    assert [row["heads"] for row in rows] == list(attentions.MODELS)


def test_the_trainer_is_compared_with_the_bare_step() -> None:
    *_, row = told(trainer.run)
    share = row["cells"]["tokenyard train"] / row["cells"]["bare step"]
    assert row["table"] == "tokens/s" and row["cells"]["share"] == pytest.approx(share, abs=0.01)


def test_works_take_turns() -> None:
    order: list[str] = []
    taken = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, CPU, 2, 1, lambda: order.append("-"))
    assert "".join(order) == "-b-a" + "-a-b" + "-b-a"
    assert [len(times) for times in taken.values()] == [2, 2]
    order.clear()
    take_turns({"a": lambda: order.append("a")}, CPU, 1, 0, lambda: order.append("-"), in_a_row=3)
    assert "".join(order) == "-aaa"


def test_steps_with_a_graph_are_compared_and_timed() -> None:
    with recording() as captured:
        records = told(lambda recorder: steps.graphs(recorder, steps.NARROW))
    checks = [record for record in records if record["kind"] == "check"]
    assert len(checks) == 2 * (steps.WARM_STEPS + 3) + 1 and all(check["ok"] for check in checks)
    rows = [record for record in records if record["kind"] == "row"]
    assert len(rows) == len(steps.BATCHES["tiny"]) and all(row["cells"]["step"] == "CUDA graph" for row in rows)
    assert len(captured) == 1 + len(rows)
