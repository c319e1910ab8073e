"""`tokenyard report`: what the page says of a run, what it refuses, and that nothing in a file can act in it."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_run import made_run, write
from tokenyard.launch.main import main
from tokenyard.report.headline import verdict
from tokenyard.report.page import digest, page
from tokenyard.report.payload import payload
from tokenyard.report.run_reader import Run
from tokenyard.train.config.config import Config
from tokenyard.train.config.model_summary import training_flops_per_token
from tokenyard.train.config.serialize import config_from_plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("runs") / "first", steps=200)


def data_of(text: str) -> dict[str, Any]:
    """What the page holds, read as a browser would find it."""
    found = Scripts(text)
    return json.loads(found.contents[0])


class Scripts(HTMLParser):
    """The tags of a page in order, and the contents of its scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.contents: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.contents.append(data)


def test_it_writes_one_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--out", str(tmp_path)]) == 0
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    data = data_of((tmp_path / "report.html").read_text())
    run = data["runs"][0]
    assert (run["name"], run["state"], run["steps"]) == ("first", "finished", 200)
    assert run["telemetry"]["layers"] == list(range(8))
    assert run["accounting"]["seconds"]["compute"] == 402.0
    assert {event["kind"] for event in run["events"]} >= {"start", "checkpoint", "failed", "resume", "alert: spike", "finished"}


def test_the_page_stands_in_the_run_folder_by_default(folder: Path) -> None:
    assert main(["report", str(folder)]) == 0
    assert (folder / "report" / "report.html").is_file()


def test_the_verdict_names_layer_and_expert(folder: Path) -> None:
    run = Run(folder)
    findings = verdict(run)
    window = np.sum([sums.counts_LE for sums in run.telemetry.recent], axis=0)
    load = window[3].max() / window[3].mean()
    assert findings[0].text.startswith(f"Layer 3 is the least balanced: expert 5 gets {load:.2f} x an even share")
    # Expert 2 of layer 1 is dead in the second half, but the recent records begin before that.
    assert [finding.level for finding in findings[1:3]] == ["good", "fact"]
    assert "validation loss 2.4321 at step 200" in findings[3].text


def test_dead_experts_are_named(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=1000, detailed=False)
    texts = [finding.text for finding in verdict(Run(folder))]
    assert "Dead: 1 of 128 experts got no token in steps 810 to 1,000; the first is expert 2 of layer 1." in texts


def test_what_the_run_calls_dead_is_dead(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=20, telemetry={"window": 77})
    dead = [[0] * 16 for _ in range(8)]
    dead[6][9] = 1
    write(folder / "telemetry.jsonl", [json.loads(broken(dead_LE=dead)) | {"step": 21, "stability_L": [0.5] * 7 + [None]}])
    texts = [finding.text for finding in verdict(Run(folder))]
    assert "Dead: 1 of 128 experts got no token for 77 steps, at step 21; the first is expert 9 of layer 6." in texts
    assert main(["report", str(folder)]) == 0


def test_single_layers_are_lines_only_without_telemetry(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=20)
    write(folder / "metrics.jsonl", [{"step": 21, "moe/dropped/layer_3": 5}])
    assert "moe/dropped/layer_3" not in payload([Run(folder)])["runs"][0]["series"]
    (folder / "telemetry.jsonl").unlink()
    assert "moe/dropped/layer_3" in payload([Run(folder)])["runs"][0]["series"]


def test_without_telemetry_the_metrics_speak(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=50)
    (folder / "telemetry.jsonl").unlink()
    run = Run(folder)
    assert verdict(run)[0].text.startswith("Layer 3 is the least balanced at step 50: its busiest expert gets")
    assert payload([run])["runs"][0]["telemetry"] is None


@pytest.mark.parametrize(("alone", "level", "moves"), [(1.2, "good", False), (2.0, "watch", True), (4.0, "bad", True)])
def test_an_overload_that_alternates_is_not_called_even(tmp_path: Path, alone: float, level: str, moves: bool) -> None:
    """The sums of telemetry are even, because each expert has its turn; single steps say how uneven each of them was."""
    folder = made_run(tmp_path / "run", steps=40, telemetry={"every": 10})
    even = {"layers": [0, 1], "counts_LE": [[100] * 4] * 2, "dropped_L": [0, 0]}
    for name in ("metrics", "telemetry"):
        (folder / f"{name}.jsonl").unlink()
    loads = [alone + 0.01 * (step == 33) for step in range(1, 41)] + [9.0]
    named = [
        {"step": step, "moe/load_max_over_mean": load, "moe/load_max_over_mean_layer": 0} for step, load in enumerate(loads, 1)
    ]
    write(folder / "metrics.jsonl", named)
    write(folder / "telemetry.jsonl", [{"step": step, **even} for step in (10, 20, 30, 40)])
    first = verdict(Run(folder))[0]
    assert first.level == level and "expert 0 gets 1.00 x an even share" in first.text
    words = f"; in single steps the busiest expert gets {alone:.2f} x (median), at most {alone + 0.01:.2f} x at step 33"
    assert first.text.endswith(f"{words}{': the overload moves between experts or layers' if moves else ''}.")
    (folder / "telemetry.jsonl").unlink()
    assert verdict(Run(folder))[0].level == "bad"  # of the last step, 9


