"""Is a checkpoint what it was when it was written? Asked before any tensor is changed, of all files, by all ranks together."""

from pathlib import Path

from ..parallel.object_collectives import from_all, from_first, rank_and_world
from .expert_hashes import expert_hashes, hash_stored, slices
from .manifest import MANIFEST, DamagedCheckpoint, Manifest, check_sizes, check_unlisted, read_manifest
from .safetensors_file import hash_file, open_shard


def verified(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`, whose files are all as it says. Collective; the ranks share the reading.

    DamagedCheckpoint, the same on every rank, if they are not.
    """
    manifest = from_first(lambda: read_manifest(path))
    rank, world = rank_and_world()
    failure = None
    try:
        check_files(path, manifest, rank, world)
    except DamagedCheckpoint as error:
        failure = error
    failures = [each for each in from_all(failure) if each is not None]
    if failures:
        raise failures[0]
    return manifest


def check_all(path: Path) -> Manifest:
    """The manifest of `path`, all of whose bytes, headers and experts were checked; not collective, a slice at a time in memory.

    DamagedCheckpoint for the first that is wrong.
    """
    manifest = read_manifest(path)
    check_files(path, manifest)
    check_unlisted(path, manifest)
    if manifest.experts:
        wanted = [one for name, record in manifest.tensors.items() for one in slices(name, record.shape)]
        found = expert_hashes([hash_stored(path, manifest.tensors, wanted, lambda: None)])
        for layer in sorted(found.keys() | manifest.experts.keys()):
            if found.get(layer) != manifest.experts.get(layer):
                raise DamagedCheckpoint(path / MANIFEST, f"{path / MANIFEST}: the experts of {layer} are not those it states")
    return manifest


def check_files(path: Path, manifest: Manifest, rank: int = 0, world: int = 1) -> None:
    """DamagedCheckpoint for the first of this rank's share of the files that is missing, or does not hold what it should."""
    share = sorted(manifest.files | manifest.attachments)[rank::world]
    check_sizes(path, manifest, share)
    check_headers(path, manifest, {name for name in share if name in manifest.files})
    for name in share:
        check_hash(path, manifest, name)


def check_headers(path: Path, manifest: Manifest, names: set[str]) -> None:
    """DamagedCheckpoint if a file's own header differs from the manifest in the dtype or shape of a tensor."""
    wanted: dict[str, list[tuple[str, tuple[str, tuple[int, ...]]]]] = {name: [] for name in names}
    for record in manifest.tensors.values():
        for chunk in record.chunks:
            if chunk.file in names:
                wanted[chunk.file].append((chunk.key, (record.dtype, chunk.sizes)))
    for name, tensors in wanted.items():
        with open_shard(path / name) as file:
            keys = set(file.keys())
            for key, said in tensors:
                view = file.get_slice(key) if key in keys else None
                if view is None or (view.get_dtype(), tuple(view.get_shape())) != said:
                    reason = f"checkpoint file {path / name} does not hold {key!r} as {MANIFEST} says: {said}"
                    raise DamagedCheckpoint(path / name, reason)


def check_hash(path: Path, manifest: Manifest, name: str) -> None:
    """DamagedCheckpoint if the bytes of a file are not those that were written."""
    if hash_file(path / name) != (manifest.files | manifest.attachments)[name].hash:
        raise DamagedCheckpoint(path / name, f"checkpoint file {path / name} is damaged: its hash is not the one in {MANIFEST}")
