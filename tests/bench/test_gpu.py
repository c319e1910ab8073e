"""`make gpu`: parts that fail, crash or hang do not stop the next ones, what was known is reported, and nothing is installed."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tokenyard.bench.gpu import __main__ as program
from tokenyard.bench.gpu.report import Report
from tokenyard.bench.gpu.runner import PARTS, TOTAL_SECONDS, Part, Runner
from tokenyard.bench.gpu.start import fits, unpack

ROOT = Path(__file__).resolve().parents[2]
BROKEN = """
import json, os, sys, time
for line in sys.stdin:
    part = json.loads(line)["part"]
    print(json.dumps({"kind": "check", "name": f"begin of {part}", "ok": True, "text": str(os.getpid())}), flush=True)
    if part == "products":
        os.abort()
    if part == "presets":
        print("asleep", file=sys.stderr, flush=True)
        time.sleep(60)
    if part == "routers":
        print(json.dumps({"kind": "check", "name": "raised", "ok": False, "text": "E"}), flush=True)
        print(json.dumps({"kind": "end", "stays": False}), flush=True)
        time.sleep(1)  # its end takes a while
        sys.exit(1)
    print(json.dumps({"kind": "end", "stays": True}), flush=True)
"""
"""A worker of which one part crashes, one hangs and one raises."""


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **rest: popen([sys.executable, str(path)], **rest))


def part(name: str, seconds: float = 30.0) -> Part:
    return next(one for one in PARTS if one.name == name)._replace(seconds=seconds)


def test_a_crash_and_a_hang_do_not_stop_the_next(broken: None) -> None:
    runner = Runner("cpu", "tiny", time.monotonic() + 60.0)
    found = {}
    for name, seconds in [("machine", 30.0), ("products", 30.0), ("presets", 12.0), ("routers", 30.0), ("waits", 30.0)]:
        found[name] = list(runner.run(part(name, seconds)))
    runner.close()
    assert all(records[0]["name"] == f"begin of {name}" and records[-1]["kind"] == "took" for name, records in found.items())
    texts = {name: [one["text"] for one in records if one["kind"] == "check" and not one["ok"]] for name, records in found.items()}
    assert texts == {
        "machine": [],
        "products": ["it ended its process (signal SIGABRT)"],
        "presets": ["it took longer than 12 s"],
        "routers": ["E"],
        "waits": [],
    }
    assert [one["text"] for one in found["presets"] if one["kind"] == "log"] == ["asleep"]
    processes = [records[0]["text"] for records in found.values()]
    assert processes[0] == processes[1] and len(set(processes)) == 4
    with pytest.raises(ProcessLookupError):
        os.kill(int(processes[2]), 0)


def test_a_part_that_has_no_time_is_skipped() -> None:
    records = list(Runner("cpu", "tiny", time.monotonic() + 2.0).run(part("products")))
    assert [one["kind"] for one in records] == ["skip", "took"] and records[0]["text"] == "no time was left"


def test_what_was_known_is_reported(broken: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of a part that crashed."""
    words = f"--device cpu --scale tiny --part products waits --out {tmp_path / 'out'}".split()
    assert program.main(words) == 1
    page, plain = (tmp_path / "out" / "report.md").read_text(), json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(plain["parts"]) == ["machine", "products", "waits"] and plain["device"] == "cpu" and plain["scale"] == "tiny"
    assert "- products: **products came to its end**: it ended its process (signal SIGABRT)" in page
    assert "| products | " in page and "begin of waits" in page
    shown = capsys.readouterr().out
    assert shown.startswith("make gpu: date ") and "FAILED products came to its end" in shown and "[waits] " in shown


