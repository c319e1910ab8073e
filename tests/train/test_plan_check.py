"""A run on a GPU is compared with its plan after 20 steps: here with doubles of the GPU's name, memory counters and events."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.plan.gpu_cluster import Cluster
from tokenyard.plan.model_work import ModelWork
from tokenyard.plan.own_layout import OwnPlan
from tokenyard.plan.step_time import predict
from tokenyard.plan.workload import StepBatch
from tokenyard.report.headline import Remark, verdict
from tokenyard.report.run_reader import Run
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.config.gpus import gpus
from tokenyard.train.logging import plan_check, run_logger
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.plan_check import FIRST, STEPS, MeasuredSteps, PlanCheck, compare
from tokenyard.train.run import run

CONFIG = Config()
TIME = replace(
    predict(ModelWork(CONFIG.model, 256), CONFIG.parallel, StepBatch(16, 1), Cluster(gpus()["h200"], 1)),
    low=0.8,
    likely=1.0,
    high=1.9,
)
PLANNED = OwnPlan(memory=50 * 10**9, gpu="h200", measured_on="h200", time=TIME)


def test_estimates_that_are_right_are_shown_beside_what_was_measured() -> None:
    record = compare(PLANNED, MeasuredSteps(46 * 10**9, 55 * 10**9, 1.14), CONFIG)
    assert record["off"] == []
    assert record["text"] == (
        "planned and measured: memory 50 GB, 46 GB measured, 55 GB with the allocator's cache; "
        "step 1 s (0.8 to 1.9), 1.14 s measured, the median of steps 6 to 20"
    )
    assert record["memory_error"] == pytest.approx(50 / 46 - 1) and record["step_seconds_error"] == pytest.approx(1 / 1.14 - 1)


MORE = "memory planned 38% too low: 50 GB planned, 80 GB measured; "
OTHER = "the rates were measured on h200: `make gpu` and `tokenyard plan calibrate=` measure h100"


@pytest.mark.parametrize(
    ("planned", "measured", "changed", "says"),
    [
        (PLANNED, (40, 1.0), {}, "memory planned 25% too high: 50 GB planned, 40 GB measured; fused kernels keep less"),
        (PLANNED, (80, 1.0), {}, f"{MORE}what an operator allocates and frees inside"),
        (PLANNED, (80, 1.0), {"expert": 4}, f"{MORE}this rank's experts may have more rows"),
        (PLANNED, (80, 1.0), {"compile": True}, f"{MORE}the plan knows nothing of compile=true"),
        (PLANNED, (50, 1.6), {}, "step planned 38% too low: 1 s planned, 1.6 s measured, within 0.8 to 1.9; waiting for data"),
        (PLANNED, (50, 0.5), {}, "step planned 100% too high: 1 s planned, 0.5 s measured, outside of 0.8 to 1.9; this GPU"),
        (
            replace(PLANNED, gpu="h100"),
            (50, 2.0),
            {},
            f"step planned 50% too low: 1 s planned, 2 s measured, outside of 0.8 to 1.9; {OTHER}",
        ),
    ],
)
def test_an_estimate_that_is_off_is_named_with_its_likely_cause(
    planned: OwnPlan, measured: tuple[int, float], changed: dict[str, Any], says: str
) -> None:
    config = replace(CONFIG, compile=changed.get("compile", False))
    config.parallel = replace(config.parallel, expert=changed.get("expert", 1))
    (line,) = compare(planned, MeasuredSteps(measured[0] * 10**9, 90 * 10**9, measured[1]), config)["off"]
    assert line.startswith(says)


def test_what_was_not_planned_is_unknown() -> None:
    record = compare(OwnPlan(unknown=("not known",)), MeasuredSteps(1, 2, 3.0), CONFIG)
    assert record["off"] == [] and "memory_error" not in record and "step_seconds_error" not in record
    assert "memory unknown, 1 bytes measured" in record["text"] and "step unknown, 3 s measured" in record["text"]


class Clock:
    """Events whose times are those of a list; `ready` is whether the device has come to them."""

    def __init__(self, ends: Iterator[float]) -> None:
        self.ends, self.ready = ends, False

    def record(self, device: torch.device, timed: bool = False) -> Any:
        clock, at = self, next(self.ends)
        return type("Event", (), {"at": at, "done": lambda self: clock.ready})()


def test_the_median_leaves_out_the_first_steps_and_the_host_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    took = [100.0] * FIRST + [float(number) for number in range(1, STEPS - FIRST + 1)]
    clock = Clock(iter([time for seconds in took for time in (0.0, seconds)]))
    monkeypatch.setattr(plan_check, "record_event", clock.record)
    monkeypatch.setattr(plan_check, "seconds_between", lambda first, second: second.at - first.at)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 7)
    check = PlanCheck(torch.device("cuda", 0))
    for _ in took:
        assert check.measured() is None
        with check.step():
            pass
    assert check.measured() is None  # the device is not done
    with check.step():  # records no more events: the iterator has none
        pass
    clock.ready = True
    assert check.measured() == MeasuredSteps(5, 7, (STEPS - FIRST + 1) / 2)


def test_a_run_on_a_gpu_is_compared_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The device is a CPU that the logger takes for an H200."""
    monkeypatch.setattr(run_logger, "kind_of", lambda device: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10**9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 2 * 10**9)
    words = [f"run.dir={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}", "evaluate.every=0", "checkpoint.every=30"]
    assert run(compose([*TINY_RUN, *words, "steps=23", "log.every=5", "precision=bf16"])) == 0
    events = read_journal(tmp_path / "run" / "events.jsonl")
    (planned,) = [event for event in events if event["event"] == "planned"]
    (checked,) = [event for event in events if event["event"] == "plan_checked"]
    assert (planned["step"], planned["gpu"], planned["verdict"], checked["step"]) == (0, "h200", "FITS", 20)
    assert (checked["planned_bytes"], checked["allocated_bytes"]) == (planned["memory_bytes"], 10**9)
    assert checked["planned_step_seconds"] == planned["step_seconds"] and checked["measured_step_seconds"] > 0
    assert checked["off"][0].startswith("memory planned ")
    out = capsys.readouterr().out
    assert "  plan        " in out and out.count(checked["text"]) == 1 and checked["off"][0] in out
    assert Remark("watch", f"Plan: {checked['off'][0]}.") in verdict(Run(tmp_path / "run"))


def test_on_a_cpu_a_run_has_one_line_and_no_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"run.dir={tmp_path / 'run'}", f"data.cache={tmp_path / 'cache'}", "evaluate.every=0", "checkpoint.every=30"]
    assert run(compose([*TINY_RUN, *words, "steps=1"])) == 0
    assert capsys.readouterr().out.count("of weights, gradients and moments on rank 0; the rest is planned for GPUs alone") == 1
    assert not [each for each in read_journal(tmp_path / "run" / "events.jsonl") if each["event"].startswith("plan")]
