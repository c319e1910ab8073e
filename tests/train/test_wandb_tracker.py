"""What W&B's offline file holds, read back by wandb's own reader, and that nothing else is printed, written or sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenyard.train.config import TrackerConfig
from tokenyard.train.wandb_tracker import account, init_arguments, mode

RUN = """
import math, sys
from pathlib import Path
from tokenyard.train.config import TrackerConfig
from tokenyard.train.trackers import build_trackers
run_dir, first = Path(sys.argv[1]), int(sys.argv[2])
trackers = build_trackers(TrackerConfig(tags=["a", "b"]), run_dir, "abcd1234")
trackers.start({"seed": 1, "model": {"width": 256}})
for step in (first, first + 1, first + 2):
    trackers.log({"step": step, "loss": 0.1 + step if step != 3 else math.nan, "moe/dead_experts": step})
trackers.finish(3, {"validation_loss": 2.5})
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
    """A process that logs three steps from `first` on; returns its offline file. It may print nothing and litter nowhere."""
    run_dir, here = tmp_path / "run", tmp_path / "here"
    run_dir.mkdir(exist_ok=True)
    here.mkdir(exist_ok=True)
    before = set(run_dir.glob("wandb/offline-run-*/run-abcd1234.wandb"))
    import tokenyard

    environment = os.environ | {"PYTHONPATH": str(Path(tokenyard.__file__).parents[1])}
    command = [sys.executable, "-W", "error::DeprecationWarning:tokenyard", "-c", RUN, str(run_dir), str(first)]
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(here.iterdir()) == []
    assert [path.name for path in run_dir.iterdir()] == ["wandb"]
    (new,) = set(run_dir.glob("wandb/offline-run-*/run-abcd1234.wandb")) - before
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
    records = read(run(tmp_path, first=1))
    assert history(records) == [
        {"global_step": 1, "loss": 1.1, "moe/dead_experts": 1},
        {"global_step": 2, "loss": 2.1, "moe/dead_experts": 2},
        {"global_step": 3, "loss": "NaN", "moe/dead_experts": 3},
    ]
    (header,) = [record["run"] for record in records if record["type"] == "run"]
    assert (header["run_id"], header["project"], header["display_name"]) == ("abcd1234", "tokenyard", "run")
    assert header["tags"] == ["a", "b"]
    update = header["config"]["update"]
    assert (update["seed"], update["model"]) == (1, {"width": 256})
    metrics = {
        record["metric"].get("name", "") or record["metric"]["glob_name"]: record["metric"]
        for record in records
        if "metric" in record
    }
    assert metrics["*"]["step_metric"] == "global_step"
    assert [record["exit"]["exit_code"] for record in records if record["type"] == "exit"] == [3]
    updates = [record["summary"]["update"] for record in records if record["type"] == "summary"]
    assert [update["validation_loss"] for update in updates if "validation_loss" in update] == [2.5]


def test_a_resumed_run_has_the_same_id_and_may_repeat_steps(clean: pytest.MonkeyPatch, tmp_path: Path):
    first, second = run(tmp_path, first=1), run(tmp_path, first=2)
    assert first != second
    assert [item["global_step"] for item in history(read(second))] == [2, 3, 4]


def test_settings_beat_the_environment_and_the_environment_beats_defaults(clean: pytest.MonkeyPatch, tmp_path: Path):
    for name in ("ENTITY", "PROJECT", "NAME", "RUN_GROUP", "JOB_TYPE"):
        clean.setenv(f"WANDB_{name}", f"env-{name}")
    clean.setenv("WANDB_TAGS", "x, y")
    usual = init_arguments(TrackerConfig(), tmp_path / "folder", "id", None)
    chosen = {key: usual[key] for key in ("entity", "project", "name", "group", "job_type", "tags")}
    assert chosen == {
        "entity": "env-ENTITY",
        "project": "env-PROJECT",
        "name": "env-NAME",
        "group": "env-RUN_GROUP",
        "job_type": "env-JOB_TYPE",
        "tags": ["x", "y"],
    }
    config = TrackerConfig(project="p", entity="e", group="g", tags=["t"])
    explicit = init_arguments(config, tmp_path / "folder", "id", "n")
    assert [explicit[key] for key in ("entity", "project", "name", "group", "tags")] == ["e", "p", "n", "g", ["t"]]


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
    import tokenyard

    code = "import sys, tokenyard.train.wandb_tracker; assert 'wandb' not in sys.modules and 'torch' not in sys.modules"
    environment = os.environ | {"PYTHONPATH": str(Path(tokenyard.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
