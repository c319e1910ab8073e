"""The shapes that parallel/layout.py computes are those of the parameters after `parallelize`."""

import math

import pytest
import torch
from tokenyard.moe.model import Transformer
from tokenyard.parallel.apply import local, parallelize
from tokenyard.parallel.layout import rank_shapes
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config

MODELS = ["tiny_mixtral", "tiny_deepseek_v3", "tiny_qwen2_moe", "tiny_gpt_oss", "tiny_olmoe", "tiny_grok"]
LAYOUTS = [
    "parallel.expert=4",
    "parallel.tensor=2 parallel.expert=2",
    "parallel.shard=2 parallel.expert=2",
    "parallel.shard=4",
    "parallel.expert=2 parallel.expert_tensor=2",
    "parallel.tensor=2 parallel.shard=2 parallel.expert_tensor=2",
    "parallel.tensor=2 parallel.shard=2 parallel.expert=4",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_holds_what_the_rules_say(ranks, layout: str) -> None:
    cases = [[f"model={model}", *layout.split()] for model in MODELS]
    # 6 rows of MLA's latent and 42 of the dense feed-forward do not divide by 4: the last ranks hold less.
    cases.append(["model=tiny_deepseek_v3", "model.attention.mla.kv_rank=30", "model.hidden=42", *layout.split()])
    configs = [compose(case) for case in cases]
    held = ranks(4, held_on_rank, configs)
    for place, (case, config) in enumerate(zip(cases, configs, strict=True)):
        expected = rank_shapes(config.model, config.parallel, 4)
        assert held[0][place] == expected, case
        for rank in held:
            assert all(math.prod(rank[place][name]) <= math.prod(shape) for name, shape in expected.items())


def test_one_rank_holds_everything() -> None:
    config = compose(["model=tiny_deepseek_v3"])
    assert rank_shapes(config.model, config.parallel, 1) == held_on_rank([config])[0]


def held_on_rank(configs: list[Config]) -> list[dict[str, tuple[int, ...]]]:
    held = []
    for config in configs:
        with torch.device("meta"):
            model = Transformer(config.model)
        parallel = parallelize(model, build_mesh(config.parallel), config.parallel, torch.device("cpu"))
        held.append({name: tuple(local(parameter).shape) for name, parameter in parallel.model.named_parameters()})
    return held
