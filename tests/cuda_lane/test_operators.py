"""The operators of a MoE layer on CUDA: how many, and in which order those that travel or wait."""

import pytest
from operators import layer_operators
from tokenyard.train.compose import compose

RANKS = 8


@pytest.mark.parametrize(
    ("model", "forward", "backward"), [("qwen3_30b_a3b", 64, 55), ("mixtral_8x7b", 62, 55), ("deepseek_v3", 94, 73)]
)
def test_operators_of_a_layer_only_become_fewer(model: str, forward: int, backward: int) -> None:
    passes = layer_operators(compose([f"model={model}"]).model, RANKS)
    assert (len(passes.forward.launching), len(passes.backward.launching)) == (forward, backward)
    assert passes.waits == {"rows of each rank": 1}
