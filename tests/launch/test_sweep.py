"""A sweep: the names of its points, what runs again, the table, and what its sweeper minimises."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenyard.launch import sweep
from tokenyard.launch.main import main
from tokenyard.report.run_reader import run_folders

WORDS = ["train", "-m", "model=glob(tiny_mi*)", "model.moe.top_k=1,2", "steps=4"]


@pytest.mark.parametrize(
    ("differs", "name"),
    [
        (["seed=1", "model.moe.top_k=2"], "seed-1+top_k-2"),
        (["model.hidden=8", "model.moe.hidden=16"], "model.hidden-8+moe.hidden-16"),
        (["optimizer.lr=1e-3", "model=tiny"], "lr-1e-3+model-tiny"),
    ],
)
def test_a_point_is_named_by_what_differs(differs: list[str], name: str) -> None:
    assert sweep.point_name(differs) == name


def test_names_of_values_that_no_folder_can_have_differ() -> None:
    names = [sweep.point_name([f"batch.schedule=[{first}, 8]", "data.files=a/b c"]) for first in (100, "100,")]
    assert len(set(names)) == 2 and all("/" not in name and " " not in name for name in names)
    assert len(sweep.point_name([f"data.files={'x' * 1000}"])) < 200


def test_points_that_finished_do_not_run_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """The third point is killed, the data of the fourth do not answer; both go on. Only --retry runs one that failed."""
    folder, ended = tmp_path / "sweep", {"0": ("finished", 0), "1": ("stopped", 70), "2": (None, -9), "3": ("stopped", 75)}
    ran: list[str] = []

    class Done:
        def __init__(self, returncode: int) -> None:
            self.returncode = returncode

    def run(command: list[str], **settings: Any) -> Done:
        assert settings["env"]["WANDB_RUN_GROUP"] == "sweep"
        run_folder = Path(command[-1].removeprefix("run.dir=").strip("'"))
        kind, code = ended.get(str(len(ran)), ("finished", 0))
        ran.append(run_folder.name)
        if kind is None:
            raise KeyboardInterrupt
        write_run(run_folder, 6.0 - len(ran), kind)
        return Done(code)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    words = [*WORDS, f"run.dir={folder}"]
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert main(words) == 1
    names = [f"model-tiny_{model}+top_k-{top_k}" for model in ("minimax_m2", "mixtral") for top_k in (1, 2)]
    assert ran == [*names[:3], *names[2:]], "the first and the second did not run again"
    told = capsys.readouterr().out.splitlines()
    assert [line.split() for line in told[-7:-2]] == [
        ["model", "top_k", "loss", "validation", "tokens/s", "imbalance", "state"],
        ["tiny_mixtral", "2", "1.0000", "1.5000", "100", "1.50", "finished"],
        ["tiny_mixtral", "1", "2.0000", "2.5000", "100", "1.50", "stopped,", "exit", "code", "75"],
        ["tiny_minimax_m2", "2", "4.0000", "4.5000", "100", "1.50", "stopped,", "exit", "code", "70"],
        ["tiny_minimax_m2", "1", "5.0000", "5.5000", "100", "1.50", "finished"],
    ]
    assert told[-2].startswith("1 of 4 points failed") and told[-1] == f"to compare the others: tokenyard report {folder}"
    assert main(words) == 1 and ran[5:] == [names[2]], "a run that waits for its data goes on"
    assert main([*words, "--retry"]) == 0 and ran[6:] == [names[1]]
    assert [each.name for each in run_folders(folder)] == sorted(names)


def test_other_settings_for_all_points_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sweep.subprocess, "run", lambda *_, **__: pytest.fail("a point ran"))
    (tmp_path / "sweep.json").write_text(json.dumps(["steps=4"]))
    assert main([*WORDS[:-1], "steps=5", f"run.dir={tmp_path}"]) == 2
    rule = "holds a sweep with other settings for all its points (steps=4, steps=5); nearest valid: run.dir=runs/"
    assert capsys.readouterr().err.startswith(f"tokenyard: run.dir={tmp_path}: {rule}")


@pytest.mark.parametrize(
    ("plugin", "words"),
    [
        ("hydra_optuna_sweeper", ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "optimizer.lr=interval(1e-4,1e-2)"]),
        ("hydra_submitit_launcher", ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5", "seed=1,2"]),
    ],
)
def test_plugins_of_hydra_run_points(plugin: str, words: list[str], tmp_path: Path) -> None:
    pytest.importorskip(f"hydra_plugins.{plugin}")
    tiny = ["model=tiny", "steps=2", "sequence_length=16", "batch.sequences=2", "data=synthetic", "tokenizer=bytes", "tracker=none"]
    command = [sys.executable, "-m", "tokenyard", "train", "-m", *words, *tiny, f"run.dir={tmp_path / 'sweep'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    table = done.stdout.splitlines()[-4:]
    assert table[0].split()[1:] == list(sweep.COLUMNS) and all(line.endswith("finished") for line in table[1:3])


def test_a_sweeper_gets_the_loss_of_the_validation(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 2.0, "finished")
    assert sweep.loss_of(sweep.Point(tmp_path / "run", [], 0).run) == 2.5
    assert sweep.loss_of(None) is None


def write_run(folder: Path, loss: float, ends: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    record = {"step": 4, "tokens": 8, "loss": loss, "tokens_per_second": 100.0, "moe/load_max_over_mean": 1.5}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "events.jsonl").write_text(json.dumps({"event": ends, "step": 4, "validation_loss": loss + 0.5}) + "\n")
