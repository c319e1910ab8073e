"""Properties of every kind of router: counts, gradients, ties, capacity, no tokens, and where it is random."""

import math
from dataclasses import replace

import pytest
import torch
from tokenyard.bench.gpu.routers import EXPERTS, RANDOM, ROUTERS
from tokenyard.moe.config import MoEConfig, RouterConfig, Scope, Selection
from tokenyard.moe.layer import MoELayer
from tokenyard.moe.model import ModelConfig, Transformer
from tokenyard.moe.router import Router, Routing
from tokenyard.moe.token_info import BatchPosition, TokenInfo, build_token_info, layer_keys, token_keys
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train.loss import Totals, add_pooled_balance, losses, pooled_sums
from torch import Tensor

WIDTH, SEQUENCES, LENGTH = 16, 4, 16
ALL = pytest.mark.parametrize("config", ROUTERS.values(), ids=list(ROUTERS))
COEFFICIENTS = {
    "coefficient": "balance",
    "sequence_coefficient": "balance",
    "device_coefficient": "balance",
    "communication_coefficient": "balance",
    "importance_coefficient": "balance",
    "z_coefficient": None,
}
OF_GROUPS = ("device_coefficient", "communication_coefficient")


@ALL
@pytest.mark.parametrize("masked", [False, True])
def test_counts_conserve_tokens_times_k(config: MoEConfig, masked: bool) -> None:
    routing, tokens = route(config, masked=masked)
    stats, valid_BS = routing.stats, tokens.valid_BS
    assert stats.counts_BE.dtype == torch.int64 and stats.dropped.dtype == torch.int64
    assert torch.equal(stats.tokens_B, torch.full((SEQUENCES,), LENGTH) if valid_BS is None else valid_BS.sum(1))
    if config.router.selection is not Selection.expert_choice:
        assert torch.equal(stats.counts_BE.sum(1), stats.tokens_B * config.top_k)
    elif not masked:
        share = config.capacity.factor or 1.0
        assert stats.counts_BE.sum() == SEQUENCES * LENGTH * config.top_k * share
    torch.testing.assert_close(stats.scores_BE.sum(1), stats.tokens_B.double())
    dispatched = stats.counts_BE[:, :EXPERTS].sum() if routing.kept_TK is None else (routing.kept_TK & flat(valid_BS)).sum()
    if config.router.selection is not Selection.gshard:
        assert dispatched == stats.counts_BE[:, :EXPERTS].sum() - stats.dropped
    if routing.kept_TK is not None:
        assert (routing.experts_TK[routing.kept_TK] < EXPERTS).all(), "null experts get no row"


@ALL
def test_every_expert_stays_within_its_capacity(config: MoEConfig) -> None:
    routing, _ = route(config)
    factor = config.capacity.factor_at(1)
    if factor is None:
        assert routing.stats.dropped == 0
        return
    by_batch = config.capacity.scope is Scope.batch
    tokens = math.ceil(SEQUENCES * LENGTH / config.capacity.groups) if by_batch else LENGTH
    rows = math.ceil(factor * tokens * config.top_k / (EXPERTS + config.router.null_experts))
    assert routing.kept_TK is not None
    choices_TK = torch.where(routing.kept_TK, routing.experts_TK, EXPERTS)
    taken = torch.stack([group.flatten().bincount(minlength=EXPERTS + 1)[:EXPERTS] for group in choices_TK.split(tokens)])
    assert (taken <= rows).all() and taken.max() == rows, "the fullest is full"


@pytest.mark.parametrize(
    ("config", "coefficient"),
    [
        pytest.param(config, coefficient, id=f"{coefficient}-{name}")
        for name, config in ROUTERS.items()
        for coefficient in COEFFICIENTS
        if config.router.groups > 1 or coefficient not in OF_GROUPS
    ],
)
def test_the_routers_gradient_is_linear_in_each_coefficient(config: MoEConfig, coefficient: str) -> None:
    gradients = [router_gradient(with_coefficient(config, coefficient, value)) for value in (0.0, 0.5, 1.0)]
    once, twice = gradients[1] - gradients[0], gradients[2] - gradients[0]
    torch.testing.assert_close(twice, 2 * once, rtol=1e-9, atol=1e-13 * float(gradients[2].abs().max()))
    taken_evenly = config.router.selection is Selection.expert_choice and (
        coefficient == "coefficient" or (coefficient == "sequence_coefficient" and config.capacity.scope is Scope.sequence)
    )
    assert (once.norm() > 1e-6) != (config.router.selection is Selection.hash or taken_evenly)


@ALL
def test_gradient_reaches_the_router_through_the_output(config: MoEConfig) -> None:
    layer, x_BSD, tokens = random_layer(config), inputs(), token_record(config)
    layer(x_BSD, tokens)[0].square().sum().backward()
    gradients = [parameter.grad for name, parameter in layer.named_parameters() if name.startswith("router.")]
    assert bool(gradients) == (config.router.selection is not Selection.hash)
    assert all(gradient is not None and gradient.norm() > 1e-6 for gradient in gradients)


