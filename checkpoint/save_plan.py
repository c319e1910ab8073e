"""Who writes which rectangle of which tensor: decided by rank 0 from what all ranks hold, and kept while that stays the same."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from ..parallel.shard import LocalShard, ShardMetadata, disjoint
from .expert_hashes import Slice, cut_slices
from .manifest import ITEM_BYTES, ChunkRecord, TensorRecord
from .safetensors_file import CODES, DTYPES


class Offer(NamedTuple):
    """What a rank holds of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * ITEM_BYTES[self.dtype]


class Share(NamedTuple):
    """What one rank does in a save."""

    names: list[str]
    """Tensors whose piece here it writes into its file."""
    slices: list[Slice]
    """Slices of experts for it to read back and hash, when all files are there."""
    tensors: dict[str, TensorRecord]
    """Where these slices are; for rank 0, which writes the manifest, every tensor."""
    readers: int
    """The ranks below this number have such slices."""
    bytes: int
    """That all ranks together write."""


def shard_name(rank: int) -> str:
    """The file that a rank writes."""
    return f"shard_{rank:05d}.safetensors"


def offers_of(held: dict[str, LocalShard]) -> list[Offer]:
    """ValueError for a piece that cannot be saved."""
    return [_offer(name, one) for name, one in held.items()]


def shares_of(offers: list[list[Offer]]) -> list[Share]:
    """Each rectangle is written once, by one of the ranks that hold it, so that the ranks write about the same number of bytes.

    ValueError for pieces that do not make up their tensor.
    """
    tensors = _agreed_tensors(offers)
    names: list[list[str]] = [[] for _ in offers]
    for offer, rank in _writers(offers).items():
        names[rank].append(offer.name)
        # A rank holds one piece of a tensor at most, so the tensor's name will do as the key in its file.
        tensors[offer.name].chunks.append(ChunkRecord(offer.offsets, offer.sizes, shard_name(rank), offer.name))
    for name, tensor in tensors.items():
        tensor.chunks.sort(key=lambda chunk: chunk.offsets)
        _check_tiling(name, tensor)
    total = sum(math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype] for tensor in tensors.values())
    cut = cut_slices(tensors)
    shares = []
    for rank, own in enumerate(names):
        mine = cut[rank :: len(names)]
        known = tensors if rank == 0 else {one.tensor: tensors[one.tensor] for one in mine}
        shares.append(Share(sorted(own), mine, known, min(len(cut), len(names)), total))
    return shares


def check_held(name: str, held: LocalShard) -> None:
    """ValueError if the tensor is not the piece, or the piece not inside of its shape."""
    piece, tensor = held
    if tuple(tensor.shape) != tuple(piece.sizes):
        raise ValueError(f"tensor {name!r}: the local shape {tuple(tensor.shape)} must be the piece's sizes {tuple(piece.sizes)}")
    spans = zip(piece.shape, piece.offsets, piece.sizes, strict=True)
    if any(offset < 0 or offset + size > extent for extent, offset, size in spans):
        raise ValueError(f"tensor {name!r}: {span(piece)} must lie inside of the shape {tuple(piece.shape)}")


def span(piece: ShardMetadata) -> str:
    """The piece as slices are written."""
    return "[" + ", ".join(f"{offset}:{offset + size}" for offset, size in zip(piece.offsets, piece.sizes, strict=True)) + "]"


def dtype_name(dtype: torch.dtype) -> str:
    """Without torch's name before it."""
    return str(dtype).removeprefix("torch.")


def _offer(name: str, held: LocalShard) -> Offer:
    check_held(name, held)
    piece, tensor = held
    if tensor.dtype not in CODES:
        known = ", ".join(map(dtype_name, CODES))
        raise ValueError(f"tensor {name!r}: dtype {dtype_name(tensor.dtype)} cannot be saved; these can: {known}")
    return Offer(name, CODES[tensor.dtype], tuple(piece.shape), tuple(piece.offsets), tuple(piece.sizes))


def _agreed_tensors(offers: list[list[Offer]]) -> dict[str, TensorRecord]:
    """Each tensor by name, without chunks yet; all ranks that hold a piece must mean the same tensor."""
    tensors: dict[str, TensorRecord] = {}
    for offer in _all(offers):
        known = tensors.setdefault(offer.name, TensorRecord(offer.dtype, offer.shape, []))
        if (known.dtype, known.shape) != (offer.dtype, offer.shape):
            kinds = " and ".join(f"{dtype_name(DTYPES[one.dtype])} {one.shape}" for one in (known, offer))
            raise ValueError(f"tensor {offer.name!r}: shape and dtype must be the same on all ranks, not {kinds}")
    return tensors


def _writers(offers: list[list[Offer]]) -> dict[Offer, int]:
    """The rank that writes each rectangle: largest first, to the rank with the fewest bytes so far among those that hold it."""
    holders: dict[Offer, list[int]] = defaultdict(list)
    for rank, own in enumerate(offers):
        for offer in own:
            if offer.bytes:
                holders[offer].append(rank)
    load = [0] * len(offers)
    writer: dict[Offer, int] = {}
    # What only one rank holds comes first: there is no choice, and it counts for the choices after it.
    for offer in sorted(holders, key=lambda one: (len(holders[one]) > 1, -one.bytes)):
        writer[offer] = min(holders[offer], key=load.__getitem__)
        load[writer[offer]] += offer.bytes
    return writer


def _check_tiling(name: str, tensor: TensorRecord) -> None:
    """The chunks cover the tensor without overlap."""
    if not disjoint([ShardMetadata(tensor.shape, chunk.offsets, chunk.sizes) for chunk in tensor.chunks]):
        raise ValueError(f"tensor {name!r}: two ranks hold pieces that overlap but differ; pieces must be equal or apart")
    covered, total = sum(math.prod(chunk.sizes) for chunk in tensor.chunks), math.prod(tensor.shape)
    if covered != total:
        raise ValueError(f"tensor {name!r}: the ranks hold {covered} of its {total} elements; the pieces must make up the whole")


def _all(offers: Iterable[list[Offer]]) -> Iterator[Offer]:
    return (offer for own in offers for offer in own)
