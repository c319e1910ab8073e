"""Gated DeltaNet: chunks against a loop over tokens, documents against separate rows, and a cache against the whole sequence."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tokenyard.moe import delta_net
from tokenyard.moe.attention import KeyValueCache
from tokenyard.moe.config import AttentionConfig, DeltaNetConfig, ModelConfig
from tokenyard.moe.delta_net import CausalConvolution, DeltaNet, gated_delta_rule
from tokenyard.moe.generation import generate
from tokenyard.moe.init import fill, initialise
from tokenyard.moe.model import Transformer
from tokenyard.moe.rotary import RotaryTables
from tokenyard.train.config.compose import compose
from torch import Tensor

SETTINGS = DeltaNetConfig(key_heads=2, value_heads=4, key_width=5, value_width=3, kernel=4)
CONFIG = ModelConfig(layers=2, width=8, attention=AttentionConfig(linear_every=2, delta=SETTINGS))


@pytest.fixture(params=[1, 4, 64])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(delta_net, "CHUNK", request.param)
    return request.param


def drawn(length: int, batch: int = 2, heads: int = 3) -> tuple[Tensor, ...]:
    """Queries, keys, values, logarithms of alpha, beta and a state; with gradients, in fp64."""
    torch.manual_seed(length)
    shapes = [(5,), (5,), (4,), (), ()]
    q, k, v, alpha, beta = (torch.randn(batch, heads, length, *shape, dtype=torch.float64) for shape in shapes)
    made = (q, F.normalize(k, dim=-1), v, -alpha.exp(), beta.sigmoid(), torch.randn(batch, heads, 5, 4, dtype=torch.float64))
    return tuple(x.requires_grad_() for x in made)


def token_by_token(q: Tensor, k: Tensor, v: Tensor, log_alpha: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 10 of the paper: S (I - beta k k^T) alpha + beta v k^T, here with S transposed."""
    outputs, eye = [], torch.eye(k.shape[-1], dtype=k.dtype)
    for t in range(q.shape[2]):
        outer = torch.einsum("bhk,bhj->bhkj", k[:, :, t], k[:, :, t])
        erase = eye - beta[:, :, t, None, None] * outer
        write = beta[:, :, t, None, None] * torch.einsum("bhk,bhv->bhkv", k[:, :, t], v[:, :, t])
        state = log_alpha[:, :, t].exp()[..., None, None] * (erase @ state) + write
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, :, t], state))
    return torch.stack(outputs, 2), state


