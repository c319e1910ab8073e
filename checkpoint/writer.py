"""One rank's part of a save, from its first byte to the name of the whole. It talks to the other ranks through files alone.

So it may run in a thread beside the training. Each rank writes its shard and then a note about it, in JSON; rank 0 waits for all
notes, writes the manifest and gives the folder its name. A rank that fails leaves a note of that, which ends the others.
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
from typing import Any

from ..parallel.failpoints import failpoint
from ..parallel.shard import LocalShard
from .expert_hashes import Hashes, expert_hashes, hash_held, hash_stored
from .folder import REPLACED
from .fsync import sync, sync_folder, write_durably
from .manifest import MANIFEST, FileRecord, Manifest, write_manifest
from .safetensors_file import hash_file, write_shard
from .save_plan import Share, shard_name

TEMPORARY = ".tmp-"
LONGEST_PAUSE = 0.2


class Stopped(Exception):
    """Another rank failed, or nobody waits for this save any more."""


@dataclass
class Job:
    """A save as this rank knows it."""

    final: Path
    temporary: Path
    step: int
    facts: dict[str, Any]
    rank: int
    world: int
    share: Share
    limit_seconds: float
    attach: Callable[[Path], None] | None = None
    """Rank 0: writes further files into the folder."""
    stop: Event = field(default_factory=Event)
    """Set from outside to end the writing."""


def write_share(job: Job, held: dict[str, LocalShard]) -> None:
    """Everything this rank has to do; rank 0 returns once the checkpoint has its name. `held` must not change meanwhile."""
    try:
        _Writing(job).run(held)
    except BaseException as error:
        if not isinstance(error, Stopped):
            with contextlib.suppress(OSError):
                _write_note(job.temporary / f"failed_{job.rank:05d}.note", describe(error))
        raise


def describe(error: BaseException) -> str:
    """Type and text."""
    return f"{type(error).__name__}: {error}"


def discard(temporary: Path) -> None:
    """Remove what a failed save has left; for one rank, when all have stopped."""
    shutil.rmtree(temporary, ignore_errors=True)


class _Writing:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.end = monotonic() + job.limit_seconds

    def run(self, held: dict[str, LocalShard]) -> None:
        job, share = self.job, self.job.share
        note = self._write_shard({name: held[name] for name in share.names})
        if job.world > 1:
            _write_note(self._place("shard", job.rank), note)
        if share.slices or job.rank == 0:
            notes = self._gather("shard", range(job.world), note)
            read = hash_stored(job.temporary, share.tensors, share.slices, self._go_on)
            if job.rank == 0:
                hashes = [note["slices"] for note in notes] + self._gather("slices", range(share.readers), read)
                self._commit({note["file"]: FileRecord(*note["record"]) for note in notes if note["file"]}, hashes)
            else:
                _write_note(self._place("slices", job.rank), read)

    def _write_shard(self, held: dict[str, LocalShard]) -> dict[str, Any]:
        """Returns the note about it: file, size and hash, and the hashes of the slices of experts that it holds whole."""
        job, slices = self.job, Hashes()

        def see(name: str, content: memoryview) -> None:
            failpoint("checkpoint.shard_begun", job.step)
            self._go_on()
            if found := hash_held(name, held[name].metadata, content):
                slices[name] = found

        if not held:
            return {"file": None, "record": None, "slices": {}}
        path = job.temporary / shard_name(job.rank)
        record = write_shard(path, {name: one.tensor for name, one in held.items()}, see)
        failpoint("checkpoint.shard_written", job.step)
        return {"file": path.name, "record": record, "slices": slices}

    def _commit(self, files: dict[str, FileRecord], hashes: list[Hashes]) -> None:
        """What all ranks wrote becomes a checkpoint."""
        job = self.job
        failpoint("checkpoint.before_manifest", job.step)
        for note in job.temporary.glob("*.note"):
            note.unlink()
        attachments = self._attach()
        manifest = Manifest(job.step, job.facts, job.share.tensors, files, attachments, expert_hashes(hashes))
        write_manifest(job.temporary / MANIFEST, manifest)
        sync_folder(job.temporary)
        failpoint("checkpoint.before_rename", job.step)
        self._go_on()
        give_name(job.temporary, job.final)
        failpoint("checkpoint.renamed", job.step)

    def _attach(self) -> dict[str, FileRecord]:
        """The files that `job.attach` makes in folders beside the shards."""
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
        """The notes of the ranks, when all are there."""
        found = {self.job.rank: mine}
        pause = 0.002
        while waiting := [rank for rank in ranks if rank not in found]:
            there = {path.name for path in self.job.temporary.iterdir()}
            arrived = [rank for rank in waiting if self._place(kind, rank).name in there]
            found |= {rank: json.loads(self._place(kind, rank).read_bytes()) for rank in arrived}
            if len(arrived) < len(waiting):
                if any(name.startswith("failed_") for name in there):
                    raise Stopped("another rank failed")
                self._go_on()
                self.job.stop.wait(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        return [found[rank] for rank in ranks]

    def _place(self, kind: str, rank: int) -> Path:
        return self.job.temporary / f"{kind}_{rank:05d}.note"

    def _go_on(self) -> None:
        """Raises if this save cannot become a checkpoint any more."""
        if self.job.stop.is_set():
            raise Stopped("stopped")
        if monotonic() > self.end:
            raise TimeoutError(f"the save took longer than checkpoint.timeout_seconds={self.job.limit_seconds:g}")


def beside(path: Path, tag: str) -> Path:
    """Another name for `path` in the same folder."""
    return path.with_name(f"{path.name}{tag}{secrets.token_hex(4)}")


def give_name(temporary: Path, final: Path) -> None:
    """Rename the complete folder `temporary` to `final`. A folder of that name is set aside first and removed last."""
    old = beside(final, REPLACED) if final.exists() else None
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