def test_memory_is_judged(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=20)
    memory = {"system/memory_peak_gb": 61.25, "system/memory_peak_gb_mean": 58.0, "system/memory_peak_gb_rank": 3}
    for share, retries, level in ((0.77, 0, "fact"), (0.97, 0, "watch"), (0.77, 2, "watch")):
        write(
            folder / "metrics.jsonl", [{"step": 21, **memory, "system/memory_share": share, "system/allocation_retries": retries}]
        )
        (found,) = [each for each in verdict(Run(folder)) if each.text.startswith("Memory: at most 61.2 GB on rank 3")]
        assert found.level == level and f"{share:.0%} of a device" in found.text and ("2 times" in found.text) == (retries == 2)
    run = payload([Run(folder)])["runs"][0]
    assert (run["facts"]["memory_gb"], run["facts"]["memory_share"]) == (61.25, 0.77)
    assert "system/memory_peak_gb" in run["series"] and not [name for name in run["series"] if name.endswith(("_layer", "_rank"))]


def test_the_horizontal_axis_can_be_tokens_flops_or_hours(folder: Path) -> None:
    run = Run(folder)
    found, records = (
        payload([run])["runs"][0]["axes"],
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
    )
    assert found["tokens"]["x"] == list(range(1, 201))
    assert found["tokens"]["y"] == pytest.approx([4096.0 * step for step in range(1, 201)], rel=1e-4)
    hours = np.cumsum([record["step_seconds"] for record in records]) / 3600
    assert found["hours"]["y"] == pytest.approx(hours.tolist(), rel=1e-4)
    each = training_flops_per_token(config_from_plain({"model": run.config["model"]}).model, Config().sequence_length)
    assert found["flops"]["y"] == pytest.approx((4096.0 * each * np.arange(1, 201)).tolist(), rel=1e-4)


def test_samples_are_shown_and_many_runs_are_thinner(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=2000, every=500)
    write(
        folder / "events.jsonl", [{"event": "sample", "step": step, "prompt": "def ", "text": f"f{step}" * 3000} for step in (5, 9)]
    )
    (run,) = payload([Run(folder)])["runs"]
    assert [(sample["step"], sample["text"][:2], len(sample["text"])) for sample in run["samples"]] == [
        (5, "f5", 4000),
        (9, "f9", 4000),
    ]
    assert [event["text"] for event in run["events"] if event["kind"] == "sample"] == ["", ""]
    nine = payload([Run(folder)] * 9)["runs"]
    assert len(run["series"]["loss"]["x"]) > 2.5 * len(nine[0]["series"]["loss"]["x"]) > 500


def test_a_dense_run_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "config.yaml").write_text("steps: 10\n")
    write(folder / "metrics.jsonl", [{"step": step, "loss": 3.0, "dropped_fraction": 0.0} for step in range(1, 4)])
    assert main(["report", str(folder)]) == 0


HOSTILE = "</script><script>document.title='pwned'</script><img src=x onerror=alert(1)><!--"


def test_nothing_from_a_file_becomes_markup(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "<img src=x onerror=alert(1)>", steps=20, run={"name": HOSTILE})
    write(folder / "events.jsonl", [{"event": HOSTILE, "step": 3, "error": HOSTILE}])
    record = json.loads((folder / "telemetry.jsonl").read_text().splitlines()[-1])
    record["vocabulary"] = {"0": [[[HOSTILE, 5]]] * 16}
    record["sources"] = {HOSTILE: record["counts_LE"]}
    write(folder / "telemetry.jsonl", [record])
    text = page(payload([Run(folder)]))
    found = Scripts(text)
    assert [tag for tag, _ in found.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in found.tags]
    assert not found.open
    assert data_of(text)["runs"][0]["telemetry"]["vocabulary"]["0"][0][0] == [HOSTILE, 5]


def test_the_page_may_load_nothing_and_run_only_its_own_script(folder: Path) -> None:
    text = page(payload([Run(folder)]))
    found = Scripts(text)
    policy = next(attrs["content"] for tag, attrs in found.tags if tag == "meta" and "http-equiv" in attrs)
    assert policy is not None and policy.startswith("default-src 'none'; ")
    assert "connect-src 'none'" in policy and "unsafe" not in policy
    assert digest(found.contents[1]) in policy
    assert not [attrs for tag, attrs in found.tags if "src" in attrs or attrs.get("href") not in (None, "data:,")]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?://(?!www\.w3\.org/2000/svg)", text)


