"""Steps of single ranks, as on CUDA: what the host waits for, and where tensors are. plan/ has the device, and why this works."""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from dry import PLANTS, Case, Found, largest_kept, planted, step_of, step_of_experiment, watched
from tokenyard.train.config.compose import compose

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("tiny*.yaml"))
FOLDED = "parallel.expert=8 parallel.shard=8 parallel.tensor=2"
EXCHANGES = ("plain", "deduplicated", "hierarchical parallel.node_ranks=4", "gather", "symmetric")
DROPS = ("tiny_expert_choice", "tiny_gshard", "tiny_longcat_flash", "tiny_moe_plus_plus", "tiny_null", "tiny_switch")
"""With the plain exchange these wait for what they drop, and the others do not."""
ALL = os.environ.get("TOKENYARD_LANE") == "all"
"""`make lane`: every preset meets every exchange, and not one of them; every experiment of hundreds of GPUs."""
MEETINGS = [
    (model, exchange)
    for index, model in enumerate(PRESETS)
    for turn, exchange in enumerate(EXCHANGES)
    if ALL or index % len(EXCHANGES) == turn or (exchange == "plain" and model in DROPS)
]
CLUSTERS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*_gpus.yaml") if path.stem != "eight_gpus")
LAYOUTS = [
    (8, ""),
    (8, "parallel.shard=8 parallel.zero=1"),
    (8, "parallel.shard=8 parallel.zero=2"),
    (16, "parallel.shard=4 parallel.expert=2"),
    (64, "parallel.expert=4 parallel.expert_tensor=2 parallel.shard=16 parallel.recompute=block"),
    (8, "parallel.expert=8 parallel.overlap_chunks=2 parallel.recompute=selective"),
    (8, "parallel.expert=2 parallel.shard=8 sequence_length=4096 parallel.recompute=offload"),
    (8, "parallel.expert=4 parallel.exchange=symmetric model.moe.capacity.factor=1.25"),
    (8, "parallel.expert=4 parallel.exchange=symmetric parallel.exchange_overflow=repair parallel.recompute=block"),
    (16, "parallel.expert=4 parallel.expert_tensor=2 parallel.exchange=symmetric parallel.recompute=selective"),
    (8, "parallel.expert=8 model.moe.capacity.factor=1.25 model.moe.capacity.scope=batch"),
    (8, "parallel.expert=8 model.moe.capacity.factor=1.25 model.moe.capacity.pad=true"),
    (8, "parallel.tensor=2 data.mask_documents=true"),
    (8, "parallel.context=2 parallel.shard=4 parallel.tensor=2 parallel.expert=4 model.moe.capacity.factor=1"),
    (8, "parallel.context=4 parallel.context_exchange=heads data.mask_documents=true"),
]


class Row(NamedTuple):
    """A row of the table."""

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
        if found.conditions[row.condition]:
            waits[row.place] += row.a_step + row.a_pass * found.passes
    return waits


@pytest.mark.parametrize("model", PRESETS)
def test_a_preset_on_one_device(model: str, apart: Callable[..., Any]) -> None:
    found = apart(step_of, Case(model))
    check(found)
    assert found.conditions["capacity, null experts, expert choice; one device or plain"] == (model in DROPS)


@pytest.mark.parametrize(("world", "words"), LAYOUTS)
def test_a_layout(world: int, words: str, apart: Callable[..., Any]) -> None:
    check(apart(step_of, Case("tiny_qwen3_moe", world, world // 2, tuple(words.split()))))


@pytest.mark.parametrize(("model", "exchange"), MEETINGS)
def test_a_preset_on_64_ranks(model: str, exchange: str, apart: Callable[..., Any]) -> None:
    """Recomputation differs with the exchange."""
    recompute = {"plain": "none", "gather": "selective"}.get(exchange, "block")
    words = f"{FOLDED} parallel.recompute={recompute} parallel.exchange={exchange}"
    check(apart(step_of, Case(model, 64, 63, words_of(model, words))))


@pytest.mark.parametrize("experiment", CLUSTERS if ALL else ["olmoe_1b_7b_64_gpus"])
def test_an_experiment_of_hundreds_of_gpus(experiment: str, apart: Callable[..., Any]) -> None:
    """The first rank, and one of the last stage. Stages exchange activations and gradients of each micro-batch."""
    first, last = (apart(step_of_experiment, experiment, place) for place in (0.0, 0.999))
    check(first)
    check(last)
    messages = 2 if compose([f"experiment={experiment}"]).parallel.pipeline > 1 else 0
    assert len(first.sent) == len(first.received) == len(last.sent) == len(last.received) == messages


def words_of(model: str, words: str) -> tuple[str, ...]:
    """With experts enough for the layout."""
    return (*words.split(), *(["model.moe.experts=8"] if model == "tiny" else []))


def check(found: Found) -> None:
    """The host waits where the table says, and nowhere else; its tensors enter no collective and no operator of the device."""
    assert found.waits == expected(found)
    assert not found.unlisted
    assert not found.strangers


@pytest.mark.parametrize("logged", [False, True])
def test_a_step_that_is_watched(logged: bool, apart: Callable[..., Any]) -> None:
    check(apart(watched, Case("tiny_qwen3_moe", 8, 3, ("parallel.expert=8",)), logged))


@pytest.mark.parametrize("model", ["tiny_qwen3_moe", "tiny_deepseek_v2", "tiny_gpt_oss"])
def test_attention_keeps_no_scores(model: str, apart: Callable[..., Any]) -> None:
    """The largest tensor grows with the length, not with its square."""
    assert apart(largest_kept, model, 1024) == 2 * apart(largest_kept, model, 512)


@pytest.mark.parametrize("model", ["tiny_qwen3_moe", "tiny_deepseek_v2", "tiny_gpt_oss"])
def test_attention_of_context_ranks_keeps_no_scores(model: str, apart: Callable[..., Any]) -> None:
    """Of its chunks of a sequence neither: there is no mask of (S / 2 N, S)."""
    assert apart(largest_kept, model, 1024, 2) == 2 * apart(largest_kept, model, 512, 2)


@pytest.mark.parametrize(("line", "found"), PLANTS.items())
def test_what_no_step_may_have_is_found(line: str, found: str, apart: Callable[..., Any]) -> None:
    assert apart(planted, line) == found
