"""Context parallelism gives the numbers of one process, in fp64: outputs, losses, counts, drops, gradients, weights after 3 steps.

Each layout trains all its models in one start of the ranks.
"""

from typing import Any

import pytest
from sameness import VOCABULARY, Case, Layout, assert_equal, compared_with, found, reference, spread, verdict_of
from tokenyard.moe.config import (
    AttentionConfig,
    AttentionKind,
    BalanceConfig,
    CapacityConfig,
    DropPolicy,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    Scope,
    Selection,
)
from tokenyard.parallel.config import ContextExchange

HEADS = ContextExchange.heads


def case(documents: bool = False, micro_batches: int = 1, attention: AttentionConfig | None = None, **changes: Any) -> Case:
    """Balance losses over sequence and batch, z-loss, expert bias."""
    model = {name: changes.pop(name) for name in ("kv_heads", "mtp_depth", "tie_embeddings") if name in changes}
    balance = BalanceConfig(coefficient=0.05, sequence_coefficient=0.02, bias_rate=0.01, scope=Scope.batch)
    moe = MoEConfig(**({"experts": 8, "hidden": 16, "z_coefficient": 0.01, "balance": balance} | changes))
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "hidden": 24, "vocabulary": VOCABULARY} | model
    config = ModelConfig(**sizes, init_std=0.3, moe=moe, attention=attention or AttentionConfig())
    return Case(config, micro_batches, length=16, documents=documents)


def limit(scope: Scope, **more: Any) -> CapacityConfig:
    return CapacityConfig(factor=0.8, scope=scope, **more)


LATENT = {"kind": AttentionKind.mla, "mla": MLAConfig(q_rank=12, kv_rank=8, nope_width=4, rope_width=4, value_width=6)}
GSHARD = {"router": RouterConfig(selection=Selection.gshard), "balance": BalanceConfig(coefficient=0.05, scope=Scope.batch)}
CHOICE = {
    "router": RouterConfig(selection=Selection.expert_choice),
    "balance": BalanceConfig(),
    "capacity": CapacityConfig(factor=1.0, scope=Scope.sequence),
}
CASES = {
    "plain, two micro-batches": case(micro_batches=2, tie_embeddings=True),
    "window, sinks": case(attention=AttentionConfig(window=5, sinks=True)),
    "soft cap, documents, one key head": case(True, attention=AttentionConfig(softcap=5.0), kv_heads=1),
    "latents, prediction, documents": case(True, attention=AttentionConfig(**LATENT), kv_heads=4, mtp_depth=1),
    "documents, window, drops by sequence": case(True, attention=AttentionConfig(window=5), capacity=limit(Scope.sequence)),
    "drops by batch": case(capacity=limit(Scope.batch)),
    "drops by priority": case(capacity=limit(Scope.batch, policy=DropPolicy.priority)),
    "GShard's groups": case(capacity=limit(Scope.batch, groups=4), **GSHARD),
    "expert choice over a sequence": case(**CHOICE),
}

LAYOUTS = {
    "context 2": Layout(2, context=2),
    "context 2, heads": Layout(2, context=2, context_exchange=HEADS),
    "context 4, expert 2": Layout(4, context=4, expert=2),
    "context 2 x tensor 2, expert 4": Layout(4, context=2, tensor=2, expert=4),
    "context 2 x tensor 2, heads, shard 2, expert_tensor 2": Layout(
        4, context=2, tensor=2, shard=2, expert_tensor=2, context_exchange=HEADS
    ),
    "context 2 x shard 2, recompute": Layout(4, context=2, shard=4, expert=2, recompute=True),
    "context 2 of 4, zero 1": Layout(4, context=2, shard=2, zero=1, expert=2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_numbers_of_one_process(ranks: Any, layout: str) -> None:
    cases = {name: case for name, case in CASES.items() if fits(LAYOUTS[layout], case.config)}
    expected = [compared_with(each) for each in cases.values()]
    answers = ranks(LAYOUTS[layout].world, all_found, LAYOUTS[layout], list(cases.values()), expected)
    for index, each in enumerate(cases.values()):
        assert_equal(verdict_of(spread(LAYOUTS[layout], each.micro_batches), [of_rank[index] for of_rank in answers]))


def all_found(layout: Layout, cases: list[Case], expected: list[Any]) -> list[Any]:
    """On a rank."""
    return [found(layout, each, one) for each, one in zip(cases, expected, strict=True)]


def fits(layout: Layout, config: ModelConfig) -> bool:
    return config.kv_heads % layout.tensor == 0


@pytest.mark.parametrize("name", CASES)
def test_the_reference_is_worth_comparing_with(name: str) -> None:
    expected = reference(CASES[name])
    first, factor = expected["steps"][0], CASES[name].config.moe.capacity.factor
    assert all(gradient.abs().max() > 0 for name, gradient in expected["gradients"].items() if "experts" not in name)
    assert factor in (None, 1.0) or first.dropped_L.sum() > 0
