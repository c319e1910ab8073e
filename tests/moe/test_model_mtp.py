"""Multi-token prediction: DeepSeek-V3's definition (section 2.2), its loss, and where it is not used."""

from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenyard.data.batches import IGNORE
from tokenyard.moe.attention import KeyValueCache
from tokenyard.moe.config import CapacityConfig, ModelConfig, MoEConfig
from tokenyard.moe.generation import generate
from tokenyard.moe.init import initialise
from tokenyard.moe.model import MTPModule, Transformer, shift_left
from tokenyard.moe.rotary import rotary_tables
from tokenyard.moe.token_info import documents_of
from tokenyard.parallel.apply import Parallel, parallelize
from tokenyard.parallel.apply import initialise as initialise_ranks
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train.batch import Rows
from tokenyard.train.step import count_totals, forward
from torch import Tensor

VOCABULARY, LENGTH = 30, 7
CPU = torch.device("cpu")
LOGITS: Any = 3 * [lambda x, _weight, head: head(x)]
"""For each of a model's heads with two modules: no loss, the logits themselves."""


@pytest.mark.parametrize("dense", [False, True])
def test_logits_are_those_of_the_definition(dense: bool) -> None:
    """h' = projection [norm(embedding of token i + d); norm(h)], then block, norm and head over positions with such a token."""
    model, ids_BS = tiny(depth=2, dense=dense), torch.randint(VOCABULARY, (2, LENGTH))
    (_, *further), stats = model(ids_BS, head_losses=LOGITS)
    assert len(further) == 2 and len(stats) == (0 if dense else 4)
    hidden_BSD = residual_stream(model, ids_BS)
    for depth, logits_BSV in enumerate(further, 1):
        module: Any = model.mtp[str(depth - 1)]
        embedded_BSD = model.embedding(ids_BS[:, depth:])
        hidden_BSD = hidden_BSD[:, : LENGTH - depth]
        joined = torch.cat([module.embedding_norm(embedded_BSD), module.hidden_norm(hidden_BSD)], -1) @ module.projection.weight.T
        hidden_BSD, *_ = module.block(joined, rotary_tables(model.config, 0, LENGTH - depth, CPU, torch.float64))
        torch.testing.assert_close(logits_BSV[:, : LENGTH - depth], model.head(module.norm(hidden_BSD)), rtol=0, atol=1e-12)
        if not dense:
            assert stats[1 + depth].counts_BE.sum() == 2 * (LENGTH - depth) * model.config.moe.top_k


def test_objective_is_the_loss_plus_the_coefficient_times_the_mean() -> None:
    parallel = one_rank(depth=2)
    model = parallel.model
    ids, targets = torch.randint(VOCABULARY, (2, 3, LENGTH))
    targets[0, 2], targets[1, 5:] = IGNORE, IGNORE
    rows = Rows(ids, targets)
    totals = count_totals(parallel, [rows])
    share = forward(parallel, rows, totals)
    logits, _ = model(ids, targets != IGNORE, head_losses=LOGITS)
    expected = [
        F.cross_entropy(part[:, : LENGTH - depth].flatten(0, 1), targets[:, depth:].flatten(), ignore_index=IGNORE)
        for depth, part in enumerate(logits)
    ]
    assert totals.mtp_tokens == tuple(int((targets[:, depth:] != IGNORE).sum()) for depth in (1, 2))
    torch.testing.assert_close(share.cross_entropy, expected[0])
    torch.testing.assert_close(share.mtp_D, torch.stack(expected[1:]))
    without = share.objective - model.config.mtp_coefficient * share.mtp_D.mean()
    auxiliary = 0.01 * share.balance_L.sum() + 0.001 * share.z_L.sum()
    torch.testing.assert_close(without, expected[0] + auxiliary)
    assert len(share.balance_L) == len(share.counts_LE) == 4


def test_a_prediction_sees_no_more_than_it_may() -> None:
    """Position i of module d depends on tokens 0 to i + d only; tokens beyond the sequence take no capacity."""
    model = tiny(depth=2, capacity=0.6)
    ids_BS = torch.randint(VOCABULARY, (1, LENGTH))
    before = model(ids_BS, head_losses=LOGITS)[0][1:]
    ids_BS[0, 4] = (ids_BS[0, 4] + 1) % VOCABULARY
    after = model(ids_BS, head_losses=LOGITS)[0][1:]
    for depth, (old, new) in enumerate(zip(before, after, strict=True), 1):
        changed = ((old - new).abs() > 1e-12)[0].any(-1)[: LENGTH - depth]  # last bits depend on the rows beside
        assert changed.tolist() == [position >= 4 - depth for position in range(LENGTH - depth)]


