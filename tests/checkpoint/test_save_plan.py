"""Each rank finds the same plan, which writes each element once; its index is read as it was made."""

import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from checkpoint_layouts import LAYOUTS, SHAPES, global_tensors, shard_of
from tokenyard.bench.scale import checkpoints as scale
from tokenyard.checkpoint.expert_hashes import ExpertSums
from tokenyard.checkpoint.host_staging import HostStaging
from tokenyard.checkpoint.safetensors_file import content_of
from tokenyard.checkpoint.save_plan import SLACK, SavePlan, held_shards, make_save_plan
from tokenyard.checkpoint.saver import Saver
from tokenyard.checkpoint.store import load_checkpoint
from tokenyard.checkpoint.tensor_groups import TensorRecord, groups_of, parse_group, plain_group, tensors_by_file
from tokenyard.parallel import object_collectives
from tokenyard.parallel.object_collectives import distinct_from_all
from tokenyard.parallel.shard import LocalShard, ShardMetadata, whole
from tokenyard.parallel.streams import record_event


def planned(states: list[dict[str, LocalShard]]) -> list[SavePlan]:
    told = [held_shards(state, rank) for rank, state in enumerate(states)]
    names, rectangles = (dict.fromkeys(told_of) for told_of in zip(*told, strict=True))
    held = [(list(names).index(one), list(rectangles).index(other)) for one, other in told]
    return [make_save_plan(list(names), list(rectangles), held, rank) for rank in range(len(states))]


