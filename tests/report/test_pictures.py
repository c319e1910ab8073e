"""The PNGs beside the page, where matplotlib is installed; a hint where it is not."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from made_run import made_run
from tokenyard.launch.main import main
from tokenyard.report.payload import payload, quantize_ratios
from tokenyard.report.pictures import decoded, plain, write_pictures
from tokenyard.report.run_reader import Run


def test_pictures_of_two_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'tokenyard[report]'")
    folders = [made_run(tmp_path / "_$first$", steps=200), made_run(tmp_path / "second", steps=150, seed=2)]
    names = write_pictures(payload([Run(folder) for folder in folders]), tmp_path)
    assert names == ["loss.png", "speed.png", "time.png", "load.png", "layers.png"]
    for name in names:
        head = (tmp_path / name).read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:]) == (1200, 600)


def test_without_matplotlib_there_is_the_page_and_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = made_run(tmp_path / "run", steps=20)
    assert main(["report", str(folder)]) == 0
    assert "pip install 'tokenyard[report]'" in capsys.readouterr().err
    assert [path.name for path in (folder / "report").iterdir()] == ["report.html"]


def test_tables_are_read_back() -> None:
    values = np.array([[0.0, 1.0], [2.0, np.nan]])
    assert decoded(quantize_ratios(values, 8)) == pytest.approx(values, rel=0.02, nan_ok=True)


def test_names_are_no_formulas() -> None:
    assert (plain("$x$"), plain("_hidden"), plain("_")) == (r"\$x\$", "hidden", "run")