@pytest.mark.parametrize("length", [1, 4, 11])
def test_chunks_are_the_recurrence(length: int, chunk: int) -> None:
    inputs = drawn(length)
    expected, found = token_by_token(*inputs), gated_delta_rule(*inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    torch.manual_seed(0)
    weights = [torch.randn_like(x) for x in expected]
    gradients = [torch.autograd.grad([(x * w).sum() for x, w in zip(of, weights, strict=True)], inputs) for of in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("lengths", [(5, 1, 6, 3), (4, 4, 1, 9), (1, 1, 2)])
def test_each_document_begins_without_a_state(lengths: tuple[int, ...], chunk: int) -> None:
    """Documents that end inside of a chunk and at its end; one of several chunks."""
    *inputs, _ = drawn(sum(lengths))
    documents = torch.tensor([[index for index, length in enumerate(lengths) for _ in range(length)]] * 2)
    together, _ = gated_delta_rule(*inputs, documents_BS=documents)
    alone = [gated_delta_rule(*part)[0] for part in zip(*(x.split(list(lengths), dim=2) for x in inputs), strict=True)]
    torch.testing.assert_close(together, torch.cat(alone, dim=2), rtol=0, atol=1e-12)
    assert (together - gated_delta_rule(*inputs)[0]).abs().max() > 1e-3


def test_strong_decay_has_finite_gradients() -> None:
    """Differences of logarithms between tokens in the wrong order would overflow."""
    q, k, v, log_alpha, beta, state = drawn(9)
    y, _ = gated_delta_rule(q, k, v, log_alpha * 1000, beta, state)
    gradients = torch.autograd.grad(y.sum(), (q, k, v, log_alpha, beta, state))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(("kernel", "length"), [(4, 7), (4, 2), (1, 3)])
def test_convolution_is_torchs(kernel: int, length: int) -> None:
    torch.manual_seed(1)
    convolution, x = CausalConvolution(6, kernel, torch.float64), torch.randn(2, length, 6, dtype=torch.float64)
    torch.nn.init.normal_(convolution.weight)
    expected = F.conv1d(x.mT, convolution.weight.unsqueeze(1), padding=kernel - 1, groups=6)[..., :length].mT
    found, last = convolution(x)
    torch.testing.assert_close(found, F.silu(expected), rtol=0, atol=1e-12)
    assert torch.equal(last, F.pad(x, (0, 0, kernel - 1, 0))[:, length:])
    documents = torch.arange(length).expand(2, -1)  # a token each
    torch.testing.assert_close(convolution(x, documents)[0], F.silu(x * convolution.weight[:, -1]), rtol=0, atol=1e-12)


def layer(dtype: torch.dtype = torch.float64) -> DeltaNet:
    made = DeltaNet(CONFIG, dtype)
    for name, parameter in made.named_parameters():
        fill(parameter.data, f"layers.0.attention.{name}", tuple(parameter.shape), CONFIG, seed=1)
    return made


def tables(documents_BS: Tensor | None = None) -> RotaryTables:
    return RotaryTables(torch.empty(0), torch.empty(0), documents_BS, {})


def test_a_cache_has_the_state_of_the_whole_sequence() -> None:
    """Parts of one token and of several, shorter and longer than the convolution."""
    attention, x = layer(), torch.randn(2, 13, 8, dtype=torch.float64)
    cache, found = KeyValueCache(), []
    for part in x.split([3, 1, 1, 6, 2], dim=1):
        found.append(attention(part, tables(), cache))
    torch.testing.assert_close(torch.cat(found, dim=1), attention(x, tables()), rtol=0, atol=1e-12)
    assert cache.length == 13 and cache.recurrent is not None and cache.recurrent.state_BHkv.shape == (2, 4, 5, 3)


def test_the_state_of_bf16_activations_is_fp32() -> None:
    attention, x, cache = layer(torch.float32), torch.randn(1, 200, 8), KeyValueCache()
    expected = attention(x, tables())
    found = attention(x.bfloat16(), tables(), cache)
    assert cache.recurrent is not None and cache.recurrent.state_BHkv.dtype == torch.float32
    assert found.dtype == torch.bfloat16 and (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_generation_continues_as_the_whole_sequence_would() -> None:
    model = Transformer(compose(["model=tiny_qwen3_next"]).model, torch.float64)
    initialise(model, 1)
    ids = list(range(3, 12))
    found = list(generate(model, ids, 6, temperature=0))
    for token in found:
        assert int(model(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)
    assert len(set(found)) > 1


def test_initial_decay_is_that_of_mamba_2() -> None:
    config = ModelConfig(attention=AttentionConfig(linear_every=2, delta=DeltaNetConfig(key_heads=1, value_heads=4000)))
    model = {name: torch.empty(4000) for name in ("a_log", "dt_bias")} | {"q_conv.weight": torch.empty(1000, 4)}
    for name, tensor in model.items():
        fill(tensor, f"layers.0.attention.{name}", tuple(tensor.shape), config, seed=1)
    rate, step, weight = model["a_log"].exp(), F.softplus(model["dt_bias"]), model["q_conv.weight"]
    assert rate.min() >= 0.01 and rate.max() <= 16 and rate.mean().item() == pytest.approx(8, abs=0.4)
    assert step.min() > 0.00099 and step.max() < 0.1001 and step.log10().mean().item() == pytest.approx(-2, abs=0.05)
    assert weight.abs().max() <= 0.5 and weight.std().item() == pytest.approx(0.5 / 3**0.5, rel=0.05)
