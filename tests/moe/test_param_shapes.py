"""The shapes computed from the configuration equal those of the model, for every model in conf/model."""

import time

import pytest
import torch
from tokenyard.moe.model import Transformer
from tokenyard.moe.param_count import count, part_of
from tokenyard.moe.param_shapes import shapes
from tokenyard.train.config.compose import CONF, compose

NAMES = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))
CHANGES = [
    # Settings that no shipped model has, or not together.
    "model.moe.router.noise=true model.moe.router.null_experts=3 model.moe.router.bias=true",
    "model.attention.qk_norm=full model.attention.sinks=true model.attention.qkv_bias=true model.head_width=24",
    "model.mtp_depth=2 model.dense_first=1 model.moe_every=2 model.layers=5 model.hidden=96",
    "model.attention.kind=mla model.moe.shared_hidden=24 model.moe.shared_gate=true model.activation=gelu",
    "model.attention.linear_layers=[1] model.attention.output_gate=true model.attention.qkv_bias=true model.mtp_depth=1",
    "model.moe.router.null_experts=4 model.moe.router.copy_experts=1 model.moe.router.constant_experts=2",
    "model.moe.router.selection=hash model.moe.router.null_experts=2 model.moe.router.constant_experts=2",
    "model.pre_norms=false model.sandwich_norms=true model.dense_first=1 model.layers=2",
    "model.moe.activation=relu_squared model.moe.bias=true model.tie_embeddings=true model.sandwich_norms=true",
]


@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_those_of_the_model(name: str) -> None:
    config = compose([f"model={name}"]).model
    start = time.process_time()
    with torch.device("meta"):
        model = Transformer(config, torch.bfloat16)
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes(config) == built
    sums = dict.fromkeys(vars(count(config)), 0)
    for name, parameter in model.named_parameters():
        sums[part_of(name)] += parameter.numel()
    assert sums | {"active_experts": count(config).active_experts} == vars(count(config))
    assert time.process_time() - start < 5


@pytest.mark.parametrize("changes", CHANGES)
def test_shapes_of_rarer_settings(changes: str) -> None:
    config = compose(["model=tiny", *changes.split()]).model
    with torch.device("meta"):
        model = Transformer(config)
    assert shapes(config) == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
