"""What a rank computes, moves and sends, against counts by hand."""

import pytest
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.moe.param_count import count
from tokenyard.parallel.config import ContextExchange, ExchangeDtype, ParallelConfig, PipelineSchedule, Recompute
from tokenyard.plan.gpu_cluster import Cluster
from tokenyard.plan.model_work import ModelWork
from tokenyard.plan.workload import LinkBytes, StepBatch, Workload, workload
from tokenyard.train.config.gpus import gpus

MODEL = ModelConfig(
    layers=4, width=64, heads=8, kv_heads=2, head_width=16, vocabulary=256, moe=MoEConfig(experts=16, top_k=2, hidden=32)
)
LENGTH = 128
P = count(MODEL).total


def counts(parallel: ParallelConfig, ranks: int, sequences: int = 64, micro: int = 1) -> Workload:
    """On H100: 8 ranks are a domain."""
    return workload(ModelWork(MODEL, LENGTH), parallel, StepBatch(sequences, micro), Cluster(gpus()["h100"], ranks))


def about(inside: float, network: float) -> LinkBytes:
    return LinkBytes(pytest.approx(inside, rel=1e-9), pytest.approx(network, rel=1e-9))


@pytest.mark.parametrize(
    ("zero", "gathers", "gradients"),
    [
        (1, 2, 4),  # weights in bf16 and gradients in fp32, once a step
        (2, 2 + 4 * 4, 0),  # gradients of each of four micro-batches
        (3, 4 * (2 + 2 + 4), 0),  # weights for both passes, too
    ],
)
def test_shards(zero: int, gathers: int, gradients: int) -> None:
    """Each of 16 ranks sends 15 parts of 16. Half of them are for the other domain, whose 8 network cards share one passage."""
    found = counts(ParallelConfig(shard=16, zero=zero), 16)
    assert found.micro_batches == 4
    assert found.gathers == about(gathers * P * 15 / 16, gathers * P / 16)
    assert found.gradients == about(gradients * P * 15 / 16, gradients * P / 16)
    assert found.optimizer_bytes == pytest.approx(8 * 4 * P / 16)


def test_replicas() -> None:
    """A sum over replicas is a reduce-scatter and an all-gather of fp32 gradients."""
    found = counts(ParallelConfig(), 8)
    assert (found.gathers, found.gradients) == (LinkBytes(), about(2 * 4 * P * 7 / 8, 0))
    assert found.optimizer_bytes == pytest.approx(8 * 4 * P)
    halves = counts(ParallelConfig(shard=8, zero=1), 16)
    assert halves.gathers == about(2 * P * 7 / 8, 0)
    # The 2 replicas of each shard are in different domains.
    assert halves.gradients == about(4 * P * 7 / 8, 2 * 4 * P / 8 / 2)


def test_replicas_of_experts() -> None:
    """Of 16 ranks every fourth has the same experts: two in each domain."""
    experts = count(MODEL).experts
    found = counts(ParallelConfig(expert=4), 16)
    dense = 2 * 4 * (P - experts)
    own = 2 * 4 * experts / 4
    assert found.gradients == about(dense * 15 / 16 + own * 3 / 4, dense / 16 + own / 4)


@pytest.mark.parametrize(("ranks", "inside", "network"), [(2, 1 / 2, 0), (8, 7 / 8, 0), (16, 15 / 16, 1 / 16)])
def test_tensor_ranks(ranks: int, inside: float, network: float) -> None:
    """Two collectives of each layer's tokens forward and three backward, around attention alone, since all layers have experts."""
    whole = 5 * 2 * LENGTH * MODEL.width * MODEL.layers
    found = counts(ParallelConfig(tensor=ranks), ranks)
    assert found.tensor == about(whole * inside, whole * network)
    assert found.dense_flops * ranks == pytest.approx(counts(ParallelConfig(), 1).dense_flops)


