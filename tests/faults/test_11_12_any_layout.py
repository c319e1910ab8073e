"""From any layout to any other: weights and moments bit for bit by name, every expert with its own hash, the same next loss."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from checkpoint_run import everything, same_tensors
from tiny_run import TINY_RUN
from tokenyard.checkpoint.manifest import read_manifest
from tokenyard.checkpoint.store import save_checkpoint
from tokenyard.checkpoint.verify import check_all
from tokenyard.parallel.shard import LocalShard, ShardMetadata
from tokenyard.train.checkpointing import save
from tokenyard.train.config.compose import compose
from tokenyard.train.run import single_step
from tokenyard.train.setup import open_session

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "data 4": (4, []),
    "expert 4": (4, ["parallel.expert=4"]),
    "tensor 2 x expert 2": (4, ["parallel.tensor=2", "parallel.expert=2"]),
    "shard 4": (4, ["parallel.shard=4"]),
    "shard 2 x expert 2": (4, ["parallel.shard=2", "parallel.expert=2"]),
    "shard 2 x expert_tensor 2": (4, ["parallel.shard=2", "parallel.expert_tensor=2", "parallel.zero=1"]),
    "tensor 2 x expert_tensor 4": (4, ["parallel.tensor=2", "parallel.expert_tensor=4"]),
    "context 2 x shard 2": (4, ["parallel.context=2", "parallel.shard=4", "parallel.expert=2"]),
    "pipeline 2 x shard 2": (4, ["parallel.pipeline=2", "parallel.shard=2", "parallel.expert=2"]),
    "pipeline 2 x tensor 2, head alone": (4, ["parallel.pipeline=2", "parallel.tensor=2", "parallel.pipeline_layers=[2,0]"]),
}
NAMES = list(LAYOUTS)
PAIRS = [(one, NAMES[(index + hop) % len(NAMES)]) for index, one in enumerate(NAMES) for hop in (1, 3)]
DEEPSPEED = ["engine=deepspeed", "engine.zero=1", "parallel.expert=2", "precision=fp32"]


def configured(folder: Path, overrides: list[str], *more: str) -> Any:
    cache = folder.parent / "cache"
    return compose(
        [
            *TINY_RUN,
            "steps=20",
            "precision=fp64",
            "schedule=constant",
            f"run.dir='{folder}'",
            f"data.cache='{cache}'",
            *overrides,
            *more,
        ]
    )


def train(folder: Path, overrides: list[str]) -> float:
    """Two steps, a checkpoint, and the loss of the third."""
    with closing(open_session(configured(folder, overrides), torch.device("cpu"))) as session:
        while session.step < 2:
            single_step(session)
        save(session)
        return single_step(session).cross_entropy.item()


def move(folder: Path, checkpoint: Path, overrides: list[str]) -> float:
    """Read it, write what was read, and the loss of the next step."""
    resumed = configured(folder, overrides, f"checkpoint.resume='{checkpoint}'")
    with closing(open_session(resumed, torch.device("cpu"))) as session:
        save(session)
        return single_step(session).cross_entropy.item()


def on(ranks: Any, world: int, function: Any, *args: Any) -> float:
    return ranks(world, function, *args)[0] if world > 1 else function(*args)


@pytest.mark.fault(11)
@pytest.mark.fault(12)
def test_every_pair_of_layouts(ranks, tmp_path: Path, record_property) -> None:
    expected = {name: on(ranks, world, train, tmp_path / name, layout) for name, (world, layout) in LAYOUTS.items()}
    worst = 0.0
    for one, other in PAIRS:
        world, layout = LAYOUTS[other]
        written, moved = (tmp_path / name / "checkpoints" / "step_00000002" for name in (one, f"{one} to {other}"))
        loss = on(ranks, world, move, moved.parents[1], written, layout)
        worst = max(worst, abs(loss / expected[one] - 1))
        assert loss == pytest.approx(expected[one], rel=1e-12, abs=0), (one, other)
        assert same_tensors(everything(moved), everything(written)), (one, other)
        assert_same_experts(moved, written)
    check_all(tmp_path / "one process" / "checkpoints" / "step_00000002")
    record_property(
        "measured", f"{len(PAIRS)} pairs in fp64: weights and moments bit-equal, expert hashes equal, next loss {worst:.0e} apart"
    )


def assert_same_experts(one: Path, other: Path) -> None:
    ours, theirs = (read_manifest(path).experts for path in (one, other))
    assert ours == theirs and set(ours) == {"layers.0.moe.experts", "layers.1.moe.experts"}
    for kinds in ours.values():
        assert set(kinds) == {"weights", "exp_avg", "exp_avg_sq"}
        assert all(len(set(hashes)) == 8 for hashes in kinds.values())


@pytest.mark.fault(11)
@pytest.mark.fault(12)
@pytest.mark.parametrize("layout", ["tensor 2 x expert 2", "one process"])
def test_torch_and_deepspeed(ranks, tmp_path: Path, layout: str, record_property) -> None:
    pytest.importorskip("deepspeed")
    world, torch_layout = LAYOUTS[layout]
    ours = on(ranks, world, train, tmp_path / "torch", [*torch_layout, "precision=fp32"])
    theirs = ranks(2, train, tmp_path / "deepspeed", DEEPSPEED)[0]
    written = {name: tmp_path / name / "checkpoints" / "step_00000002" for name in ("torch", "deepspeed")}
    there = ranks(2, move, tmp_path / "there", written["torch"], DEEPSPEED)[0]
    back = on(ranks, world, move, tmp_path / "back", written["deepspeed"], [*torch_layout, "precision=fp32"])
    assert (there, back) == (pytest.approx(ours, rel=1e-6), pytest.approx(theirs, rel=1e-6))
    for name, moved in (("torch", "there"), ("deepspeed", "back")):
        path = tmp_path / moved / "checkpoints" / "step_00000002"
        assert same_tensors(everything(path), everything(written[name]))
        assert_same_experts(path, written[name])
    record_property("measured", f"torch ({layout}) <-> deepspeed (ZeRO 1, expert 2): bit-equal by name, next loss within 1e-6")


def save_constants(folder: Path, cut: int) -> Path:
    """Expert e of a tensor (8, 4, 6) has the value e everywhere; dimension `cut` is spread over the ranks."""
    shape = (8, 4, 6)
    step = shape[cut] // 2
    offsets, sizes = [0, 0, 0], list(shape)
    offsets[cut], sizes[cut] = dist.get_rank() * step, step
    piece = ShardMetadata(shape, tuple(offsets), tuple(sizes))
    values = torch.arange(8.0).view(8, 1, 1).expand(shape)
    names = [f"{kind}.layers.3.moe.experts.{name}" for kind, name in (("model", "down"), ("optimizer", "down.exp_avg"))]
    return save_checkpoint(folder, 1, {name: LocalShard(piece, piece.cut(values).clone()) for name in names}, {})


@pytest.mark.fault(12)
@pytest.mark.parametrize("cut", [0, 1, 2])
def test_the_hash_of_an_expert_is_the_stated_one(ranks, tmp_path: Path, cut: int) -> None:
    path = ranks(2, save_constants, tmp_path, cut)[0]
    places = [element(1, row) * element(2, column) for row in range(4) for column in range(6)]
    name = xxhash.xxh3_64_intdigest(b"down") | 1
    bits = [int.from_bytes(torch.tensor(float(expert)).numpy().tobytes(), "little") for expert in range(8)]
    wanted = [f"{sum(name * each * place for place in places) % 2**64:016x}" for each in bits]
    assert read_manifest(path).experts == {"layers.3.moe.experts": {"weights": wanted, "exp_avg": wanted}}
    check_all(path)


def element(dim: int, index: int) -> int:
    """SplitMix64, made odd."""
    x = (index + (dim << 32) + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return (x ^ x >> 31) | 1
