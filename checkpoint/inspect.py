"""What a checkpoint holds, from its manifest alone. No torch here."""

import math
from pathlib import Path
from typing import Any

from .manifest import Manifest, check_sizes, read_manifest
from .tensor_groups import ITEM_BYTES

KINDS = ("weights", "exp_avg", "exp_avg_sq", "random", "other")


def inspect(path: Path) -> dict[str, Any]:
    """Returns a checkpoint in plain JSON.

    Raises DamagedCheckpoint if the manifest cannot be read, or a file has another size than it says.
    """
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    facts = manifest.facts
    return {
        "path": str(path),
        "step": manifest.step,
        "tokens": facts.get("tokens"),
        "validation_loss": facts.get("validation_loss"),
        "torch": facts.get("torch"),
        "ranks": facts.get("ranks"),
        "layout": facts.get("layout"),
        "tensors": _sizes(manifest),
        "files": {name: record.bytes for name, record in (manifest.files | manifest.attachments).items()},
        "bytes": sum(record.bytes for record in (manifest.files | manifest.attachments).values()),
        "experts": {layer: len(next(iter(hashes.values()), [])) for layer, hashes in manifest.experts.items()},
        "expert_hashes": manifest.experts,
        "config": facts.get("config", {}),
    }


def _sizes(manifest: Manifest) -> dict[str, dict[str, int]]:
    """Numbers of tensors, elements and bytes by kind."""
    found = {kind: {"tensors": 0, "elements": 0, "bytes": 0} for kind in KINDS}
    for name, record in manifest.tensors.items():
        count, size = found[_kind(name)], math.prod(record.shape)
        count["tensors"] += 1
        count["elements"] += size
        count["bytes"] += size * ITEM_BYTES[record.dtype]
    return {kind: count for kind, count in found.items() if count["tensors"]}


def _kind(name: str) -> str:
    """Returns the kind of a tensor by its name."""
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    if first == "model":
        return "weights"
    if first == "optimizer" and last in KINDS:
        return last
    return "random" if first == "random" else "other"
