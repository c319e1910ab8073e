"""QK-clip: heads above the bound are exactly at it when the step's tokens come again, and no other head changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.moe.attention_config import AttentionConfig, AttentionKind, MLAConfig, QKNorm
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.moe.model import Transformer
from tokenyard.parallel.apply import Parallel, initialise, parallelize
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train.attention_logits import clip_heads, largest_logits, watching
from tokenyard.train.config.compose import compose
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.run import run

KINDS = {
    "a key for each head": {"kv_heads": 4, "attention": AttentionConfig(qkv_bias=True)},
    "shared keys": {"kv_heads": 2, "attention": AttentionConfig(softcap=5.0, window=5)},
    "latents": {"attention": AttentionConfig(AttentionKind.mla, mla=MLAConfig(q_rank=8, kv_rank=8, nope_width=4, rope_width=2))},
}


@pytest.mark.parametrize("kind", KINDS)
def test_clipped_heads_are_at_the_bound_and_others_as_they_were(kind: str) -> None:
    parallel = build(ModelConfig(layers=2, width=16, heads=4, hidden=24, vocabulary=40, init_std=0.5, **KINDS[kind]))
    before = seen(parallel)
    bound = before[0].sort().values[1:3].mean().item()
    keys = {name: one.parameter.detach().clone() for name, one in parallel.parameters.items() if ".k." in name}
    largest, clipped = clip_heads(parallel, before.clone(), bound).tolist()
    assert largest == before.max() and clipped == (before > bound).sum() > 1
    torch.testing.assert_close(seen(parallel)[0], before[0].clamp(max=bound), rtol=1e-12, atol=0)
    changed = {name for name, key in keys.items() if not parallel.parameters[name].parameter.equal(key)}
    assert bool(changed) == (kind == "a key for each head")


def test_it_is_off_after_a_step() -> None:
    parallel = build(ModelConfig(layers=1, width=16, heads=4, hidden=24, vocabulary=40))
    seen(parallel)
    assert not largest_logits(parallel).isfinite().any()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_logs_it_and_stays_below(optimizer: str, tmp_path: Path) -> None:
    words = [*TINY_RUN, "steps=6", "log.every=1", "evaluate.every=0", f"data.cache={tmp_path}/cache", "model.init_std=0.3"]
    words += [f"optimizer={optimizer}", "optimizer.lr=1e-3", "optimizer.qk_clip=2", f"run.dir={tmp_path}/run"]
    assert run(compose(words)) == 0
    records = read_journal(tmp_path / "run" / "metrics.jsonl")
    found = [(each["stability/attention_logit_max"], each["stability/clipped_heads"]) for each in records]
    assert found[0][0] > 2 and found[0][1] > 0 and all(bool(heads) == (largest > 2) for largest, heads in found)
    assert found[-1][0] < found[0][0] and found[-1][0] < 3


def seen(parallel: Parallel) -> torch.Tensor:
    ids_BS = torch.arange(24).view(2, 12) * 7 % 40
    with torch.no_grad(), watching(parallel) as largest_AH:
        for row in ids_BS:
            parallel.model(row[None], torch.ones(1, 12, dtype=torch.bool), head_losses=[lambda *_: torch.zeros(())])
    return largest_AH


def build(config: ModelConfig) -> Parallel:
    assert config.attention.qk_norm is QKNorm.none
    config = replace(config, moe=MoEConfig(experts=0))
    with torch.device("meta"):
        net = Transformer(config, torch.float64)
    parallel = parallelize(net, build_mesh(ParallelConfig()), ParallelConfig(), torch.device("cpu"))
    initialise(parallel, 1)
    for name, one in parallel.parameters.items():
        if name.endswith(("q.bias", "k.bias")):
            one.parameter.data.normal_()
    return parallel
