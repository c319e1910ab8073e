"""AdamW: groups, and one update by hand."""

import pytest
import torch
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.moe.model import Transformer
from tokenyard.parallel.apply import Parallel, initialise, parallelize
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train.config.config import OptimizerConfig
from tokenyard.train.optimizer import build_optimizer, set_learning_rate

CONFIG = OptimizerConfig(lr=0.01, beta1=0.8, beta2=0.9, epsilon=1e-6, weight_decay=0.3)


@pytest.mark.fault(14, "each parameter in one group; all change")
@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_group_and_matrices_alone_decay(tied: bool) -> None:
    parallel = build(tied)
    names = {id(parameter): name for name, parameter in parallel.model.named_parameters()}
    groups = build_optimizer(CONFIG, parallel).param_groups
    listed = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(names.values()) and len(set(listed)) == len(listed)
    for group in groups:
        for parameter in group["params"]:
            decays = "norm" not in names[id(parameter)]
            assert group["weight_decay"] == (CONFIG.weight_decay if decays else 0.0)
        assert (group["lr"], group["betas"], group["eps"]) == (CONFIG.lr, (CONFIG.beta1, CONFIG.beta2), CONFIG.epsilon)


def test_two_updates_by_hand() -> None:
    torch.manual_seed(0)
    parallel = build(False)
    optimizer = build_optimizer(CONFIG, parallel)
    set_learning_rate(optimizer, 0.02)
    state = {name: (p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)) for name, p in named(parallel)}
    for step in (1, 2):
        for name, parameter in named(parallel):
            parameter.grad = torch.randn_like(parameter)
            value, first, second = state[name]
            first = 0.8 * first + 0.2 * parameter.grad
            second = 0.9 * second + 0.1 * parameter.grad**2
            value = value * (1 - 0.02 * (0.3 if value.ndim > 1 else 0.0))
            value = value - 0.02 * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-6)
            state[name] = value, first, second
        optimizer.step()
    for name, parameter in named(parallel):
        torch.testing.assert_close(parameter.detach(), state[name][0], rtol=0, atol=1e-14, msg=name)


def named(parallel: Parallel) -> list[tuple[str, torch.nn.Parameter]]:
    return list(parallel.model.named_parameters())


def build(tied: bool) -> Parallel:
    moe = MoEConfig(experts=4, hidden=8, shared_hidden=8)
    config = ModelConfig(layers=2, width=16, heads=2, kv_heads=1, hidden=8, vocabulary=24, dense_first=1, moe=moe)
    config.tie_embeddings = tied
    with torch.device("meta"):
        model = Transformer(config, torch.float64)
    parallel = parallelize(model, build_mesh(ParallelConfig()), ParallelConfig(), torch.device("cpu"))
    initialise(parallel, 1)
    return parallel
