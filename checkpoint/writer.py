"""One rank's part of a save. It talks to the other ranks through files alone, so it may run in a thread while training goes on.

Each rank writes its file of tensors and then a note about it, in JSON; rank 0 waits for all notes, writes the manifest and gives
the folder its final name. A rank that fails leaves a note of that, which ends the others.
"""

import contextlib
import itertools
import json
import operator
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..parallel.failpoints import failpoint
from ..parallel.shard import LocalShard, ShardMetadata
from .expert_hashes import ExpertSums
from .folder import REPLACED
from .fsync import sync, sync_folder, write_durably
from .manifest import MANIFEST, FileRecord, Manifest, write_manifest
from .safetensors_file import hash_file, write_safetensors
from .save_plan import SavePlan
from .tensor_groups import file_of_rank

if TYPE_CHECKING:
    import torch

TEMPORARY = ".tmp-"
LONGEST_PAUSE = 0.2
"""Seconds between two looks for notes."""


class Stopped(Exception):
    """Another rank failed, or nobody waits for this save any more."""


@dataclass
class SaveJob:
    """A save as this rank knows it."""

    final: Path
    temporary: Path
    step: int
    facts: dict[str, Any]
    rank: int
    world: int
    plan: SavePlan
    limit_seconds: float
    attach: Callable[[Path], None] | None = None
    """On rank 0: writes further files into the folder."""
    read: "Callable[[str], torch.Tensor] | None" = None
    """Gives the values of a tensor when it is written; None: the shards have them."""
    stop: Event = field(default_factory=Event)
    """Set by another thread to end the writing."""


Staged = Iterator[tuple[str, LocalShard]]
"""Consecutive parts of all shards, in the order of the file; see `HostStaging.copy_in_turns`."""


def write_part(job: SaveJob, shards: dict[str, LocalShard], staged: Staged | None = None) -> None:
    """Writes this rank's part of a save. Its tensors must not change meanwhile. Rank 0 gives the checkpoint its final name.

    staged: has the values; the tensors may then be on the meta device.
    """
    try:
        _Writer(job, staged).run(shards)
    except BaseException as error:
        if not isinstance(error, Stopped):
            with contextlib.suppress(OSError):
                _write_note(job.temporary / f"failed_{job.rank:05d}.note", error_text(error))
        raise


def error_text(error: BaseException) -> str:
    """Returns the type and message."""
    return f"{type(error).__name__}: {error}"


class _Writer:
    def __init__(self, job: SaveJob, staged: Staged | None) -> None:
        self.job = job
        self.staged = itertools.groupby(staged, operator.itemgetter(0)) if staged is not None else None
        self.end = monotonic() + job.limit_seconds

    def run(self, shards: dict[str, LocalShard]) -> None:
        job = self.job
        note = self._write_shards({name: shards[name] for name in job.plan.names})
        if job.rank > 0:
            _write_note(self._note(job.rank), note)
        else:
            self._commit(*self._gather(note))

    def _write_shards(self, shards: dict[str, LocalShard]) -> dict[str, Any]:
        """Writes the file of this rank. Returns the note: its size and hash, and the sums of the experts' elements in it."""
        if not shards:
            return {"record": None, "experts": {}}
        job, experts = self.job, ExpertSums()
        reading = dict[str, ShardMetadata]()

        def read(name: str) -> Iterator["torch.Tensor"]:
            for metadata, tensor in self._values(name, shards[name]):
                reading[name] = metadata
                yield tensor

        def on_content(name: str, content: memoryview) -> None:
            failpoint("checkpoint.shard_begun", job.step)
            self._check()
            experts.add(name, reading[name], content)

        path = job.temporary / file_of_rank(job.rank)
        record = write_safetensors(path, {name: shard.tensor for name, shard in shards.items()}, on_content, read)
        failpoint("checkpoint.shard_written", job.step)
        return {"record": record, "experts": experts.sums}

    def _values(self, name: str, shard: LocalShard) -> Iterable[LocalShard]:
        """Returns the values of a shard, in parts."""
        if self.staged is not None:
            found, parts = next(self.staged)
            assert found == name
            return (part for _, part in parts)
        return [shard if self.job.read is None else LocalShard(shard.metadata, self.job.read(name))]

    def _commit(self, files: dict[str, FileRecord], experts: dict[str, dict[str, list[str]]]) -> None:
        """Makes the files of all ranks a checkpoint."""
        job = self.job
        failpoint("checkpoint.before_manifest", job.step)
        for note in job.temporary.glob("*.note"):
            note.unlink()
        attachments = self._attach()
        manifest = Manifest(job.step, job.facts, job.plan.tensors, files, attachments, experts)
        write_manifest(job.temporary / MANIFEST, manifest)
        sync_folder(job.temporary)
        failpoint("checkpoint.before_rename", job.step)
        self._check()
        give_name(job.temporary, job.final)
        failpoint("checkpoint.renamed", job.step)

    def _attach(self) -> dict[str, FileRecord]:
        """Has `job.attach` write its files, into folders next to the tensors. Returns their records."""
        folder = self.job.temporary
        if self.job.attach is not None:
            self.job.attach(folder)
        records = {}
        for path in sorted(folder.glob("*/*")):
            with path.open("rb+") as file:
                sync(file)
            records[path.relative_to(folder).as_posix()] = FileRecord(path.stat().st_size, hash_file(path))
        for inner in {path.parent for path in folder.glob("*/*")}:
            sync_folder(inner)
        return records

    def _gather(self, mine: dict[str, Any]) -> tuple[dict[str, FileRecord], dict[str, dict[str, list[str]]]]:
        """Returns the files and the hashes of experts of all ranks, on rank 0, once the notes of all are there."""
        files: dict[str, FileRecord] = {}
        experts, waiting, pause = ExpertSums(), set(range(1, self.job.world)), 0.002

        def take(rank: int, note: dict[str, Any]) -> None:
            if note["record"]:
                files[file_of_rank(rank)] = FileRecord(*note["record"])
            experts.merge(note["experts"])

        take(0, mine)
        while waiting:
            names = {path.name for path in self.job.temporary.iterdir()}
            arrived = [rank for rank in waiting if self._note(rank).name in names]
            for rank in arrived:
                take(rank, json.loads(self._note(rank).read_bytes()))
            waiting.difference_update(arrived)
            if waiting:
                if any(name.startswith("failed_") for name in names):
                    raise Stopped("another rank failed")
                self._check()
                self.job.stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        return dict(sorted(files.items())), experts.hashes()

    def _note(self, rank: int) -> Path:
        return self.job.temporary / f"shard_{rank:05d}.note"

    def _check(self) -> None:
        """Raises Stopped or TimeoutError if this save cannot become a checkpoint any more."""
        if self.job.stop.is_set():
            raise Stopped("stopped")
        if monotonic() > self.end:
            raise TimeoutError(f"the save took longer than checkpoint.timeout_seconds={self.job.limit_seconds:g}")


def sibling(path: Path, tag: str) -> Path:
    """Returns an unused name in the folder of `path`: its own name, `tag` and random digits."""
    return path.with_name(f"{path.name}{tag}{secrets.token_hex(4)}")


def give_name(temporary: Path, final: Path) -> None:
    """Renames the complete folder `temporary` to `final`. An existing `final` is set aside first and removed last."""
    old = sibling(final, REPLACED) if final.exists() else None
    if old:
        final.rename(old)
    try:
        temporary.rename(final)
    except BaseException:
        if old:
            old.rename(final)
        raise
    sync_folder(final.parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def _write_note(path: Path, content: Any) -> None:
    write_durably(path, json.dumps(content).encode())