def mixed_state(rank: int, world: int) -> dict[str, LocalShard]:
    """Tensors of all layouts; some of one half of the ranks only, as a pipeline stage's, and one of this rank's own."""
    half = -(-world // 2)
    stages = {"both": (0, world), "first": (0, half), "last": (world - half, half)}
    held = {f"random.cpu.rank_{rank}": LocalShard(whole((3,)), torch.empty(3, device="meta"))}
    for number, layout in enumerate(LAYOUTS):
        for name, (shape, dtype) in SHAPES.items():
            for stage, (first, ranks) in stages.items():
                if first <= rank < first + ranks:
                    metadata = shard_of(layout, shape, rank - first, ranks)
                    tensor = torch.empty(metadata.sizes, dtype=dtype, device="meta")
                    held[f"{name}.{stage}.{number}"] = LocalShard(metadata, tensor)
    return held


@pytest.mark.parametrize("world", [1, 2, 6, 8])
def test_each_element_is_written_once_by_a_rank_that_holds_it(world: int) -> None:
    states = [mixed_state(rank, world) for rank in range(world)]
    plans = planned(states)
    written = Counter((name, state[name].metadata) for plan, state in zip(plans, states, strict=True) for name in plan.names)
    wanted = {(name, one.metadata): one.tensor.nbytes for state in states for name, one in state.items() if one.tensor.numel()}
    assert written.keys() == wanted.keys() and set(written.values()) == {1}
    assert {plan.bytes for plan in plans} == {sum(wanted.values())} and not any(plan.tensors for plan in plans[1:])
    for name, record in plans[0].tensors.items():
        assert {chunk.metadata for chunk in record.chunks} == {metadata for other, metadata in wanted if other == name}
        for chunk in record.chunks:
            assert name in plans[int(chunk.file[6:11])].names and chunk.key == name


def test_ranks_write_about_the_same_and_small_copies_stay_together() -> None:
    """512 small tensors that all of 16 ranks hold, beside shards of 1 MB a rank."""
    big, small = (16, 1 << 18), (4,)
    states = [
        {"big": LocalShard(ShardMetadata(big, (rank, 0), (1, 1 << 18)), torch.empty(1, 1 << 18, device="meta"))}
        | {f"small.{number}": LocalShard(whole(small), torch.empty(small, device="meta")) for number in range(512)}
        for rank in range(16)
    ]
    plans = planned(states)
    load = [sum(states[rank][name].tensor.nbytes for name in plan.names) for rank, plan in enumerate(plans)]
    assert max(load) <= (1 + SLACK) * sum(load) / 16
    assert sum(len(plan.names) > 1 for plan in plans) == 1


def test_pieces_that_are_no_grid() -> None:
    """The arms of a pinwheel, each on a rank."""
    arms = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    pieces = [ShardMetadata((3, 3), *arm) for arm in arms]
    plans = planned([{"x": LocalShard(piece, torch.empty(piece.sizes))} for piece in pieces])
    [group] = groups_of(plans[0].tensors)
    assert group.cells.cuts is None and sorted(group.cells) == sorted(pieces)
    assert parse_group(json.loads(json.dumps(plain_group(group)))).records() == plans[0].tensors


def test_a_grid_that_lacks_a_cell_is_refused() -> None:
    pieces = [whole((4, 6)).chunk(0, 2, row).chunk(1, 2, column) for row, column in ((0, 0), (0, 1), (1, 0))]
    with pytest.raises(ValueError, match="'x': the ranks hold 18 of its 24 elements"):
        planned([{"x": LocalShard(piece, torch.empty(piece.sizes))} for piece in pieces])


@pytest.mark.parametrize("world", [1, 6])
def test_the_index_is_read_as_it_was_made(world: int) -> None:
    layouts = itertools.cycle(["grid", "shard", "columns", "replicate", "hybrid"])
    chosen = {f"{name}.{number}": next(layouts) for number in range(5) for name in SHAPES}
    states = []
    for rank in range(world):
        held = {}
        for name, layout in chosen.items():
            shape, dtype = SHAPES[name.rpartition(".")[0]]
            metadata = shard_of(layout, shape, rank, world)
            held[name] = LocalShard(metadata, torch.empty(metadata.sizes, dtype=dtype, device="meta"))
        states.append(held)
    made = planned(states)[0].tensors
    read: dict[str, TensorRecord] = {}
    for group in groups_of(made):
        read |= parse_group(json.loads(json.dumps(plain_group(group)))).records()
    assert read == made and read.keys() == chosen.keys()
    chance = random.Random(world)
    for name, record in read.items():
        for _ in range(20):
            begins = [chance.randrange(extent + 1) for extent in record.shape]
            extents = [chance.randrange(extent + 1 - begin) for extent, begin in zip(record.shape, begins, strict=True)]
            metadata = ShardMetadata(record.shape, tuple(begins), tuple(extents))
            found = [chunk for chunk in record.chunks if 0 not in extents and chunk.metadata.overlaps(metadata)]
            assert list(record.overlapping(metadata)) == found, (name, metadata)
    files = {chunk.file for record in read.values() for chunk in record.chunks}
    for file, keys in tensors_by_file(read, files | {"other"}).items():
        wanted = [
            (name, (record.dtype, chunk.metadata.sizes))
            for name, record in read.items()
            for chunk in record.chunks
            if chunk.file == file
        ]
        assert sorted(keys) == sorted(wanted)


GROUP = {"dtype": "F32", "shape": [4, 6], "cuts": [[0, 2, 4], [0, 6]], "files": [0, [[1, 2], [1, 3]]], "names": ["a", "b"]}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "F33"}, "dtype = 'F33' must be one of F64"),
    ({"dtype": ["F32"]}, "must be one of F64"),
    ({"shape": [4]}, "its cuts must be those of 1 dimensions"),
    ({"shape": [4, -6]}, "-6 must be a whole number"),
    ({"cuts": [[0, 2, 4], [0, 5]]}, r"cuts = \[0, 5\] must rise from 0 to 6"),
    ({"cuts": [[1, 2, 4], [0, 6]]}, "must rise from 0 to 4"),
    ({"cuts": [[0, 2, 2, 4], [0, 6]]}, "must rise from 0 to 4"),
    ({"cuts": [[0, 3, 2, 4], [0, 6]]}, "must rise from 0 to 4"),
    ({"cuts": [[4], [0, 6]]}, "must rise from 0 to 4"),
    ({"cuts": [[0, 2, 4]]}, "its cuts must be those of 2 dimensions"),
    ({"cuts": "x"}, "'x' must be a list"),
    ({"files": [0]}, "1 files must be as many as its 2 rectangles"),
    ({"files": [0, [[1, 2]]]}, "must say for 2 tensors where they are"),
    ({"files": [0, [[0, 2], [2, 3]]]}, "must say for 2 tensors where they are"),
    ({"files": [0, "1"]}, "must be a file's number"),
    ({"files": [0, [1]]}, "must be a file's number"),
    ({"files": [0, True]}, "must be a whole number"),
    ({"files": [0, -1]}, "must be a whole number"),
    ({"names": []}, "must name at least one tensor"),
    ({"names": ["a", "a"]}, "and each once"),
    ({"names": ["a", "\x1b"]}, "printable characters"),
    ({"cuts": None, "rectangles": [[[0, 0], [2, 6]], [[1, 0], [2, 6]]]}, "overlap but differ"),
    ({"cuts": None, "rectangles": [[[0, 0], [2, 6]], [[2, 0], [1, 6]]]}, "hold 18 of its 24 elements"),
    ({"cuts": None, "rectangles": [[[0, 0], [2, 6]], [[2, 0], [3, 6]]]}, "must lie inside of the shape"),
    ({"cuts": None, "rectangles": [[[0, 0], [4, 6]], [[0, 0], [0, 6]]]}, "must hold something"),
    ({"cuts": None, "rectangles": [[[0], [4, 6]]]}, "and have 2 dimensions"),
]


