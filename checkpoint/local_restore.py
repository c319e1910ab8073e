"""Finds the newest local save of which the ranks together can reach every part, and fills tensors of any layout from it.

A part may be on its own host or on the one that has the copy. What a rank does not have comes from the rank that has it, through
the process group, a rectangle at a time. Ranks that find all that they hold on their own host exchange nothing.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..parallel.object_collectives import any_rank, from_all, message_device
from ..parallel.progress import progress
from ..parallel.shard import LocalShard, ShardMetadata
from .hosts import CHUNK, Hosts
from .local_files import RankNote, parts_in, rank_files, read_note
from .manifest import DamagedCheckpoint
from .safetensors_file import CODES, DTYPES, open_safetensors, read_rectangle
from .tensor_reader import overlap, within

Part = tuple[int, int, int]
"""Step, world and rank of a part."""


@dataclass
class LocalSave:
    """A local save of which every part was read and verified by the rank that provides it."""

    step: int
    folder: Path
    providers: list[int]
    """The rank of now that reads the part of each rank of then."""
    notes: dict[int, RankNote]
    """The parts that this rank provides."""
    facts: dict[str, Any]
    generators: set[str]
    """Kinds of random states in it."""


def find_local(folder: Path, hosts: Hosts, newer_than: int, refused: Callable[[DamagedCheckpoint], None]) -> LocalSave | None:
    """Returns the newest save after the step `newer_than` that all ranks together can read, None without one. Collective.

    `folder`: that of this host. Parts that are damaged are told to `refused` and count as missing.
    """
    held = parts_in(folder) if hosts.first else set()
    while True:
        found = newest_whole(from_all(held), hosts)
        if found is None or found[0] <= newer_than:
            return None
        step, providers = found
        notes, damaged = {}, {}
        for rank in (rank for rank, provider in enumerate(providers) if provider == hosts.rank):
            try:
                notes[rank] = read_note(rank_files(folder, step, rank, len(providers)))
            except DamagedCheckpoint as error:
                damaged[rank] = error
                refused(error)
        lost = {(hosts.names[rank], place) for rank, places in enumerate(from_all(list(damaged))) for place in places}
        if not lost:
            break
        held = {part for part in held if (part[0], part[1]) != (step, len(providers)) or (hosts.name, part[2]) not in lost}
    box: list[Any] = [None]
    if 0 in notes:
        kinds = {name.split(".")[1] for name in notes[0].tensors if name.startswith("random.")}
        box = [(notes[0].facts, kinds)]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=providers[0])
    return LocalSave(step, folder, providers, notes, *box[0])


def newest_whole(held: list[set[Part]], hosts: Hosts) -> tuple[int, list[int]] | None:
    """Returns the newest step of which all parts are somewhere, and the provider of each part; None without one.

    held: by rank, what its host has. A part is provided by the rank of its number if that is on a host that has it, else by
    a rank of the first such host: all of its ranks in turn.
    """
    places: dict[tuple[int, int], dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, parts in zip(hosts.names, held, strict=True):
        for step, world, rank in parts:
            places[step, world][rank].append(name)
    whole = [(step, world) for (step, world), parts in places.items() if set(parts) == set(range(world))]
    if not whole:
        return None
    step, world = max(whole)
    providers = []
    for rank in range(world):
        there = places[step, world][rank]
        own = rank < len(hosts.names) and hosts.names[rank] in there
        ranks = hosts.on(there[0])
        providers.append(rank if own else ranks[rank % len(ranks)])
    return step, providers


# Filling tensors: first what this rank has itself, then what others have of the rest.


class Piece(NamedTuple):
    """A rectangle that a rank provides, in the part of the rank `part`; or one that a rank wants."""

    rank: int
    dtype: str
    metadata: ShardMetadata
    part: int = -1


def fill_from_local(save: LocalSave, shards: dict[str, LocalShard]) -> None:
    """Copies the values of `save` into the tensors of `shards`, whatever layout they are of. Collective.

    Raises ValueError, on every rank and before any tensor changes, if an element is in no part.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    with ExitStack() as stack:
        files = {
            part: stack.enter_context(open_safetensors(rank_files(save.folder, save.step, part, len(save.providers))[0]))
            for part in save.notes
        }
        own = {name: part for name, shard in shards.items() if (part := _part_with(save, name, shard)) is not None}
        wanted = {name: _piece(rank, shard) for name, shard in shards.items() if name not in own and shard.tensor.numel()}
        if any_rank(bool(wanted))[0]:
            wants = _by_name(from_all(wanted))
            provided = _by_name(from_all(_provided(save, rank, wants)))
            moves = [move for name in sorted(wants) for move in _moves(name, wants[name], provided.get(name, []))]
        else:
            moves = []
        for name, part in own.items():
            shards[name].tensor.detach().copy_(files[part].get_tensor(name))
        for name, source, target in moves:
            _move(name, source, target, rank, files, shards)