@ALL
def test_ties_go_to_the_first(config: MoEConfig) -> None:
    router = random_router(config)
    for parameter in router.parameters():
        parameter.data.zero_()
    routing = router.eval()(inputs(), token_record(config))
    if config.router.selection is Selection.expert_choice:
        kept_BSE = routing.kept_TK.view(SEQUENCES, LENGTH, EXPERTS)
        assert (kept_BSE[..., :1] == kept_BSE).all() and kept_BSE[0, 0, 0] and not kept_BSE[-1, -1, 0]
    elif config.router.selection is not Selection.hash:
        assert torch.equal(routing.experts_TK, torch.arange(config.top_k).expand_as(routing.experts_TK))


@ALL
def test_all_tokens_to_one_expert(config: MoEConfig) -> None:
    """With equal logits (and ids) all tokens have the same experts; in expert choice each expert takes its share."""
    layer, tokens = random_layer(config), build_token_info(torch.full((SEQUENCES, LENGTH), 7), None, BatchPosition())
    for parameter in layer.router.parameters():
        parameter.data.zero_()
    y_BSD, stats = layer(inputs(), tokens)
    if config.router.selection is Selection.expert_choice:
        assert (stats.counts_BE.sum(0) == stats.counts_BE.sum(0)[0]).all()
    elif not config.router.noise:
        chosen = stats.counts_BE == LENGTH
        assert torch.equal(chosen.sum(1), torch.full((SEQUENCES,), config.top_k)), "all tokens chose the same experts"
        assert chosen[:, : config.top_k].all() or config.router.selection is Selection.hash
    (y_BSD.sum() + loss_of(stats, config).objective).backward()
    assert y_BSD.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@ALL
@pytest.mark.parametrize(("sequences", "length"), [(0, LENGTH), (SEQUENCES, 0)])
def test_no_token_at_all(config: MoEConfig, sequences: int, length: int) -> None:
    layer, x_BSD = random_layer(config), torch.zeros(sequences, length, WIDTH, dtype=torch.float64, requires_grad=True)
    y_BSD, stats = layer(x_BSD, build_token_info(torch.zeros(sequences, length, dtype=torch.int64), None, BatchPosition()))
    y_BSD.sum().backward()
    assert y_BSD.shape == x_BSD.shape == x_BSD.grad.shape
    assert stats.counts_BE.shape[0] == sequences and not stats.counts_BE.any() and not stats.dropped
    assert not any(p.grad.any() for p in layer.parameters() if p.grad is not None)


@ALL
def test_no_token_that_counts(config: MoEConfig) -> None:
    config = with_coefficient(with_coefficient(config, "importance_coefficient", 1.0), "sequence_coefficient", 1.0)
    layer, x_BSD = random_layer(config), inputs()
    tokens = token_record(config)._replace(valid_BS=torch.zeros(SEQUENCES, LENGTH, dtype=torch.bool))
    y_BSD, stats = layer(x_BSD, tokens)
    share = loss_of(stats, config)
    (y_BSD.sum() + share.objective).backward()
    assert not stats.counts_BE.any() and not stats.dropped and not stats.tokens_B.any()
    assert share.balance_L == share.sequence_L == share.importance_L == share.z_L == 0
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@ALL
def test_only_training_is_random_and_the_place_decides(config: MoEConfig) -> None:
    router, name = random_router(config), next(name for name, other in ROUTERS.items() if other is config)
    here, again = (outcome(router, BatchPosition(3, 7)) for _ in range(2))
    assert torch.equal(here, again), "recomputation"
    for elsewhere in (BatchPosition(3, 8), BatchPosition(4, 7), BatchPosition(3, 7, row=4)):
        assert torch.equal(outcome(router, elsewhere), here) == (name not in RANDOM)
    router.eval()
    assert torch.equal(outcome(router, BatchPosition(3, 7)), outcome(router, None))


@pytest.mark.parametrize("name", RANDOM)
def test_rows_are_routed_alike_in_whatever_batch_they_come(name: str) -> None:
    config = ROUTERS[name]
    router, x_BSD = random_router(replace(config, capacity=replace(config.capacity, scope=Scope.sequence))), inputs()
    whole = outcome(router, BatchPosition(3, 7), x_BSD)
    halves = [outcome(router, BatchPosition(3, 7, row=row), x_BSD[row : row + 2]) for row in (0, 2)]
    assert torch.equal(torch.cat(halves), whole)


