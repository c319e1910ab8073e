"""Names of tensors: each of our tensors, and the Hugging Face tensors that make it up, as views of it, for import and export alike.

E experts, P = 2 (gate, up), F hidden width, D model width.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..moe.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


def identity(tensor: "Tensor") -> "Tensor":
    return tensor


def gate(gate_up_PFD: "Tensor") -> "Tensor":
    return gate_up_PFD[0]


def up(gate_up_PFD: "Tensor") -> "Tensor":
    return gate_up_PFD[1]


class RowRange(NamedTuple):
    """The rows of a Hugging Face tensor, one of several parts, that a part of ours is."""

    begin: int
    total: int
    """RowRange of the whole tensor."""


class Source(NamedTuple):
    """A pattern of Hugging Face tensors: the part `view` of ours, with dimensions `joined` and `joined + 1` flattened into one.

    In `name`, {layer} is the layer's index, {pair} and {half} its quotient and rest by 2; with {expert} there is a tensor for each
    expert, and `view` is applied to its slice.
    """

    name: str
    view: "Callable[[Tensor], Tensor]" = identity
    joined: int | None = None
    rows: RowRange | None = None
    """None: the part is the whole tensor."""


StoredForms = tuple[tuple[Source, ...], ...]
"""The ways in which one tensor of ours may be stored in a Hugging Face folder; an export writes the first."""
FormsOfModel = Callable[[ModelConfig, int], StoredForms]
"""The same, where it depends on the model and on the layer, whose index is the second argument."""


class HFTensor(NamedTuple):
    """One Hugging Face tensor, and the part of ours that it holds; see `Source`."""

    name: str
    view: "Callable[[Tensor], Tensor]"
    joined: int | None
    rows: RowRange | None = None

    def written(self, ours: "Tensor") -> "Tensor":
        """Returns the tensor (or its `rows`) as Hugging Face has it, a view of `ours` where possible."""
        part = self.view(ours)
        return part if self.joined is None else part.flatten(self.joined, self.joined + 1)

    def shape(self, ours: "Tensor") -> tuple[int, ...]:
        """Returns the shape of the whole Hugging Face tensor."""
        shape = tuple(self.written(ours).shape)
        return shape if self.rows is None else (self.rows.total, *shape[1:])


def hf_tensors(form: tuple[Source, ...], layer: int, ours: "Tensor") -> list[HFTensor]:
    """All Hugging Face tensors that make up `ours` (which may be on the meta device) in this form."""
    found, place = [], {"layer": layer, "pair": layer // 2, "half": layer % 2}
    for source in form:
        if "{expert}" not in source.name:
            found.append(HFTensor(source.name.format(**place), source.view, source.joined, source.rows))
            continue
        for expert in range(ours.shape[0]):
            name = source.name.format(**place, expert=expert)
            found.append(HFTensor(name, _view_of_expert(source.view, expert), source.joined, source.rows))
    return found


def _view_of_expert(view: "Callable[[Tensor], Tensor]", expert: int) -> "Callable[[Tensor], Tensor]":
    return lambda ours: view(ours[expert])


def same(name: str) -> StoredForms:
    """A tensor that is the same on both sides."""
    return ((Source(name),),)


LAYER = "model.layers.{layer}."


def layer_tensors(names: dict[str, str], layer: str = LAYER) -> dict[str, StoredForms]:
    """Tensors of a layer that are the same on both sides, by their names within the layer: ours to Hugging Face's."""
    return {ours: same(layer + theirs) for ours, theirs in names.items()}


def feedforward(ours: str, theirs: str, layer: str = LAYER) -> dict[str, StoredForms]:
    """Gate and up projections are one tensor of (P, F, D) here and two tensors there."""
    prefix = layer + theirs
    return {
        f"{ours}.gate_up": ((Source(f"{prefix}.gate_proj.weight", gate), Source(f"{prefix}.up_proj.weight", up)),),
        f"{ours}.down": same(f"{prefix}.down_proj.weight"),
    }


def experts(
    published: str = "mlp.experts.{expert}", names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> dict[str, StoredForms]:
    """A tensor for each expert as published, or (E, P * F, D) and (E, D, F) as transformers 5 keeps them in memory."""
    prefix, fused = LAYER + published, LAYER + "mlp.experts"
    gates, ups, downs = (f"{prefix}.{name}.weight" for name in names)
    return {
        "moe.experts.gate_up": ((Source(gates, gate), Source(ups, up)), (Source(f"{fused}.gate_up_proj", joined=1),)),
        "moe.experts.down": ((Source(downs),), (Source(f"{fused}.down_proj"),)),
    }


OUTSIDE_LAYERS: dict[str, StoredForms] = {
    "embedding.weight": same("model.embed_tokens.weight"),
    "norm.weight": same("model.norm.weight"),
    "head.weight": same("lm_head.weight"),
}
NORMS = layer_tensors(
    {"attention_norm.weight": "input_layernorm.weight", "feedforward_norm.weight": "post_attention_layernorm.weight"}
)
PROJECTIONS = layer_tensors(
    {f"attention.{name}.{kind}": f"self_attn.{name}_proj.{kind}" for name in ("q", "k", "v", "o") for kind in ("weight", "bias")}
)
QK_NORMS = layer_tensors({f"attention.{name}.weight": f"self_attn.{name}.weight" for name in ("q_norm", "k_norm")})
ROUTER = layer_tensors({"moe.router.weight": "mlp.gate.weight"})
EXPERT_BIAS = layer_tensors({"moe.router.expert_bias": "mlp.gate.e_score_correction_bias"})
DENSE = feedforward("dense", "mlp")
