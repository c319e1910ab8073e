"""The coefficients that a report of `make gpu` measured, and steps predicted with them that they were not made of."""

import dataclasses
import json
from pathlib import Path

import pytest
from tokenyard.bench.gpu.layers import DENSE, SHAPES, LayerLine, cells
from tokenyard.bench.gpu.report import Report
from tokenyard.bench.gpu.steps import WIDE
from tokenyard.bench.timing import Spread
from tokenyard.moe.config import MoEConfig
from tokenyard.parallel.config import Exchange, ParallelConfig
from tokenyard.plan.calibrate import LAYERS, STEP, WIDTHS, calibrate
from tokenyard.plan.coefficients import COEFFICIENTS, coefficients, write_coefficients
from tokenyard.plan.gpu_cluster import Cluster
from tokenyard.plan.model_work import ModelWork
from tokenyard.plan.step_time import Tuning, predict
from tokenyard.plan.workload import StepBatch
from tokenyard.train.config.config import ConfigError
from tokenyard.train.config.gpus import gpus

HERE = Path(__file__).parent


def test_the_committed_ones_are_those_of_the_h200() -> None:
    found = calibrate(HERE / "report_h200.json")
    assert found.gpu.name == "h200"
    committed = json.loads(COEFFICIENTS.read_text())["tokenyard"]
    assert {name: after for name, (_, after) in found.replaced.items()} == pytest.approx(committed, rel=1e-3)
    assert coefficients(own=True) == dataclasses.replace(coefficients(), **committed)


def test_each_part_of_the_file_is_written_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.json").write_text('{"coefficients": {"a": 1.0}, "tokenyard": {"b": 2.0}}')
    monkeypatch.setattr("tokenyard.plan.coefficients.COEFFICIENTS", tmp_path / "c.json")
    text = write_coefficients("tokenyard", {"c": 0.123456})
    assert (
        json.loads(text)
        == json.loads((tmp_path / "c.json").read_text())
        == {"coefficients": {"a": 1.0}, "tokenyard": {"c": 0.1235}}
    )


@pytest.mark.parametrize("gpu", ["h200", "h100"])
def test_steps_that_were_not_calibrated_are_predicted(gpu: str) -> None:
    """docs/plan.md has these figures. Those of the H100 come from the coefficients of the H200."""
    steps = [one["cells"] for one in json.loads((HERE / f"report_{gpu}.json").read_text())["parts"]["steps"]]
    for cells_ in steps:
        length, micros = min(4096, cells_["tokens"]), cells_["micro-batches"]
        sequences = cells_["tokens"] // length
        work = ModelWork(dataclasses.replace(WIDE, layers=cells_["layers"]), length)
        found = predict(work, ParallelConfig(), StepBatch(sequences, sequences // micros), Cluster(gpus()[gpu], 1))
        measured = 1e-3 * float(cells_["ms (least, most)"].split()[0])
        assert found.likely == pytest.approx(measured, rel=0.12) and found.low < measured < found.high
    assert len(steps) == 3


def test_dense_products_and_attention_by_hand(tmp_path: Path) -> None:
    """A report as bench/gpu writes it, with layers of 0.5 of the peak."""
    peak = gpus()["h100"].flops["bf16"] / 1e12
    report = Report(tmp_path, {})
    report.add("machine", {"kind": "fact", "name": "GPU 0", "value": "NVIDIA H100 80GB HBM3, 79 GiB, sm_90"})
    for name, shape in SHAPES["full"].items():
        line = LayerLine(name, DENSE, Spread(1.0, 1.0, 1.0), teraflops=0.5 * peak)
        report.add("layers", {"kind": "row", "table": "layers", "cells": cells(line, shape.tokens)})
    for heads, rate in (("Qwen3-30B", 0.25 * peak), ("gpt-oss, full", 0.1 * peak)):
        report.add("attentions", {"kind": "row", "table": "attention", "cells": {"heads": heads, "TFLOP/s": rate}})
    (tmp_path / "report.json").write_text(report._json())
    found = calibrate(tmp_path / "report.json")
    assert {name: after for name, (_, after) in found.replaced.items()} == {
        "hopper_bf16": pytest.approx(0.5),
        "hopper_scores": pytest.approx(0.25),
    }
    assert found.coefficients == dataclasses.replace(coefficients(), hopper_bf16=0.5, hopper_scores=0.25)


def test_the_sizes_are_those_that_are_measured() -> None:
    assert STEP == WIDE
    for name, moe in LAYERS.items():
        shape = SHAPES["full"][name]
        assert (shape.width, shape.experts, shape.top_k, shape.hidden, shape.shared) == (
            *(WIDTHS[name], moe.experts, moe.top_k, moe.hidden, 0),
        )
        assert moe == MoEConfig(experts=moe.experts, top_k=moe.top_k, hidden=moe.hidden)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        (None, r"cannot be read as the report.json of `make gpu` \(FileNotFoundError\)"),
        ("[", r"cannot be read .* \(JSONDecodeError\)"),
        ("{}", r"cannot be read .* \(KeyError\)"),
        ('{"parts": {}}', "was measured on no GPU, which conf/cluster/ does not have"),
        ('{"parts": {"machine": [{"name": "GPU 0", "value": "GeForce 256"}]}}', "was measured on GeForce 256, which"),
        ('{"parts": {"machine": [{"name": "GPU 0", "value": "NVIDIA H100"}]}}', "has neither layers, attentions, fused nor steps"),
    ],
)
def test_another_file_is_refused(text: str | None, rule: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError, match=f"^calibrate=.*report.json: {rule}.*; nearest valid: calibrate=gpu-report"):
        calibrate(tmp_path / "report.json")


def test_a_host_waits_for_counts_of_other_ranks_only() -> None:
    work = ModelWork(dataclasses.replace(WIDE, layers=2), 128)
    plain, symmetric, one, vendor = (
        predict(work, layout, StepBatch(8, 1), Cluster(gpus()["h100"], 8), tuning=tuning).terms.launches
        for layout, tuning in (
            (ParallelConfig(expert=8), Tuning.tokenyard),
            (ParallelConfig(expert=8, exchange=Exchange.symmetric), Tuning.tokenyard),
            (ParallelConfig(), Tuning.tokenyard),
            (ParallelConfig(expert=8), Tuning.vendor),
        )
    )
    assert symmetric < 0.7 * plain and one < 0.7 * plain and vendor < plain
