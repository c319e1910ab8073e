"""The bytes that blocks keep, predicted and measured, on a CPU."""

import torch
from tokenyard.bench.kept_bytes import KeptResult, kept_bytes, table
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.moe.model import Transformer
from tokenyard.parallel.apply import Parallel, initialise, parallelize
from tokenyard.parallel.config import ParallelConfig, Recompute
from tokenyard.parallel.mesh import build_mesh

WIDTH, HEADS, GROUPS, HEAD, EXPERTS, TOP_K, HIDDEN, LENGTH = 32, 4, 2, 8, 16, 4, 24, 256


def test_kept_bytes_are_as_predicted() -> None:
    """In fp32. What is kept of a sequence, sums of the router, is below 2 % of them."""
    products = HEADS * HEAD + 2 * GROUPS * HEAD + WIDTH  # queries, keys and values; output
    attention = HEADS * HEAD + HEADS  # and a logarithm of a sum for each query
    router = EXPERTS + 2 * TOP_K  # logits, and ids of 8 bytes
    experts = TOP_K * 2 * HIDDEN + WIDTH  # gate and up of each choice, and the sum of the outputs
    kept = {recompute: kept_bytes(built(recompute), 0, LENGTH)[0] for recompute in Recompute}
    predicted = 4 * (products + attention + router + experts + WIDTH)
    assert predicted <= kept[Recompute.selective] < 1.02 * predicted
    assert 4 * WIDTH <= kept[Recompute.block] < 1.5 * 4 * WIDTH
    assert kept[Recompute.selective] < 0.75 * kept[Recompute.none]


def built(recompute: Recompute) -> Parallel:
    moe = MoEConfig(experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN)
    config = ModelConfig(layers=1, width=WIDTH, heads=HEADS, kv_heads=GROUPS, vocabulary=64, moe=moe)
    with torch.device("meta"):
        model = Transformer(config)
    layout = ParallelConfig(recompute=recompute)
    parallel = parallelize(model, build_mesh(layout), layout, torch.device("cpu"))
    initialise(parallel, seed=1)
    return parallel


def test_table() -> None:
    line = KeptResult("tiny", "selective", 2048.0, 1024.0, 3_000_000, 12_000_000)
    assert "| tiny | selective | 2 | 1 | 3 | 25.0% |" in table([line])
