"""One rank's part of a save. It talks to the other ranks through files alone, so it may run in a thread while training goes on.

Each rank writes its file of tensors and then a note about it, in JSON; rank 0 waits for all notes, writes the manifest and gives
the folder its final name. A rank that fails leaves a note of that, which ends the others.
"""

import contextlib
import json
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..parallel.failpoints import failpoint
from ..parallel.shard import LocalShard
from .expert_hashes import SliceHashes, expert_hashes, hash_stored_slices, hash_whole_slices
from .folder import REPLACED
from .fsync import sync, sync_folder, write_durably
from .manifest import MANIFEST, FileRecord, Manifest, write_manifest
from .safetensors_file import hash_file, write_safetensors
from .save_plan import SavePlan, file_of_rank

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


def write_part(job: SaveJob, shards: dict[str, LocalShard]) -> None:
    """Writes this rank's part of a save. Its tensors must not change meanwhile. Rank 0 gives the checkpoint its final name."""
    try:
        _Writer(job).run(shards)
    except BaseException as error:
        if not isinstance(error, Stopped):
            with contextlib.suppress(OSError):
                _write_note(job.temporary / f"failed_{job.rank:05d}.note", error_text(error))
        raise


def error_text(error: BaseException) -> str:
    """Returns the type and message."""
    return f"{type(error).__name__}: {error}"


class _Writer:
    def __init__(self, job: SaveJob) -> None:
        self.job = job
        self.end = monotonic() + job.limit_seconds

    def run(self, shards: dict[str, LocalShard]) -> None:
        job, plan = self.job, self.job.plan
        note = self._write_shards({name: shards[name] for name in plan.names})
        if job.world > 1:
            _write_note(self._note("shard", job.rank), note)
        if plan.slices or job.rank == 0:
            notes = self._gather("shard", range(job.world), note)
            hashes = hash_stored_slices(job.temporary, plan.tensors, plan.slices, self._check)
            if job.rank == 0:
                files = {note["file"]: FileRecord(*note["record"]) for note in notes if note["file"]}
                self._commit(files, [note["slices"] for note in notes] + self._gather("slices", range(plan.hashing_ranks), hashes))
            else:
                _write_note(self._note("slices", job.rank), hashes)

    def _write_shards(self, shards: dict[str, LocalShard]) -> dict[str, Any]:
        """Writes the file of this rank. Returns the note: its name, size and hash, and the hashes of the expert slices in it."""
        if not shards:
            return {"file": None, "record": None, "slices": {}}
        job, slices = self.job, SliceHashes()

        def on_content(name: str, content: memoryview) -> None:
            failpoint("checkpoint.shard_begun", job.step)
            self._check()
            if hashes := hash_whole_slices(name, shards[name].metadata, content):
                slices[name] = hashes

        path = job.temporary / file_of_rank(job.rank)
        record = write_safetensors(path, {name: shard.tensor for name, shard in shards.items()}, on_content, job.read)
        failpoint("checkpoint.shard_written", job.step)
        return {"file": path.name, "record": record, "slices": slices}

    def _commit(self, files: dict[str, FileRecord], hashes: list[SliceHashes]) -> None:
        """Makes the files of all ranks a checkpoint."""
        job = self.job
        failpoint("checkpoint.before_manifest", job.step)
        for note in job.temporary.glob("*.note"):
            note.unlink()
        attachments = self._attach()
        manifest = Manifest(job.step, job.facts, job.plan.tensors, files, attachments, expert_hashes(hashes))
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

    def _gather(self, kind: str, ranks: range, mine: Any) -> list[Any]:
        """Returns the notes of `ranks`, once all are there; `mine` is this rank's."""
        found = {self.job.rank: mine}
        pause = 0.002
        while waiting := [rank for rank in ranks if rank not in found]:
            names = {path.name for path in self.job.temporary.iterdir()}
            arrived = [rank for rank in waiting if self._note(kind, rank).name in names]
            found |= {rank: json.loads(self._note(kind, rank).read_bytes()) for rank in arrived}
            if len(arrived) < len(waiting):
                if any(name.startswith("failed_") for name in names):
                    raise Stopped("another rank failed")
                self._check()
                self.job.stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        return [found[rank] for rank in ranks]

    def _note(self, kind: str, rank: int) -> Path:
        return self.job.temporary / f"{kind}_{rank:05d}.note"

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
