"""Plans which Hugging Face tensor holds which part of ours, from names and shapes, so that all are checked before any is read."""

import re
from collections import defaultdict
from typing import NamedTuple

from torch import Tensor

from ..moe.config import ModelConfig
from .families import Family
from .hf_folder import DTYPES, TensorHeader
from .weight_mapping import OUTSIDE_LAYERS, HFTensor, StoredForms, hf_tensors, same

MTP = {
    "embedding_norm.weight": "enorm.weight",
    "hidden_norm.weight": "hnorm.weight",
    "projection.weight": "eh_proj.weight",
    "norm.weight": "shared_head.norm.weight",
}
"""Tensors of a multi-token prediction module outside of its block. Hugging Face numbers the modules as further layers."""

IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
"""A buffer that old files hold; it is computed from the configuration."""


class Planned(NamedTuple):
    """A Hugging Face tensor, or rows of it, that holds the part `part` of our tensor `ours`."""

    ours: str
    part: HFTensor


Plan = dict[str, list[Planned]]
"""By the names of Hugging Face tensors, what each of them holds."""


def read_plan(family: Family, model: ModelConfig, ours: dict[str, Tensor], headers: dict[str, TensorHeader]) -> Plan:
    """The plan of an import, by the names of the Hugging Face tensors. `ours` may be on the meta device.

    Raises ValueError, one line, for the first tensor that is missing, unknown, of another shape or of a type that no weight has.
    """
    plan: Plan = defaultdict(list)
    for name, tensor in ours.items():
        layer, stored_forms = _stored_forms(family, model, name)
        forms = [hf_tensors(form, layer, tensor) for form in stored_forms]
        form = next((form for form in forms if any(part.name in headers for part in form)), forms[0])
        for part in form:
            _check(part, tensor, headers)
            plan[part.name].append(Planned(name, part))
    known = plan.keys() | repeated_tensors(model).keys() | family.idle(model).keys()
    for name, header in headers.items():
        nothing = 0 in header.shape or IGNORED.fullmatch(name) or re.fullmatch(family.left_out, name)
        if name not in known and not nothing:
            raise ValueError(f"tensor {name} of shape {header.shape} has no place in {family.architecture} with this config.json")
    return dict(plan)


def write_plan(family: Family, model: ModelConfig, ours: dict[str, Tensor]) -> Plan:
    """The plan of an export. Raises ValueError for a tensor that the architecture has no name for."""
    plan: Plan = defaultdict(list)
    for name, tensor in ours.items():
        layer, stored_forms = _stored_forms(family, model, name)
        for part in hf_tensors(stored_forms[0], layer, tensor):
            plan[part.name].append(Planned(name, part))
    return dict(plan)


def repeated_tensors(model: ModelConfig) -> dict[str, str]:
    """Hugging Face tensors that may be stored and must equal another one: a tied head, and what prediction modules share."""
    found = {"lm_head.weight": "model.embed_tokens.weight"} if model.tie_embeddings else {}
    for index in range(model.layers, model.layers + model.mtp_depth):
        found[f"model.layers.{index}.embed_tokens.weight"] = "model.embed_tokens.weight"
        found[f"model.layers.{index}.shared_head.head.weight"] = (
            "model.embed_tokens.weight" if model.tie_embeddings else "lm_head.weight"
        )
    return found


def _stored_forms(family: Family, model: ModelConfig, name: str) -> tuple[int, StoredForms]:
    """The layer's index in Hugging Face's names, and the forms of our tensor `name`."""
    forms, index = OUTSIDE_LAYERS.get(name), 0
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        index, forms = int(match[1]), family.tensors.get(match[2])
    elif match := re.fullmatch(r"mtp\.(\d+)\.(block\.)?(.+)", name):
        index = model.layers + int(match[1])
        forms = family.tensors.get(match[3]) if match[2] else same("model.layers.{layer}." + MTP[match[3]])
    if forms is None:
        raise ValueError(f"tensor {name} has no place in {family.architecture}")
    return index, forms(model, index) if callable(forms) else forms


def _check(part: HFTensor, ours: Tensor, headers: dict[str, TensorHeader]) -> None:
    if part.name not in headers:
        raise ValueError(f"tensor {part.name} is missing")
    shape = part.shape(ours)
    if headers[part.name].shape != shape:
        raise ValueError(f"tensor {part.name} has the shape {headers[part.name].shape}: must be {shape} with this config.json")
    if headers[part.name].code not in DTYPES:
        raise ValueError(f"tensor {part.name} is of type {headers[part.name].code}: must be one of {', '.join(DTYPES)}")