def _part_with(save: LocalSave, name: str, shard: LocalShard) -> int | None:
    """Returns a part of this rank that has exactly this shard."""
    wanted = ShardMetadata(*map(tuple, shard.metadata))
    for part, note in save.notes.items():
        held = note.tensors.get(name)
        if held is not None and held.metadata == wanted and DTYPES.get(held.dtype) == shard.tensor.dtype:
            return part
    return None


def _piece(rank: int, shard: LocalShard) -> Piece:
    return Piece(rank, CODES[shard.tensor.dtype], ShardMetadata(*map(tuple, shard.metadata)))


def _by_name(pieces: list[Any]) -> dict[str, list[Piece]]:
    """Returns the pieces of all ranks, by tensor. Each rank gives one or a list of them by name."""
    found: dict[str, list[Piece]] = defaultdict(list)
    for by_name in pieces:
        for name, one in by_name.items():
            found[name] += one if isinstance(one, list) else [one]
    return found


def _provided(save: LocalSave, rank: int, wants: dict[str, list[Piece]]) -> dict[str, list[Piece]]:
    """Returns what this rank has of what any rank wants."""
    found: dict[str, list[Piece]] = defaultdict(list)
    for part, note in save.notes.items():
        for name in wants.keys() & note.tensors.keys():
            dtype, metadata = note.tensors[name]
            if any(_common(metadata, want.metadata) for want in wants[name]):
                found[name].append(Piece(rank, dtype, metadata, part))
    return dict(found)


def _common(one: ShardMetadata, other: ShardMetadata) -> ShardMetadata | None:
    return overlap(one, other) if one.shape == other.shape else None


def _moves(name: str, wants: list[Piece], provided: list[Piece]) -> Iterator[tuple[str, Piece, Piece]]:
    """Yields which rectangle of which part fills which want, the same list on every rank.

    Parts are equal or apart: of equal ones the own is taken, or one of another rank in turn. Raises ValueError if something is
    missing.
    """
    equal: dict[tuple[str, ShardMetadata], list[Piece]] = defaultdict(list)
    for piece in provided:
        equal[piece.dtype, piece.metadata].append(piece)
    for want in wants:
        missing = math.prod(want.metadata.sizes)
        for (dtype, metadata), pieces in equal.items():
            common = _common(metadata, want.metadata)
            if common is None or dtype != want.dtype or missing <= 0:
                continue
            missing -= math.prod(common.sizes)
            source = next((piece for piece in pieces if piece.rank == want.rank), pieces[want.rank % len(pieces)])
            yield name, source, want._replace(metadata=common)
        if missing:
            raise ValueError(
                f"the local save lacks {missing} elements of the tensor {name!r} as {want.dtype}: it is of another run"
            )


def _move(name: str, source: Piece, target: Piece, rank: int, files: dict[int, Any], shards: dict[str, LocalShard]) -> None:
    """Copies one rectangle, through messages of at most CHUNK bytes if two ranks are concerned."""
    if rank not in (source.rank, target.rank):
        return
    progress()
    values = torch.empty(target.metadata.sizes, dtype=DTYPES[source.dtype])
    if rank == source.rank:
        values = read_rectangle(files[source.part], name, within(source.metadata, target.metadata)).contiguous()
    if source.rank != target.rank:
        flat = values.view(-1).view(torch.uint8)
        for chunk in flat.split(CHUNK):
            moved = chunk.to(message_device())
            if rank == source.rank:
                dist.send(moved, target.rank)
            else:
                dist.recv(moved, source.rank)
                chunk.copy_(moved)
    if rank == target.rank:
        metadata, tensor = shards[name]
        within(metadata, target.metadata).cut(tensor.detach()).copy_(values)
