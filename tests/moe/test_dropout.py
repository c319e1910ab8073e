"""Dropout and the experts' dropout: the masks against splitmix64 in Python's integers, the numbers against plain products.

B sequences, S tokens of each, T tokens, C columns, R rows, F hidden width.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tokenyard.moe import feedforward
from tokenyard.moe.config import Activation, ModelConfig, MoEConfig
from tokenyard.moe.dispatch import Dispatcher, FusedDispatcher, LocalDispatcher
from tokenyard.moe.dropout import Dropout
from tokenyard.moe.experts import Experts
from tokenyard.moe.feedforward import FeedForward, activate
from tokenyard.moe.init import initialise
from tokenyard.moe.layer import MoELayer
from tokenyard.moe.model import Transformer
from tokenyard.moe.router import Routing
from tokenyard.moe.token_info import BatchPosition, Purpose, TokenInfo, fold_in, layer_keys, token_keys
from torch import Tensor

EXPERTS, WIDTH, HIDDEN, WORD = 5, 16, 22, 2**64
RATES = [0.1, 0.4, 0.75]


def mixed(key: int, value: int) -> int:
    """`fold_in` of one key, in integers modulo 2**64."""
    x = (key * 0x9E3779B97F4A7C15 + value) % WORD
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def factor(key: int, purpose: Purpose, column: int, rate: float) -> float:
    """What dropout multiplies an element by: the signed 16-bit number at its place in the hash decides."""
    lane = mixed(mixed(key % WORD, purpose), column // 4) >> 16 * (column % 4) & 0xFFFF
    signed = lane - 2**16 if lane >= 2**15 else lane
    levels = round(rate * 2**16)
    return 0.0 if signed < levels - 2**15 else 2**16 / (2**16 - levels)


def factors(keys: Tensor, purpose: Purpose, columns: int, rate: float) -> Tensor:
    flat = [[factor(key, purpose, column, rate) for column in range(columns)] for key in keys.flatten().tolist()]
    return torch.tensor(flat, dtype=torch.float64).view(*keys.shape, columns)


@pytest.mark.parametrize("rate", RATES)
def test_masks_are_those_of_the_formula(rate: float) -> None:
    keys = some_keys(3, 7)
    x = torch.randn(3, 7, 13, dtype=torch.float64)
    torch.testing.assert_close(
        Dropout(rate, Purpose.hidden_dropout)(x, keys), x * factors(keys, Purpose.hidden_dropout, 13, rate), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("rate", RATES)
def test_the_rate_and_the_mean_are_right(rate: float) -> None:
    """Of 1.6 million elements, within 5 standard deviations; and so for each column and for each token."""
    ones = torch.ones(8, 200, 1000, dtype=torch.float64)
    y = Dropout(rate, Purpose.hidden_dropout)(ones, some_keys(8, 200))
    kept = (y > 0).double()
    assert abs(y[y > 0].mean().item() - 1 / (1 - rate)) < 1e-4
    for means in (kept.mean(), kept.mean((0, 1)), kept.mean(2).flatten()):
        deviation = math.sqrt(rate * (1 - rate) * means.numel() / kept.numel())
        assert (means - (1 - rate)).abs().max() < 5 * deviation + 2**-17


def test_masks_of_different_things_are_independent() -> None:
    """Layers, steps, seeds, rows, places in a layer, experts, neighbouring tokens and columns, also those of one hash."""
    base = kept_by(some_keys(8, 200))
    others = {
        "layers": kept_by(layer_keys(torch.empty(8, 200, 1), TokenInfo(keys_BS=run_keys(), layer=4))),
        "steps": kept_by(some_keys(8, 200, BatchPosition(3, 8))),
        "seeds": kept_by(some_keys(8, 200, BatchPosition(4, 7))),
        "rows": kept_by(some_keys(8, 200, BatchPosition(3, 7, row=8))),
        "experts": kept_by(fold_in(some_keys(8, 200), 1)),
        "another expert": kept_by(fold_in(some_keys(8, 200), 2)),
        "tokens": base.roll(1, 1),
        **{f"columns {distance} apart": base.roll(distance, 2) for distance in (1, 2, 3, 4)},
        **{purpose.name: kept_by(some_keys(8, 200), purpose) for purpose in Purpose if purpose.name.endswith("_dropout")},
    }
    del others["hidden_dropout"]
    assert len(others) == 15
    centred = base - base.mean()
    for name, other in others.items():
        correlation = (centred * (other - other.mean())).mean() / base.var()
        assert abs(correlation.item()) < 5 / math.sqrt(base.numel()), name


@pytest.mark.parametrize("first", range(6))
def test_a_slice_of_columns_has_the_slice_of_the_mask(first: int) -> None:
    whole, part = (Dropout(0.4, Purpose.hidden_dropout) for _ in range(2))
    part.first_column = first
    assert torch.equal(part.keep(some_keys(3, 7), 9), whole.keep(some_keys(3, 7), 20)[..., first : first + 9])


def test_a_rate_near_one_keeps_something_to_scale() -> None:
    assert Dropout(1 - 1e-9, Purpose.hidden_dropout).scale == 2**16


CASES = {
    "dropless": (11, 2, None, None),
    "some dropped": (11, 3, 0.3, None),
    "padded": (11, 2, 0.3, 9),
    "no tokens": (0, 2, None, None),
}


@pytest.mark.parametrize("dispatcher", [FusedDispatcher, LocalDispatcher])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("activation", Activation)
def test_the_experts_drop_hidden_columns_by_token_and_expert(
    activation: Activation, case: tuple[int, int, float | None, int | None], dispatcher: type[Dispatcher]
) -> None:
    """Outputs and all gradients, against one product for each choice, by autograd. Expert ids begin at 3."""
    torch.manual_seed(0)
    tokens, top_k, dropped, padded = case
    experts = Experts(EXPERTS, WIDTH, HIDDEN, torch.float64, activation, bias=True, dropout=0.4)
    experts.first_expert = 3
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_TD = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(tokens, top_k, dtype=torch.float64, requires_grad=True)
    kept_TK = None if dropped is None else torch.rand(tokens, top_k) > dropped
    experts_TK, keys_T = torch.rand(tokens, EXPERTS).argsort(1)[:, :top_k], some_keys(1, tokens).flatten()
    routing = Routing(experts_TK, weights_TK, kept_TK, None, padded, keys_T)  # pyright: ignore[reportArgumentType]
    y_TD = dispatcher(EXPERTS).run(x_TD, routing, experts, lambda: lambda: None).y_TD  # pyright: ignore[reportCallIssue]
    expected_TD = by_choice(experts, x_TD, routing)
    torch.testing.assert_close(y_TD, expected_TD, rtol=0, atol=1e-13)
    inputs, weight_TD = (x_TD, weights_TK, *experts.parameters()), torch.randn_like(x_TD)
    gradients = torch.autograd.grad(y_TD, inputs, weight_TD)
    expected = torch.autograd.grad(expected_TD, inputs, weight_TD, materialize_grads=True)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


def test_a_layer_drops_in_the_shared_expert_too_and_only_in_training() -> None:
    layer = MoELayer(ModelConfig(width=WIDTH, moe=MoEConfig(4, 2, HIDDEN, shared_hidden=HIDDEN, dropout=0.4)), torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_BSD, keys_BS = torch.randn(2, 6, WIDTH, dtype=torch.float64), run_keys()[:2, :6]
    tokens = TokenInfo(keys_BS=keys_BS, layer=3)
    assert layer.shared is not None
    y_BSD, routing = layer(x_BSD, tokens)[0], layer.router(x_BSD, tokens)
    routing = routing._replace(keys_T=fold_in(keys_BS, 3).flatten())
    routed_BSD = by_choice(layer.experts, x_BSD.flatten(0, 1), routing).view_as(x_BSD)
    hidden = activate(layer.shared.activation, x_BSD @ layer.shared.gate_up.flatten(0, 1).T)
    shared_BSD = hidden * factors(fold_in(keys_BS, 3), Purpose.hidden_dropout, HIDDEN, 0.4) @ layer.shared.down.T
    torch.testing.assert_close(y_BSD, routed_BSD + shared_BSD, rtol=0, atol=1e-13)
    layer.eval()
    plain = MoELayer(ModelConfig(width=WIDTH, moe=MoEConfig(4, 2, HIDDEN, shared_hidden=HIDDEN)), torch.float64).eval()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x_BSD, tokens)[0], plain(x_BSD)[0]) and not torch.equal(layer(x_BSD)[0], y_BSD)


def test_a_model_drops_where_t5_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a dense model: the same model without dropout, with hooks that multiply by the masks of the formula."""
    config = ModelConfig(layers=2, width=WIDTH, heads=2, kv_heads=2, hidden=HIDDEN, vocabulary=40, dropout=0.25, moe=MoEConfig(0))
    model, plain = (Transformer(each, torch.float64) for each in (config, replace(config, dropout=0.0)))
    initialise(model, 1)
    plain.load_state_dict(model.state_dict())
    keys_BS, layers = token_keys(BatchPosition(3, 7), 2, 5, torch.device("cpu")), iter(range(2))

    def dropping(purpose: Purpose, layer: int = 0) -> Callable[..., Tensor]:
        return lambda *inputs: inputs[-1] * factors(fold_in(keys_BS, layer), purpose, inputs[-1].shape[-1], 0.25)

    plain.embedding.register_forward_hook(dropping(Purpose.embedding_dropout))
    plain.norm.register_forward_hook(dropping(Purpose.output_dropout))
    for index, block in enumerate(plain.blocks):
        block.attention.register_forward_hook(dropping(Purpose.attention_dropout, index))
        assert block.dense is not None
        block.dense.register_forward_hook(dropping(Purpose.feedforward_dropout, index))
    ids_BS, position = torch.randint(40, (2, 5)), BatchPosition(3, 7)
    logits = model(ids_BS, position=position)
    monkeypatch.setattr(feedforward, "activate", lambda *inputs: dropping(Purpose.hidden_dropout, next(layers))(activate(*inputs)))
    torch.testing.assert_close(logits, plain(ids_BS, position=position), rtol=1e-12, atol=1e-14)
    monkeypatch.undo()
    assert torch.equal(logits, model(ids_BS, position=position))
    assert not torch.equal(logits, model(ids_BS, position=BatchPosition(3, 8)))
    untouched = Transformer(replace(config, dropout=0.0), torch.float64).eval()
    untouched.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(ids_BS), untouched(ids_BS))


