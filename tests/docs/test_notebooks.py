"""The notebooks run from top to bottom: no cell fails, what their prose states is asserted in cells, and figures are drawn.

`TOKENYARD_FIGURES=FOLDER` keeps the figures, as SVG files by notebook and number.
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "docs" / "notebooks").glob("*.ipynb"))
FIGURES = {"moe_layer": 3, "specialise": 4, "upcycling": 2}
NEEDED = {"upcycling": "transformers"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    pytest.importorskip(NEEDED.get(path.stem, "json"))
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown: list[Path] = []
    folder = Path(os.environ.get("TOKENYARD_FIGURES", tmp_path)).resolve()

    def show() -> None:
        for number in pyplot.get_fignums():
            assert any(axes.has_data() or axes.patches for axes in pyplot.figure(number).axes)
            shown.append(folder / f"{path.stem}-{len(shown) + 1}.svg")
            pyplot.figure(number).savefig(shown[-1], metadata={"Date": None})
        pyplot.close("all")

    pyplot.close("all")
    monkeypatch.setattr(pyplot, "show", show)
    monkeypatch.chdir(tmp_path)
    pyplot.rcParams["svg.hashsalt"] = path.stem  # the same picture has the same bytes
    names: dict[str, Any] = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="transformers")
        warnings.filterwarnings("ignore", "__array", DeprecationWarning)  # of tensors, in matplotlib
        for code in cells(path, "code"):
            exec(compile(code, f"{path.name}, {code.splitlines()[0]}", "exec"), names)
    assert len(shown) == FIGURES[path.stem] and all(file.stat().st_size > 2000 for file in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_plain(path: Path) -> None:
    """Without outputs, which would differ at every run, and with prose before each figure and assertions behind."""
    notebook = json.loads(path.read_text())
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook["cells"])
    assert notebook["nbformat"] == 4 and notebook["cells"][0]["source"][0].startswith("# ")
    assert sum("assert" in code for code in cells(path, "code")) >= 3
    assert set(FIGURES) == {each.stem for each in NOTEBOOKS}


def cells(path: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]
