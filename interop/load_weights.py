"""Loads the weights of a Hugging Face folder file by file: memory holds our tensors and a piece of the folder's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.bounded import short_message
from ..moe.config import ModelConfig
from ..moe.model import Transformer
from ..moe.param_count import count
from ..parallel.shard import LocalShard, ShardMetadata, whole
from .config_mapping import read_config
from .families import Family
from .hf_folder import DTYPES, HFFolder, TensorHeader, open_folder
from .language_model import language_model
from .quantized import dequantized, open_tensor
from .weight_mapping import HFTensor
from .weight_plan import Plan, read_plan, repeated_tensors


class HFSource(NamedTuple):
    """A folder whose keys and tensors were all checked; its weights are not read yet."""

    folder: HFFolder
    family: Family
    model: ModelConfig
    plan: Plan
    ours: dict[str, Tensor]
    """Our tensors, on the meta device."""


def open_source(path: Path) -> HFSource:
    """Maps all keys and tensors of the folder. Raises ValueError, one line, for the first that has no place in our model."""
    folder = open_folder(path)
    family, model = read_config(folder.config, f"{path / 'config.json'}: ")
    folder = language_model(dequantized(folder))
    behind = f"model.layers.{model.layers}."
    if model.mtp_depth and not any(name.startswith(behind) for name in folder.tensors):
        model.mtp_depth, model.mtp_after_norm = 0, False  # transformers writes the key but not the tensors
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
    if wanted is False or wanted > 2 * held:  # numbers of 4 bits are the smallest
        raise ValueError(f"{path}: config.json describes {model.layers} layers and more weights than are in {held} bytes")


def read_weights(source: HFSource, like: dict[str, Tensor] | None = None, device: str = "cpu") -> dict[str, Tensor]:
    """Returns all our tensors, by name, on `device`, in the types of `like` or else of the files."""
    dtypes = stored_dtypes(source) if like is None else {name: tensor.dtype for name, tensor in like.items()}
    weights = {name: torch.empty(t.shape, dtype=dtypes[name], device=device) for name, t in source.ours.items()}
    read_shards(source, {name: LocalShard(whole(tensor.shape), tensor) for name, tensor in weights.items()})
    return weights


def read_shards(source: HFSource, shards: dict[str, LocalShard], complete: bool = True) -> None:
    """Fills `shards`, rectangles of our tensors by name, converted to their types.

    Nothing beyond these rectangles is read, but of quantized tensors the whole groups of numbers that share a byte or a scale.
    A name that the source has not is left as it is. complete: also compare the tensors that must equal another one.
    """
    for name in sorted(source.plan, key=lambda name: source.folder.tensors[name].file):
        wanted = [(part, place_of(part, shards[mine])) for mine, part in source.plan[name] if mine in shards]
        places = [(part, place) for part, place in wanted if place is not None]
        if not places:
            continue
        with open_tensor(source.folder, name) as stored:
            for part, place in places:
                for piece in _pieces(place, source.folder.tensors[name]):
                    piece.target.copy_(_read_part(stored, part, piece))
    if complete:
        check_repeated(source)


PIECE_ROWS = 128
"""Rows of a quantized matrix that are dequantized at a time; of a stack of matrices, one is."""


def _pieces(place: "Place", header: TensorHeader) -> Iterator["Place"]:
    """Cuts a quantized tensor in dimension 0, so that memory holds what dequantization needs for a small part of it alone."""
    if header.encoding is None:
        yield place
        return
    shape, ((first, end), *others), target = place
    step = PIECE_ROWS if len(header.shape) == 2 else 1
    for begin in range(first, end, step):
        stop = min(begin + step, end)
        yield Place(shape, [(begin, stop), *others], target.narrow(0, begin - first, stop - begin))


def _read_part(stored: Any, part: HFTensor, place: "Place") -> Tensor:
    """Reads the rectangle `place.ranges` of the part of ours that a Hugging Face tensor, `stored`, holds."""
    ranges = [slice(*bounds) for bounds in place.ranges]
    if part.rows is not None:
        assert part.joined is None, f"{part.name}: rows of a tensor are not flattened"
        begin, end = place.ranges[0]
        ranges[0] = slice(part.rows.begin + begin, part.rows.begin + end)
    if part.joined is None:
        return stored[tuple(ranges)]
    first, second = part.joined, part.joined + 1
    inner = place.shape[second]
    (begin, end), within = place.ranges[first], ranges[second]
    read = stored[(*ranges[:first], slice(begin * inner, end * inner), *ranges[second + 1 :])]
    return read.unflatten(first, (end - begin, inner))[(slice(None),) * second + (within,)]


class Place(NamedTuple):
    """What a Hugging Face tensor and a shard have in common."""

    shape: tuple[int, ...]
    """The sizes of the whole part of our tensor that it holds."""
    ranges: list[tuple[int, int]]
    """Begin and end in each dimension of that part."""
    target: Tensor
    """The view of the shard that they fill."""


def place_of(part: HFTensor, shard: LocalShard) -> Place | None:
    """Returns the place of `part` in a rectangle of our tensor, None if they share no element.

    The view of a part selects, permutes or steps through dimensions of ours. So each of ours has one coordinate in all of the part,
    or varies along one dimension of it, in equal steps; `part.view` of the coordinates shows which.
    """
    (shape, offsets, sizes), tensor = shard
    begin, ranges, strides = tensor.storage_offset(), dict[int, tuple[int, int]](), dict[int, int]()
    part_shape, lines = _lines(part, shape)
    for dim, (along, line) in enumerate(lines):
        held = ((line >= offsets[dim]) & (line < offsets[dim] + sizes[dim])).nonzero().view(-1)
        if not len(held):
            return None
        begin += (int(line[held[0]]) - offsets[dim]) * tensor.stride(dim)
        if along is not None:
            ranges[along] = int(held[0]), int(held[-1]) + 1
            strides[along] = int(line[1] - line[0]) * tensor.stride(dim)
    bounds = [ranges.get(axis, (0, size)) for axis, size in enumerate(part_shape)]
    target = tensor.as_strided([end - first for first, end in bounds], [strides.get(axis, 1) for axis in range(len(bounds))], begin)
    return Place(part_shape, bounds, target)


def rectangle_of(part: HFTensor, shape: tuple[int, ...], begin: int, end: int) -> ShardMetadata:
    """Returns the least rectangle of our tensor, of `shape`, with all of `part` from `begin` to `end` in its first dimension."""
    lines = [line[begin:end] if along == 0 else line for along, line in _lines(part, shape)[1]]
    return ShardMetadata(shape, tuple(int(line[0]) for line in lines), tuple(int(line[-1] - line[0]) + 1 for line in lines))


def _lines(part: HFTensor, shape: tuple[int, ...]) -> tuple[tuple[int, ...], list[tuple[int | None, Tensor]]]:
    """Returns the shape of `part` (before it is flattened), and for each dimension of ours its dimension there and coordinates."""
    part_shape, lines = tuple(part.view(torch.empty(shape, device="meta")).shape), []
    for dim, size in enumerate(shape):
        alone = [1] * len(shape)
        alone[dim] = size
        seen = part.view(torch.arange(size).view(alone).expand(shape))
        along = next((axis for axis in range(seen.ndim) if seen.shape[axis] > 1 and seen.stride(axis)), None)
        lines.append((along, seen[tuple(slice(None) if axis == along else 0 for axis in range(seen.ndim))].view(-1)))
    return part_shape, lines


def stored_dtypes(source: HFSource) -> dict[str, torch.dtype]:
    """The types that our tensors have in the files, by name; a tensor of several parts has the widest of their types."""
    dtypes: dict[str, torch.dtype] = {}
    for name, parts in source.plan.items():
        dtype = DTYPES[source.folder.tensors[name].code]
        for planned in parts:
            dtypes[planned.ours] = torch.promote_types(dtype, dtypes.get(planned.ours, dtype))
    return dtypes


def check_repeated(source: HFSource) -> None:
    """Raises ValueError for a tensor that must equal another one and does not."""
    for name, original in repeated_tensors(source.model).items():
        if name not in source.folder.tensors:
            continue
        every = tuple(slice(0, size) for size in source.folder.tensors[name].shape)
        with open_tensor(source.folder, name) as one, open_tensor(source.folder, original) as other:
            if not torch.equal(one[every], other[every]):
                raise ValueError(f"{source.folder.path}: tensor {name} must equal {original}, which stands for both")


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
