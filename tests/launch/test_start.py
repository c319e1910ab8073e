"""Ranks and sweeps start real processes, which record how they were started instead of training."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenyard.launch.launchers.torchrun import check_hosts
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import ConfigError

NOTE = """
import json, os, signal, sys, types

BORN = sorted(number.name for number in signal.pthread_sigmask(signal.SIG_BLOCK, []))

def run(config):
    rank = os.environ.get("RANK", "0")
    note = {"rank": rank, "world": os.environ.get("WORLD_SIZE"), "threads": os.environ.get("OMP_NUM_THREADS"),
            "folder": config.run.dir, "seed": config.seed, "layers": config.model.layers,
            "held_back": BORN, "of_launcher": os.environ.get("TOKENYARD_LAUNCHER") == str(os.getppid())}
    with open(os.path.join(os.environ["NOTES"], f"{os.getpid()}.json"), "w") as file:
        json.dump(note, file)
    return int(os.environ["CODE"]) if os.environ.get("FAILS") in (rank, f"seed={config.seed}") else 0

module = types.ModuleType("tokenyard.train.run")
module.run = run
sys.modules["tokenyard.train.run"] = module
"""


HELD_BACK = ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"]


class Job:
    """`tokenyard WORDS` in a folder of its own, with `run` replaced by NOTE."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.notes = folder / "notes"
        self.site = folder / "site"
        for made in (self.folder, self.notes, self.site):
            made.mkdir()
        (self.site / "sitecustomize.py").write_text(NOTE)

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH")]))
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment = {**inherited, "PYTHONPATH": path, "NOTES": str(self.notes), **environment}
        command = [sys.executable, "-m", *words]
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=240, check=False)

    def said(self, by: str = "rank") -> list[dict[str, Any]]:
        notes = [json.loads(path.read_text()) for path in self.notes.iterdir()]
        return sorted(notes, key=lambda note: note[by])


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_inline_is_this_process(job: Job) -> None:
    done = job.run("tokenyard", "train", "seed=5")
    assert (done.returncode, done.stderr) == (0, "")
    [note] = job.said()
    assert (note["rank"], note["world"], note["threads"], note["folder"], note["seed"], note["layers"]) == ("0", *[None] * 3, 5, 4)
    assert note["held_back"] == ["SIGUSR1"] and not note["of_launcher"]
    assert list(job.folder.iterdir()) == []


