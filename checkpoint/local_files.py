"""The files of the node-local tier: in the folder of a host, a folder for each step with two files for each rank.

    FOLDER/RUN-TIMELINE/HOST/step_00000012/rank_00003_of_00004.safetensors    all that rank 3 holds
    FOLDER/RUN-TIMELINE/HOST/step_00000012/rank_00003_of_00004.json           its note: size, hash and rectangles

The note is written last and renamed into place, so a rank's part is there exactly when its note is. A step is whole when the notes
of all ranks are there, on whichever hosts.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ..parallel.shard import LocalShard, ShardMetadata
from .bounded import read_regular, short_message, strict_json
from .facts import check_facts
from .folder import checkpoints_in, step_of
from .fsync import sync_folder, write_durably
from .manifest import DamagedCheckpoint, FileRecord
from .safetensors_file import CODES, hash_file, write_safetensors

NOTE = re.compile(r"rank_(\d{5,})_of_(\d{5,})\.json")
LARGEST_NOTE = 1 << 28
"""Bytes."""


class HeldRectangle(NamedTuple):
    """A rectangle in a rank's file."""

    dtype: str
    metadata: ShardMetadata


class RankNote(NamedTuple):
    """What a rank's file holds."""

    record: FileRecord
    tensors: dict[str, HeldRectangle]
    facts: dict[str, Any] | None
    """Of rank 0 alone."""


def rank_files(folder: Path, step: int, rank: int, world: int) -> list[Path]:
    """Returns the tensors' file and the note of a rank."""
    stem = folder / f"step_{step:08d}" / f"rank_{rank:05d}_of_{world:05d}"
    return [stem.with_suffix(".safetensors"), stem.with_suffix(".json")]


def write_rank(files: list[Path], shards: dict[str, LocalShard], facts: dict[str, Any] | None) -> int:
    """Writes a rank's part of a save, durably. Returns its bytes. A part of the same name is replaced."""
    path, note = files
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in (note, path):
        old.unlink(missing_ok=True)
    record = write_safetensors(path, {name: shard.tensor for name, shard in shards.items()})
    held = {name: [CODES[tensor.dtype], *map(list, metadata)] for name, (metadata, tensor) in shards.items()}
    content = {"file": list(record), "tensors": held, "facts": facts}
    write_durably(note, json.dumps(content | {"hash": _hash(content)}).encode())
    sync_folder(path.parent)
    return record.bytes


def read_note(files: list[Path]) -> RankNote:
    """Returns the note of a rank's part after every byte of that was compared with it. Raises DamagedCheckpoint."""
    path, note = files
    try:
        content = strict_json(read_regular(note, LARGEST_NOTE))
        stated = content.pop("hash")
        if stated != _hash(content):
            raise ValueError("it does not have the hash that it states")
        tensors = {
            name: HeldRectangle(dtype, ShardMetadata(*map(tuple, place))) for name, (dtype, *place) in content["tensors"].items()
        }
        facts = content["facts"] and check_facts(content["facts"])
        found = RankNote(FileRecord(*content["file"]), tensors, facts)
        if (path.stat().st_size, hash_file(path)) != found.record:
            raise ValueError(f"{path.name} does not have the bytes that it states")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(note, f"local save {note} is refused: {short_message(error)}") from None
    return found


def parts_in(folder: Path) -> set[tuple[int, int, int]]:
    """Returns (step, world, rank) of each part in a host's folder that has its note; no file is opened."""
    found = ((step_of(step), NOTE.fullmatch(path.name)) for step in checkpoints_in(folder) for path in step.iterdir())
    return {(step, int(match[2]), int(match[1])) for step, match in found if match}


def remove_steps(folder: Path, below: int | None = None, but: int | None = None) -> None:
    """Removes the steps of a host's folder: those below `below` (None: all), but not `but`."""
    for path in checkpoints_in(folder):
        if step_of(path) != but and (below is None or step_of(path) < below):
            shutil.rmtree(path, ignore_errors=True)


def _hash(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
