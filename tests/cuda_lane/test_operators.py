"""The operators of a MoE layer on CUDA: how many, and in which order those that travel or wait."""

import re

import pytest
from operators import layer_operators
from tokenyard.parallel.config import Exchange
from tokenyard.train.config.compose import compose

RANKS = 8


@pytest.mark.parametrize(
    ("model", "forward", "backward"), [("qwen3_30b_a3b", 34, 24), ("mixtral_8x7b", 33, 24), ("deepseek_v3", 40, 32)]
)
def test_operators_of_a_layer_only_become_fewer(model: str, forward: int, backward: int) -> None:
    passes = layer_operators(compose([f"model={model}"]).model, RANKS)
    assert (len(passes.forward.launching), len(passes.backward.launching)) == (forward, backward)
    assert passes.waits == {"rows of each rank": 1}


def test_a_product_in_fp8_scales_its_operands_in_one_launch_each() -> None:
    """A product is three launches instead of one, and the host waits for nothing more."""
    passes = layer_operators(compose(["model=qwen3_30b_a3b", "model.moe.products=fp8_blockwise"]).model, RANKS)
    assert (len(passes.forward.launching), len(passes.backward.launching)) == (34 + 2 * 2, 24 + 2 * 2)
    for operators in (passes.forward.launching, passes.backward.launching):
        first = operators.index("scale_rows")
        assert operators[first : first + 3] == ["scale_rows", "scale_blocks", "product_of_blocks"]
        assert operators.count("product_of_blocks") == 2 and "grouped_mm" not in operators
    assert passes.waits == {"rows of each rank": 1}


def test_what_travels_departs_before_what_can_wait_is_planned() -> None:
    """The counts before the plan of rows, the rows before the plan of arrivals; between them the host waits, once."""
    events = layer_operators(compose(["model=qwen3_30b_a3b"]).model, RANKS).forward.events
    events = events[events.index("alltoall_base_") :]
    plan, copy, arrivals = ["place_rows"], ["copy_rows"], ["cumsum", "cumsum", "repeat_interleave"]
    rank_flags = {"alltoall_base_", "wait: rows of each rank", *plan, *copy, *arrivals}
    found = [event for event in events if event in rank_flags]
    travels = ["alltoall_base_", *plan, *copy, "wait: rows of each rank", "alltoall_base_", *arrivals]
    assert found[: len(travels)] == travels


LAUNCHES = "alltoall_base_", "_allgather_base_"


def products_beside_exchanges(events: list[str]) -> list[int]:
    """Counts the dense products between the launch of each exchange and its arrival, where there are any."""
    letters = {**dict.fromkeys(LAUNCHES, "L"), "mm": "M", "arrived": "A"}
    found = re.findall("L(M*)A", "".join(letters.get(event, "") for event in events))
    return [len(products) for products in found if products]


@pytest.mark.parametrize("exchange", [Exchange.plain, Exchange.deduplicated, Exchange.gather])
def test_the_shared_expert_is_beside_both_exchanges(exchange: Exchange) -> None:
    """Forward its first product is beside the way there, its second beside the way back; backward there are two of each."""
    passes = layer_operators(compose(["model=deepseek_v3"]).model, RANKS, exchange=exchange)
    assert products_beside_exchanges(passes.forward.events) == [1, 1]
    assert products_beside_exchanges(passes.backward.events) == [2, 2]


@pytest.mark.parametrize("exchange", [Exchange.deduplicated, Exchange.gather])
def test_a_shared_expert_sends_nothing_more_in_a_second_pass(exchange: Exchange) -> None:
    """Where the token's rank only adds up what comes back, it does not come again, though the second product keeps its input."""
    models = [compose(["model=deepseek_v3", *words]).model for words in ([], ["model.moe.shared_hidden=0"])]
    events = [layer_operators(model, RANKS, exchange=exchange, recompute=True).backward.events for model in models]
    shared, alone = ([event for event in each if event in LAUNCHES] for each in events)
    assert shared == alone


@pytest.mark.parametrize("ranks", [1, RANKS])
def test_the_symmetric_exchange_waits_for_nothing_and_puts_rows_four_times(ranks: int) -> None:
    """There and back, forward and backward; also where choices are dropped."""
    model = compose(["model=qwen3_30b_a3b", "model.moe.capacity.factor=1.0"]).model
    passes = layer_operators(model, ranks, exchange=Exchange.symmetric)
    assert not passes.waits
    assert [passes.forward.launching.count("put_rows"), passes.backward.launching.count("put_rows")] == [2, 2]
    assert not {"alltoall_base_", "copy_rows", "nonzero"} & set(passes.forward.launching + passes.backward.launching)
