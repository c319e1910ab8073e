"""The step-time model in cases that have an answer."""

import dataclasses
from dataclasses import replace

import pytest
from tokenyard.moe.config import AttentionConfig, ModelConfig, MoEConfig
from tokenyard.moe.param_count import count, training_flops_per_token
from tokenyard.parallel.config import Exchange, ParallelConfig, PipelineSchedule, Recompute
from tokenyard.plan.coefficients import coefficients
from tokenyard.plan.gpu_cluster import Cluster
from tokenyard.plan.model_work import ModelWork
from tokenyard.plan.step_time import StepTime, Terms, Tuning, predict
from tokenyard.plan.workload import LinkBytes, StepBatch, copies
from tokenyard.train.config.gpus import gpus

H100 = gpus()["h100"]
MOE = ModelConfig(
    layers=8, width=2048, heads=16, kv_heads=4, vocabulary=32768, mtp_depth=1, moe=MoEConfig(experts=64, top_k=8, hidden=1024)
)
WORK = ModelWork(MOE, 4096)
EXPERT = ParallelConfig(expert=16, shard=16, zero=1, exchange=Exchange.hierarchical)
FIELDS = [field.name for field in dataclasses.fields(Terms)]


def predicted(parallel: ParallelConfig, ranks: int = 16, gpu=H100, **more) -> StepTime:
    return predict(WORK, parallel, StepBatch(64, 1), Cluster(gpu, ranks), **more)


@pytest.mark.parametrize("stages", [1, 4])
def test_nothing_is_lost_between_the_kinds_of_products(stages: int) -> None:
    assert 3 * WORK.whole.flops == pytest.approx(training_flops_per_token(MOE, 4096), rel=1e-9)
    assert WORK.whole.dense_parameters + WORK.whole.expert_parameters == count(MOE).trained
    slowest = WORK.slowest_rank(ParallelConfig(pipeline=stages))
    assert WORK.whole.flops / stages <= slowest.flops < 1.6 * WORK.whole.flops / stages


def test_a_huge_dense_model_reaches_the_share_of_its_products() -> None:
    """Products grow with the square of the width and everything else with the width; no rank waits for another."""
    config = ModelConfig(
        layers=2, width=1 << 17, heads=1024, kv_heads=1024, hidden=1 << 19, vocabulary=256, moe=MoEConfig(experts=0)
    )
    found = predict(ModelWork(config, 128), ParallelConfig(), StepBatch(64 * 64, 64), Cluster(H100, 1), tuning=Tuning.vendor)
    assert found.mfu == pytest.approx(coefficients().hopper_bf16, rel=0.05)


def test_one_gpu_sends_nothing() -> None:
    terms = predicted(ParallelConfig(), 1).terms
    assert [name for name in FIELDS if not getattr(terms, name)] == [
        *("exchange_inside", "exchange_network", "tensor", "context", "gathers", "gradients", "messages", "bubble")
    ]


def test_one_domain_uses_no_network() -> None:
    everything = ParallelConfig(tensor=2, context=2, shard=4, expert=4, zero=3)
    slow = replace(H100, network_bytes_per_second=1.0)
    assert predicted(everything, 8, slow) == predicted(everything, 8)
    assert predicted(everything, 16, slow).likely > 10 * predicted(everything, 16).likely


@pytest.mark.parametrize("field", ["memory_bytes_per_second", "nvlink_bytes_per_second", "network_bytes_per_second"])
def test_more_bandwidth_is_faster(field: str) -> None:
    times = [predicted(EXPERT, gpu=replace(H100, **{field: factor * getattr(H100, field)})).likely for factor in (0.5, 1, 2)]
    assert times[0] > times[1] > times[2]


