"""What a run is told of its own layout: the same numbers as the planner's, and in words what is not known."""

import pytest
from tokenyard.plan.gpu_cluster import Cluster
from tokenyard.plan.model_work import ModelWork
from tokenyard.plan.own_layout import plan_own_layout
from tokenyard.plan.rank_memory import rank_memory
from tokenyard.plan.search import RESERVED, Fit
from tokenyard.plan.step_time import predict
from tokenyard.plan.workload import StepBatch
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.config.gpus import gpus
from tokenyard.train.config.model_summary import per_rank

H100 = "NVIDIA H100 80GB HBM3"
PIPELINE = ["model=qwen3_30b_a3b", "sequence_length=4096", "batch.sequences=64", "batch.micro=1", "parallel.expert=8"]


def configured(*words: str, precision: str = "bf16") -> Config:
    return compose([*words, f"precision={precision}"])


def test_it_is_the_plan_of_rank_0_and_of_the_fullest_rank() -> None:
    config = configured(
        *PIPELINE, "parallel.shard=8", "parallel.pipeline=2", "parallel.pipeline_layers=[12,36]", "parallel.recompute=block"
    )
    plan = plan_own_layout(config, 16, 8, H100)
    first, last = (rank_memory(config, 16, rank) for rank in (0, 1))
    assert last.peak > first.peak
    assert (plan.memory, plan.parts, plan.fullest) == (first.peak, first.parts, (last.peak, 1))
    time = predict(ModelWork(config.model, 4096), config.parallel, StepBatch(64, 1), Cluster(gpus()["h100"], 16))
    assert (plan.gpu, plan.measured_on, plan.time, plan.unknown) == ("h100", "h200", time, ())
    assert plan.usable == 80e9 - RESERVED and plan.fit is Fit.fits
    memory, seconds = plan.sentences()
    shown = f"{first.peak / 1e9:.3g} GB at the peak of a step on rank 0, {last.peak / 1e9:.3g} GB in stage 1 of the pipeline"
    assert memory == f"{shown}, of 77.5 GB: FITS"
    assert seconds.startswith(f"{time.low:.3g} to {time.high:.3g} s a step, {time.likely:.3g} the likeliest, MFU ")
    assert seconds.endswith(", by rates measured on h200")
    assert plan.record()["fullest_bytes"] == last.peak and plan.record()["step_seconds"] == time.likely


def test_what_does_not_fit_is_said() -> None:
    config = configured(*PIPELINE)
    plan = plan_own_layout(config, 8, 8, H100)
    assert plan.fit is Fit.out and "of 77.5 GB: OUT OF MEMORY" in plan.sentences()[0]


def test_on_a_cpu_only_the_states_are_planned() -> None:
    config = configured("model=tiny", precision="fp32")
    plan = plan_own_layout(config, 1, 1, None)
    parameters = per_rank(config, 1)["total"]
    assert plan.memory == 16 * parameters and plan.parts == {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
    }
    assert (plan.time, plan.fullest, plan.fit, len(plan.sentences())) == (None, None, None, 1)


@pytest.mark.parametrize(
    ("words", "precision", "device", "says"),
    [
        ([], "bf16", "GeForce 256", ["time not known: conf/cluster/ has no GeForce 256"]),
        ([], "fp32", H100, ["time not known with precision=fp32, only with bf16"]),
        (["parallel.recompute=offload"], "bf16", H100, ["memory and time not known with parallel.recompute=offload"]),
        (["engine=deepspeed"], "bf16", H100, ["not known for DeepSpeed's engine"]),
        (["model=tiny_qwen3_next"], "bf16", H100, ["memory not known: of 3 layers of gated DeltaNet only the dry run knows it"]),
        (["parallel.tensor=3"], "bf16", H100, ["not known (AssertionError: )"]),
    ],
)
def test_what_is_not_known_is_said_and_nothing_raises(words: list[str], precision: str, device: str, says: list[str]) -> None:
    plan = plan_own_layout(configured("model=tiny", *words, precision=precision), 1, 8, device)
    assert len(plan.unknown) == len(says) and all(mine.startswith(given) for mine, given in zip(plan.unknown, says, strict=True))
    assert plan.sentences()[-1] == plan.unknown[-1] and "\n" not in plan.unknown[0]
    assert plan.record()["unknown"] == list(plan.unknown)