@pytest.mark.parametrize(("change", "reason"), WRONG)
def test_each_rule_of_the_index(change: dict[str, Any], reason: str) -> None:
    assert parse_group(GROUP).names == ("a", "b")
    with pytest.raises(ValueError, match=reason) as caught:
        parse_group({key: value for key, value in {**GROUP, **change}.items() if value is not None})
    assert "\n" not in str(caught.value)


def tell(sizes: list[int], most: int) -> tuple[list[bytes], list[int]]:
    """Each rank's bytes, in messages of at most `most`; ranks of the same size tell the same."""
    before, object_collectives.MESSAGE_BYTES = object_collectives.MESSAGE_BYTES, most
    try:
        size = sizes[dist.get_rank()]
        return distinct_from_all(random.Random(size).randbytes(size))
    finally:
        object_collectives.MESSAGE_BYTES = before


@pytest.mark.parametrize("sizes", [[5, 5, 5, 5], [0, 3000, 7, 3000], [1, 2, 3, 2500]])
def test_what_ranks_tell_arrives_once(ranks: Any, sizes: list[int]) -> None:
    wanted = list(dict.fromkeys(sizes))
    for found, held in ranks(4, tell, sizes, 1000):
        assert found == [random.Random(size).randbytes(size) for size in wanted]
        assert [wanted[number] for number in held] == sizes


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int8"])
@pytest.mark.parametrize("shape", [(3,), (3, 10), (3, 4, 10), (3, 2, 5, 6)])
def test_hashes_of_experts_add_up(dtype: str, shape: tuple[int, ...]) -> None:
    """Of all rectangles of any grid, and nothing else has the hash."""
    kind = getattr(torch, dtype)
    values = torch.from_numpy(np.random.default_rng(1).integers(0, 256, math.prod(shape) * kind.itemsize, dtype=np.uint8)).view(
        kind
    )
    values, name = values.view(shape), "model.layers.0.moe.experts.down"

    def hashes(x: torch.Tensor, ways: list[int]) -> list[str]:
        sums = ExpertSums()
        for place in itertools.product(*map(range, ways)):
            metadata = whole(shape)
            for dim, (way, index) in enumerate(zip(ways, place, strict=True)):
                metadata = metadata.chunk(dim, way, index)
            part = ExpertSums()
            part.add(name, metadata, content_of(metadata.cut(x)))
            sums.merge(json.loads(json.dumps(part.sums)))
        return sums.hashes()["layers.0.moe.experts"]["weights"]

    expected = hashes(values, [1] * len(shape))
    assert len(set(expected)) == 3 and all(len(one) == 16 for one in expected)
    for ways in itertools.product([1, 2, 3], repeat=len(shape)):
        assert hashes(values, list(ways)) == expected
    changed = values.clone()
    changed.view(torch.uint8).flatten()[-1] ^= 128
    assert hashes(changed, [1] * len(shape)) == [*expected[:2], hashes(changed, [2] * len(shape))[2]] != expected
    if len(shape) > 1:
        swapped = values.flip(1)
        assert all(one != other for one, other in zip(hashes(swapped, [1] * len(shape)), expected, strict=True))


