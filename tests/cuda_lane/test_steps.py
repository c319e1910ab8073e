"""Steps of single ranks, as on CUDA: what the host waits for, and where tensors are. plan/ has the device, and why this works."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dry import PLANTS, Case, Found, planted, step_of

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("tiny*.yaml"))
NOT_YET = {
    "tiny_gpt_oss": "moe/expert_function.py: torch.segment_reduce reads the counts to check them",
    "exchange=deduplicated": "parallel/dispatch/hop.py: sizes do not go through host_read",
    "exchange=hierarchical": "parallel/dispatch/hop.py: sizes do not go through host_read",
    "exchange=gather": "parallel/dispatch/gather.py: a list, sizes and nonzero do not go through host_read",
}
"""What still waits elsewhere: the file to mend."""
FOLDED = ("parallel.expert=8", "parallel.shard=8", "parallel.tensor=2", "parallel.recompute=true")
WORDS = [
    (8, ""),
    (8, "parallel.shard=8 parallel.zero=1"),
    (8, "parallel.shard=8 parallel.zero=2"),
    (16, "parallel.shard=4 parallel.expert=2"),
    (64, "parallel.expert=4 parallel.expert_tensor=2 parallel.shard=16"),
    (8, "parallel.expert=8 parallel.overlap_chunks=2"),
    (8, "parallel.expert=8 model.moe.capacity.factor=1.25 model.moe.capacity.scope=batch"),
    (8, "parallel.expert=8 model.moe.capacity.factor=1.25 model.moe.capacity.pad=true"),
    (8, "parallel.tensor=2 data.mask_documents=true"),
    (8, "parallel.expert=8 parallel.exchange=deduplicated"),
    (64, "parallel.expert=8 parallel.shard=64 parallel.exchange=hierarchical parallel.node_ranks=4"),
    (8, "parallel.expert=8 parallel.exchange=gather"),
]


class Row(NamedTuple):
    """Of the table."""

    condition: str
    place: str
    a_step: int
    a_pass: int


def table() -> list[Row]:
    section = (ROOT / "docs" / "performance.md").read_text().partition("## Where the host waits\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (\d+) \| (\d+) \|$", section, re.M)
    return [Row(condition, place, int(a_step), int(a_pass)) for condition, place, a_step, a_pass in rows]


def expected(found: Found) -> Counter[str]:
    """The waits that the table gives this step."""
    waits: Counter[str] = Counter()
    for row in table():
        if row.condition in found.conditions:
            waits[row.place] += row.a_step + row.a_pass * found.passes
    return waits


def marked(name: str, *values: Any) -> Any:
    """A parameter, expected to fail if its name has a part that is in NOT_YET."""
    reasons = [reason for part, reason in NOT_YET.items() if part in name]
    return pytest.param(*values or [name], marks=[pytest.mark.xfail(strict=True, reason=reason) for reason in reasons])


@pytest.mark.parametrize("model", [*map(marked, PRESETS)])
def test_a_preset_on_one_device(model: str, apart: Callable[..., Any]) -> None:
    check(apart(step_of, Case(model)))


@pytest.mark.parametrize("model", [*map(marked, PRESETS)])
def test_a_preset_on_64_ranks(model: str, apart: Callable[..., Any]) -> None:
    more = ("model.moe.experts=8",) if model == "tiny" else ()
    check(apart(step_of, Case(model, 64, 63, (*FOLDED, *more))))


@pytest.mark.parametrize(("world", "words"), [marked(words, world, words) for world, words in WORDS])
def test_a_layout(world: int, words: str, apart: Callable[..., Any]) -> None:
    check(apart(step_of, Case("tiny_qwen3_moe", world, world // 2, tuple(words.split()))))


def check(found: Found) -> None:
    """The host waits where the table says, and nowhere else; its tensors enter no collective and no operator of the device."""
    assert found.waits == expected(found)
    assert not found.unlisted
    assert not found.strangers


@pytest.mark.parametrize(("line", "found"), PLANTS.items())
def test_what_no_step_may_have_is_found(line: str, found: str, apart: Callable[..., Any]) -> None:
    assert apart(planted, line) == found
