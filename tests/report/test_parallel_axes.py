"""The parallel coordinates of a sweep: which runs are drawn, where their lines pass the axes, and what is said of them."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from browser import CHROMIUM, Browser
from made_run import made_run, write
from test_page import contrast
from test_report import data_of
from tokenyard.launch.main import main

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt install chromium")


class Point(NamedTuple):
    lr: str
    model: str
    loss: float
    speed: float
    end: dict[str, Any]
    code: int = 0


FINISHED, FAILED, NOT_FINITE, STOPPED, KILLED = (
    {"event": "finished"},
    {"event": "failed", "error": "RuntimeError: lost"},
    {"event": "stopped", "code": 70},
    {"event": "stopped", "code": 0},
    {"event": "resume"},
)
POINTS = [
    Point("0.001", "tiny", 3.5, 4000, FINISHED),
    Point("0.01", "tiny", 2.0, 5000, FINISHED),
    Point("0.1", "default", 4.0, 1000, STOPPED),
    Point("0.01", "default", 2.5, 2000, FINISHED),
    Point("0.02", "tiny", 9.0, 5000, FAILED, 1),
    Point("0.03", "tiny", 9.0, 5000, NOT_FINITE, 70),
    Point("0.04", "tiny", 9.0, 5000, KILLED, -9),
]
DRAWN = sorted((point for point in POINTS if point.code == 0), key=lambda point: point.loss)


def sweep(folder: Path, points: list[Point], more: tuple[str, ...] = ()) -> Path:
    """Writes the runs of a sweep, and a point that ended before its run began."""
    for number, point in enumerate(points):
        run = made_run(
            folder / f"point{number}", layers=2, experts=4, steps=20, every=10, detailed=False, optimizer={"lr": point.lr}
        )
        numbers = {"validation_loss": point.loss, "tokens_per_second": point.speed, "moe/load_max_over_mean": 1.0 + number}
        records = [json.loads(line) | numbers for line in (run / "metrics.jsonl").read_text().splitlines()]
        (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        write(run / "events.jsonl", [{"step": 20, "validation_loss": point.loss, **point.end}])
        differs = [f"optimizer.lr={point.lr}", f"model={point.model}", *(f"{key}={number}" for key in more)]
        (run / "point.json").write_text(json.dumps({"differs": differs, "code": point.code}))
    (folder / "nothing").mkdir()
    (folder / "nothing" / "point.json").write_text(json.dumps({"differs": ["optimizer.lr=-1"], "code": 2}))
    assert main(["report", str(folder)]) == 0
    return folder / "report" / "report.html"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(tmp_path_factory.mktemp("sweep"), POINTS)


def test_the_data_says_what_was_varied_and_what_failed(report: Path) -> None:
    data = data_of(report.read_text())
    assert data["without_run"] == 1
    assert [run["failed"] for run in data["runs"]] == [False] * 4 + [True] * 3
    assert [run["swept"] for run in data["runs"]] == [{"optimizer.lr": point.lr, "model": point.model} for point in POINTS]


def test_a_run_alone_is_no_point(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", layers=2, experts=4, steps=20)
    assert main(["report", str(run)]) == 0
    (found,) = data_of((run / "report" / "report.html").read_text())["runs"]
    assert (found["swept"], found["failed"]) == (None, False)


@pytest.mark.parametrize("text", ["{", "[]", '{"code": 0}', '{"differs": [1], "code": 0}', '{"differs": 3, "code": 0}'])
def test_what_no_sweep_wrote_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = made_run(tmp_path / "run", layers=2, experts=4, steps=20)
    (run / "point.json").write_text(text)
    assert main(["report", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"tokenyard: {run / 'point.json'}: not as `tokenyard train -m` writes it (") and said.count("\n") == 1


@pytest.fixture(scope="module")
def browser() -> Any:
    with Browser() as running:
        yield running


@pytest.fixture
def page(browser: Browser, report: Path) -> Any:
    browser.open(report.as_uri())
    yield browser
    assert browser.complaints() == [] and browser.requests() == [report.as_uri()]


def ask(page: Browser, code: str) -> Any:
    return json.loads(page.run(f"JSON.stringify({code})"))


def vertices(page: Browser) -> list[list[list[float]]]:
    """The points of each line, those of the lowest loss first; the page draws them last."""
    numbers = "line => line.getAttribute('d').slice(1).split('L').map(point => point.split(' ').map(Number))"
    return ask(page, f"[...document.querySelectorAll('#parallel g.series path')].map({numbers})")[::-1]


READOUT = "document.getElementById('parallel-readout').textContent"


@needs_chromium
def test_lines_pass_the_axes_where_their_values_are(page: Browser) -> None:
    """Learning rates span decades, so their axis is logarithmic; losses are linear, models beside each other by name."""
    lines, names = vertices(page), "[...document.querySelectorAll('#parallel .name')].map(each => each.firstChild.textContent)"
    assert ask(page, names) == ["lr, log", "model", "validation loss", "tokens/s", "imbalance"]
    assert len(lines) == len(DRAWN)
    rates, kinds, losses, speeds, _ = ([each[axis][1] for each in lines] for axis in range(5))
    bottom, top = max(losses), min(losses)
    for point, rate, kind, loss, speed in zip(DRAWN, rates, kinds, losses, speeds, strict=True):
        assert (bottom - rate) / (bottom - top) == pytest.approx(math.log10(float(point.lr) / 0.001) / 2, abs=1e-3)
        assert (bottom - kind) / (bottom - top) == pytest.approx({"default": 0.25, "tiny": 0.75}[point.model], abs=1e-3)
        assert (bottom - loss) / (bottom - top) == pytest.approx((point.loss - 2) / 2, abs=1e-3)
        assert (bottom - speed) / (bottom - top) == pytest.approx((point.speed - 1000) / 4000, abs=1e-3)


@needs_chromium
def test_keys_read_the_runs_in_the_order_of_their_losses(page: Browser) -> None:
    page.run("document.getElementById('parallel-picture').focus()")
    page.press("Home")
    for number, point in enumerate(DRAWN):
        index = POINTS.index(point)
        values = (
            f"lr {point.lr}, model {point.model}, validation loss {point.loss:g}, tokens/s {point.speed:g}, imbalance {1 + index} x"
        )
        assert page.run(READOUT) == f"point{index}: {values}"
        chosen = "[...document.querySelectorAll('#parallel .chosen')].map(line => line.dataset.run)"
        assert ask(page, chosen) == [str(index)], number
        page.press("ArrowRight")
    page.press("ArrowLeft")
    assert page.run(READOUT).startswith(f"point{POINTS.index(DRAWN[-2])}: ")
    page.run("document.activeElement.blur()")
    assert ask(page, "[...document.querySelectorAll('#parallel .chosen, #parallel .choosing')].length") == 0


@needs_chromium
@pytest.mark.parametrize("width", [420, 1400])
def test_the_pointer_names_the_line_below_it(page: Browser, width: int) -> None:
    """Axes stand beside each other at 1400 pixels, and lie below each other at 420, where nothing is wider than the page."""
    page.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=True)
    page.until(f"document.getElementById('parallel-picture').viewBox.baseVal.width === {min(width - 24, 1160)}")
    assert page.run("document.documentElement.scrollWidth") == width
    lines = vertices(page)
    assert (lines[0][0][0] == lines[2][0][0]) == (width == 1400)  # where the two cross the first axis
    for point, line in zip(DRAWN, lines, strict=True):
        x, y = ((line[1][i] + 9 * line[2][i]) / 10 for i in range(2))  # near the axis of the loss, where lines are apart
        corner = "(box => [box.left, box.top])(document.getElementById('parallel-picture').getBoundingClientRect())"
        left, above = ask(page, corner)
        place = f"{{clientX: {left + x}, clientY: {above + y}, bubbles: true}}"
        page.run(f"document.getElementById('parallel-picture').dispatchEvent(new PointerEvent('pointermove', {place}))")
        assert page.run(READOUT).startswith(f"point{POINTS.index(point)}: ")
    page.call("Emulation.clearDeviceMetricsOverride")


@needs_chromium
def test_what_is_not_drawn_is_counted_and_what_goes_on_is_dashed(page: Browser) -> None:
    note = page.run("document.querySelector('#parallel .note').textContent")
    assert "not drawn: 4 that failed or have no validation loss; dashed: not finished" in note
    dashed = "[...document.querySelectorAll('#parallel path[stroke-dasharray]')].map(line => line.parentNode.dataset.run)"
    assert ask(page, dashed) == ["2"]
    page.run("document.getElementById('loss-legend-run:1').click()")
    assert ask(page, "[...document.querySelectorAll('#parallel g.series')].map(line => line.dataset.run)") == ["2", "0", "3"]


@needs_chromium
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_stand_out_from_the_page(page: Browser, report: Path, theme: str) -> None:
    """WCAG 2.1, 1.4.11: 3 to 1."""
    page.call("Emulation.setEmulatedMedia", media="", features=[{"name": "prefers-color-scheme", "value": theme}])
    page.open(report.as_uri())
    paper = page.run("getComputedStyle(document.documentElement).getPropertyValue('--paper')")
    strokes = ask(page, "[...document.querySelectorAll('#parallel g.series path')].map(line => line.getAttribute('stroke'))")
    page.call("Emulation.setEmulatedMedia", media="", features=[])
    assert len({*strokes}) == len(DRAWN)
    for stroke in strokes:
        colour = "#" + "".join(f"{int(part):02x}" for part in stroke[4:-1].split(","))
        assert contrast(colour, paper) >= 3


@needs_chromium
def test_many_settings_lie_below_each_other_and_the_rest_is_counted(browser: Browser, tmp_path: Path) -> None:
    address = sweep(tmp_path / "sweep", POINTS[:3], tuple(f"model.setting{i}" for i in range(20))).as_uri()
    browser.open(address)
    assert ask(browser, "document.querySelectorAll('#parallel .axis').length") == 16 + 3
    assert "; 6 more settings differ, in the table above" in browser.run("document.querySelector('#parallel .note').textContent")
    assert len({line[0][1] for line in vertices(browser)}) == 1


@needs_chromium
def test_two_runs_or_equal_settings_have_no_axes(browser: Browser, tmp_path: Path) -> None:
    for name, points in {"two": POINTS[:2], "equal": [POINTS[0]] * 3}.items():
        browser.open(sweep(tmp_path / name, points).as_uri())
        assert browser.run("document.getElementById('comparison') !== null && document.getElementById('parallel') === null")
