"""Writes the results of docs/runs.md and their picture from finished runs: python -m tokenyard.bench.runs_page RUN RUN RUN

The runs differ in their seeds alone. Needs matplotlib.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plan.accuracy_picture import write_charts
from ..train.logging.journal import read_journal
from .quality.runs import deviation
from .timing import markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE = Path(__file__).resolve().parents[1] / "docs" / "runs.md"
PICTURE = PAGE.with_name("runs.svg")
BEGIN, END = "<!-- written by python -m tokenyard.bench.runs_page -->\n", "<!-- end -->\n"
COLOURS = ("#0064a6", "#c04a00", "#00745a", "#a03f84", "#7a5c00", "#4b4b9a")
"""Of the report's palette."""
SMOOTHED = 50
"""Logged steps over which the training loss is averaged in the picture."""
PROBES = {"next_word": "next word", "copying": "copying", "addition": "addition", "brackets": "brackets"}


@dataclass
class FinishedRun:
    """What a run has written."""

    folder: Path
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    end: dict[str, Any]
    """The event of its end, with the numbers of the last evaluation."""

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        return [record for record in self.metrics if "validation_loss" in record]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--minutes", nargs="+", type=float, default=[], help="processor time of each run, if it was measured")
    parsed = parser.parse_args(arguments)
    if parsed.minutes and len(parsed.minutes) != len(parsed.runs):
        parser.error(f"--minutes: has {len(parsed.minutes)} numbers for {len(parsed.runs)} runs; must have one for each")
    return parsed


def main(arguments: Sequence[str] | None = None, page: Path = PAGE, picture: Path = PICTURE) -> None:
    parsed = parse(arguments)
    runs = [read(folder) for folder in parsed.runs]
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + "\n".join(section(runs, parsed.minutes, picture.name)) + "\n" + END + rest.partition(END)[2])
    draw(runs, picture)


def read(folder: Path) -> FinishedRun:
    """Raises ValueError for a run that has not finished."""
    metrics, events = (
        read_journal(folder / name) if (folder / name).is_file() else [] for name in ("metrics.jsonl", "events.jsonl")
    )
    ends = [event for event in events if event["event"] in ("start", "resume", "finished")]
    if not ends or ends[-1]["event"] != "finished":
        raise ValueError(f"{folder}: must be the folder of a finished run; tokenyard train --from {folder} goes on")
    return FinishedRun(folder, metrics, events, ends[-1])


def section(runs: Sequence[FinishedRun], minutes: Sequence[float], picture: str) -> Iterator[str]:
    """Yields the lines between the markers."""
    yield from ["", markdown(["", *(run.folder.name for run in runs), "mean"], table(runs, minutes)), ""]
    yield from [f"![Loss and probes of {len(runs)} runs]({picture})", "", *samples(runs[0]), *tracked(runs[0])]


def table(runs: Sequence[FinishedRun], minutes: Sequence[float]) -> Iterator[list[str]]:
    """Yields a row for each number: its value in each run, mean and deviation."""
    yield row("validation loss, nats a token", [run.end["validation_loss"] for run in runs], ".3f")
    yield row("bits per byte", [run.end["validation/bits_per_byte"] for run in runs], ".3f")
    for key, name in PROBES.items():
        if f"probes/{key}" in runs[0].end:
            chance = runs[0].end[f"probes/{key}_chance"]
            yield row(f"probe {name}, right; chance is {chance:.0%}", [run.end[f"probes/{key}"] for run in runs], ".0%")
    worst = [statistics.median(record["moe/load_max_over_mean"] for record in last_fifth(run)) for run in runs]
    mean = [statistics.median(record["moe/load_max_over_mean_mean"] for record in last_fifth(run)) for run in runs]
    yield row("busiest expert over an even share in a step, worst layer", worst, ".2f")
    yield row("the same, mean of the layers", mean, ".2f")
    yield row("experts without a token in the last 100 steps", [run.metrics[-1]["moe/dead_fraction"] for run in runs], ".1%")
    if minutes:
        yield row("processor time, minutes", minutes, ".0f")


def last_fifth(run: FinishedRun) -> list[dict[str, Any]]:
    """Returns the records of the last fifth of the steps, in which the learning rate falls."""
    return [record for record in run.metrics if record["step"] > 0.8 * run.end["step"]]


