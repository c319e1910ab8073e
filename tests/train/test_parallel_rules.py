"""Wrong settings of the exchange end in one line with key, value, rule and the nearest valid value."""

import pytest
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import ConfigError
from tokenyard.train.config.environment import world_size
from tokenyard.train.preflight import check_config

REFUSED = [
    (4, "parallel.expert=4 parallel.node_ranks=2", "parallel.node_ranks=2: must be null, only parallel.exchange=hierarchical",
     "parallel.node_ranks=null"),
    (4, "parallel.expert=4 parallel.exchange=hierarchical parallel.node_ranks=3",
     "parallel.node_ranks=3: must divide parallel.expert=4", "parallel.node_ranks=2 or parallel.node_ranks=4"),
    (4, "parallel.expert=4 parallel.exchange=hierarchical parallel.node_ranks=0", "parallel.node_ranks=0: must be in [1, inf)",
     "parallel.node_ranks=1"),
    (4, "parallel.overlap_chunks=0", "parallel.overlap_chunks=0: must be in [1, inf)", "parallel.overlap_chunks=1"),
    (4, "parallel.overlap_chunks=2 model.moe.capacity.pad=true model.moe.capacity.factor=1",
     "parallel.overlap_chunks=2: must be 1 with model.moe.capacity.pad=true", "parallel.overlap_chunks=1"),
    (4, "parallel.exchange=dedup", "parallel.exchange=dedup: must be one of plain, deduplicated, hierarchical, gather, symmetric",
     "parallel.exchange=deduplicated"),
    (1, "parallel.recompute=selektive", "parallel.recompute=selektive: must be one of none, block, selective",
     "parallel.recompute=selective"),
    (1, "parallel.recompute=selective compile=true", "parallel.recompute=selective: must be none or block with compile=true",
     "parallel.recompute=block"),
    (1, "parallel.recompute=offload compile=true", "parallel.recompute=offload: must be none or block with compile=true",
     "parallel.recompute=block"),
    (4, "parallel.expert=4 parallel.exchange=symmetric parallel.overlap_chunks=2",
     "parallel.overlap_chunks=2: must be 1 with parallel.exchange=symmetric", "parallel.overlap_chunks=1"),
    (8, "parallel.expert=4 parallel.exchange=symmetric launch=torchrun launch.nodes=4 launch.ranks=2",
     "parallel.exchange=symmetric: must not be symmetric where the 4 ranks of an expert group are not inside a node of 2",
     "parallel.exchange=deduplicated or parallel.exchange=hierarchical"),
    (4, "parallel.expert=4 parallel.exchange=symmetric parallel.exchange_rows=0",
     "parallel.exchange_rows=0.0: must be in (0, inf)", "parallel.exchange_rows=2.0"),
    (8, "parallel.expert=4 parallel.exchange=symmetric sequence_length=4194304 batch.micro=128 batch.sequences=1024",
     "parallel.exchange_rows=2.0: must leave the 1073741824 rows of an even share below 2**31 in all", "parallel.exchange_rows=1"),
    (4, "parallel.exchange_overflow=drop", "parallel.exchange_overflow=drop: must be fatal, only parallel.exchange=symmetric reads",
     "parallel.exchange_overflow=fatal"),
    (1, "cuda_graph=true model.moe.router.jitter=0.1",
     "model.moe.router.jitter=0.1: must be 0.0 with cuda_graph=true, a graph has the same launches in each step",
     "model.moe.router.jitter=0.0"),
    (1, "cuda_graph=true model.moe.capacity.factor=1.25", "model.moe.capacity.pad=false: must be true with cuda_graph=true",
     "model.moe.capacity.pad=true"),
    (4, "cuda_graph=true parallel.expert=4", "parallel.exchange=plain: must be symmetric with cuda_graph=true",
     "parallel.exchange=symmetric"),
    (4, "cuda_graph=true parallel.shard=4", "parallel.shard=4: must be 1 with cuda_graph=true", "parallel.shard=1"),
    (4, "cuda_graph=true parallel.expert=4 parallel.exchange=symmetric parallel.exchange_overflow=repair",
     "parallel.exchange_overflow=repair: must be fatal with cuda_graph=true", "parallel.exchange_overflow=fatal"),
    (4, "parallel.expert_tensor=4 model.moe.products=fp8_blockwise",
     "parallel.expert_tensor=4: must cut model.moe.hidden=256 into multiples of 128 with model.moe.products=fp8_blockwise",
     "parallel.expert_tensor=2"),
    (4, "parallel.expert_tensor=2 model.moe.products=fp8_rowwise",
     "parallel.expert_tensor=2: must be 1 with model.moe.products=fp8_rowwise, whose scales are of whole rows",
     "parallel.expert_tensor=1"),
    (4, "parallel.tensor=4 model.products=mxfp8",
     "parallel.tensor=4: must cut attention.k.weight=64 into multiples of 32 with model.products=mxfp8", "parallel.tensor=2"),
    (4, "parallel.tensor=4 model.kv_heads=8 model.dense_first=1 model.hidden=320 model.products=mxfp8",
     "parallel.tensor=4: must cut dense.gate_up=320 into multiples of 32 with model.products=mxfp8", "parallel.tensor=2"),
    (2, "parallel.tensor=2 model.products=fp8_rowwise",
     "parallel.tensor=2: must be 1 with model.products=fp8_rowwise, whose scales are of whole rows", "parallel.tensor=1"),
    (4, "parallel.expert=4 parallel.exchange=symmetric parallel.exchange_dtype=fp8",
     "parallel.exchange_dtype=fp8: must be wide with parallel.exchange=symmetric, whose kernels move rows of bf16",
     "parallel.exchange_dtype=wide"),
]  # fmt: skip
ACCEPTED = [
    (4, "cuda_graph=true parallel.expert=4 parallel.exchange=symmetric model.moe.capacity.factor=1.25"),
    (8, "parallel.expert_tensor=8 parallel.tensor=4 model.moe.products=mxfp8"),
    (4, "parallel.tensor=2 parallel.expert_tensor=2 model.products=mxfp8 model.moe.products=fp8_blockwise"),
    (4, "parallel.shard=4 model.products=fp8_rowwise model.moe.products=fp8_rowwise"),
    (2, "model=dense parallel.tensor=2 model.moe.products=fp8_rowwise"),
    (4, "parallel.expert=4 parallel.exchange=deduplicated parallel.overlap_chunks=3"),
    (4, "parallel.expert=4 parallel.exchange=hierarchical"),
    (4, "parallel.expert=2 parallel.exchange=hierarchical parallel.node_ranks=4"),
    (8, "parallel.expert=8 parallel.exchange=hierarchical parallel.node_ranks=2"),
    (1, "parallel.exchange=gather"),
    (8, "parallel.expert=4 parallel.exchange=symmetric launch=torchrun launch.nodes=2 launch.ranks=4"),
    (4, "parallel.expert=4 parallel.exchange=symmetric engine.kind=deepspeed"),
]


