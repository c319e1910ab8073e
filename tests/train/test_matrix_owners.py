"""Owners of matrices: what all ranks of a layout do fits together, moves each element once, and shares the work evenly."""

import math
from collections import Counter
from typing import Any

import pytest
from tokenyard.moe.attention_config import AttentionConfig, AttentionKind, MLAConfig
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.moe.param_shapes import shapes
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.layout import mesh_sizes, shard_of, stays_whole
from tokenyard.train.config.matrices import MuonConfig, by_muon, matrices, newton_schulz_flops
from tokenyard.train.matrix_owners import Bucket, Layout, Local, Rectangle, Sharding, buckets

MODEL = ModelConfig(
    layers=3,
    width=24,
    heads=4,
    hidden=40,
    dense_first=1,
    attention=AttentionConfig(AttentionKind.mla, mla=MLAConfig(q_rank=12, kv_rank=8, nope_width=4, rope_width=2, value_width=6)),
    moe=MoEConfig(experts=4, hidden=16, shared_hidden=16),
)
LAYOUTS = {
    "one": ParallelConfig(),
    "tensor": ParallelConfig(tensor=2),
    "uneven shards": ParallelConfig(shard=8, expert=4),
    "all": ParallelConfig(tensor=2, shard=2, expert=2, expert_tensor=2),
    "context": ParallelConfig(context=2, shard=4, expert=2),
}


@pytest.mark.parametrize("limit", [200, 2**24])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_ranks_send_fits_and_reaches_every_copy(name: str, limit: int) -> None:
    parallel, muon = LAYOUTS[name], MuonConfig()
    world = 1 if name == "one" else 8
    sizes, named = mesh_sizes(parallel, world), shardings(parallel, muon)
    all_ranks = [buckets(Layout(MODEL, muon, sizes, rank), named, limit) for rank in range(world)]
    assert len({len(own) for own in all_ranks}) == 1 and (len(all_ranks[0]) > 1) == (limit == 200)
    updated = [Counter[Any]() for _ in range(world)]
    for step in zip(*all_ranks, strict=True):
        assert len({own.travels for own in step}) == 1 and (step[0].travels or not any(own.sent or own.returned for own in step))
        for sender, here in enumerate(step):
            for receiver, there in enumerate(step):
                assert extents(here.sent.get(receiver, ())) == extents(there.received.get(sender, ()))
                assert extents(here.returned.get(receiver, ())) == extents(there.taken.get(sender, ()))
        for rank, own in enumerate(step):
            filled = Counter[int]()
            for owned in [whole for _, whole in own.stays] + [one for ones in own.received.values() for one in ones]:
                filled[owned.number] += owned.place.rows * owned.place.columns
            assert [filled[number] for number in range(len(own.shapes))] == [math.prod(shape) for shape in own.shapes]
            for mine in [mine for mine, _ in own.stays] + [one for ones in own.taken.values() for one in ones]:
                updated[rank][mine.name] += mine.place.rows * mine.place.columns
    for rank, own in enumerate(all_ranks):
        assert [name for bucket in own for name in bucket.names] == [name for bucket in own for name in bucket.ended] == list(named)
        for name, (shape, by_fsdp) in named.items():
            held = shard_of(name, shape, MODEL, sizes, by_fsdp, rank)
            assert updated[rank][name] == math.prod(held.sizes), (rank, name)
    flops = [newton_schulz_flops(m.shape) for n, (shape, _) in named.items() for m in matrices(n, shape, MODEL, muon)]
    loads = [sum(newton_schulz_flops(shape) for bucket in own for shape in bucket.shapes) for own in all_ranks]
    assert sum(loads) == sum(flops)
    assert max(loads) <= sum(flops) / world + max(flops)


def test_a_piece_comes_from_the_nearest_rank() -> None:
    sizes, muon = mesh_sizes(ParallelConfig(shard=2), 8), MuonConfig()
    named = {name: one for name, one in shardings(ParallelConfig(shard=2), muon).items() if ".experts." not in name}
    for rank in range(8):
        for bucket in buckets(Layout(MODEL, muon, sizes, rank), named):
            assert set(bucket.received) <= {rank ^ 1}, "from its own replica, whose ranks are neighbours"
            assert len(bucket.returned) >= 3, "to all replicas"


def shardings(parallel: ParallelConfig, muon: MuonConfig) -> dict[str, Sharding]:
    by_fsdp = parallel.shard > 1
    found = {name: Sharding(shape, by_fsdp and not stays_whole(name, len(shape))) for name, shape in shapes(MODEL).items()}
    return {name: one for name, one in found.items() if by_muon(name, one.shape, muon)}


def extents(ones: Any) -> list[tuple[int, int]]:
    return [(one.place.rows, one.place.columns) for one in ones]


def test_a_rank_alone_sends_nothing() -> None:
    own = buckets(
        Layout(MODEL, MuonConfig(), mesh_sizes(ParallelConfig(), 1), 0), {"layers.0.dense.down": Sharding((24, 40), False)}
    )
    mine = Local("layers.0.dense.down", Rectangle(0, 0, 24, 40))
    assert own == [Bucket(["layers.0.dense.down"], ["layers.0.dense.down"], False, [(24, 40)], [(mine, own[0].stays[0][1])])]