def test_the_model_itself_is_as_without() -> None:
    """Logits, statistics and generation do not change; parameters of the same name have the same initial weights."""
    with_modules, without = tiny(depth=2), tiny(depth=0)
    assert {name for name, _ in with_modules.named_parameters() if not name.startswith("mtp.")} == set(
        dict(without.named_parameters())
    )
    ids_BS = torch.randint(VOCABULARY, (2, LENGTH))
    assert torch.equal(with_modules(ids_BS), without(ids_BS))
    assert len(with_modules(ids_BS, with_stats=True)[1]) == len(without(ids_BS, with_stats=True)[1])
    assert list(generate(with_modules, [1, 2], 5, seed=3)) == list(generate(without, [1, 2], 5, seed=3))
    assert len(with_modules.eval()(ids_BS, head_losses=LOGITS)[0]) == 1, "nor does evaluation run them"
    cache = [KeyValueCache() for _ in with_modules.layers]
    in_steps = torch.cat([with_modules(part, cache=cache) for part in ids_BS.split(2, dim=1)], dim=1)
    torch.testing.assert_close(in_steps, with_modules(ids_BS))


def test_with_documents_apart_the_objective_is_that_of_each_alone() -> None:
    """Documents of 5, 1, 2 and 3 tokens and a truncated one: none predicts, attends to or counts tokens of another."""
    parallel, end, lengths = one_rank(depth=2), 2, (5, 1, 2, 3, 4)
    ids = torch.randint(3, VOCABULARY, (1, sum(lengths) + 1))
    ids[0, torch.tensor(lengths[:-1]).cumsum(0) - 1] = end
    documents, targets = documents_of(ids[:, :-1], ids[:, 1:], end, -100)
    rows = Rows(ids[:, :-1], targets, documents=documents)
    totals = count_totals(parallel, [rows])
    share = forward(parallel, rows, totals)
    summed, predictions = torch.zeros(3, dtype=torch.float64), [0, 0, 0]
    for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
        last = start + length == sum(lengths)
        following = ids[0, start + 1 : start + length + last]  # what the document itself has to be predicted
        logits, _ = parallel.model(ids[:, start : start + length], head_losses=LOGITS)
        for depth, part_BSV in enumerate(logits):
            count = max(0, len(following) - depth)
            summed[depth] += F.cross_entropy(part_BSV[0, :count], following[depth:], reduction="sum") if count else 0.0
            predictions[depth] += count
    assert (totals.tokens, *totals.mtp_tokens) == tuple(predictions)
    expected = summed / torch.tensor(predictions)
    torch.testing.assert_close(torch.cat([share.cross_entropy[None], share.mtp_D]), expected, rtol=0, atol=1e-12)
    counted = share.counts_LE.sum(1) // parallel.model.config.moe.top_k
    assert counted.tolist() == [predictions[0], predictions[0], *predictions[1:]], "nor do routing statistics count others"


@pytest.mark.parametrize("fill", [0, False, IGNORE])
def test_shift_left(fill: int | bool) -> None:
    x_BS = torch.tensor([[5, 6, 7], [8, 9, 1]])
    x_BS = x_BS > 6 if fill is False else x_BS
    assert torch.equal(shift_left(x_BS, 0, fill), x_BS)
    shifted = shift_left(x_BS, 2, fill)
    assert shifted.dtype == x_BS.dtype
    assert shifted.tolist() == [[x_BS[0, 2].item(), fill, fill], [x_BS[1, 2].item(), fill, fill]]
    assert shift_left(x_BS, 5, fill).tolist() == [[fill] * 3] * 2


def residual_stream(model: Transformer, ids_BS: Tensor) -> Tensor:
    x_BSD = model.embedding(ids_BS)
    for block in model.layers.values():
        x_BSD, *_ = block(x_BSD, rotary_tables(model.config, 0, LENGTH, CPU, torch.float64))
    return x_BSD


def config_of(depth: int, dense: bool = False, capacity: float | None = None) -> ModelConfig:
    moe = MoEConfig(experts=0 if dense else 4, hidden=8, capacity=CapacityConfig(factor=capacity))
    return ModelConfig(2, 16, 4, 2, hidden=24, vocabulary=VOCABULARY, init_std=0.3, mtp_depth=depth, moe=moe)


def tiny(depth: int, dense: bool = False, capacity: float | None = None) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config_of(depth, dense, capacity), torch.float64)
    initialise(model, 1)
    assert all(isinstance(module, MTPModule) for module in model.mtp.values())
    return model


def one_rank(depth: int) -> Parallel:
    with torch.device("meta"):
        model = Transformer(config_of(depth), torch.float64)
    parallel = parallelize(model, build_mesh(ParallelConfig()), ParallelConfig(), CPU)
    initialise_ranks(parallel, 1)
    return parallel
