"""A real run of a mixture, and the page about it: experts by source of the data, and where it ran."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard import __version__
from tokenyard.report.payload import payload
from tokenyard.report.run_reader import Run
from tokenyard.train.config.compose import compose
from tokenyard.train.logging.environment_info import environment
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.trackers.sections import is_index, sectioned
from tokenyard.train.run import run

MIX = "data.mix=['weight=0.5 corpus=synthetic label=stories','weight=0.5 corpus=text path={path} label=sums']"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("mixture")
    (base / "texts").mkdir()
    for number in range(60):
        lines = [f"{number} + {other} = {number + other}\n" for other in range(40)]
        (base / "texts" / f"{number}.py").write_text("".join(lines))
    sizes = [
        "steps=4",
        "evaluate.every=2",
        "evaluate.sequences=8",
        "checkpoint.every=0",
        "sample.tokens=0",
        f"run.dir={base / 'run'}",
    ]
    watched = ["telemetry.tier=detailed", "telemetry.every=2", "telemetry.probe=8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENYARD_CACHE", str(base / "cache"))
        mixture = [MIX.format(path=base / "texts"), "data.pattern='*.py'"]
        assert run(compose([*TINY_RUN, "data=mix", *mixture, *sizes, *watched])) == 0
    return base / "run"


def test_experts_are_told_by_source(folder: Path) -> None:
    records = read_journal(folder / "telemetry.jsonl")
    for record in records:
        assert set(record["sources"]) == {"stories", "sums"}
        by_source, by_class = (torch.tensor(list(record[kind].values())).sum(0) for kind in ("sources", "classes"))
        assert torch.equal(by_source, by_class) and (torch.tensor(record["sources"]["sums"]).sum(1) > 0).all()
    found: dict[str, Any] = payload([Run(folder)])["runs"][0]["telemetry"]["kinds"]
    assert found["sources"]["names"] == ["stories", "sums"]
    sums_LE = torch.tensor([record["sources"]["sums"] for record in records]).sum(0)
    assert torch.equal(torch.tensor(found["sources"]["counts"])[:, :, 1], sums_LE)


def test_where_it_ran_is_in_the_first_event_and_on_the_page(folder: Path) -> None:
    (start,) = [event for event in read_journal(folder / "events.jsonl") if event["event"] == "start"]
    here = start["environment"]
    assert (here["torch"], here["tokenyard"], here["ranks"]) == (torch.__version__, __version__, 1)
    assert {"python", "host", "system", "cpu", "command"} <= set(here)
    shown = dict(payload([Run(folder)])["runs"][0]["environment"])
    assert shown["torch"] == torch.__version__ and shown["command"] == here["command"]


def test_secrets_of_the_command_line_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.orig_argv", ["python", "-m", "tokenyard", "train", "a.api_key=sesame", "seed=2"])
    command = environment(torch.device("cpu"), 1)["command"]
    assert "sesame" not in command and command.endswith("seed=2")


def test_the_workspace_of_wandb_has_keys_that_runs_log(folder: Path) -> None:
    """Its definition can be imported without wandb_workspaces and without an account."""
    file = Path(__file__).parents[2] / "docs" / "wandb_workspace.py"
    spec = importlib.util.spec_from_file_location("wandb_workspace", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    keys = {key for panels in module.SECTIONS.values() for _, keys in panels for key in keys}
    logged = {sectioned(key) for record in read_journal(folder / "metrics.jsonl") for key in record}
    of_gpus = {"system/memory_allocated_gb", "system/memory_reserved_gb", "perf/host_wait_fraction"}
    several = {"perf/exchange_fraction", "perf/exchange_fraction_mean"}
    assert keys - logged == {"moe/expert_bias_range", *of_gpus, *several}, "only expert biases, GPUs or several ranks have these"
    assert not any(map(is_index, keys))
