"""Checks that a checkpoint is what was written: presence, sizes, headers and hashes of its files."""

from collections.abc import Callable
from pathlib import Path

from ..parallel.object_collectives import from_first, on_each_rank, rank_and_world
from .expert_hashes import stored_hashes
from .expert_hashes_1 import stored_hashes_1
from .manifest import MANIFEST, DamagedCheckpoint, Manifest, check_sizes, check_unlisted, read_manifest
from .safetensors_file import hash_file, open_safetensors
from .tensor_groups import tensors_by_file


def verify_checkpoint(path: Path) -> None:
    """Raises DamagedCheckpoint, the same on every rank, if a file is not what was written.

    Collective; the ranks share the reading.
    """
    manifest = from_first(lambda: read_manifest(path))
    on_each_rank(lambda: check_files(path, manifest, *rank_and_world()), f"checkpoint {path} was not verified")


def check_all(path: Path, count: Callable[[int], None] = lambda size: None) -> Manifest:
    """Checks every byte, header and expert hash of `path`, a part of one expert at a time in memory, and returns the manifest.

    `count` is called with bytes that were hashed. Raises DamagedCheckpoint for the first that is wrong. Not collective.
    """
    manifest = read_manifest(path)
    check_files(path, manifest, count=count)
    check_unlisted(path, manifest)
    if manifest.experts:
        hashes = stored_hashes_1 if manifest.version == 1 else stored_hashes
        found = hashes(path, manifest.tensors)
        for layer in sorted(found.keys() | manifest.experts.keys()):
            if found.get(layer) != manifest.experts.get(layer):
                raise DamagedCheckpoint(path / MANIFEST, f"{path / MANIFEST}: the experts of {layer} are not those it states")
    return manifest


def check_files(
    path: Path, manifest: Manifest, rank: int = 0, world: int = 1, count: Callable[[int], None] = lambda size: None
) -> None:
    """Checks every `world`-th file from the `rank`-th on. Raises DamagedCheckpoint for the first that is missing or was changed."""
    share = sorted(manifest.files | manifest.attachments)[rank::world]
    check_sizes(path, manifest, share)
    check_headers(path, manifest, {name for name in share if name in manifest.files})
    for name in share:
        if hash_file(path / name, count) != (manifest.files | manifest.attachments)[name].hash:
            reason = f"checkpoint file {path / name} is damaged: its hash is not the one in {MANIFEST}"
            raise DamagedCheckpoint(path / name, reason)


def check_headers(path: Path, manifest: Manifest, names: set[str]) -> None:
    """Raises DamagedCheckpoint if a file's own header differs from the manifest in the dtype or shape of a tensor."""
    for name, tensors in tensors_by_file(manifest.tensors, names).items():
        with open_safetensors(path / name) as file:
            keys = set(file.keys())
            for key, stated in tensors:
                view = file.get_slice(key) if key in keys else None
                if view is None or (view.get_dtype(), tuple(view.get_shape())) != stated:
                    reason = f"checkpoint file {path / name} does not hold {key!r} as {MANIFEST} says: {stated}"
                    raise DamagedCheckpoint(path / name, reason)
