"""Loads the weights of a Hugging Face folder file by file: memory holds our tensors and one tensor of the folder."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint.bounded import short_message
from ..moe.config import ModelConfig
from ..moe.model import Transformer
from ..moe.param_count import count
from .config_mapping import read_config
from .families import Family
from .hf_folder import DTYPES, HFFolder, open_file, open_folder
from .weight_plan import Planned, read_plan, repeated_tensors


class HFSource(NamedTuple):
    """A folder whose keys and tensors were all checked; its weights are not read yet."""

    folder: HFFolder
    family: Family
    model: ModelConfig
    plan: dict[str, Planned]
    ours: dict[str, Tensor]
    """Our tensors, on the meta device."""


def open_source(path: Path) -> HFSource:
    """Maps all keys and tensors of the folder. Raises ValueError, one line, for the first that has no place in our model."""
    folder = open_folder(path)
    family, model = read_config(folder.config, f"{path / 'config.json'}: ")
    behind = f"model.layers.{model.layers}."
    if model.mtp_depth and not any(name.startswith(behind) for name in folder.tensors):
        model.mtp_depth = 0  # transformers writes the key but not the tensors
    _check_bytes(path, folder, model)
    with torch.device("meta"):
        ours = dict(Transformer(model).state_dict())
    try:
        return HFSource(folder, family, model, read_plan(family, model, ours, folder.tensors), ours)
    except ValueError as error:
        raise ValueError(f"{path}: {short_message(error)}") from None


def _check_bytes(path: Path, folder: HFFolder, model: ModelConfig) -> None:
    """Raises ValueError if the files have fewer bytes than the model has parameters, before anything is allocated for them."""
    try:
        wanted = model.layers <= len(folder.tensors) and count(model).trained
    except (ArithmeticError, TypeError) as error:
        raise ValueError(f"{path}: config.json makes no model: {short_message(error)}") from None
    held = sum((path / file).stat().st_size for file in {stored.file for stored in folder.tensors.values()})
    if wanted is False or wanted > held:
        raise ValueError(f"{path}: config.json describes {model.layers} layers and more weights than are in {held} bytes")


def read_weights(source: HFSource, like: dict[str, Tensor] | None = None, device: str = "cpu") -> dict[str, Tensor]:
    """Returns all our tensors, by name, on `device`, in the types of `like` or else of the files."""
    weights = {name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in (like or _as_stored(source)).items()}
    for name in sorted(source.plan, key=lambda name: source.folder.tensors[name].file):
        mine, part = source.plan[name]
        part.read(_read_tensor(source.folder, name).to(device), weights[mine])
    _check_repeated(source)
    return weights


def _as_stored(source: HFSource) -> dict[str, Tensor]:
    """`source.ours` in the types of the files; a tensor of several parts has the widest of their types."""
    dtypes: dict[str, torch.dtype] = {}
    for name, planned in source.plan.items():
        dtype = DTYPES[source.folder.tensors[name].code]
        dtypes[planned.ours] = torch.promote_types(dtype, dtypes.get(planned.ours, dtype))
    return {name: tensor.to(dtypes[name]) for name, tensor in source.ours.items()}


def _check_repeated(source: HFSource) -> None:
    """Raises ValueError for a tensor that must equal another one and does not."""
    for name, original in repeated_tensors(source.model).items():
        if name not in source.folder.tensors:
            continue
        if not torch.equal(_read_tensor(source.folder, name), _read_tensor(source.folder, original)):
            raise ValueError(f"{source.folder.path}: tensor {name} must equal {original}, which stands for both")


def _read_tensor(folder: HFFolder, name: str) -> Tensor:
    """Reads one tensor. The file is opened each time: an open one keeps all pages that were read from it in memory."""
    with open_file(folder.path / folder.tensors[name].file) as file:
        return file.get_tensor(name)


# Opens a Hugging Face folder as a model on one device.

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""Types of the activations and products."""


def load_folder(path: str | Path, precision: str = "fp32", device: str = "cpu") -> Transformer:
    """Returns the model of the folder `path`, whole on `device`, in evaluation mode.

    Raises ValueError, one line, for a key or tensor with no place in our model.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision}: must be one of {', '.join(PRECISIONS)}")
    source = open_source(Path(path))
    with torch.device("meta"):
        model = Transformer(source.model, PRECISIONS[precision])
    model.load_state_dict(read_weights(source, dict(model.state_dict()), device), strict=True, assign=True)
    return model.eval()
