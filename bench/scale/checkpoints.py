"""What planning, writing and opening a checkpoint of DeepSeek-V3 costs a rank; a formula gives the shards of all other ranks.

FSDP over all ranks and experts over at most 64, in fp32 with both moments: no layout cuts tensors into more pieces.
`python -m tokenyard.bench.scale.checkpoints 2048`
"""

import json
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from ...checkpoint.expert_hashes import EXPERT_TENSOR, WEIGHTS, ExpertSums
from ...checkpoint.manifest import MANIFEST, FileRecord, Manifest, read_manifest, write_manifest
from ...checkpoint.save_plan import SavePlan, held_shards, make_save_plan
from ...checkpoint.tensor_groups import file_of_rank
from ...checkpoint.tensor_reader import reads_by_file
from ...moe.param_shapes import shapes
from ...parallel import layout
from ...parallel.layout import mesh_sizes, stays_whole
from ...parallel.object_collectives import MESSAGE_BYTES, SUMMARY_BYTES
from ...parallel.shard import LocalShard, ShardMetadata, whole
from ...train.config.compose import compose
from ...train.config.config import Config
from . import print_figures

Result = TypeVar("Result")
EXPERT_RANKS = 64
STATES = {"cpu": 5056, "python": 5008, "numpy": 5000, "cuda": 16}
"""Bytes of the states of generators that each rank saves."""


def figures(world: int) -> dict[str, float]:
    """Returns counted bytes, and seconds on one core of this machine."""
    config = compose(
        [
            *("model=deepseek_v3", f"parallel.shard={world}", f"parallel.expert={min(world, EXPERT_RANKS)}"),
            *("launch=torchrun", f"launch.ranks={world}", f"batch.sequences={world}"),
        ]
    )
    state = state_of(config, world, 0)
    mine, told_seconds = _timed(lambda: held_shards(state, 0))
    rectangles = [rectangles_of(state, config, world, rank) for rank in range(world)]
    assert rectangles[0] == mine.rectangles
    distinct = {one: number for number, one in enumerate(dict.fromkeys(rectangles))}
    held = [(0, distinct[one]) for one in rectangles]
    before = _peak_megabytes()
    plan, seconds = _timed(lambda: make_save_plan([mine.names], list(distinct), held, 0))
    moved = [2 * SUMMARY_BYTES * world, len(mine.names), sum(map(len, distinct))]
    found = {
        "planning, seconds of each rank": told_seconds + seconds,
        "planning, host MB of each rank": _peak_megabytes() - before,
        "planning, MB that each rank receives": sum(moved) / 1e6,
        "planning, MB of the largest buffer on a device": max(min(size, MESSAGE_BYTES) for size in moved) / 1e6,
        "rectangles of all tensors": float(sum(len(record.chunks) for record in plan.tensors.values())),
    }
    return found | _after_writing(state, config, world, plan)


def state_of(config: Config, world: int, rank: int) -> dict[str, LocalShard]:
    """Returns what a rank saves, on the meta device: weights, both moments, and states of generators."""
    held: dict[str, LocalShard] = {}
    for name, shape in shapes(config.model).items():
        metadata = shard_of(name, shape, config, world, rank)
        shard = LocalShard(metadata, torch.empty(metadata.sizes, device="meta"))
        held |= dict.fromkeys((f"model.{name}", f"optimizer.{name}.exp_avg", f"optimizer.{name}.exp_avg_sq"), shard)
    for kind, size in STATES.items():
        state = torch.empty(size, dtype=torch.uint8, device="meta")
        held[f"random.{kind}.rank_{rank}"] = LocalShard(whole((size,)), state)
    return held


def shard_of(name: str, shape: tuple[int, ...], config: Config, world: int, rank: int) -> ShardMetadata:
    """Returns what a rank holds of a parameter; FSDP shards all that it can."""
    by_fsdp = config.parallel.shard > 1 and not stays_whole(name, len(shape))
    return layout.shard_of(name, shape, config.model, mesh_sizes(config.parallel, world), by_fsdp, rank)


def rectangles_of(state: dict[str, LocalShard], config: Config, world: int, rank: int) -> bytes:
    """Returns `HeldShards.rectangles` of a rank, from the `state` of rank 0, whose kinds are those of every rank here."""
    known = shapes(config.model)
    kinds = {(shard.tensor.dtype, shard.metadata): name for name, shard in reversed(state.items())}
    found = []
    for _, metadata in dict.fromkeys((shard.tensor.dtype, shard.metadata) for shard in state.values()):
        name = next(name for (_, one), name in kinds.items() if one == metadata)
        if not name.startswith("random."):
            name = name.removeprefix("model.")
            metadata = shard_of(name, known[name], config, world, rank)
        found.append((metadata.offsets, metadata.sizes))
    return json.dumps(found).encode()


def _after_writing(state: dict[str, LocalShard], config: Config, world: int, plan: SavePlan) -> dict[str, float]:
    notes = [json.dumps(_note(config, world, rank)) for rank in range(world)]
    sums = ExpertSums()
    _, merging = _timed(lambda: [sums.merge(json.loads(note)) for note in notes])
    files = {file_of_rank(rank): FileRecord(1 << 50, f"{rank:032x}") for rank in range(world)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MANIFEST
        _, writing = _timed(lambda: write_manifest(path, Manifest(1, {}, plan.tensors, files, {}, sums.hashes())))
        size = path.stat().st_size
        manifest, opening = _timed(lambda: read_manifest(Path(folder)))
        reads, finding = _timed(lambda: reads_by_file(manifest.tensors, state))
    return {
        "after a save, notes that rank 0 reads": world - 1.0,
        "after a save, files that another rank reads": 0.0,
        "after a save, MB of notes": sum(map(len, notes)) / 1e6,
        "after a save, seconds of rank 0 for notes and index": merging + writing,
        "index, MB": size / 1e6,
        "index, seconds to open it": opening,
        "index, seconds to find a rank's shards": finding,
        "files that a rank opens to load them": float(len(reads)),
    }


def _note(config: Config, world: int, rank: int) -> dict[str, dict[str, dict[str, int]]]:
    """Returns the sums of a rank's experts, as large as they are."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, shape in shapes(config.model).items():
        if match := EXPERT_TENSOR.fullmatch(f"model.{name}"):
            metadata = shard_of(name, shape, config, world, rank)
            experts = range(metadata.offsets[0], metadata.offsets[0] + metadata.sizes[0])
            for kind in (WEIGHTS, "exp_avg", "exp_avg_sq"):
                found.setdefault(match["layer"], {})[kind] = {str(expert): (1 << 63) + rank for expert in experts}
    return found


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    begin = time.perf_counter()
    result = work()
    return result, time.perf_counter() - begin


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    print_figures(figures)


if __name__ == "__main__":
    main()