def test_the_terms_without_what_hides_are_the_step() -> None:
    found = predicted(ParallelConfig(expert=8, shard=8, pipeline=2, zero=1))
    assert found.likely == pytest.approx(found.terms.sum - sum(found.hidden.values()))
    assert set(found.hidden) == set(found.behind) <= set(FIELDS)
    assert all(0 <= took <= getattr(found.terms, name) for name, took in found.hidden.items())
    assert found.low < found.likely < found.high
    assert found.tokens_per_second_per_gpu == pytest.approx(64 * 4096 / 16 / found.likely)
    assert found.mfu == pytest.approx(training_flops_per_token(MOE, 4096) * found.tokens_per_second_per_gpu / H100.flops["bf16"])


def test_the_bubble_is_that_of_the_schedule() -> None:
    """1F1B waits for P - 1 of M + P - 1 micro-batches; V stages on a rank divide that."""
    times = {}
    for kind, chunks in (("1f1b", None), ("interleaved", 2), ("zbh1", None), ("zbv", None)):
        layout = ParallelConfig(pipeline=4, pipeline_schedule=PipelineSchedule[kind], pipeline_chunks=chunks, shard=4, zero=1)
        terms = predicted(layout).terms
        times[kind] = terms.bubble / (terms.sum - terms.bubble - terms.gathers - terms.gradients - terms.optimizer)
    assert times["1f1b"] == pytest.approx(3 / 16, rel=1e-3)
    assert times["1f1b"] > times["interleaved"] > times["zbh1"] > times["zbv"]


def test_computing_again_costs_a_forward_pass() -> None:
    products = [
        predicted(replace(EXPERT, recompute=kind)).terms.products for kind in (Recompute.none, Recompute.selective, Recompute.block)
    ]
    assert products[0] == products[1] < products[2] < products[0] * 4 / 3 + 1e-9
    assert predicted(replace(EXPERT, recompute=Recompute.block)).mfu < predicted(EXPERT).mfu


def test_an_uneven_load_costs_experts_and_exchange_only() -> None:
    even, uneven = (predicted(EXPERT, balanced=balanced).terms for balanced in (True, False))
    changed = {name for name in FIELDS if getattr(even, name) != getattr(uneven, name)}
    assert changed == {"products", "exchange_inside", "exchange_network", "launches"} and uneven.sum > even.sum


@pytest.mark.parametrize(
    ("exchange", "ranks", "inside", "network"),
    [
        (Exchange.plain, 1, 0, 0),
        (Exchange.plain, 8, 7, 0),  # 7 of 8 of the 8 experts are on other ranks
        (Exchange.plain, 64, 8 * 7 / 64, 8 * 56 / 64),
        (Exchange.gather, 16, 7, 8),
        (Exchange.deduplicated, 64, 8 * 7 / 64, 8 * 56 / 64),  # an expert a rank: nothing to save
    ],
)
def test_copies_of_a_row(exchange: Exchange, ranks: int, inside: float, network: float) -> None:
    found = copies(MOE, ParallelConfig(expert=ranks, exchange=exchange), Cluster(H100, 64))
    assert (found.inside, found.network) == (pytest.approx(inside), pytest.approx(network))


def test_a_domain_gets_a_row_once() -> None:
    """By hand: 2 experts, both chosen, on 2 ranks: each row goes to the other rank, and only once to the other domain."""
    config = replace(MOE, moe=MoEConfig(experts=64, top_k=64))
    twice = copies(config, ParallelConfig(expert=16, exchange=Exchange.hierarchical), Cluster(H100, 16))
    assert twice == LinkBytes(14.0, 1.0)  # in each of two domains from one rank to the seven others


def test_what_cannot_be_predicted_is_refused() -> None:
    with pytest.raises(ValueError, match="64 sequences are no multiple of 24 data ranks x 1"):
        predicted(ParallelConfig(), 24)
    with pytest.raises(ValueError, match="A100 80GB SXM has no products in fp8"):
        predicted(EXPERT, gpu=gpus()["a100"], precision="fp8")


def test_latents_are_what_context_ranks_exchange() -> None:
    assert WORK.kv_elements == 2 * 4 * 128
    assert ModelWork(replace(MOE, attention=AttentionConfig(kind=type(MOE.attention.kind)["mla"])), 128).kv_elements < 1000
