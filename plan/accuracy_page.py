"""Writes docs/plan.md's section "Predicted against published" and its picture: python -m tokenyard.plan.accuracy_page

Needs matplotlib for the picture, and a minute, because it fits again without each family of models.
"""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from .accuracy import Compared, Figures, compare, figures
from .accuracy_picture import draw
from .coefficients import Coefficients, coefficients
from .fit import PRIORS, fit
from .measurements import ROWS, Measured, measured, why_left_out

PAGE = Path(__file__).resolve().parents[1] / "docs" / "plan.md"
PICTURE = PAGE.with_name("plan.svg")
BEGIN, END = "<!-- written by python -m tokenyard.plan.accuracy_page -->\n", "<!-- end -->\n"

MISS = 0.3
"""Errors above this are named."""
H800 = "Megatron-Core as its vendor tuned it, run by others: as fast as the vendor's own row on H100"
EFA = "512 tokens a rank, or 2,048, so that all is latency, of which EFA has more"
GUESSES = {
    "deepseek_v3, 256 B200, pp 16, ep 8": "recomputation that the rows do not name, since weights fill the memory",
    "deepseek_v3, 256 B200, pp 8, vpp 2, ep 32": "the exchange between hosts hides behind other micro-batches",
    "gpt_oss_120b, 64 B200, ep 8, micro 4": "an early recipe: 1.7 times as fast three months later",
    "gpt_oss_120b, 64 B300, ep 64, micro 4": "rows go to 8 hosts; a later recipe keeps them in one",
    "mixtral_8x7b, 64 H100 SXM, pp 4, vpp 8, ep 8": "few large experts, whose products are more efficient",
    "moonlight_16b_a3b, 16 H100 SXM, ep 8, micro 2": "real text, whose load is more even than assumed",
    "qwen3_235b_a22b, 64 B300, tp 8, pp 2, ep 32, micro 4": "overlapped micro-batches hide more over EFA than assumed",
    "qwen3_235b_a22b, 64 GB300, ep 64": "a recipe with partial CUDA graphs, which the row does not name",
    "qwen3_235b_a22b, 256 H100 SXM, tp 2, ep 8, micro 4": "the only row of Megatron-FSDP: more of its gathers hides",
    "qwen3_235b_a22b, 256 H800, pp 32, vpp 3, ep 8": H800,
    "qwen3_235b_a22b, 256 H800, tp 2, pp 32, vpp 3, ep 8": H800,
    "qwen3_235b_a22b, 256 H800, tp 2, pp 32, vpp 3, ep 8, micro 4": H800,
    "qwen3_30b_a3b, 8 B200, ep 8": "nearly all is the host's time, and releases of one layout differ by a factor of two",
    "qwen3_30b_a3b, 8 GB200, ep 8, micro 4": "real text: half as fast as with forced balance, where a quarter less is assumed",
    "qwen3_30b_a3b, 16 H100 SXM, pp 2, vpp 12, ep 8": "the release of 2026-03 is 1.8 times as fast as the one a month before",
    "qwen3_30b_a3b, 16 H100 SXM, pp 2, vpp 24, ep 8, micro 2": "twice as fast two months earlier, with capacities",
    "qwen3_30b_a3b, 64 H100 SXM, tp 8, pp 4, ep 16": EFA,
    "qwen3_30b_a3b, 64 H100 SXM, tp 8, pp 4, ep 16, micro 4": EFA,
    "qwen3_next_80b_a3b, 128 H100 SXM, pp 4, vpp 3, ep 32": "its source calls it not well tuned; gated DeltaNet",
}
"""Why a row of the configuration may be missed."""


def main() -> None:
    compared = compare(measured())
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(before + BEGIN + "\n".join(section(compared, left_out_families())) + "\n" + END + rest.partition(END)[2])
    draw(compared, PICTURE)


def left_out_families() -> dict[str, Figures]:
    """Returns figures of the vendor-tuned rows of each family of models, by coefficients fitted without any row of the family."""
    rows = measured()
    tuned = {name: [row for row in rows if row.family == name and row.vendor] for name in sorted({row.family for row in rows})}
    return {name: figures(compare(of, _fit_without(rows, name))) for name, of in tuned.items() if len(of) >= 2}


