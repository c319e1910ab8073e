"""The cases and the sides of the comparison: which transformers are trained, and who computes them."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple


@dataclass(frozen=True)
class Case:
    """A decoder of `layers` blocks, each with `experts`, and the batch of a step."""

    experts: int
    top_k: int
    hidden: int
    """Hidden width of one expert. The dense feed-forward has top_k times that width, which computes as much for each token."""
    precision: str
    """fp32 or bf16, for activations, weights, gradients and moments."""
    width: int = 512
    layers: int = 4
    heads: int = 8
    vocabulary: int = 8192
    sequences: int = 8
    length: int = 512

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequences * self.length


CASES = {
    "8x2-fp32": Case(8, 2, 1024, "fp32"),
    "8x2-bf16": Case(8, 2, 1024, "bf16"),
    "64x8-bf16": Case(64, 8, 256, "bf16"),
    "64x8-fp32": Case(64, 8, 256, "fp32"),
}
"""Each name is experts x top_k and precision."""

CAPACITY = 1.25
"""Rows that an expert accepts on the sides that drop, as a multiple of an even share."""


class Side(NamedTuple):
    """`name` in the table; `builder` of worker.py builds the model for a `variant`."""

    name: str
    builder: str
    variant: str = ""
    needs: str | None = None
    """The distribution that must be installed."""
    dense: str = "dense"
    """The dense side that is the upper bound of this one."""
    ours: str = "tokenyard"
    """The side of ours that does the same work."""
    same: bool = True
    """Whether it computes the same function as `ours`, so that their first losses are equal."""


SIDES = (
    Side("dense", "ours", "dense", same=False),
    Side("tokenyard", "ours"),
    Side("transformers eager", "transformers", "eager", "transformers"),
    Side("transformers grouped_mm", "transformers", "grouped_mm", "transformers"),
    Side("transformers batched_mm", "transformers", "batched_mm", "transformers"),
    Side("torchtitan", "torchtitan", needs="torchtitan"),
    Side("Megatron-Core", "megatron", needs="megatron-core"),
    Side("DeepSpeed", "deepspeed", needs="deepspeed"),
    Side("tokenyard, drops", "ours", "drops", ours="tokenyard, drops"),
    Side("DeepSpeed, drops", "deepspeed", "drops", "deepspeed", ours="tokenyard, drops", same=False),
    Side("dense, fp32 weights", "ours", "dense wide", dense="dense, fp32 weights", ours="tokenyard, fp32 weights", same=False),
    Side("tokenyard, fp32 weights", "ours", "wide", dense="dense, fp32 weights", ours="tokenyard, fp32 weights"),
)
"""The sides that drop choose the dropped tokens differently; only the amount of work is the same. `tokenyard train` has fp32
weights."""

IMPORTS = {
    "transformers": "transformers.models.mixtral.modeling_mixtral",
    "torchtitan": "torchtitan.models.common.moe",
    "megatron-core": "megatron.core.transformer.moe.moe_layer",
    "deepspeed": "deepspeed.moe.layer",
}
"""The module that a side's process imports before memory is counted."""
PIP = {"torchtitan": "--no-deps torchtitan spmd_types triton"}
"""Arguments of pip if they are not the distribution's name. torchtitan 0.3 requires datasets < 4.8, and tokenyard >= 5.2."""


def sides_of(case: Case, wanted: list[str] | None = None) -> list[Side]:
    """Returns the sides of this case; `wanted` are names (None: all). The sides that a wanted one is compared with are included."""
    sides = [side for side in SIDES if case.precision == "bf16" or "fp32 weights" not in side.name]
    if wanted is None:
        return sides
    names = {name for side in sides if side.name in wanted for name in (side.name, side.dense, side.ours)}
    return [side for side in sides if side.name in names]


def refusal(side: Side, case: Case, memory: int) -> str | None:
    """Returns why the side cannot run with `memory` bytes; None if it can."""
    if side.needs is not None and find_spec(IMPORTS[side.needs].partition(".")[0]) is None:
        return not_installed(side)
    if side.builder == "torchtitan" and case.precision != "bf16":
        return "computes experts in bf16 only"
    if side.variant == "batched_mm":
        number = 2 if case.precision == "bf16" else 4
        copies = case.tokens * case.top_k * case.layers * 3 * case.width * case.hidden * number
        if copies > memory / 2:
            return f"needs {copies / 2**30:.0f} GiB: copies an expert's weights for each choice of a token"
    return None


def groups(sides: list[Side], together: int) -> Iterator[list[Side]]:
    """Groups of at most `together` sides that take turns. Each has the sides that its members are compared with, if they can
    run."""
    by_name = {side.name: side for side in sides}
    group: list[Side] = []
    for side in sides:
        needed = [by_name[name] for name in dict.fromkeys((side.dense, side.ours, side.name)) if name in by_name]
        if group and len({*group, *needed}) > together:
            yield group
            group = []
        group = list(dict.fromkeys([*group, *needed]))
    if group:
        yield group


def not_installed(side: Side) -> str:
    return f"not installed (pip install {PIP.get(side.needs or '', side.needs)})"