@pytest.mark.parametrize(("world", "overrides", "start", "nearest"), REFUSED, ids=[case[1] for case in REFUSED])
def test_refused(world: int, overrides: str, start: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check_config(compose(overrides.split()), world)
    assert str(raised.value).startswith(start) and str(raised.value).endswith(f"nearest valid: {nearest}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("world", "overrides"), ACCEPTED, ids=[case[1] for case in ACCEPTED])
def test_accepted(world: int, overrides: str) -> None:
    check_config(compose(overrides.split()), world)


def test_the_launcher_says_how_many_ranks_a_node_has(monkeypatch: pytest.MonkeyPatch) -> None:
    config = compose(["parallel.expert=4", "parallel.exchange=hierarchical"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="a node has 3 ranks; nearest valid: parallel"):
        check_config(config, 12)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_config(config, 4)


@pytest.mark.parametrize("value", ["two", "0", "", "-1"])
@pytest.mark.parametrize("name", ["LOCAL_WORLD_SIZE", "WORLD_SIZE"])
def test_a_number_of_ranks_that_is_none(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value}: must be a positive integer .*; nearest valid: {name}=1"):
        world_size()
    if name == "LOCAL_WORLD_SIZE":
        with pytest.raises(ConfigError, match=f"{name}={value}: must be"):
            check_config(compose(["parallel.expert=4", "parallel.exchange=hierarchical"]), 4)


def test_ranks_that_are_still_to_be_started() -> None:
    wish = "parallel.expert=4 parallel.exchange=hierarchical launch=torchrun launch.nodes=4 launch.ranks=3"
    with pytest.raises(ConfigError, match="a node has 3 ranks"):
        check_config(compose(wish.split()), 12)