@pytest.mark.parametrize("limit", [100, 1000, 5000, 10**6, None])
def test_a_save_through_a_bounded_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    """The same bytes as a synchronous save, within the limit, and the update waits for the last copy."""
    tensors = global_tensors() | {"model.layers.1.moe.experts.up": torch.arange(3 * 40 * 30.0).view(3, 40, 30).transpose(1, 2)}
    shards = {name: LocalShard(whole(tensor.shape), tensor) for name, tensor in tensors.items()}
    waited, staged = Saver(tmp_path / "waited"), Saver(tmp_path / "staged", staging_bytes=limit)
    assert waited.start(1, shards, {}, asynchronous=False) is None and waited.wait() is not None
    copies: list[int] = []
    copy = HostStaging._copy_tensor
    monkeypatch.setattr(HostStaging, "_copy_tensor", lambda *call: copies.append(call[1].nbytes) or copy(*call))
    assert staged.start(1, shards, {}) is None
    staged.wait_for_copies()
    assert sum(copies) == sum(tensor.nbytes for tensor in tensors.values())
    outcome = staged.wait()
    assert outcome is not None and outcome.error is None
    one, other = (saver.path_of(1) for saver in (waited, staged))
    assert {file.name: file.read_bytes() for file in one.iterdir()} == {file.name: file.read_bytes() for file in other.iterdir()}
    buffer = staged._staging._buffer
    assert buffer is not None and len(buffer) <= (limit or 10**6) and (len(copies) > len(tensors)) == (limit in (100, 1000, 5000))
    back = {name: LocalShard(metadata, torch.zeros_like(tensor)) for name, (metadata, tensor) in shards.items()}
    load_checkpoint(other, back)
    assert all(content_of(back[name].tensor) == content_of(tensor) for name, tensor in tensors.items())


def test_a_change_between_two_turns_fails_the_save() -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    staging = HostStaging(limit=256)
    staging.begin()
    turns = staging.copy_in_turns(
        {name: LocalShard(whole((64,)), one) for name, one in (("x", x), ("y", y))}, record_event(x.device)
    )
    next(turns)
    assert not staging._copied.is_set()
    x.add_(1)
    with pytest.raises(RuntimeError, match="tensor 'x' changed while it was copied"):
        list(turns)
    assert staging._copied.is_set()


def test_what_ranks_of_a_stage_say_of_names_is_the_same() -> None:
    config = scale.compose(["model=tiny_deepseek_v3", "parallel.shard=4", "parallel.expert=2", "launch=torchrun", "launch.ranks=8"])
    told = [held_shards(scale.state_of(config, 8, rank), rank) for rank in range(8)]
    assert len({one.names for one in told}) == 1
    assert [one.rectangles for one in told] == [
        scale.rectangles_of(scale.state_of(config, 8, 0), config, 8, rank) for rank in range(8)
    ]
