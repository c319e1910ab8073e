"""Muon: Newton-Schulz against singular values and a loop, two updates by hand, and which parameters are cut into which matrices."""

import functools
import math
from unittest import mock

import pytest
import torch
from sameness import VOCABULARY
from tokenyard.moe.attention_config import AttentionConfig, AttentionKind, MLAConfig
from tokenyard.moe.config import ModelConfig, MoEConfig, RouterConfig
from tokenyard.moe.model import Transformer
from tokenyard.moe.param_shapes import shapes
from tokenyard.parallel.apply import Parallel, initialise, parallelize
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train.batch import Rows
from tokenyard.train.config.config import OptimizerConfig
from tokenyard.train.config.matrices import STEPS, MuonConfig, MuonProducts, OptimizerName, by_muon, matrices
from tokenyard.train.muon import COEFFICIENTS, orthogonalize
from tokenyard.train.optimizer import build_optimizer, set_learning_rate
from tokenyard.train.step import StepInput, train_step

MLA = AttentionConfig(AttentionKind.mla, mla=MLAConfig(q_rank=8, kv_rank=12, nope_width=4, rope_width=2, value_width=6))


def polynomial(s: torch.Tensor) -> torch.Tensor:
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    return s


def test_singular_values_follow_the_polynomial_and_vectors_stay() -> None:
    torch.manual_seed(0)
    x_NAB = torch.randn(5, 12, 40, dtype=torch.float64) * torch.logspace(-4, 4, 5, dtype=torch.float64)[:, None, None]
    x_NAB[1, 3:] = x_NAB[1, :9] @ torch.randn(40, 40, dtype=torch.float64)  # a steep spectrum
    x_NAB[2] = 0
    found_NAB = orthogonalize(x_NAB)
    for x_AB, found_AB in zip(x_NAB, found_NAB, strict=True):
        u, s, vh = torch.linalg.svd(x_AB, full_matrices=False)
        norm = s.norm().clamp(min=1e-7)
        torch.testing.assert_close(found_AB, u @ torch.diag(polynomial(s / norm)) @ vh, rtol=0, atol=1e-12)
    spread = torch.linalg.svdvals(found_NAB[0])
    assert spread.min() > 0.65 and spread.max() < 1.25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_batch_is_each_matrix_by_itself(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x_NAB = torch.randn(4, 16, 24).to(dtype)
    a, b, c = COEFFICIENTS
    for x, found in zip(x_NAB, orthogonalize(x_NAB), strict=True):
        x = (x.double() / x.double().norm()).to(dtype)
        for _ in range(STEPS):
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
        torch.testing.assert_close(found, x, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", [(16, 64), (64, 16)])
def test_steep_spectra_stay_bounded_in_bf16(shape: tuple[int, int]) -> None:
    torch.manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(4, size, 16, dtype=torch.float64)).Q for size in shape)
    x_NAB = (u * torch.arange(1, 17, dtype=torch.float64) ** -2) @ v.mT
    wide_NAB, narrow_NAB = orthogonalize(x_NAB), orthogonalize(x_NAB.bfloat16()).double()
    assert (narrow_NAB - wide_NAB).norm() < 0.1 * wide_NAB.norm()
    torch.testing.assert_close(orthogonalize(x_NAB.mT.contiguous()), wide_NAB.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(orthogonalize(x_NAB, 3.0), 3 * wide_NAB)


def test_products_are_as_wide_as_asked_but_fp64_in_fp64() -> None:
    def update(dtype: torch.dtype, products: MuonProducts) -> torch.Tensor:
        parallel = build(model(), dtype)
        optimizer = build_optimizer(OptimizerConfig(OptimizerName.muon, muon=MuonConfig(products=products)), parallel)
        torch.manual_seed(3)
        before = torch.cat([one.parameter.detach().flatten() for one in parallel.parameters.values()])
        for one in parallel.parameters.values():
            one.parameter.grad = torch.randn(one.metadata.shape).to(dtype)
        optimizer.step()
        return torch.cat([one.parameter.detach().flatten() for one in parallel.parameters.values()]) - before

    auto, narrow, wide = (update(torch.float32, products) for products in MuonProducts)
    assert auto.equal(wide) and 1e-3 < (narrow - wide).norm() / wide.norm() < 0.03
    assert update(torch.float64, MuonProducts.bf16).equal(update(torch.float64, MuonProducts.auto))


def test_two_updates_by_hand() -> None:
    torch.manual_seed(0)
    parallel = build(model(), torch.float64)
    settings = OptimizerConfig(OptimizerName.muon, 0.01, 0.8, 0.9, 1e-6, 0.3, muon=MuonConfig(0.7))
    optimizer, plain = build_optimizer(settings, parallel), build(model(), torch.float64)
    adamw = build_optimizer(OptimizerConfig(OptimizerName.adamw, 0.01, 0.8, 0.9, 1e-6, 0.3), plain)
    for of in (optimizer, adamw):
        set_learning_rate(of, 0.02)
    expected = {name: one.parameter.detach().clone() for name, one in parallel.parameters.items()}
    momenta = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    for _ in (1, 2):
        for name, one in parallel.parameters.items():
            gradient = torch.randn_like(one.parameter)
            one.parameter.grad, plain.parameters[name].parameter.grad = gradient, gradient.clone()
            momenta[name] = 0.7 * momenta[name] + 0.3 * gradient
            weight, x = expected[name], 0.3 * gradient + 0.7 * momenta[name]
            if by_muon(name, x.shape, settings.muon):
                for row, matrix in zip(weight.view(-1, *x.shape[-2:]), x.view(-1, *x.shape[-2:]), strict=True):
                    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
                    update = u @ torch.diag(polynomial(s / s.norm())) @ vh * 0.2 * math.sqrt(max(matrix.shape))
                    row.copy_(row - 0.02 * (update + 0.3 * row))
        optimizer.step()
        adamw.step()
    for name, one in parallel.parameters.items():
        wanted = expected[name] if by_muon(name, one.metadata.shape, settings.muon) else plain.parameters[name].parameter
        torch.testing.assert_close(one.parameter, wanted, rtol=0, atol=1e-12, msg=name)


def test_every_parameter_is_in_one_group_and_matrices_have_one_moment() -> None:
    parallel = build(model(attention=MLA, mtp_depth=1), torch.float32)
    optimizer = build_optimizer(OptimizerConfig(OptimizerName.muon), parallel)
    names = {id(one.parameter): name for name, one in parallel.parameters.items()}
    listed = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(listed) == sorted(names.values()) and len(set(listed)) == len(listed)
    first = {names[id(parameter)] for parameter in optimizer.param_groups[0]["params"]}
    rest = ("embedding.weight", "head.weight", "norm", ".router.", "shared_gate", "_bias")
    assert first == {name for name in names.values() if not any(part in name for part in rest)}
    assert all(set(optimizer.state[parallel.parameters[name].parameter]) == {"exp_avg"} for name in first)


@pytest.mark.parametrize("fused", [False, True])
def test_matrices_cover_a_parameter_once(fused: bool) -> None:
    config, muon = model(attention=MLA, mtp_depth=1), MuonConfig(fused=fused, router=True)
    found = {}
    for name, shape in shapes(config).items():
        if by_muon(name, shape, muon):
            seen = torch.zeros(shape, dtype=torch.int64)
            own = list(matrices(name, shape, config, muon))
            for matrix in own:
                assert sum(run.rows for run in matrix.runs) == matrix.shape[0] and matrix.shape[1] == shape[-1]
                for run in matrix.runs:
                    seen[run.leading][run.start : run.start + run.rows] += 1
            assert (seen == 1).all(), name
            found[name] = [matrix.shape for matrix in own]
    heads, attention = config.heads, "layers.1.attention"
    assert found[f"{attention}.q_up.weight"] == [(6, 8)] * heads
    assert found[f"{attention}.kv_up.weight"] == ([(10, 12)] * heads if fused else [(4, 12), (6, 12)] * heads)
    assert found[f"{attention}.kv_down.weight"] == ([(14, 16)] if fused else [(12, 16), (2, 16)])
    assert found["layers.1.moe.experts.gate_up"] == ([(32, 16)] * 4 if fused else [(16, 16)] * 8)
    assert found["layers.1.moe.router.weight"] == [(4, 16)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf.*:UserWarning")
def test_compiled_blocks_train_as_eager_ones() -> None:
    rows = Rows(torch.randint(VOCABULARY, (2, 12)), torch.randint(VOCABULARY, (2, 12)))
    weights = []
    for compiled in (False, True):
        torch.compiler.reset()
        with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager")):
            parallel = build(model(attention=MLA), torch.float64, compiled)
        optimizer = build_optimizer(OptimizerConfig(OptimizerName.muon), parallel)
        for _ in range(2):
            train_step(parallel, optimizer, StepInput([rows, rows], 0.01, 0.5, qk_clip=0.1))
        weights.append({name: one.parameter.detach() for name, one in parallel.parameters.items()})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-11, msg=name)


def model(**settings: object) -> ModelConfig:
    moe = MoEConfig(experts=4, hidden=16, shared_hidden=8, shared_gate=True, bias=True, router=RouterConfig(bias=True))
    sizes = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "hidden": 24, "vocabulary": VOCABULARY, "dense_first": 1}
    return ModelConfig(**{**sizes, "moe": moe, **settings})  # pyright: ignore[reportArgumentType]


def build(config: ModelConfig, dtype: torch.dtype, compiled: bool = False) -> Parallel:
    with torch.device("meta"):
        net = Transformer(config, dtype)
    parallel = parallelize(net, build_mesh(ParallelConfig()), ParallelConfig(), torch.device("cpu"), compiled)
    initialise(parallel, 1)
    return parallel
