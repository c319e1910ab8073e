"""The coefficients that a report of `make gpu` measured, and steps predicted with them that they were not made of."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenyard.bench.gpu.layers import DENSE, SHAPES, LayerLine, cells
from tokenyard.bench.gpu.report import Report
from tokenyard.bench.gpu.steps import WIDE
from tokenyard.bench.timing import Spread
from tokenyard.launch.main import main
from tokenyard.moe.config import MoEConfig
from tokenyard.parallel.config import Exchange, ParallelConfig, Recompute
from tokenyard.plan.calibrate import LAYERS, STEP, WIDTHS, calibrate
from tokenyard.plan.coefficients import COEFFICIENTS, coefficients, measured_on, write_coefficients
from tokenyard.plan.gpu_cluster import Cluster
from tokenyard.plan.model_work import ModelWork
from tokenyard.plan.step_time import Tuning, predict
from tokenyard.plan.workload import StepBatch
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import ConfigError
from tokenyard.train.config.gpus import gpus

HERE = Path(__file__).parent


def test_the_committed_ones_are_those_of_the_h200() -> None:
    found = calibrate(HERE / "report_h200.json")
    assert found.gpu.name == measured_on() == "h200"
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
        ('{"parts": [1]}', r"has a part that `make gpu` does not write \(AttributeError: "),
        (
            '{"parts": {"machine": [{"name": "GPU 0", "value": "NVIDIA H100"}], '
            '"steps": [{"kind": "row", "cells": {"step": "eager"}}]}}',
            r"has a part that `make gpu` does not write \(KeyError: 'micro-batches'\)",
        ),
    ],
)
def test_another_file_is_refused(text: str | None, rule: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ConfigError, match=f"^calibrate=.*report.json: {rule}.*; nearest valid: calibrate=gpu-report"):
        calibrate(tmp_path / "report.json")


def test_the_word_alone_shows_what_the_report_measured(capsys: pytest.CaptureFixture[str]) -> None:
    path, found = HERE / "report_h100.json", calibrate(HERE / "report_h100.json")
    assert main(["plan", f"calibrate={path}"]) == 0
    text = capsys.readouterr().out
    assert main(["plan", "--json", f"calibrate={path}"]) == 0
    object_ = json.loads(capsys.readouterr().out)
    assert (object_["gpu"], object_["file"]) == ("h100", str(path))
    assert {name: tuple(pair.values()) for name, pair in object_["coefficients"].items()} == found.replaced
    assert "in use (h200)" in text and "measured (h100)" in text
    for name, (before, after) in found.replaced.items():
        assert f"{name:16}{before:>11.4g}{getattr(coefficients(own=True), name):>17.4g}{after:>20.4g}" in text


def test_written_it_holds_for_all_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "coefficients.json"
    shutil.copy(COEFFICIENTS, copy)
    monkeypatch.setattr("tokenyard.plan.coefficients.COEFFICIENTS", copy)
    monkeypatch.setattr("tokenyard.launch.calibrate_command.COEFFICIENTS", copy)
    assert main(["plan", f"calibrate={HERE / 'report_h100.json'}", "--write", "coefficients"]) == 0
    assert f"written to {copy}" in capsys.readouterr().out
    measured = {name: float(f"{after:.4g}") for name, (_, after) in calibrate(HERE / "report_h100.json").replaced.items()}
    coefficients.cache_clear()
    try:
        assert measured_on() == "h100" and coefficients(own=True) == dataclasses.replace(coefficients(), **measured)
        assert json.loads(copy.read_text())["coefficients"] == json.loads(COEFFICIENTS.read_text())["coefficients"]
    finally:
        coefficients.cache_clear()


def test_a_package_that_cannot_be_written_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(*_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tokenyard.launch.calibrate_command.write_coefficients", write)
    assert main(["plan", f"calibrate={HERE / 'report_h100.json'}", "--write", "coefficients"]) == 2
    says = f"--write=coefficients: {COEFFICIENTS} cannot be written (Permission denied); nearest valid: cluster=... calibrate=..."
    assert capsys.readouterr().err == f"tokenyard: {says}\n"


def test_a_plan_with_it_takes_its_times(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["parallel.expert=8", "parallel.shard=8", "parallel.recompute=block", "batch.micro=4", "parallel.zero=3"]
    words = ["plan", "cluster=h100x8", "model=olmoe_1b_7b", "batch.tokens=524288", *layout]

    def planned(*more: str) -> dict[str, Any]:
        assert main([*words, "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)

    path = HERE / "report_h100.json"
    plain, mine = planned(), planned(f"calibrate={path}")
    assert mine["calibrated"] == {"file": str(path), "gpu": "h100", "coefficients": list(calibrate(path).replaced)}
    assert "calibrated" not in plain
    work = ModelWork(compose(["model=olmoe_1b_7b"]).model, 4096)
    parallel = ParallelConfig(expert=8, shard=8, zero=3, recompute=Recompute.block, exchange=Exchange.symmetric)
    given = work, parallel, StepBatch(128, 4), Cluster(gpus()["h100"], 8)
    likely = [each["best"][0]["step_seconds"][1] for each in (plain, mine)]
    assert likely == [predict(*given).likely, predict(*given, using=calibrate(path).coefficients).likely]
    assert likely[0] != likely[1]
    assert main([*words, f"calibrate={HERE / 'report_h200.json'}"]) == 0
    text = capsys.readouterr().out
    assert "report_h200.json, measured on h200, which is not the cluster's h100: hopper_bf16, experts" in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("model=tiny", "model: a plan needs a cluster too; nearest valid: cluster=h100x8 calibrate="),
        (
            "--write experiment=mine",
            "--write=experiment=mine: a calibration alone has no layout; nearest valid: --write coefficients",
        ),
        ("--explain 2", "--explain=2: a calibration alone has no layout; nearest valid: --write coefficients"),
        ("cluster=h100x8 calibrate=/none", "calibrate=/none: cannot be read as the report.json of `make gpu` (FileNotFoundError)"),
    ],
)
def test_what_else_is_said_with_it_is_refused(words: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"calibrate={HERE / 'report_h100.json'}", *words.split()]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1) and error.startswith(f"tokenyard: {says}")


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
