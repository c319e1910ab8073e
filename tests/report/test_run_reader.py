"""Journals that grow and are cut back; thinning that keeps extremes; frames in which each token counts once; codes."""

import base64
import json
import math
from pathlib import Path

import numpy as np
import pytest
from made_run import made_run, telemetry, write
from tokenyard.report.columns import Column, Columns, line, smoothed, thinned
from tokenyard.report.journal_reader import JournalReader, Record
from tokenyard.report.payload import by_layer, partners, quantize_amounts, quantize_ratios
from tokenyard.report.run_reader import Run
from tokenyard.report.telemetry_reader import MOST_FRAMES, Telemetry


def steps(tail: JournalReader) -> list[int]:
    return [record.values["step"] for record in tail.read()]


def test_each_record_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = JournalReader(path)
    assert steps(tail) == []
    write(path, [{"step": 1}, {"step": 2}])
    assert steps(tail) == [1, 2]
    assert steps(tail) == []
    with path.open("a") as file:
        file.write('{"step"')
    assert steps(tail) == [] and tail.torn == f"{path}, line 3: not whole, left out"
    with path.open("a") as file:
        file.write(': 3}\n{"step": 4}\n')
    assert steps(tail) == [3, 4] and tail.torn is None


def test_a_line_without_its_end_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}')
    tail = JournalReader(path)
    assert steps(tail) == [1]
    with path.open("a") as file:
        file.write('\n{"step": 2}\nwhat\n{}\n')
    with pytest.raises(ValueError, match="line 3: not a JSON object"):
        steps(tail)


def test_a_journal_that_is_cut_back_is_read_anew(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", steps=30)
    run = Run(folder)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    other = folder / "other"
    other.write_text("".join(lines[:10]))
    other.replace(path)
    assert run.refresh()
    assert run.last_step() == 10
    with path.open("a") as file:
        file.write(json.dumps({"step": 11, "loss": 9.0}) + "\n")
    assert run.refresh() and not run.refresh()
    assert list(run.metrics.by_name["loss"].steps) == list(range(1, 12))


@pytest.mark.parametrize("size", [1, 2, 9, 10, 11, 1000, 100_003])
def test_thinning_keeps_ends_and_extremes(size: int) -> None:
    y = np.random.default_rng(size).standard_normal(size)
    y[size // 3] = 99.0
    y[size // 2] = -99.0 if size > 2 else y[size // 2]
    kept = thinned(y, 10)
    assert len(kept) <= 12 and list(kept) == sorted(set(kept.tolist()))
    assert {0, size - 1, int(y.argmax()), int(y.argmin())} <= set(kept.tolist())


def test_smoothing_is_the_mean_around() -> None:
    y = np.arange(400.0)
    assert smoothed(y)[200] == 200.0
    assert smoothed(y)[0] == y[:5].mean()
    assert smoothed(np.full(300, 2.5)) == pytest.approx(2.5)


def test_what_is_not_finite_is_kept_apart() -> None:
    columns = Columns()
    for step, loss in enumerate([3.0, "NaN", 2.0, "Infinity", None, True, "text"], start=1):
        columns.add(Record("here", {"step": step, "loss": loss}))
    shown = line(columns.by_name["loss"], 100)
    assert shown == {"x": [1, 3], "y": [3.0, 2.0], "bad": [2, 4], "bad_count": 2}
    assert columns.last("loss") == 2.0


def test_frames_count_each_token_once() -> None:
    random, found, total = np.random.default_rng(1), Telemetry(), 0
    for values in telemetry(random, 3, 8, 5000, 5, detailed=False):
        total += np.array(values["counts_LE"])
        found.add(Record("here", values))
    assert np.array_equal(sum(frame.counts_LE for frame in found.frames), total)
    assert sum(frame.records for frame in found.frames) == 1000
    assert MOST_FRAMES / 2 <= len(found.frames) <= MOST_FRAMES
    assert [frame.first for frame in found.frames[1:]] == [frame.last + 5 for frame in found.frames[:-1]]
    assert len({frame.records for frame in found.frames[:-1]}) == 1


def test_layers_over_time_are_means_of_records() -> None:
    records = list(telemetry(np.random.default_rng(1), 2, 8, 4000, 5, detailed=False))
    found = Telemetry()
    for values in records:
        found.add(Record("here", values))
    first = found.frames[0]
    table = by_layer(found.frames)
    expected = np.mean([values["router_entropy_L"] for values in records[: first.records]], axis=0)
    assert [row[0] for row in table["router_entropy_L"]] == pytest.approx(expected, rel=1e-3)
    counts = [np.array(values["counts_LE"]) for values in records[: first.records]]
    expected = np.mean([table_LE.max(1) / table_LE.mean(1) for table_LE in counts], axis=0)
    assert [row[0] for row in table["load_L"]] == pytest.approx(expected, rel=1e-3)


def decoded(coded: dict) -> list[float | None]:
    """As page/numbers.js does it."""
    found = []
    for code in base64.b64decode(coded["codes"]):
        value = coded["low"] + (code - 1) / 253 * (coded["high"] - coded["low"])
        found.append(None if code == 255 else 0.0 if code == 0 else 2**value if coded["log"] else value)
    return found


def test_codes_tell_numbers_within_a_step() -> None:
    values = np.array([0.0, math.nan, 1 / 32, 1.0, 1.7, 64.0])
    none, unknown, *others = decoded(quantize_ratios(values, 64))
    assert (none, unknown) == (0.0, None)
    assert others == pytest.approx(values[2:], rel=0.02)
    values = np.array([-0.3, 0.0, 0.41])
    assert decoded(quantize_amounts(values)) == pytest.approx(values, abs=0.71 / 253)
    assert decoded(quantize_amounts(np.array([0.5, 0.5]))) == pytest.approx([0.5, 0.5])


def test_partners_are_over_an_even_choice() -> None:
    ratio = partners([[9, 3, 1], [3, 9, 0], [0, 0, 5]])
    assert np.nan_to_num(ratio, nan=-1).tolist() == [[-1, 1.5, 0.5], [2.0, -1, 0.0], [-1, -1, -1]]


def test_a_column_without_numbers_is_empty() -> None:
    column = Columns()
    assert column.last("loss") is None and column.typical("loss") is None
    assert isinstance(Column.__annotations__, dict)
