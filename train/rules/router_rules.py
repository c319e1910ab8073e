"""Rules between the settings of routers, balance losses and capacity. A model without experts breaks none."""

from collections.abc import Iterator

from ...moe.config import GroupScore, MoEConfig, Scope, Score, Selection
from ..config import Config
from ..schema import written
from .broken import Broken

ROUTER, BALANCE, CAPACITY = "model.moe.router", "model.moe.balance", "model.moe.capacity"

INTERVALS = {
    f"{ROUTER}.scale": "(0, inf)",
    f"{ROUTER}.groups": "[1, inf)",
    f"{ROUTER}.top_groups": "[1, inf)",
    f"{ROUTER}.jitter": "[0, 1)",
    f"{ROUTER}.null_experts": "[0, inf)",
    f"{BALANCE}.coefficient": "[0, inf)",
    f"{BALANCE}.sequence_coefficient": "[0, inf)",
    f"{BALANCE}.importance_coefficient": "[0, inf)",
    f"{BALANCE}.bias_rate": "[0, inf)",
    f"{CAPACITY}.factor": "(0, inf)",
    f"{CAPACITY}.evaluation_factor": "(0, inf)",
    f"{CAPACITY}.minimum": "[1, inf)",
}
"""Where each of these numbers must lie, unless it is null."""


def routers(config: Config, world: int) -> Iterator[Broken]:
    c = config.model.moe
    if not any(config.model.moe_layer(index) for index in range(config.model.layers)):
        return
    yield from _groups(c)
    yield from _selection(c)
    yield from _softmax_after_top_k(c)
    yield from _capacity(c)


def _groups(c: MoEConfig) -> Iterator[Broken]:
    router, key = c.router, f"{ROUTER}.groups"
    if c.experts % router.groups:
        divisors = [groups for groups in range(1, c.experts + 1) if c.experts % groups == 0]
        yield Broken(key, f"must divide model.moe.experts={c.experts}", divisors)
        return
    size = c.experts // router.groups
    if router.top_groups > router.groups:
        yield Broken(f"{ROUTER}.top_groups", f"must be at most {key}={router.groups}", [router.groups])
    if router.groups == 1:
        return
    if c.top_k > size * router.top_groups:
        rule = (
            f"must be at most {size * router.top_groups}, the experts of {ROUTER}.top_groups={router.top_groups} groups of {size}"
        )
        yield Broken("model.moe.top_k", rule, [size * router.top_groups])
    if router.group_score is GroupScore.top2 and size < 2:
        yield Broken(f"{ROUTER}.group_score", "top2 needs groups of two experts or more", [GroupScore.max])
    if router.null_experts:
        yield Broken(f"{ROUTER}.null_experts", f"must be 0, null experts are in no group of {key}={router.groups}", [0])


def _selection(c: MoEConfig) -> Iterator[Broken]:
    router, chosen = c.router, c.router.selection
    chosen_by = f"with {ROUTER}.selection={chosen.value}"
    if chosen is Selection.gshard and c.top_k != 2:
        yield Broken("model.moe.top_k", f"must be 2 {chosen_by}", [2])
    if chosen not in (Selection.top_k, Selection.gshard):
        if router.groups > 1:
            yield Broken(f"{ROUTER}.groups", f"must be 1 {chosen_by}", [1])
        if c.balance.bias_rate > 0:
            yield Broken(f"{BALANCE}.bias_rate", f"must be 0 {chosen_by}, which no bias balances", [0.0])
    if chosen is Selection.hash:
        for name, off in (("bias", False), ("noise", False), ("jitter", 0.0)):
            if getattr(router, name) != off:
                yield Broken(f"{ROUTER}.{name}", f"must be {written(off)} {chosen_by}, which has no logits", [off])
    if chosen is Selection.expert_choice:
        if router.null_experts:
            yield Broken(f"{ROUTER}.null_experts", f"must be 0 {chosen_by}, every expert takes its share", [0])
        if c.capacity.scope is Scope.rank:
            scopes = [Scope.sequence, Scope.batch]
            yield Broken(f"{CAPACITY}.scope", f"must be sequence or batch {chosen_by}", scopes)


def _softmax_after_top_k(c: MoEConfig) -> Iterator[Broken]:
    router, key = c.router, f"{ROUTER}.softmax_after_top_k"
    if not router.softmax_after_top_k:
        return
    if router.score is not Score.softmax:
        yield Broken(f"{ROUTER}.score", f"must be softmax with {key}=true", [Score.softmax])
    if router.selection in (Selection.hash, Selection.expert_choice):
        yield Broken(key, f"must be false with {ROUTER}.selection={router.selection.value}", [False])
    if c.top_k == 1:
        yield Broken(key, "must be false with model.moe.top_k=1, whose weight would always be 1", [False])


def _capacity(c: MoEConfig) -> Iterator[Broken]:
    limits, key = c.capacity, f"{CAPACITY}.schedule"
    if limits.schedule != _mended(limits.schedule):
        yield Broken(key, "must be pairs of a rising step and a factor >= 0", [_mended(limits.schedule)])
    elif c.router.selection is Selection.expert_choice and 0 in limits.schedule[1::2]:
        yield Broken(key, "may not be dropless (0) with expert_choice, whose experts take what the factor says", [[]])
    if limits.pad and limits.factor is None and not limits.schedule and c.router.selection is not Selection.expert_choice:
        yield Broken(f"{CAPACITY}.pad", f"must be false without {CAPACITY}.factor, there is nothing to pad to", [False])


def _mended(schedule: list[float]) -> list[float]:
    """Whole pairs in the order of their steps, those that make sense."""
    pairs = zip(schedule[::2], schedule[1::2], strict=False)
    right = {step: factor for step, factor in pairs if step >= 0 and step == int(step) and 0 <= factor < float("inf")}
    return [number for step in sorted(right) for number in (step, right[step])]
