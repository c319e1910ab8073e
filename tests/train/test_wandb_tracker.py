"""What W&B's offline file holds, read back by wandb's own reader, and that nothing else is printed, written or sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenyard
from tiny_run import TINY_RUN
from tokenyard.train.config.config import TrackerConfig
from tokenyard.train.logging.expert_stats.alerts import ERRORS, TITLES
from tokenyard.train.logging.trackers.wandb_tracker import account, init_arguments, mode

RUN = """
import math, sys
from pathlib import Path
from tokenyard.train.config.config import TrackerConfig
from tokenyard.train.logging.trackers.trackers import build_trackers
run_dir, first = Path(sys.argv[1]), int(sys.argv[2])
trackers = build_trackers(TrackerConfig(), run_dir, "abcd1234")
trackers.start({"seed": 1, "model": {"width": 256}})
for step in (first, first + 1, first + 2):
    loss = 0.1 + step if step != 3 else math.nan
    trackers.log({"step": step, "loss": loss, "lr": 0.1, "moe/dead_experts": step, "moe/load_cv_layer": 1})
    trackers.console(f"line of step {step}")
trackers.finish(3, {"validation_loss": 2.5})
"""

HANG = """
import sys
from types import SimpleNamespace
from pathlib import Path
from tokenyard.train.fault_tolerance.hang_diagnosis import HangDiagnosis
from tokenyard.train.config.config import TrackerConfig
from tokenyard.train.logging.console.text import Printer
from tokenyard.train.logging.journal import Journal
from tokenyard.train.logging.run_logger import RankZeroLogger
from tokenyard.train.logging.expert_stats.alerts import TITLES
from tokenyard.train.logging.trackers.trackers import build_trackers
from tokenyard.train.fault_tolerance.watchdog import Watchdog
folder = Path(sys.argv[1])
rank = RankZeroLogger.__new__(RankZeroLogger)
rank.pending, rank.session, rank.summary, rank.printer = None, SimpleNamespace(step=7), {"validation_loss": 2.5}, Printer()
rank.events = Journal(folder / "events.jsonl")
rank.trackers = build_trackers(TrackerConfig(), folder, "abcd1234", events=rank.events)
rank.trackers.start({})
rank.trackers.log({"step": 7, "loss": 2.0})
for kind in TITLES:
    if kind != "stall":
        rank.alert(kind, "some words")
Watchdog(folder, 0, 2, 1.0, on_hang=rank.on_hang)._report()
"""


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """No account and none of wandb's variables."""
    for key in [key for key in os.environ if key.startswith("WANDB_") or key == "NETRC"]:
        monkeypatch.delenv(key)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return monkeypatch


def run(tmp_path: Path, first: int) -> Path:
    """A process that logs three steps from `first` on; returns its offline file. It prints how to send it and litters nowhere."""
    run_dir, here = tmp_path / "run", tmp_path / "here"
    run_dir.mkdir(exist_ok=True)
    here.mkdir(exist_ok=True)
    before = set(run_dir.glob("wandb/offline-run-*/run-abcd1234.wandb"))
    environment = os.environ | {"PYTHONPATH": str(Path(tokenyard.__file__).parents[1])}
    command = [sys.executable, "-W", "error::DeprecationWarning:tokenyard", "-c", RUN, str(run_dir), str(first)]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=240, check=False)
    (new,) = set(run_dir.glob("wandb/offline-run-*/run-abcd1234.wandb")) - before
    assert (done.returncode, done.stdout, done.stderr) == (0, f"to send it to W&B: wandb sync {new.parent}\n", "")
    assert list(here.iterdir()) == []
    assert [path.name for path in run_dir.iterdir() if path.suffix != ".jsonl"] == ["wandb"]
    return new


def read(path: Path) -> list[dict]:
    """The file's records, by `wandb leet inspect`, as objects."""
    from wandb.util import get_core_path

    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(records: list[dict]) -> list[dict]:
    items = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{key: value for key, value in item.items() if not key.startswith("_")} for item in items]