@pytest.mark.parametrize(("dropout", "inside", "made"), [(0.0, 0.0, 0), (0.1, 0.0, 3), (0.0, 0.1, 1)])
def test_keys_are_made_only_where_something_drops(
    dropout: float, inside: float, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding and the last norm draw by keys of their own, so do the block and its experts."""
    calls: list[int] = []
    for module in ("model", "layer"):
        monkeypatch.setattr(f"tokenyard.moe.{module}.layer_keys", lambda *of: calls.append(1) or layer_keys(*of))
    moe = MoEConfig(4, 2, HIDDEN, dropout=inside)
    config = ModelConfig(layers=1, width=WIDTH, heads=2, kv_heads=2, vocabulary=40, dropout=dropout, moe=moe)
    model = Transformer(config, torch.float64)
    initialise(model, 1)
    model(torch.zeros(2, 5, dtype=torch.int64))
    assert len(calls) == made
    calls.clear()
    model.eval()(torch.zeros(2, 5, dtype=torch.int64))
    assert not calls


def test_compiled_dropout_has_the_same_mask() -> None:
    layer, x, keys = FeedForward(8, 12, torch.float32, dropout=0.3), torch.randn(2, 3, 8), some_keys(2, 3)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    expected = layer(x, keys)
    layer.compile(backend="aot_eager")
    torch.testing.assert_close(layer(x, keys), expected)
    assert not torch.allclose(layer(x, keys + 1), expected)


def by_choice(experts: Experts, x_TD: Tensor, routing: Routing) -> Tensor:
    """Sums the outputs of the kept choices, one after the other; dropout from the formula."""
    total_TD, keys_T = 0.0 * x_TD, routing.keys_T
    assert keys_T is not None
    for token, chosen in enumerate(routing.experts_TK.tolist()):
        for choice, expert in enumerate(chosen):
            if routing.kept_TK is not None and not routing.kept_TK[token, choice]:
                continue
            key = mixed(int(keys_T[token]) % WORD, expert + experts.first_expert)
            inner = experts.gate_up[expert].flatten(0, 1) @ x_TD[token]
            if experts.gate_up_bias is not None:
                inner = inner + experts.gate_up_bias[expert].flatten()
            hidden = activate(experts.activation, inner) * factors(torch.tensor(signed(key)), Purpose.hidden_dropout, HIDDEN, 0.4)
            output = experts.down[expert] @ hidden
            output = output if experts.down_bias is None else output + experts.down_bias[expert]
            one_T1 = torch.nn.functional.one_hot(torch.tensor(token), len(x_TD)).unsqueeze(1)
            total_TD = total_TD + one_T1 * (routing.weights_TK[token, choice] * output)
    return total_TD


def signed(key: int) -> int:
    return key - WORD if key >= WORD // 2 else key


def kept_by(keys: Tensor, purpose: Purpose = Purpose.hidden_dropout) -> Tensor:
    return Dropout(0.4, purpose).keep(keys, 500).double()


def run_keys(position: BatchPosition = BatchPosition(3, 7)) -> Tensor:  # noqa: B008
    return token_keys(position, 8, 200, torch.device("cpu"))


def some_keys(sequences: int, length: int, position: BatchPosition = BatchPosition(3, 7)) -> Tensor:  # noqa: B008
    """Those of layer 3."""
    return fold_in(run_keys(position), 3)[:sequences, :length]
