"""The whole model: which layers have experts, the cache of generation, tied weights, bf16, causality with dropping."""

from typing import Any

import pytest
import torch
from tokenyard.moe.attention import KeyValueCache
from tokenyard.moe.config import CapacityConfig, ModelConfig, MoEConfig
from tokenyard.moe.init import initialise
from tokenyard.moe.model import Transformer
from tokenyard.moe.rotary import rotary_tables


@pytest.mark.parametrize(
    ("dense_first", "moe_every", "pattern"),
    [(0, 1, "mmmmm"), (1, 1, "dmmmm"), (0, 2, "dmdmd"), (1, 2, "ddmdm"), (5, 1, "ddddd"), (2, 3, "ddddm")],
)
def test_which_layers_have_experts(dense_first: int, moe_every: int, pattern: str) -> None:
    model = tiny(layers=5, dense_first=dense_first, moe_every=moe_every)
    assert "".join("d" if block.moe is None else "m" for block in model.blocks) == pattern
    _, stats = model(torch.arange(6).view(1, 6), with_stats=True)
    assert len(stats) == pattern.count("m")


def test_further_dense_layers() -> None:
    model = tiny(layers=5, dense_first=1, dense_layers=[2, 4])
    assert "".join("d" if block.moe is None else "m" for block in model.blocks) == "dmdmd"


def test_no_experts_make_a_dense_model() -> None:
    assert all(block.moe is None and block.dense is not None for block in tiny(moe=MoEConfig(experts=0)).blocks)


@pytest.mark.parametrize("chunks", [[1] * 11, [5, 1, 1, 1, 1, 1, 1], [4, 3, 4], [11]], ids=str)
def test_cached_logits_equal_those_of_the_whole_sequence(chunks: list[int]) -> None:
    model = tiny(dense_first=1).eval()
    ids_BS = torch.randint(40, (3, 11))
    cache = [KeyValueCache() for _ in model.blocks]
    logits = torch.cat([model(part, cache=cache) for part in ids_BS.split(chunks, dim=1)], dim=1)
    torch.testing.assert_close(logits, model(ids_BS), rtol=0, atol=1e-10)


def test_experts_on_a_shortcut_take_what_the_feedforward_before_took() -> None:
    """As a loop over pairs of blocks; and with a cache."""
    model = tiny(layers=4, moe_every=2, moe=MoEConfig(experts=4, hidden=8, shortcut=True)).eval()
    ids_BS = torch.randint(40, (2, 9))
    x_BSD, rotary = model.embedding(ids_BS), rotary_tables(model.config, 0, 9, torch.device("cpu"), torch.float64)
    blocks: list[Any] = model.blocks
    for first, second in zip(blocks[::2], blocks[1::2], strict=True):
        x_BSD = x_BSD + first.attention(first.attention_norm(x_BSD), rotary)
        taken_BSD = first.feedforward_norm(x_BSD)
        x_BSD = x_BSD + first.dense(taken_BSD)
        x_BSD = x_BSD + second.attention(second.attention_norm(x_BSD), rotary)
        x_BSD = x_BSD + second.dense(second.feedforward_norm(x_BSD)) + second.moe(taken_BSD)[0]
    expected = model.head(model.norm(x_BSD))
    torch.testing.assert_close(model(ids_BS), expected, rtol=0, atol=1e-12)
    cache = [KeyValueCache() for _ in model.blocks]
    logits = torch.cat([model(part, cache=cache) for part in ids_BS.split([5, 1, 3], dim=1)], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("capacity", [None, 0.6])
def test_logits_depend_on_earlier_tokens_alone(capacity: float | None) -> None:
    """Also in training, with tokens dropped by sequence."""
    model = tiny(moe=MoEConfig(experts=4, hidden=8, capacity=CapacityConfig(factor=capacity)))
    ids_BS = torch.randint(40, (2, 12))
    before, stats = model(ids_BS, with_stats=True)
    assert (sum(layer.dropped for layer in stats) > 0) == (capacity is not None)
    ids_BS[0, 7] += 1
    after = model(ids_BS)
    torch.testing.assert_close(after[0, :7], before[0, :7], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-12)
    assert (after[0, 7:] - before[0, 7:]).abs().amax(-1).min() > 1e-6


def test_tied_head_is_the_embedding() -> None:
    tied, separate = tiny(tie_embeddings=True), tiny()
    assert "head.weight" not in dict(tied.named_parameters())
    separate.get_parameter("head.weight").data.copy_(tied.get_parameter("embedding.weight"))
    ids_BS = torch.randint(40, (2, 5))
    logits, expected = tied(ids_BS), separate(ids_BS)
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    both = separate.get_parameter("embedding.weight").grad + separate.get_parameter("head.weight").grad
    torch.testing.assert_close(tied.get_parameter("embedding.weight").grad, both)


def test_multipliers_and_softcap_of_the_logits() -> None:
    """The output multiplier comes before the soft cap, as in Grok. An embedding multiplier equals a scaled embedding."""
    plain, ids_BS = tiny(), torch.randint(40, (2, 5))
    logits = plain(ids_BS)
    torch.testing.assert_close(tiny(output_multiplier=0.5)(ids_BS), logits * 0.5)
    torch.testing.assert_close(tiny(output_multiplier=0.5, output_softcap=2.0)(ids_BS), 2 * torch.tanh(logits * 0.5 / 2))
    scaled = tiny(embedding_multiplier=3.0)(ids_BS)
    plain.get_parameter("embedding.weight").data.mul_(3)
    torch.testing.assert_close(scaled, plain(ids_BS))


def test_bf16_keeps_fp32_weights_and_gradients() -> None:
    """Logits are within 3 % of the fp32 model's, gradients within 10 % in the mean: with the same weights."""
    narrow, wide = tiny(torch.bfloat16), tiny(torch.float32)
    torch.manual_seed(1)  # rounding sends none of these tokens to another expert
    ids_BS = torch.randint(40, (4, 16))
    logits, expected = narrow(ids_BS), wide(ids_BS)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() < 0.03 * expected.norm()
    for output in (logits, expected):
        torch.nn.functional.cross_entropy(output.flatten(0, 1).float(), ids_BS.flatten()).backward()
    for (name, parameter), reference in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name
        assert (parameter.grad - reference.grad).norm() < 0.1 * reference.grad.norm(), name


def tiny(dtype: torch.dtype = torch.float64, moe: MoEConfig | None = None, layers: int = 3, **changes: Any) -> Transformer:
    torch.manual_seed(0)
    moe = moe or MoEConfig(experts=4, hidden=8)
    config = ModelConfig(layers, width=16, heads=4, kv_heads=2, hidden=24, vocabulary=41, init_std=0.3, moe=moe, **changes)
    model = Transformer(config, dtype)
    initialise(model, 1)
    return model