def test_scores_are_what_the_length_adds() -> None:
    """Queries with keys and weights with values, of (S + 1) / 2 tokens on average, but for the token itself: 3.5 times forward."""
    forward = MODEL.layers * 2 * MODEL.heads * 2 * 16 * ((LENGTH + 1) / 2 - 1)
    assert counts(ParallelConfig(), 1).score_flops == pytest.approx(3.5 * LENGTH * forward, rel=1e-3)
    again = counts(ParallelConfig(recompute=Recompute.block), 1)
    assert again.score_flops == pytest.approx(4.5 * LENGTH * forward, rel=1e-3)


def test_context_ranks() -> None:
    """Keys and values of the other rank's tokens, forward and backward, and their gradients; or tokens exchanged for heads, both
    ways in both passes."""
    own = LENGTH / 2
    found = counts(ParallelConfig(context=2), 2)
    assert found.context == about(3 * 2 * MODEL.layers * 2 * 2 * 16 * own, 0)
    heads = counts(ParallelConfig(context=2, context_exchange=ContextExchange.heads), 2)
    assert heads.context == about(2 * 2 * MODEL.layers * 2 * (8 + 2) * 16 * own / 2, 0)


@pytest.mark.parametrize(("ranks", "inside"), [(2, True), (8, True), (16, False)])
def test_stages(ranks: int, inside: bool) -> None:
    """A rank sends its tokens to the next stage and their gradients to the one before, for each of its stages."""
    one = 2 * 2 * LENGTH * MODEL.width
    found = counts(ParallelConfig(pipeline=2), ranks)
    assert found.messages == (about(one, 0) if inside else about(0, one)) and (found.bubble, found.stages) == (1, 1)
    two = counts(ParallelConfig(pipeline=2, pipeline_schedule=PipelineSchedule["interleaved"], pipeline_chunks=2), ranks)
    assert two.messages == found.messages * 2 and (two.bubble, two.stages) == (0.5, 2)


def test_rows_of_an_expert() -> None:
    """T tokens of each of `expert` ranks choose 2 of 16 experts; expert_tensor ranks have them all and half of the columns."""
    found = counts(ParallelConfig(expert=4), 8, micro=2)
    assert found.expert_rows == 2 * LENGTH * 4 * 2 / 16 and found.expert_hidden == 32
    halves = counts(ParallelConfig(expert=4, expert_tensor=2), 8, micro=2)
    assert halves.expert_rows == 2 * found.expert_rows and halves.expert_hidden == 16
    assert halves.expert_flops == found.expert_flops == pytest.approx(3 * 2 * LENGTH * 4 * 2 * 2 * 3 * 64 * 32)


def test_elementwise_bytes() -> None:
    """By hand, in elements of a token and forward: 15 D a layer, K (3 D + 3 F) more with experts, 6 V in the head."""
    forward = 4 * (15 * 64 + 2 * (3 * 64 + 3 * 32)) + 6 * 256
    found = counts(ParallelConfig(), 1)
    assert found.elementwise_bytes == 3 * 2 * LENGTH * forward
    # Twice as much is read and written of each input of a product that becomes fp8.
    assert found.quantized_bytes == 3 * 2 * LENGTH * 2 * 4 * (2 * 64 + 2 * (64 + 32))
    assert counts(ParallelConfig(recompute=Recompute.selective), 1).elementwise_bytes == 4 * 2 * LENGTH * forward


@pytest.mark.parametrize(("recompute", "share"), [(Recompute.none, 1 / 4), (Recompute.block, 2 / 6)])
def test_tokens_in_e4m3(recompute: Recompute, share: float) -> None:
    """The share of the ways of rows that is the one to the experts has a byte for a number, and one for 128 of them."""
    wide, narrow = (
        counts(ParallelConfig(expert=8, recompute=recompute, exchange_dtype=dtype), 8).exchange.inside for dtype in ExchangeDtype
    )
    assert narrow / wide == pytest.approx(1 - share * (1 - 129 / 256))