def test_offline_file_holds_what_was_logged(clean: pytest.MonkeyPatch, tmp_path: Path):
    """A resumed run has the same id and a file of its own, and may repeat steps."""
    for name, value in (("ENTITY", "us"), ("RUN_GROUP", "g"), ("JOB_TYPE", "j"), ("TAGS", "a,b")):
        clean.setenv(f"WANDB_{name}", value)
    first = run(tmp_path, first=1)
    records = read(first)
    assert history(records) == [
        {"global_step": 1, "train/loss": 1.1, "optimizer/lr": 0.1, "moe/dead_experts": 1, "moe/load_cv_layer": 1},
        {"global_step": 2, "train/loss": 2.1, "optimizer/lr": 0.1, "moe/dead_experts": 2, "moe/load_cv_layer": 1},
        {"global_step": 3, "train/loss": "NaN", "optimizer/lr": 0.1, "moe/dead_experts": 3, "moe/load_cv_layer": 1},
    ]
    (header,) = [record["run"] for record in records if record["type"] == "run"]
    assert (header["run_id"], header["project"], header["display_name"]) == ("abcd1234", "tokenyard", "run")
    assert (header["entity"], header["run_group"], header["job_type"], header["tags"]) == ("us", "g", "j", ["a", "b"])
    update = header["config"]["update"]
    assert (update["seed"], update["model"]) == (1, {"width": 256})
    metrics = {
        record["metric"].get("name", "") or record["metric"]["glob_name"]: record["metric"]
        for record in records
        if "metric" in record
    }
    assert metrics["*"]["step_metric"] == "global_step"
    hidden = [name for name, metric in metrics.items() if metric.get("options", {}).get("hidden")]
    assert hidden == ["global_step", "moe/load_cv_layer"], "an index is no curve"
    assert said(records) == [f"line of step {step}\n" for step in (1, 2, 3)]
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [3]
    updates = [record["summary"]["update"] for record in records if record["type"] == "summary"]
    assert [update["train/validation_loss"] for update in updates if "train/validation_loss" in update] == [2.5]


@pytest.mark.usefixtures("clean")
def test_after_a_resume_one_folder_has_the_whole_run(tmp_path: Path):
    """The journals say what was before: steps that were lost are not in them. A folder that was sent stays as it is."""
    first = run(tmp_path, first=1)
    write_journals(tmp_path / "run", steps=1)
    second = run(tmp_path, first=2)
    assert not first.exists() and list(second.parents[1].glob("offline-run-*")) == [second.parent]
    records = read(second)
    items = [item for item in history(records) if "train/loss" in item]
    assert [(item["global_step"], item["train/loss"]) for item in items] == [(1, 7.5), (2, 2.1), (3, "NaN"), (4, 4.1)]
    assert [item["global_step"] for item in history(records) if any(key.startswith("experts/load") for key in item)] == [1]
    assert [record["alert"]["text"] for record in records if "alert" in record] == ["step 1: slow"]
    assert [item["global_step"] for item in history(records) if any(key.startswith("sample") for key in item)] == [1]
    second.with_name(f"{second.name}.synced").touch()
    write_journals(tmp_path / "run", steps=4)
    third = run(tmp_path, first=5)
    assert second.exists() and [item["global_step"] for item in history(read(third))] == [5, 6, 7]


def write_journals(folder: Path, steps: int) -> None:
    """Metrics, a probe and two alerts, the second of a step that is not in the metrics."""
    table = {"layers": [0], "counts_LE": [[3, 5]], "dead_LE": [[0, 0]], "classes": {}}
    journals = {
        "metrics": [{"step": step, "loss": 7.5} for step in range(1, steps + 1)],
        "telemetry": [{"step": 1, **table}],
        "events": [
            event | {"step": step, "text": f"step {step}: slow"}
            for step in (1, steps + 1)
            for event in ({"event": "alert", "alert": "straggler"}, {"event": "sample", "prompt": "def "})
        ],
    }
    for name, lines in journals.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def said(records: list[dict]) -> list[str]:
    """The lines of the console."""
    return [
        line
        for record in records
        for kind in ("output", "output_raw", "output_logger")
        if kind in record
        for line in [record[kind].get("line", record[kind].get("text", ""))]
    ]


def test_settings_beat_the_environment_and_the_environment_beats_defaults(clean: pytest.MonkeyPatch, tmp_path: Path):
    assert init_arguments(TrackerConfig(), tmp_path / "folder", "id", None)["job_type"] == "train"
    for name in ("PROJECT", "NAME", "JOB_TYPE"):
        clean.setenv(f"WANDB_{name}", f"env-{name}")
    usual = init_arguments(TrackerConfig(), tmp_path / "folder", "id", None)
    assert [usual[key] for key in ("project", "name", "job_type")] == ["env-PROJECT", "env-NAME", "env-JOB_TYPE"]
    explicit = init_arguments(TrackerConfig(project="p"), tmp_path / "folder", "id", "n")
    assert [explicit[key] for key in ("project", "name", "job_type")] == ["p", "n", "env-JOB_TYPE"]