def test_nothing_of_the_environment_comes_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "sesame")
    folder = made_run(tmp_path / "run", steps=20, run={"name": "${oc.env:A_SECRET}"})
    assert "sesame" not in page(payload([Run(folder)]))


def test_differences_from_the_defaults_are_marked(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=20, optimizer={"lr": 0.25, "beta1": 0.9}, unheard_of=1)
    rows = {row["key"]: row for row in payload([Run(folder)])["runs"][0]["settings"]}
    assert rows["optimizer.lr"] == {"key": "optimizer.lr", "value": "0.25", "default": "0.005", "changed": True}
    assert not rows["optimizer.beta1"]["changed"]
    assert rows["unheard_of"]["changed"] and rows["unheard_of"]["default"] is None


def test_parameters_are_those_of_the_model(tmp_path: Path) -> None:
    from tokenyard.moe.config import ModelConfig
    from tokenyard.moe.param_count import count

    folder = made_run(tmp_path / "run", steps=20)
    model = ModelConfig(layers=8)
    model.moe.experts = 16
    found = payload([Run(folder)])["runs"][0]["parameters"]
    assert (found["total"], found["active"]) == (count(model).total, count(model).active)
    assert sum(total for part, (total, _) in found["parts"].items() if part != "mtp") == found["total"]


def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", str(folder)]) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    return error


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "runs" / "real", steps=5)
    error = refused(tmp_path / "runs" / "rael", capsys)
    assert error == f"tokenyard: {tmp_path}/runs/rael: no such folder; nearest valid: {tmp_path}/runs/real\n"


def test_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "real", steps=5)
    (tmp_path / "other").mkdir()
    error = refused(tmp_path / "other", capsys)
    assert error == f"tokenyard: {tmp_path}/other: not a run folder, has no config.yaml; nearest valid: {tmp_path}/real\n"
    assert main(["report", str(tmp_path)]) == 0, "a folder of runs, as that of a sweep"


def broken(**wrong: Any) -> str:
    """A record of telemetry that would be right without `wrong`."""
    right = {"step": 3, "layers": list(range(8)), "counts_LE": [[1] * 16] * 8, "dropped_L": [0] * 8}
    return json.dumps(right | wrong)


WRONG = [
    ("metrics.jsonl", '{"step": 3,', "not a JSON object; remove this line"),
    ("metrics.jsonl", "[]", "not a JSON object; remove this line"),
    ("metrics.jsonl", '{"loss": NaN}', "not a JSON object; remove this line"),
    ("metrics.jsonl", '{"loss": 3.0}', "has no step"),
    ("events.jsonl", "what?", "not a JSON object; remove this line"),
    ("telemetry.jsonl", '{"step": 3}', "has no layers"),
    (
        "telemetry.jsonl",
        '{"step": 3, "layers": [0], "counts_LE": [[1, 2]], "dropped_L": [0]}',
        "counts_LE must be 8 x 16, as before",
    ),
    ("telemetry.jsonl", '{"step": 3, "layers": [0], "counts_LE": [[1, 2], [3]], "dropped_L": [0]}', ""),
    ("telemetry.jsonl", broken(bias_LE=[[1]]), "bias_LE must be 8 x 16"),
    ("telemetry.jsonl", broken(sources={"a": [[1]]}), "a must be 8 x 16"),
    ("telemetry.jsonl", broken(coactivation={"0": [[1, 2]]}), "coactivation must be 16 x 16"),
    ("telemetry.jsonl", broken(vocabulary={"0": [["word"]]}), ""),
    ("telemetry.jsonl", broken(classes=[1]), ""),
    ("telemetry.jsonl", broken(top1_L=[0.5]), "must have 8 numbers, one for each layer"),
]


@pytest.mark.parametrize(("name", "line", "rule"), WRONG)
def test_a_wrong_line_is_named(name: str, line: str, rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made_run(tmp_path / "run", steps=40) / name
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], line, *lines[3:], ""]))
    assert refused(path.parent, capsys).startswith(f"tokenyard: {path}, line 4: {rule}")


def test_a_torn_end_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_run(tmp_path / "run", steps=20)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    assert main(["report", str(folder)]) == 0
    assert f"{folder}/metrics.jsonl, line 21: not whole, left out" in capsys.readouterr().err


def test_a_wrong_configuration_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = made_run(tmp_path / "run", steps=5)
    (folder / "config.yaml").write_text("a: [1,\nb: }")
    assert f"{folder}/config.yaml" in refused(folder, capsys)


def test_no_torch(folder: Path, tmp_path: Path) -> None:
    code = f"import sys; from tokenyard.launch.main import main; main({['report', str(folder), '--out', str(tmp_path)]!r})"
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
