"""Rules of `parallel` about expert tensor parallelism and what FSDP2 keeps within a step."""

from collections.abc import Iterator

from ..config import Config
from .broken import Broken, divisors, needs
from .model_rules import moe_layers

INTERVALS = {"parallel.expert_tensor": "[1, inf)", "parallel.zero": "[1, 3]"}
"""Where each of these numbers must lie."""


def expert_tensor(config: Config, world: int) -> Iterator[Broken]:
    """Against the model, and against the ranks that parallel.expert leaves."""
    key, degree, c = "parallel.expert_tensor", config.parallel.expert_tensor, config.model
    if not moe_layers(c):
        if degree > 1:
            yield Broken(key, "must be 1, no layer of the model has experts", [1])
        return
    if c.moe.hidden // 8 % degree:
        rule = f"must divide model.moe.hidden={c.moe.hidden} into multiples of 8, grouped products want rows of 16 bytes"
        yield Broken(key, rule, divisors(c.moe.hidden // 8))
    holders = world // config.parallel.expert
    if holders % degree:
        expert = f" ({world} ranks / parallel.expert={config.parallel.expert})" if config.parallel.expert > 1 else ""
        rule = (
            needs(degree, world)
            if world == 1
            else f"must divide the {holders} ranks{' that hold each expert' if expert else ''}{expert}"
        )
        yield Broken(key, rule, {degree, *divisors(holders)})
