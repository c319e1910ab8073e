"""Which tensor of theirs goes where in ours: made from names and shapes alone, so that all is accounted for before any is read."""

import re
from typing import NamedTuple

from torch import Tensor

from ..moe.config import ModelConfig
from .families import Family
from .hf_folder import DTYPES, Stored
from .weight_mapping import OUTSIDE, Row, TensorPart, one, parts

MTP = {
    "embedding_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "projection.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
"""Of a multi-token prediction module, beside its block: it stands behind the layers, as one more of them."""

IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""Computed from the configuration; old files have it."""


class Planned(NamedTuple):
    """One tensor of theirs: the part `part` of our tensor `ours`."""

    ours: str
    part: TensorPart


def read_plan(family: Family, model: ModelConfig, ours: dict[str, Tensor], stored: dict[str, Stored]) -> dict[str, Planned]:
    """Their names, and what each is. `ours` may be on the meta device.

    ValueError, one line, for the first tensor that is missing, misshapen, too many or of a type that is no weight's.
    """
    plan: dict[str, Planned] = {}
    for name, tensor in ours.items():
        layer, row = _row(family, model, name)
        ways = [parts(way, layer, tensor) for way in row]
        way = next((way for way in ways if any(part.name in stored for part in way)), ways[0])
        for part in way:
            _check(part, tensor, stored)
            plan[part.name] = Planned(name, part)
    known = plan.keys() | copies(model).keys()
    for name in stored:
        if name not in known and not IGNORED.fullmatch(name):
            raise ValueError(
                f"tensor {name} of shape {stored[name].shape} has no place in {family.architecture} with this config.json"
            )
    return plan


def write_plan(family: Family, model: ModelConfig, ours: dict[str, Tensor]) -> dict[str, Planned]:
    """As published. ValueError naming a tensor that the architecture has no name for."""
    plan: dict[str, Planned] = {}
    for name, tensor in ours.items():
        layer, row = _row(family, model, name)
        plan |= {part.name: Planned(name, part) for part in parts(row[0], layer, tensor)}
    return plan


def copies(model: ModelConfig) -> dict[str, str]:
    """Tensors of theirs that may be there and must equal another one: a tied head, and what prediction modules share."""
    found = {"lm_head.weight": "model.embed_tokens.weight"} if model.tie_embeddings else {}
    for index in range(model.layers, model.layers + model.mtp_depth):
        found[f"model.layers.{index}.embed_tokens.weight"] = "model.embed_tokens.weight"
        found[f"model.layers.{index}.shared_head.head.weight"] = (
            "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
        )
    return found


def _row(family: Family, model: ModelConfig, name: str) -> tuple[int, Row]:
    """The layer's index in their names, and the ways of our tensor."""
    row, index = OUTSIDE.get(name), 0
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        index, row = int(match[1]), family.rows.get(match[2])
    elif match := re.fullmatch(r"mtp\.(\d+)\.(block\.)?(.+)", name):
        index = model.layers + int(match[1])
        row = family.rows.get(match[3]) if match[2] else one("model.layers.{layer}." + MTP[match[3]])
    if row is None:
        raise ValueError(f"tensor {name} has no place in {family.architecture}")
    return index, row


def _check(part: TensorPart, ours: Tensor, stored: dict[str, Stored]) -> None:
    if part.name not in stored:
        raise ValueError(f"tensor {part.name} is missing")
    shape = tuple(part.written(ours).shape)
    if stored[part.name].shape != shape:
        raise ValueError(f"tensor {part.name} has the shape {stored[part.name].shape}: must be {shape} with this config.json")
    if stored[part.name].code not in DTYPES:
        raise ValueError(f"tensor {part.name} is of type {stored[part.name].code}: must be one of {', '.join(DTYPES)}")
