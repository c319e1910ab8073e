"""Names of tensors: from each of ours to the ones of Hugging Face that make it up, as views, so that a table serves both ways.

E experts, P = 2 (gate, up), F hidden width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


def itself(tensor: Tensor) -> Tensor:
    return tensor


def gate(both: Tensor) -> Tensor:
    """Of (P, F, D)."""
    return both[0]


def up(both: Tensor) -> Tensor:
    """Of (P, F, D)."""
    return both[1]


class Source(NamedTuple):
    """A tensor of theirs: the part `view` of ours, with dimensions `joined` and the next made one.

    In `name`, {layer} is the layer's index; with {expert} there is one for each expert, and `view` is of one expert's part.
    """

    name: str
    view: Callable[[Tensor], Tensor] = itself
    joined: int | None = None


Row = tuple[tuple[Source, ...], ...]
"""The ways in which one tensor of ours may stand in their files; the first is how it is written."""


class TensorPart(NamedTuple):
    """One tensor of theirs and where it lies in ours."""

    name: str
    view: Callable[[Tensor], Tensor]
    joined: int | None

    def read(self, theirs: Tensor, ours: Tensor) -> None:
        """Write `theirs` into its place in `ours`, in the type of that."""
        place = self.view(ours)
        place.copy_(theirs.view(place.shape))

    def written(self, ours: Tensor) -> Tensor:
        """`theirs`, a view where there is one."""
        place = self.view(ours)
        return place if self.joined is None else place.flatten(self.joined, self.joined + 1)


def parts(way: tuple[Source, ...], layer: int, ours: Tensor) -> list[TensorPart]:
    """All tensors of theirs that make up `ours` (which may be on the meta device) in this way."""
    found = []
    for source in way:
        if "{expert}" not in source.name:
            found.append(TensorPart(source.name.format(layer=layer), source.view, source.joined))
            continue
        for expert in range(ours.shape[0]):
            name = source.name.format(layer=layer, expert=expert)
            found.append(TensorPart(name, _of_expert(source.view, expert), source.joined))
    return found


def _of_expert(view: Callable[[Tensor], Tensor], expert: int) -> Callable[[Tensor], Tensor]:
    return lambda ours: view(ours[expert])


def one(name: str) -> Row:
    """A tensor that is the same on both sides."""
    return ((Source(name),),)


def layer_rows(names: dict[str, str]) -> dict[str, Row]:
    """Tensors of a layer that are the same on both sides."""
    return {ours: one("model.layers.{layer}." + theirs) for ours, theirs in names.items()}


def feedforward(ours: str, theirs: str) -> dict[str, Row]:
    """Gate and up are one tensor of (P, F, D) here and two there."""
    prefix = "model.layers.{layer}." + theirs
    return {
        f"{ours}.gate_up": ((Source(f"{prefix}.gate_proj.weight", gate), Source(f"{prefix}.up_proj.weight", up)),),
        f"{ours}.down": one(f"{prefix}.down_proj.weight"),
    }


def experts(
    published: str = "mlp.experts.{expert}", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, Row]:
    """One tensor for each expert as published, or (E, P * F, D) and (E, D, F) as transformers 5 has them in memory."""
    prefix, fused = "model.layers.{layer}." + published, "model.layers.{layer}.mlp.experts"
    gates, ups, downs = (f"{prefix}.{name}.weight" for name in names)
    return {
        "moe.experts.gate_up": ((Source(gates, gate), Source(ups, up)), (Source(f"{fused}.gate_up_proj", joined=1),)),
        "moe.experts.down": ((Source(downs),), (Source(f"{fused}.down_proj"),)),
    }


OUTSIDE: dict[str, Row] = {
    "embedding.weight": one("model.embed_tokens.weight"),
    "norm.weight": one("model.norm.weight"),
    "head.weight": one("lm_head.weight"),
}
NORMS = layer_rows(
    {"attention_norm.weight": "input_layernorm.weight", "feedforward_norm.weight": "post_attention_layernorm.weight"}
)
PROJECTIONS = layer_rows(
    {f"attention.{name}.{kind}": f"self_attn.{name}_proj.{kind}" for name in ("q", "k", "v", "o") for kind in ("weight", "bias")}
)
QK_NORMS = layer_rows({f"attention.{name}.weight": f"self_attn.{name}.weight" for name in ("q_norm", "k_norm")})
ROUTER = layer_rows({"moe.router.weight": "mlp.gate.weight"})
DENSE = feedforward("dense", "mlp")
