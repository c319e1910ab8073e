"""engine=deepspeed gives the numbers of engine=torch on every layout it takes, and each opens the other's checkpoints.

DeepSpeed does not sum in fp64, so this is fp32, beside the torch engine on the same layout: losses and norms within 1e-6 of each
other, weights after clipped steps within 1e-5. That engine has the numbers of one process in fp64 (test_parity.py).
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from sameness import VOCABULARY, Case, Layout, favour_one_expert, rows_of, starve_expert
from tiny_run import TINY_RUN
from tokenyard.checkpoint.store import read_whole
from tokenyard.moe.config import BalanceConfig, ModelConfig, MoEConfig
from tokenyard.moe.init import expert_biases
from tokenyard.moe.model import Transformer
from tokenyard.moe.token_info import BatchPosition
from tokenyard.parallel.apply import initialise, local, parallelize
from tokenyard.parallel.config import Exchange, ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.parallel.shard import ShardMetadata, whole
from tokenyard.train.checkpointing import save
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import BatchConfig, Config, EngineConfig, OptimizerConfig
from tokenyard.train.config.config import EngineKind as EngineKind
from tokenyard.train.run import single_step
from tokenyard.train.setup import build_engine, open_session
from tokenyard.train.step import StepInput

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="pip install tokenyard[deepspeed]")

LAYOUTS = {
    "data 2": Layout(2),
    "expert 2": Layout(2, expert=2),
    "symmetric 2": Layout(2, expert=2, exchange=Exchange.symmetric),
    "data 2 x expert 2": Layout(4, expert=2),
    "tensor 2 x expert 4": Layout(4, tensor=2, expert=4),
    "tensor 2 x expert 2": Layout(4, tensor=2, expert=2),
}
CLIP = 0.5


def model(**moe: Any) -> ModelConfig:
    experts = MoEConfig(experts=8, hidden=16, z_coefficient=0.01, balance=BalanceConfig(coefficient=0.05, bias_rate=0.01), **moe)
    sizes: dict[str, Any] = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "hidden": 24, "vocabulary": VOCABULARY}
    return ModelConfig(**sizes, dense_first=1, init_std=0.3, moe=experts)


CASES = {
    "an expert and a row without tokens, accumulated": Case(model(shared_hidden=16), micro_batches=2, idle_rows=2),
    "all tokens choose one expert": Case(model(), equal_scores=True, steps=1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_every_zero_gives_the_numbers_of_the_torch_engine(ranks, layout: Layout, name: str) -> None:
    theirs = ranks(layout.world, steps_of, layout, CASES[name], EngineConfig())
    for zero in (0, 1, 2):
        assert_same_numbers(ranks(layout.world, steps_of, layout, CASES[name], EngineConfig(EngineKind.deepspeed, zero)), theirs)


def assert_same_numbers(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for part, wanted in zip(ours, theirs, strict=True):
        assert part["steps"][0].gradient_norm > CLIP
        for numbers, expected in zip(part["steps"], wanted["steps"], strict=True):
            assert torch.equal(numbers.counts_LE, expected.counts_LE)
            for name in ("cross_entropy", "balance_L", "z_L", "gradient_norm"):
                torch.testing.assert_close(getattr(numbers, name), getattr(expected, name), rtol=1e-6, atol=0, msg=name)
    weights, expected = (assemble([part["weights"] for part in parts]) for parts in (ours, theirs))
    for name, value in weights.items():
        # With equal scores the gradient of a router is partly rounding alone, of which Adam makes whole steps.
        if len(ours[0]["steps"]) > 1 or "router" not in name:
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_bf16_activations_leave_weights_and_sums_in_fp32(ranks, zero: int) -> None:
    case, layout = CASES["an expert and a row without tokens, accumulated"], LAYOUTS["expert 2"]
    engine = EngineConfig(EngineKind.deepspeed, zero)
    ours, theirs = (ranks(2, steps_of, layout, case, each, torch.bfloat16)[0] for each in (engine, EngineConfig()))
    for numbers, expected in zip(ours["steps"], theirs["steps"], strict=True):
        for name in ("cross_entropy", "gradient_norm"):
            torch.testing.assert_close(getattr(numbers, name), getattr(expected, name), rtol=2e-3, atol=0, msg=name)
    first, wanted = ours["steps"][0], theirs["steps"][0]
    torch.testing.assert_close(first.gradient_norm, wanted.gradient_norm, rtol=1e-6, atol=0)
    assert any((value != value.bfloat16()).any() for _, value in ours["weights"].values())


def steps_of(layout: Layout, case: Case, engine: EngineConfig, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Three optimizer steps on this rank: their numbers, and the last weights by name and shard."""
    spread = ParallelConfig(tensor=layout.tensor, expert=layout.expert)
    with torch.device("meta"):
        transformer = Transformer(case.config, dtype)
    parallel = parallelize(transformer, build_mesh(spread), spread, torch.device("cpu"))
    initialise(parallel, seed=3)
    (favour_one_expert if case.equal_scores else starve_expert)(parallel)
    batch = BatchConfig(8, 8 // case.micro_batches // parallel.mesh.data.size)
    config = Config(batch=batch, parallel=spread, model=case.config, engine=engine, optimizer=OptimizerConfig(lr=0.01))
    used = build_engine(config, parallel)
    steps = [
        used.step(StepInput(rows_of(parallel, step, case), 0.01, CLIP, BatchPosition(seed=5, step=step + 1)))
        for step in range(case.steps)
    ]
    weights = {name: (p.metadata, local(p.parameter).detach().double()) for name, p in parallel.parameters.items()}
    weights |= {name: (whole(bias.shape), bias.double()) for name, bias in expert_biases(parallel.model).items()}
    return {"steps": steps, "weights": weights}


TINY = [*TINY_RUN, "steps=4"]


@pytest.mark.parametrize(
    ("zero", "world", "layout"),
    [
        (0, 2, ["parallel.expert=2"]),
        (1, 4, ["parallel.expert=4", "parallel.tensor=2"]),
        (1, 4, ["parallel.expert=2"]),
        (2, 4, ["parallel.expert=2", "parallel.tensor=2"]),
    ],
)
def test_checkpoints_cross_load(ranks, tmp_path: Path, zero: int, world: int, layout: list[str]) -> None:
    """Each engine resumes from the other's checkpoint; weights and moments are the other's bit for bit."""
    engines = {"torch": [*layout, "engine=torch"], "deepspeed": [*layout, "engine=deepspeed", f"engine.zero={zero}"]}
    straight = {name: ranks(world, train_on, tmp_path / name, engine) for name, engine in engines.items()}
    for name, other in (("torch", "deepspeed"), ("deepspeed", "torch")):
        written = tmp_path / name / "checkpoints" / "step_00000002"
        moved = ranks(world, train_on, tmp_path / f"{name} to {other}", [*engines[other], f"checkpoint.resume='{written}'"])
        assert_same_state(tmp_path / f"{name} to {other}" / "checkpoints" / "step_00000002", written)
        assert moved[0] == pytest.approx(straight[name][0][2:], rel=1e-6)


def train_on(folder: Path, overrides: list[str]) -> list[float]:
    """Trains to the third step, with a checkpoint after the second (also if it starts there). Returns the losses of its steps."""
    cache = folder.parent / "cache"
    session = open_session(compose([*TINY, f"run.dir='{folder}'", f"data.cache='{cache}'", *overrides]), torch.device("cpu"))
    losses = []
    while session.step < 3:
        if session.step == 2:
            save(session)
        losses.append(single_step(session).cross_entropy.item())
    return losses


def assert_same_state(one: Path, other: Path) -> None:
    ours, theirs = (read_whole(path, "") for path in (one, other))
    kept = [name for name in theirs if not name.startswith("random.")]
    assert sum(name.endswith("exp_avg_sq") for name in kept) == sum(name.startswith("model.") for name in kept) > 0
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)


def assemble(parts: list[dict[str, tuple[ShardMetadata, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """Assembles whole tensors from the shards of all ranks; replicas must agree."""
    wholes = {}
    for name in parts[0]:
        total = torch.full(parts[0][name][0].shape, torch.nan, dtype=torch.float64)
        for shard, value in (part[name] for part in parts):
            target = ShardMetadata(*shard).cut(total)
            known = ~target.isnan()
            assert torch.equal(target[known], value.double()[known]), f"copies of {name} differ"
            target.copy_(value)
        assert not total.isnan().any(), f"a part of {name} is on no rank"
        wholes[name] = total
    return wholes
