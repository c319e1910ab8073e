"""The benchmarks of a layer: where its time goes, and what it keeps."""

import math

import pytest
import torch
from tokenyard.bench.layer import PARTS, TINY, against_experts, against_skew, parts, skews, table
from tokenyard.bench.memory import measure
from tokenyard.bench.timing import ratio

CPU = torch.device("cpu")


def test_parts_add_up_to_the_whole() -> None:
    found = parts(TINY, torch.float32, CPU, rounds=1)
    for times in (found.forward, found.backward):
        assert math.isclose(sum(times[part] for part in (*PARTS, "rest")), times["all"], rel_tol=1e-9)
    busy = {part for part in PARTS if found.forward[part] > 0}
    assert busy == {"route", "sort", "gather", "products", "activation", "combine"} and found.backward["weights"] > 0
    products, whole = (found.forward[part] + found.backward[part] for part in ("products", "all"))
    assert math.isclose(found.not_products, 1 - products / whole, rel_tol=1e-9)


def test_loads_are_as_skewed_as_they_say() -> None:
    loads = {name: chosen.flatten().bincount(minlength=TINY.experts) for name, chosen in skews(TINY).items()}
    assert loads["balanced"].unique().tolist() == [TINY.tokens * TINY.top_k // TINY.experts]
    assert loads["zipf"][0] > loads["zipf"][-1] > 0
    assert loads["one"].tolist() == [TINY.tokens, TINY.tokens, 0, 0]
    assert all(len(set(row)) == TINY.top_k for chosen in skews(TINY).values() for row in chosen.tolist())


def test_tables_have_every_side() -> None:
    experts = against_experts(TINY, [4, 8], torch.float32, CPU, rounds=2)
    skew = against_skew(TINY, torch.float32, CPU, rounds=2)
    assert experts[4].median == skew["balanced"].median == 1 and {4, 8} == set(experts)
    text = table({"parts": [parts(TINY, torch.float32, CPU, 1)], "experts": experts, "skew": skew})
    assert all(f"| {name} |" in text for name in ("forward", "backward", "8", "zipf", "one"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_moe_layer_keeps_less_than_a_dense_one(dtype: torch.dtype) -> None:
    """The dense layer keeps exactly x, gate and up, silu(gate) and their product: D + 4 F numbers a token."""
    line = measure(TINY._replace(width=64, hidden=96, tokens=509), dtype)
    assert line.dense == (64 + 4 * 192) * dtype.itemsize
    assert line.ratio < 1.1


def test_ratios_are_of_the_same_round() -> None:
    found = ratio([2.0, 4.0, 9.0], [1.0, 1.0, 3.0])
    assert found.median == 3 and found.low < 3 < found.high
