"""The results of docs/runs.md: each number is that of the journals, and only what is between the markers changes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenyard.bench.runs_page import BEGIN, END, PAGE, main, parse

STEPS = 20


def finished_run(folder: Path, number: int, ended: bool = True) -> Path:
    """Writes what a run of 20 steps leaves behind, with numbers of its own."""
    folder.mkdir(parents=True)
    probes = {"probes/copying": 0.5 + 0.1 * number, "probes/copying_chance": 0.25}
    metrics: list[dict[str, Any]] = [
        {
            "step": step,
            "tokens": 64 * step,
            "loss": 8 - 0.1 * step + number,
            "moe/load_max_over_mean": 9.0 if step <= 16 else 1.5 + number,
            "moe/load_max_over_mean_mean": 9.0 if step <= 16 else 1.25 + number,
            "moe/dead_fraction": 0.125 * number,
        }
        for step in range(1, STEPS + 1)
    ]
    end = {"validation_loss": 5.25 + number, "validation/bits_per_byte": 2.125 + number, **probes}
    metrics[9] |= end | {"validation_loss": 7.5}
    metrics[19] |= end
    events: list[dict[str, Any]] = [{"event": "start", "step": 0}]
    events += [
        {"event": "sample", "step": step, "prompt": "def ", "text": f"f{number}():\n    ```\u00e9{step}  \n"}
        for step in (10, STEPS, STEPS)
    ]
    events += [{"event": "finished", "step": STEPS, **end}] if ended else [{"event": "resume", "step": 10}]
    for name, records in (("metrics", metrics), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "run_id").write_text("abc123\n")
    (folder / "wandb" / "offline-run-1-abc123" / "files").mkdir(parents=True)
    (folder / "wandb" / "offline-run-1-abc123" / "run-abc123.wandb").write_bytes(b"x" * 2_500_000)
    for name in "ab":
        (folder / "wandb" / "offline-run-1-abc123" / "files" / name).write_bytes(b"x" * 20_000)
    return folder


@pytest.fixture
def page(tmp_path: Path) -> Path:
    (tmp_path / "runs.md").write_text(f"before\n{BEGIN}TODO\n{END}after\n")
    return tmp_path / "runs.md"


def test_the_numbers_are_those_of_the_runs(page: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [finished_run(tmp_path / f"seed{number}", number) for number in (1, 2)]
    main([*map(str, runs), "--minutes", "50", "60"], page, tmp_path / "runs.svg")
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}") and text.endswith(f"{END}after\n") and "TODO" not in text
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in text.splitlines() if line.startswith("| ")
    }
    assert rows["validation loss, nats a token"] == ["6.250", "7.250", "6.750 +- 0.707"]
    assert rows["bits per byte"] == ["3.125", "4.125", "3.625 +- 0.707"]
    assert rows["probe copying, right; chance is 25%"] == ["60%", "70%", "65% +- 7%"]
    assert rows["busiest expert over an even share in a step, worst layer"] == ["2.50", "3.50", "3.00 +- 0.71"]
    assert rows["the same, mean of the layers"] == ["2.25", "3.25", "2.75 +- 0.71"]
    assert rows["experts without a token in the last 100 steps"] == ["12.5%", "25.0%", "18.8% +- 8.8%"]
    assert rows["processor time, minutes"] == ["50", "60", "55 +- 7"]
    assert not any(name.startswith("probe addition") for name in rows)  # the runs have none
    assert rows["run-ID.wandb"] == ["1", "2,500 kB"] and rows["files/"] == ["2", "40 kB"]
    assert text.count("```text\ndef f1():\n    '''\\xe920\n```\n") == 1 and "\\xe910" not in text
    drawn = (tmp_path / "runs.svg").read_text()
    assert all(f"<!-- {word} -->" in drawn or f">{word}<" in drawn for word in ("seed1", "seed2", "copying"))
    main([*map(str, runs)], page, tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == drawn


def test_a_run_that_goes_on_is_refused(page: Path, tmp_path: Path) -> None:
    run = finished_run(tmp_path / "seed1", 1, ended=False)
    with pytest.raises(
        ValueError, match=re.escape(f"{run}: must be the folder of a finished run; tokenyard train --from {run} goes on")
    ):
        main([str(run)], page, tmp_path / "runs.svg")
    assert "TODO" in page.read_text()


def test_a_time_for_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["one", "two", "--minutes", "3"])
    assert "--minutes: has 1 numbers for 2 runs; must have one for each" in capsys.readouterr().err


def test_the_page_has_the_markers() -> None:
    assert re.fullmatch(f".*{BEGIN}.*{END}.*", PAGE.read_text(), re.S)