@ALL
def test_keys_are_made_only_where_something_is_random(config: MoEConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the keys of a layer, and those that a model computes before all layers."""
    made = []
    monkeypatch.setattr("tokenyard.moe.router.layer_keys", lambda *of: made.append("layer") or layer_keys(*of))
    monkeypatch.setattr("tokenyard.moe.token_info.token_keys", lambda *of: made.append("model") or token_keys(*of))
    torch.manual_seed(0)
    model = Transformer(ModelConfig(vocabulary=40, width=WIDTH, layers=1, heads=2, kv_heads=2, moe=config), torch.float64)
    model(torch.zeros(SEQUENCES, LENGTH, dtype=torch.int64))
    name = next(name for name, other in ROUTERS.items() if other is config)
    assert made == (["model", "layer"] if name in RANDOM else [])


@ALL
def test_a_loss_that_is_off_has_no_backward_pass(config: MoEConfig) -> None:
    balance = replace(config.balance, sequence_coefficient=0.0, device_coefficient=0.0, communication_coefficient=0.0)
    on, off = (replace(config, balance=replace(balance, coefficient=value), z_coefficient=value) for value in (0.1, 0.0))
    stats, idle = (random_router(each)(inputs(), token_record(each)).stats for each in (on, off))
    learns = config.router.selection is not Selection.hash
    assert stats.scores_BE.requires_grad == stats.z.requires_grad == learns
    assert not idle.scores_BE.requires_grad and not idle.z.requires_grad
    assert torch.equal(stats.scores_BE, idle.scores_BE) and torch.equal(stats.z, idle.z)
    sequences = replace(off, balance=replace(off.balance, sequence_coefficient=0.1))
    assert random_router(sequences)(inputs(), token_record(sequences)).stats.scores_BE.requires_grad == learns


def test_layers_draw_their_own_noise() -> None:
    router, x_BSD, tokens = random_router(ROUTERS["noise, importance and load"]), inputs(), token_record(ROUTERS["softmax"])
    weights = [router(x_BSD, tokens._replace(layer=layer)).weights_TK for layer in (0, 1)]
    assert not torch.equal(*weights)


def test_null_experts_add_nothing_to_a_tokens_output() -> None:
    """Equals a layer whose last experts output zeros."""
    config = MoEConfig(experts=EXPERTS, top_k=3, hidden=16, router=RouterConfig(null_experts=4))
    layer, wide = random_layer(config), random_layer(replace(config, experts=EXPERTS + 4, router=RouterConfig()))
    with torch.no_grad():
        wide.router.get_parameter("weight").copy_(layer.router.get_parameter("weight"))
        wide.experts.gate_up[:EXPERTS] = layer.experts.gate_up
        wide.experts.down.zero_()
        wide.experts.down[:EXPERTS] = layer.experts.down
    (y_BSD, stats), (expected_BSD, wide_stats) = layer(inputs()), wide(inputs())
    torch.testing.assert_close(y_BSD, expected_BSD)
    assert torch.equal(stats.counts_BE, wide_stats.counts_BE) and stats.counts_BE[:, EXPERTS:].sum() > 0


def route(config: MoEConfig, masked: bool = False) -> tuple[Routing, TokenInfo]:
    tokens = token_record(config)
    if masked:
        tokens = tokens._replace(valid_BS=torch.rand(SEQUENCES, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.7)
    return random_router(config)(inputs(), tokens), tokens


def outcome(router: Router, place: BatchPosition | None, x_BSD: Tensor | None = None) -> Tensor:
    """Returns (B, S, E): the weights of dispatched choices."""
    x_BSD = inputs() if x_BSD is None else x_BSD
    ids_BS = torch.arange(LENGTH).expand(len(x_BSD), LENGTH)
    routing = router(x_BSD, build_token_info(ids_BS, None, place))
    weights_TK = routing.weights_TK.detach() if routing.kept_TK is None else routing.weights_TK.detach() * routing.kept_TK
    found = torch.zeros(len(weights_TK), router.columns, dtype=torch.float64).scatter(1, routing.experts_TK, weights_TK)
    return found.view(len(x_BSD), LENGTH, -1)


def router_gradient(config: MoEConfig) -> Tensor:
    """Returns the gradient of the whole objective by the router's weight (zeros if it has none)."""
    layer = random_layer(config)
    y_BSD, stats = layer(inputs(), token_record(config))
    (y_BSD.square().sum() + loss_of(stats, config).objective).backward()
    weight = layer.router.weight
    return torch.zeros(1, dtype=torch.float64) if weight is None else weight.grad.clone()


def loss_of(stats, config: MoEConfig):
    """The layer is the only one of a model whose cross entropy is constant."""
    constant = torch.zeros((), dtype=torch.float64)
    totals, mesh = Totals(SEQUENCES * LENGTH, SEQUENCES, 1), build_mesh(ParallelConfig())
    return add_pooled_balance(losses(constant, [stats], config, totals, mesh), pooled_sums([stats], config), config, totals, mesh)


def with_coefficient(config: MoEConfig, name: str, value: float) -> MoEConfig:
    section = COEFFICIENTS[name]
    return replace(config, **({section: replace(getattr(config, section), **{name: value})} if section else {name: value}))


def token_record(config: MoEConfig) -> TokenInfo:
    ids_BS = torch.randint(40, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(2))
    return build_token_info(ids_BS, None, BatchPosition())


def inputs() -> Tensor:
    return torch.randn(SEQUENCES, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def random_router(config: MoEConfig) -> Router:
    return random_layer(config).router


def random_layer(config: MoEConfig) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(ModelConfig(width=WIDTH, moe=config), torch.float64)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def flat(valid_BS: Tensor | None) -> Tensor:
    return torch.ones(1, 1, dtype=torch.bool) if valid_BS is None else valid_BS.flatten().unsqueeze(1)