def _fit_without(rows: Sequence[Measured], family: str) -> Coefficients:
    found, committed = fit([row for row in rows if row.open and row.family != family]), coefficients()
    return dataclasses.replace(committed, **{name: getattr(found, name) for name in PRIORS})


def section(compared: Sequence[Compared], families: dict[str, Figures]) -> Iterator[str]:
    """Yields the lines between the markers."""
    yield from ["", *summary(compared), "", *by_family(families), ""]
    yield from ["![Predicted against published tokens a second of a GPU](plan.svg)", "", *left_out(), "", *misses(compared), ""]
    yield from [*by_configuration(compared), "", *fitted(), ""]


def summary(compared: Sequence[Compared]) -> Iterator[str]:
    yield "| rows | rows, configurations | median error | nine of ten below | in the range | pairs in the right order |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for half, tuned in itertools.product((False, True), (True, False)):
        of = [one for one in compared if one.row.open is half and one.row.vendor is tuned]
        name = f"{'seen by the fit' if half else '**held out**'}, {'tuned by a vendor' if tuned else 'of others'}"
        yield _row(name, figures(of))


def by_family(families: dict[str, Figures]) -> Iterator[str]:
    yield "Fitted without any row of a family of models, the rows of that family that a vendor tuned:"
    yield ""
    yield "| family left out | rows, configurations | median error | nine of ten below | in the range | pairs in the right order |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, found in families.items():
        yield _row(f"`{name}`", found)


def _row(name: str, found: Figures) -> str:
    pairs = f"{found.ordered:.1%} of {found.pairs}" if found.pairs else "-"
    numbers = f"{found.rows}, {found.configurations} | {found.median:.1%} | {found.ninth:.1%} | {found.covered:.1%}"
    return f"| {name} | {numbers} | {pairs} |"


def left_out() -> Iterator[str]:
    rows = json.loads(ROWS.read_text())
    yield f"Of {len(rows)} rows of [plan/published.json](../plan/published.json) these are left out:"
    yield ""
    for reason, number in Counter(why_left_out(row) for row in rows).most_common():
        if reason is not None:
            yield f"- {number}: {reason}"


def misses(compared: Sequence[Compared]) -> Iterator[str]:
    yield f"Missed by more than {MISS:.0%}, with a guess why:"
    yield ""
    yield "| configuration | rows | error | perhaps |"
    yield "| --- | --- | --- | --- |"
    for name, of in _configurations([one for one in compared if abs(one.error) > MISS]):
        yield f"| {name} | {len(of)} | {_span([one.error for one in of], '+.0%')} | {GUESSES[name]} |"


def by_configuration(compared: Sequence[Compared]) -> Iterator[str]:
    yield "All configurations, with degrees other than 1 and lengths other than 4096; tokens a second of a GPU:"
    yield ""
    yield "| configuration | half | rows | published | predicted | error |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, of in _configurations(compared):
        published = _span([1e6 / one.row.microseconds_a_token for one in of], ",.0f")
        predicted = _span([one.predicted.tokens_per_second_per_gpu for one in of], ",.0f")
        half = "open" if of[0].row.open else "held out"
        yield f"| {name} | {half} | {len(of)} | {published} | {predicted} | {_span([one.error for one in of], '+.0%')} |"


def fitted() -> Iterator[str]:
    committed = dataclasses.asdict(coefficients())
    yield "The coefficients, with what was assumed before the fit ([plan/fit.py](../plan/fit.py)):"
    yield ""
    yield "| coefficient | fitted | assumed |"
    yield "| --- | --- | --- |"
    for name, prior in PRIORS.items():
        yield f"| `{name}` | {committed[name]:.4g} | {prior.likely:.4g} |"


def _configurations(compared: Sequence[Compared]) -> list[tuple[str, list[Compared]]]:
    names = sorted({one.row.label for one in compared})
    return [(name, [one for one in compared if one.row.label == name]) for name in names]


def _span(numbers: Sequence[float], form: str) -> str:
    """Returns the least and the most, or the one number that both are."""
    ends = list(dict.fromkeys(format(number, form) for number in (min(numbers), max(numbers))))
    return " to ".join(ends)


if __name__ == "__main__":
    main()