def row(name: str, values: Sequence[float], form: str) -> list[str]:
    spread = f" +- {deviation(values):{form}}" if len(values) > 1 else ""
    return [name, *(f"{value:{form}}" for value in values), f"{statistics.fmean(values):{form}}{spread}"]


def samples(run: FinishedRun) -> Iterator[str]:
    """Yields what the model wrote after the last step, or before it."""
    written = [event for event in run.events if event["event"] == "sample"]
    last = {event["prompt"]: event for event in written if event["step"] == written[-1]["step"]}
    if last:
        yield from [f"{run.folder.name} wrote after step {written[-1]['step']:,}:", ""]
    for event in last.values():  # the sample at the end of a run repeats one of them
        text = (event["prompt"] + event["text"]).encode("ascii", "backslashreplace").decode().replace("```", "'''")
        yield from ["```text", *(line.rstrip() for line in text.strip("\n").splitlines()), "```", ""]


def tracked(run: FinishedRun) -> Iterator[str]:
    """Yields the files that W&B left, those of a folder as one."""
    sizes, run_id = dict[str, list[int]](), (run.folder / "run_id").read_text().strip()
    for path in sorted(path for path in run.folder.glob("wandb/offline-run-*/**/*") if path.is_file()):
        inside = Path(*path.relative_to(run.folder / "wandb").parts[1:])
        alone = inside.parent == Path()
        name = inside.name.replace(run_id, "ID") if alone else f"{inside.parent.as_posix()}/"
        sizes.setdefault(name, []).append(path.stat().st_size)
    if sizes:
        rows = [[name.replace("|", "/"), str(len(each)), f"{sum(each) / 1e3:,.0f} kB"] for name, each in sizes.items()]
        yield from [f"In W&B's folder of {run.folder.name}:", "", markdown(["file or folder", "files", "size"], rows), ""]


def draw(runs: Sequence[FinishedRun], path: Path) -> None:
    """Writes an SVG: losses on the left, probes on the right. Raises ImportError without matplotlib."""
    write_charts(path, 5.2, partial(_losses, runs=runs), partial(_probes, runs=runs))


def _losses(axes: "Axes", runs: Sequence[FinishedRun]) -> None:
    """The training loss is thin, the mean of SMOOTHED logged steps; validation has dots."""
    for run, colour in zip(runs, COLOURS, strict=False):
        groups = [run.metrics[at : at + SMOOTHED] for at in range(0, len(run.metrics), SMOOTHED)]
        means = [(group[-1]["tokens"] / 1e6, statistics.fmean(record["loss"] for record in group)) for group in groups]
        axes.plot(*zip(*means, strict=True), color=colour, linewidth=0.8, alpha=0.7)
        seen = [(record["tokens"] / 1e6, record["validation_loss"]) for record in run.evaluations]
        axes.plot(*zip(*seen, strict=True), "o-", color=colour, markersize=4, linewidth=1.5, label=run.folder.name)
    losses = [record["validation_loss"] for run in runs for record in run.evaluations]
    axes.set_ylim(min(losses) - 0.2, max(losses) + 0.3)
    axes.set(xlabel="million tokens", ylabel="nats a token", title="Validation loss (dots), training loss (thin)")
    axes.grid(alpha=0.25)
    axes.legend()


def _probes(axes: "Axes", runs: Sequence[FinishedRun]) -> None:
    """The mean of the runs, with a band from the lowest to the highest, and chance as a dotted line."""
    for (key, name), colour in zip(PROBES.items(), COLOURS, strict=False):
        columns = list(zip(*([record for record in run.evaluations if f"probes/{key}" in record] for run in runs), strict=False))
        if not columns:
            continue
        at = [column[0]["tokens"] / 1e6 for column in columns]
        values = [[record[f"probes/{key}"] for record in column] for column in columns]
        axes.plot(at, [statistics.fmean(each) for each in values], "o-", color=colour, markersize=4, label=name)
        axes.fill_between(at, [min(each) for each in values], [max(each) for each in values], color=colour, alpha=0.12, linewidth=0)
        axes.axhline(columns[0][0][f"probes/{key}_chance"], color=colour, linestyle=":", linewidth=1)
    axes.set(
        xlabel="million tokens", ylabel="share of right answers", title="Probes: mean of the seeds, chance dotted", ylim=(0, 1)
    )
    axes.grid(alpha=0.25)
    axes.legend()


if __name__ == "__main__":
    main()
