"""What is compared: the transformers, and the sides that build them."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple


@dataclass(frozen=True)
class Case:
    """A decoder of `layers` blocks of which each has `experts`, and the batch of a step."""

    experts: int
    top_k: int
    hidden: int
    """Of one expert. The dense side's feed-forward has top_k times that: as much computation for each token."""
    precision: str
    """fp32 or bf16: of activations, weights, gradients and moments."""
    width: int = 512
    layers: int = 4
    heads: int = 8
    vocabulary: int = 8192
    sequences: int = 8
    length: int = 512

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.length


CASES = {
    "8x2-fp32": Case(8, 2, 1024, "fp32"),
    "8x2-bf16": Case(8, 2, 1024, "bf16"),
    "64x8-bf16": Case(64, 8, 256, "bf16"),
    "64x8-fp32": Case(64, 8, 256, "fp32"),
}
"""By name: experts x top_k."""

CAPACITY = 1.25
"""Rows an expert takes on the sides that drop, as a multiple of an even share."""


class Side(NamedTuple):
    """`name` in the table; `module` of this folder builds it, told the `variant`."""

    name: str
    module: str
    variant: str = ""
    needs: str | None = None
    """The distribution to install."""
    dense: str = "dense"
    """The side that is the limit of this one."""
    ours: str = "tokenyard"
    """The side of ours that does the same work."""
    same: bool = True
    """Computes the same function as `ours`, so their first losses are equal."""


SIDES = (
    Side("dense", "ours", "dense", same=False),
    Side("tokenyard", "ours"),
    Side("transformers eager", "mixtral", "eager", "transformers"),
    Side("transformers grouped_mm", "mixtral", "grouped_mm", "transformers"),
    Side("transformers batched_mm", "mixtral", "batched_mm", "transformers"),
    Side("torchtitan", "torchtitan", needs="torchtitan"),
    Side("Megatron-Core", "megatron", needs="megatron-core"),
    Side("DeepSpeed", "deepspeed", needs="deepspeed"),
    Side("tokenyard, drops", "ours", "drops", ours="tokenyard, drops"),
    Side("DeepSpeed, drops", "deepspeed", "drops", "deepspeed", ours="tokenyard, drops", same=False),
    Side("dense, fp32 weights", "ours", "dense wide", dense="dense, fp32 weights", ours="tokenyard, fp32 weights", same=False),
    Side("tokenyard, fp32 weights", "ours", "wide", dense="dense, fp32 weights", ours="tokenyard, fp32 weights"),
)
"""Those with drops choose them differently: only the amount of work is the same. Fp32 weights are what `tokenyard train` has."""

IMPORTS = {
    "transformers": "transformers.models.mixtral.modeling_mixtral",
    "torchtitan": "torchtitan.models.common.moe",
    "megatron-core": "megatron.core.transformer.moe.moe_layer",
    "deepspeed": "deepspeed.moe.layer",
}
"""What a side's process imports before memory is counted."""
PIP = {"torchtitan": "--no-deps torchtitan spmd_types triton"}
"""What to install, where it is not the distribution's name. torchtitan 0.3 asks for datasets < 4.8, and tokenyard for >= 5.2."""


def sides_of(case: Case, wanted: list[str] | None = None) -> list[Side]:
    """Those that this case has; `wanted` are names, None is all. What a side is compared with comes along."""
    sides = [side for side in SIDES if case.precision == "bf16" or "fp32 weights" not in side.name]
    if wanted is None:
        return sides
    names = {name for side in sides if side.name in wanted for name in (side.name, side.dense, side.ours)}
    return [side for side in sides if side.name in names]


def refusal(side: Side, case: Case, memory: int) -> str | None:
    """Why it cannot run here with so many bytes of `memory`, in words; None if it can."""
    if side.needs is not None and find_spec(IMPORTS[side.needs].partition(".")[0]) is None:
        return not_installed(side)
    if side.module == "torchtitan" and case.precision != "bf16":
        return "computes experts in bf16 only"
    if side.variant == "batched_mm":
        number = 2 if case.precision == "bf16" else 4
        copies = case.tokens * case.top_k * case.layers * 3 * case.width * case.hidden * number
        if copies > memory / 2:
            return f"needs {copies / 2**30:.0f} GiB: copies an expert's weights for each choice of a token"
    return None


def groups(sides: list[Side], together: int) -> Iterator[list[Side]]:
    """Of at most `together` sides, which take turns; each with those that its other sides are compared with, as far as they run."""
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