def test_the_report_has_tables_and_says_what_failed(tmp_path: Path) -> None:
    report = Report(tmp_path, {"device": "cpu"})
    report.add("steps", {"kind": "row", "table": "steps", "cells": {"step": "a|b", "ms": 1.23456}})
    report.add("steps", {"kind": "row", "table": "steps", "cells": {"step": "c", "MFU": "1%"}})
    report.add("steps", {"kind": "skip", "name": "d", "text": "no time"})
    for number in range(40):
        report.add("steps", {"kind": "check", "name": f"n{number}", "ok": number != 7, "value": number, "limit": 9.0, "text": "t"})
    report.add("steps", {"kind": "took", "seconds": 2.0})
    report.write()
    page = (tmp_path / "report.md").read_text()
    assert "| step | ms | MFU |\n| --- | --- | --- |\n| a/b | 1.235 |  |\n| c |  | 1% |" in page
    assert "| steps | 2 | 39 | 1 | 1 |" in page and "- steps: **n7**: t" in page and "skipped: d: no time" in page
    assert page.index("| n7 | **NO** |") < page.index("| n39 | yes |") and "| n3 |" not in page
    assert len(json.loads((tmp_path / "report.json").read_text())["parts"]["steps"]) == 44


def test_a_killed_report_leaves_no_half_file(tmp_path: Path) -> None:
    Report(tmp_path / "new", {}).write()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.json", "report.md"]


def test_a_file_that_would_be_too_large_has_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenyard.bench.gpu import report as module

    monkeypatch.setattr(module, "MOST_BYTES", 5000)
    report = Report(tmp_path, {})
    for number in range(100):
        report.add("steps", {"kind": "check", "name": f"n{number}", "ok": number != 7, "text": "t"})
    report.write()
    assert [one["name"] for one in json.loads((tmp_path / "report.json").read_text())["parts"]["steps"]] == ["n7"]
    assert all(path.stat().st_size <= 5000 for path in tmp_path.iterdir())


def test_parts_leave_room_in_eight_minutes() -> None:
    assert TOTAL_SECONDS < 480 - 10 and len({one.name for one in PARTS}) == len(PARTS)


def test_wheels_are_taken_where_they_are_missing(tmp_path: Path) -> None:
    here = f"cp{sys.version_info.major}{sys.version_info.minor}"
    machine = os.uname().machine
    wheels = {
        "missing-1.0-py3-none-any.whl": {"missing/__init__.py": "A = 1"},
        "torch-9.0-py3-none-any.whl": {"torch/__init__.py": ""},
        f"built-1.0-{here}-{here}-manylinux2014_{machine}.whl": {"built.py": ""},
        f"other-1.0-{here}-{here}-manylinux2014_riscv64.whl": {"other.py": ""},
        f"older-1.0-cp39-cp39-manylinux2014_{machine}.whl": {"older.py": ""},
    }
    for name, files in wheels.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file, content in {**files, f"{name.split('-')[0]}-1.0.dist-info/METADATA": ""}.items():
                archive.writestr(file, content)
    (tmp_path / "there").mkdir()
    assert unpack(tmp_path, tmp_path / "there") == ["built-1.0", "missing-1.0"]
    assert (tmp_path / "there" / "missing" / "__init__.py").read_text() == "A = 1"
    assert unpack(tmp_path / "nowhere", tmp_path / "there") == []
    assert fits("a-1-py2.py3-none-any.whl") and not fits("a-1-py2-none-any.whl")


def test_it_runs_from_a_folder_of_another_name(tmp_path: Path) -> None:
    """Without installation, with no package on the path: a part on a real worker, and the exit code."""
    link = tmp_path / "some-folder"
    link.symlink_to(ROOT)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = ["--device", "cpu", "--scale", "tiny", "--part", "machine", "--out", str(tmp_path / "out")]
    program = [sys.executable, "-P", str(link / "bench" / "gpu" / "start.py"), *words]
    ended = subprocess.run(program, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    plain: dict[str, Any] = json.loads((tmp_path / "out" / "report.json").read_text())
    facts = {one["name"]: one["value"] for one in plain["parts"]["machine"] if one["kind"] == "fact"}
    assert "torch" in facts and "\n  torch: " in ended.stdout
    assert any(one["kind"] == "skip" and one["name"] == "CUDA" for one in plain["parts"]["machine"])