def test_torchrun_starts_ranks_that_share_a_folder(job: Job) -> None:
    done = job.run("tokenyard", "train", "launch=torchrun", "launch.ranks=2", "parallel.expert=2", "seed=5", "model=tiny")
    assert done.returncode == 0, done.stderr
    first, second = job.said()
    assert (first["rank"], second["rank"], first["world"], second["world"]) == ("0", "1", "2", "2")
    assert first["folder"] == second["folder"]
    assert first["folder"].startswith("runs/")
    assert (first["seed"], first["layers"]) == (5, 2)
    assert first["threads"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert first["held_back"] == second["held_back"] == HELD_BACK
    assert first["of_launcher"] and second["of_launcher"]


def test_a_rank_of_any_launcher_holds_signals_back_before_it_starts_anew(job: Job) -> None:
    done = job.run("tokenyard.train", "seed=5")
    assert done.returncode == 0, done.stderr
    assert job.said()[0]["held_back"] == HELD_BACK


def test_torchrun_keeps_settings_and_hands_on_the_exit_code(job: Job) -> None:
    words = ["tokenyard", "train", "launch=torchrun", "launch.ranks=2", "run.dir=my folder"]
    done = job.run(*words, OMP_NUM_THREADS="7", FAILS="1", CODE="9")
    assert done.returncode == 9
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "tokenyard: rank 1 was the first to fail, exit code 9"
    assert {(note["folder"], note["threads"]) for note in job.said()} == {("my folder", "7")}


def test_a_sweep_goes_on_after_a_failing_point(job: Job) -> None:
    words = ["tokenyard", "train", "-m", "seed=1,2", "model=tiny,default", "run.dir=my sweep"]
    done = job.run(*words, FAILS="seed=1", CODE="3")
    assert done.returncode == 1, done.stderr
    first, second, third, fourth, *table, failed, compare = done.stdout.splitlines()
    assert [first, second, third, fourth] == [
        "seed=1 model=tiny: my sweep/seed-1+model-tiny, exit code 3",
        "seed=1 model=default: my sweep/seed-1+model-default, exit code 3",
        "seed=2 model=tiny: my sweep/seed-2+model-tiny, exit code 0",
        "seed=2 model=default: my sweep/seed-2+model-default, exit code 0",
    ]
    assert table[0].split() == ["seed", "model", "loss", "validation", "tokens/s", "imbalance", "state"] and len(table) == 5
    assert failed == "2 of 4 points failed; to run them again: the same command with run.dir=my sweep --retry"
    assert compare == "to compare the others: tokenyard report my sweep"
    assert [(note["seed"], note["layers"], note["folder"]) for note in job.said("folder")] == [
        (1, 4, "my sweep/seed-1+model-default"),
        (1, 2, "my sweep/seed-1+model-tiny"),
        (2, 4, "my sweep/seed-2+model-default"),
        (2, 2, "my sweep/seed-2+model-tiny"),
    ]
    again = job.run(*words)
    assert again.stdout.splitlines() == [*table, failed, compare], "nothing ran"
    retried = job.run(*words, "--retry")
    assert retried.returncode == 0, retried.stderr
    assert retried.stdout.splitlines()[:2] == [first[:-1] + "0", second[:-1] + "0"] and "failed" not in retried.stdout
    assert len(job.said("folder")) == 6


def test_a_sweep_makes_its_own_folder(job: Job) -> None:
    done = job.run("tokenyard", "train", "--multirun", "seed=range(1,3)")
    assert done.returncode == 0, done.stderr
    folders = [Path(note["folder"]) for note in job.said("folder")]
    assert [folder.name for folder in folders] == ["seed-1", "seed-2"]
    assert folders[0].parent == folders[1].parent
    assert folders[0].parent.parent == Path("runs")


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        (["seeed=1,2"], "seeed=1,2: there is no such setting"),
        (["seed=1,x"], "seed=1,x: must be an integer"),
        (["model=tiny,tinny"], "model=tinny: must be one of"),
        (["model=glob(tinny*)"], "model=glob(tinny*): matches none of"),
        (["seed=glob(1*)"], "seed=glob(1*): a glob chooses options of a group"),
        (["run.dir=a,b"], "run.dir=a,b: is the folder of the whole sweep"),
        (["optimizer.lr=interval(0,1)"], "configuration: BasicSweeper does not support"),
        (["seed=1,2", "optimizer._target_=x"], "optimizer._target_=x: no configuration may hold"),
    ],
)
def test_a_wrong_sweep_runs_no_point(words: list[str], begins: str, job: Job) -> None:
    done = job.run("tokenyard", "train", "-m", *words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"tokenyard: {begins}")
    assert done.stderr.count("\n") == 1
    assert job.said() == []


def test_ranks_do_not_sweep(job: Job) -> None:
    done = job.run("tokenyard.train", "-m", "seed=1,2")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nearest valid: tokenyard train -m" in done.stderr


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "NODE_RANK"])
def test_several_hosts_need_to_find_each_other(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["launch=torchrun", "launch.nodes=2", "run.dir=shared"])
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.setenv(name, "1")
    check_hosts(config)
    monkeypatch.delenv(missing)
    with pytest.raises(ConfigError, match=f"launch.nodes=2: needs {missing} in the environment"):
        check_hosts(config)


def test_several_hosts_need_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ConfigError, match=r"run\.dir=null: must be a folder that all launch\.nodes=2 hosts see"):
        check_hosts(compose(["launch=torchrun", "launch.nodes=2"]))