def test_offline_unless_an_account_is_configured(clean: pytest.MonkeyPatch, tmp_path: Path):
    assert not account()
    assert mode() == "offline"
    clean.setenv("WANDB_MODE", "disabled")
    assert mode() == "disabled"
    clean.setenv("WANDB_MODE", "online")
    with pytest.raises(ValueError, match="needs an account"):
        mode()
    clean.setenv("WANDB_API_KEY", "not-a-key")
    assert mode() == "online"
    clean.delenv("WANDB_MODE")
    assert mode() is None


def test_netrc_counts_for_the_host_in_use_only(clean: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "netrc"
    clean.setenv("NETRC", str(file))
    file.write_text("machine api.wandb.ai login user password not-a-key\n")
    assert account()
    clean.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not account()
    file.write_text("machine wandb.example.org login user password not-a-key\n")
    assert account()
    clean.delenv("WANDB_BASE_URL")
    assert not account()
    clean.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    assert account()


def test_importing_the_tracker_does_not_import_wandb():
    code = "import sys, tokenyard.train.logging.trackers.wandb_tracker; assert not {'wandb', 'torch'} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(Path(tokenyard.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def python(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(Path(tokenyard.__file__).parents[1]), "WANDB_MODE": "offline"} | more
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False)


def told(folder: Path) -> tuple[list[tuple[str, str, str]], list[int], list[dict]]:
    """Alerts, the exit code, and the last values of the summary, of the one W&B run in `folder`."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = read(file)
    alerts = [
        (record["alert"]["title"], record["alert"]["text"], record["alert"]["level"]) for record in records if "alert" in record
    ]
    codes = [record["exit"]["exit_code"] for record in records if record["type"] == "exit"]
    return alerts, codes, [record["history"]["item"] for record in records if record["type"] == "history"]


@pytest.mark.usefixtures("clean")
def test_a_hang_and_every_kind_of_alert_is_told(tmp_path: Path) -> None:
    done = python(tmp_path, "-c", HANG, str(tmp_path))
    assert done.returncode == 69, done.stderr
    alerts, codes, history = told(tmp_path)
    assert [title for title, _, _ in alerts] == [TITLES[kind] for kind in [*(set_without(TITLES, "stall")), "stall"]]
    assert all((level == "ERROR") == (title in {TITLES[kind] for kind in ERRORS}) for title, _, level in alerts)
    assert alerts[0][1] == "step 7: some words" and "rank" in alerts[-1][1]
    assert codes == [69] and [item["global_step"] for item in history] == [7]


def set_without(kinds: dict[str, str], one: str) -> list[str]:
    return [kind for kind in kinds if kind != one]


@pytest.mark.usefixtures("clean")
def test_after_a_crash_the_last_step_and_the_code_are_there(tmp_path: Path) -> None:
    """With 512 experts for 512 choices some are dead, which is told too."""
    sizes = ["steps=6", "model.moe.experts=512", "telemetry.every=1", "telemetry.window=1", f"run.dir={tmp_path / 'run'}"]
    overrides = [*TINY_RUN[:-1], "tracker=wandb", *sizes]
    done = python(
        tmp_path,
        "-m",
        "tokenyard",
        "train",
        *overrides,
        TOKENYARD_FAILPOINTS="step.begin:step=4:raise",
        TOKENYARD_CACHE=str(tmp_path),
    )
    assert done.returncode == 1 and "RuntimeError: failpoint step.begin" in done.stderr
    alerts, codes, history = told(tmp_path / "run")
    assert codes == [1]
    assert [item["global_step"] for item in history if "train/loss" in item] == [1, 2, 3]
    assert {level for _, _, level in alerts} == {"WARN"}
    assert "step 1" in [text.partition(":")[0] for title, text, _ in alerts if title == "Dead experts"]


@pytest.mark.usefixtures("clean")
def test_a_nan_is_an_error_and_the_code_is_that_of_the_run(tmp_path: Path) -> None:
    sizes = ["steps=6", "optimizer.lr=1e30", "optimizer.clip_norm=null", "schedule.warmup=0", f"run.dir={tmp_path / 'run'}"]
    overrides = [*TINY_RUN[:-1], "tracker=wandb", *sizes, "schedule.warmup=0"]
    done = python(tmp_path, "-m", "tokenyard", "train", *overrides, TOKENYARD_CACHE=str(tmp_path))
    assert done.returncode == 70, done.stderr
    alerts, codes, _ = told(tmp_path / "run")
    assert codes == [70] and (TITLES["not_finite"], "ERROR") in [(title, level) for title, _, level in alerts]
