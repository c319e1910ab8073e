"""The exchange by DeepEP equals the deduplicated one, in fp64, on ranks where another package has its place."""

import sys
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import deep_ep_double
import pytest
import torch
from tokenyard.moe.config import ModelConfig
from tokenyard.moe.layer import MoELayer
from tokenyard.moe.recompute import selective_contexts
from tokenyard.parallel.apply import build_dispatcher
from tokenyard.parallel.config import Exchange, ParallelConfig, Recompute
from tokenyard.parallel.dispatch.deepep import Link
from tokenyard.parallel.mesh import Axis, build_mesh
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import ConfigError
from tokenyard.train.config.rules import parallel_rules
from tokenyard.train.preflight import check_config
from torch import Tensor
from torch.utils.checkpoint import checkpoint

EXPERTS, WIDTH, RANKS = 8, 6, 4


class Case(NamedTuple):
    words: str
    tokens: tuple[int, ...]
    """Of each rank, in each of two sequences."""
    recompute: Recompute = Recompute.none
    chunks: int = 1


UNEVEN, EVEN = (5, 0, 3, 2), (4, 4, 4, 4)
CASES = [
    Case("model.moe.shared_hidden=7", UNEVEN),
    Case("model.moe.shared_hidden=7", UNEVEN, Recompute.block),
    Case("model.moe.shared_hidden=7", UNEVEN, Recompute.selective),
    Case("model.moe.top_k=3", UNEVEN, chunks=2),
    Case("model.moe.capacity.factor=0.5", EVEN),
    Case("model.moe.capacity.factor=0.7 model.moe.capacity.pad=true", EVEN),
    Case("model.moe.router.null_experts=2", EVEN),
]


def trained(case: Case, exchange: Exchange) -> dict[str, Tensor]:
    """On a rank: output and gradients of a layer."""
    config = ParallelConfig(expert=RANKS, exchange=exchange, overlap_chunks=case.chunks)
    mesh, recompute = build_mesh(config), case.recompute
    rank = mesh.axis("expert").rank
    moe = compose(["model.moe.experts=8", "model.moe.hidden=5", *case.words.split()]).model.moe
    layer = MoELayer(ModelConfig(layers=1, width=WIDTH, heads=2, kv_heads=2, vocabulary=8, moe=moe), torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    for name, weight in list(layer.experts.named_parameters()):
        setattr(layer.experts, name, torch.nn.Parameter(weight.detach().chunk(RANKS)[rank].clone()))
    layer.dispatcher = build_dispatcher(EXPERTS, mesh, config)
    x_BSD = torch.randn(2, case.tokens[rank], WIDTH, dtype=torch.float64, generator=generator.manual_seed(rank)).requires_grad_()
    forward: Any = layer
    if recompute is not Recompute.none:
        settings = {"context_fn": partial(selective_contexts, WIDTH)} if recompute is Recompute.selective else {}
        forward = partial(checkpoint, layer, use_reentrant=False, **settings)
    y_BSD = forward(x_BSD)[0]
    (y_BSD.square() * (1 + rank)).sum().backward()
    found = {"y": y_BSD.detach(), "x": x_BSD.grad, **{name: each.grad for name, each in layer.named_parameters()}}
    return {name: value for name, value in found.items() if value is not None}


def differ() -> list[str]:
    """On a rank: where the two differ."""
    with patch.dict(sys.modules, {"deep_ep": deep_ep_double}):
        wrong = []
        for case in CASES:
            expected, found = trained(case, Exchange.deduplicated), trained(case, Exchange.deepep)
            assert expected.keys() == found.keys() and len(found) >= 5
            wrong += [f"{case}: {name}" for name, value in expected.items() if not torch.allclose(found[name], value, 1e-12, 1e-12)]
    return wrong


def test_equals_the_deduplicated_exchange(ranks: Any) -> None:
    """Outputs and all gradients, the router's too; dropped, null and padded choices, a rank without tokens, recomputed."""
    assert ranks(RANKS, differ) == RANKS * [[]]


def buffers() -> list[int]:
    """On a rank: the bytes of the buffers that rows of 6, 4 and 8 fp64 numbers need, one after the other."""
    with patch.dict(sys.modules, {"deep_ep": deep_ep_double}), patch.object(deep_ep_double.Buffer, "made", made := list[int]()):
        link = Link(EXPERTS, build_mesh(ParallelConfig(expert=2)).axis("expert"))
        for width in (6, 4, 8):
            experts_TK = torch.tensor([[0, 5], [7, -1]])
            arriving = link.to_experts(torch.ones(2, width, dtype=torch.float64), torch.ones(2, 2), experts_TK)
            arriving.event.current_stream_wait()
            sums_TD = link.to_tokens(arriving.tokens_PD, arriving.handle)[0]
            assert sums_TD[:, 0].tolist() == [2.0, 1.0], "one row a rank"
    return made


def test_the_buffer_grows_with_the_rows(ranks: Any) -> None:
    assert ranks(2, buffers) == 2 * [[8 * 6 * 8, 8 * 8 * 8]]


def test_without_the_package() -> None:
    rule = "parallel.exchange=deepep: needs the package deep_ep, which `python setup.py install` in a clone of github.com/"
    with pytest.raises(RuntimeError) as raised:
        Link(EXPERTS, Axis(1, 0, None))
    with pytest.raises(ConfigError) as refused:
        check_config(compose(["parallel.exchange=deepep"]), 1)
    for text in (str(raised.value), str(refused.value)):
        assert text.startswith(rule) and text.endswith("; nearest valid: parallel.exchange=deduplicated") and "\n" not in text


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("precision=fp32", "precision=fp32: must be bf16 with parallel.exchange=deepep; nearest valid: precision=bf16"),
        (
            "model.moe.dropout=0.1",
            "model.moe.dropout=0.1: must be 0 with parallel.exchange=deepep, whose rows carry no keys; nearest",
        ),
        (
            "parallel.pipeline=2 parallel.pipeline_schedule=zbv parallel.expert=2 parallel.pipeline_overlap=true",
            "parallel.pipeline_overlap=true: must be false with parallel.exchange=deepep, for which no pass waits; nearest",
        ),
    ],
)
def test_what_it_cannot_is_refused_where_the_package_is(word: str, text: str) -> None:
    with patch.object(parallel_rules, "find_spec", lambda _: True), pytest.raises(ConfigError) as refused:
        check_config(compose(["parallel.exchange=deepep", *word.split()]), 4)
    assert str(refused.value).startswith(text)
