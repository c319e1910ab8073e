"""Whole blocks and experts as one graph: how many are compiled, for which numbers of layers and rows, and the same gradients."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenyard.moe.config import CapacityConfig, DropPolicy, ModelConfig, MoEConfig, RouterConfig, Scope, Selection
from tokenyard.moe.experts import Experts
from tokenyard.moe.model import Transformer
from tokenyard.parallel import compile_blocks
from tokenyard.parallel.apply import initialise, parallelize
from tokenyard.parallel.compile_blocks import compile_experts, exchanged_in_blocks
from tokenyard.parallel.config import Exchange, ParallelConfig, PipelineSchedule, Recompute
from tokenyard.parallel.mesh import build_mesh
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

pytestmark = [  # all are the compiler's own
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf.*:UserWarning"),
]
MODEL = ModelConfig(layers=2, width=16, heads=2, kv_heads=2, hidden=24, vocabulary=64, init_std=0.3)
DROPLESS = MoEConfig(experts=8, top_k=2, hidden=16)
DROPS = MoEConfig(experts=8, top_k=2, hidden=16, capacity=CapacityConfig(factor=0.7, policy=DropPolicy.probability))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> CompileCounterWithBackend:
    """Counts graphs. They are compiled up to the code generator, which takes a minute (tests/parallel/test_compile.py)."""
    torch.compiler.reset()
    counter, compile = CompileCounterWithBackend("aot_eager"), torch.compile

    def compiled(function: Any, **settings: Any) -> Any:
        return compile(function, backend=counter, **settings)

    monkeypatch.setattr(torch, "compile", compiled)
    return counter


@pytest.mark.slow
@pytest.mark.parametrize("moe", [DROPLESS, DROPS], ids=["dropless", "drops"])
def test_equal_layers_are_one_graph_for_all_routings(moe: MoEConfig, graphs: CompileCounterWithBackend) -> None:
    """Of 2 layers as of 6: a model with more layers, and 20 steps, compile nothing more. Gradients are those of eager blocks."""
    config, seen = replace(MODEL, moe=moe), set[tuple[int, ...]]()
    deep, eager, compiled = build(replace(config, layers=6), True), build(config, False), build(config, True)
    for step in range(20):
        ids = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(step))
        valid = torch.ones_like(ids, dtype=torch.bool) if step % 2 else ids > 3 * step  # in step 18 most tokens are padding
        (expected, counts), (found, found_counts) = (gradients(model, ids, valid) for model in (eager, compiled))
        seen.add(tuple(counts))
        assert counts == found_counts
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), (step, name)
        if step == 0:
            assert graphs.frame_count == 1
            gradients(deep, ids, valid)
    assert len(seen) > 15
    assert graphs.frame_count == 1


@pytest.mark.slow
def test_no_number_is_made_of_memory_if_every_choice_is_dropped(graphs: CompileCounterWithBackend) -> None:
    """Rows of no expert are not computed. What was in memory for them, NaN among it, reaches no gradient."""
    compiled, ids = build(replace(MODEL, moe=DROPS), True), torch.randint(64, (2, 12))
    for _ in range(3):
        dirt = [torch.full((48, width), torch.nan) for width in (16, 32, 16, 32)]
        del dirt
        found, _ = gradients(compiled, ids, torch.zeros_like(ids, dtype=torch.bool))
        assert all(gradient.isfinite().all() for gradient in found.values())
        assert found["layers.0.moe.experts.down"].abs().sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_experts_are_one_graph_for_all_numbers_of_rows(bias: bool, graphs: CompileCounterWithBackend) -> None:
    with torch.device("meta"):
        model = Transformer(replace(MODEL, moe=replace(DROPLESS, experts=4, bias=bias)), torch.float64)
    compile_experts(model)
    model.to_empty(device="cpu")
    for index, block in enumerate(model.blocks):
        assert block.moe is not None
        experts = block.moe.experts
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        for sizes in ([5, 2, 1, 9], [0, 0, 0, 1], [40, 0, 3, 0], [0, 0, 0, 0], [1, 1, 0, 0]):
            x, counts_E = torch.randn(sum(sizes), 16, dtype=torch.float64, requires_grad=True), torch.tensor(sizes)
            inputs = [x, *experts.parameters()]
            found, expected = (
                torch.autograd.grad(run(x, counts_E).sin().sum(), inputs)
                for run in (experts, lambda *rows, e=experts: Experts.forward(e, *rows))
            )
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14, msg=lambda text, at=(index, sizes): f"{at}: {text}")
    assert graphs.frame_count == 1


def test_a_block_is_whole_where_nothing_in_it_travels() -> None:
    whole, drops = MODEL, replace(MODEL, moe=DROPS)
    chosen = replace(MODEL, moe=replace(DROPLESS, router=RouterConfig(selection=Selection.expert_choice)))
    starting = replace(MODEL, moe=replace(DROPLESS, capacity=CapacityConfig(schedule=[10, 1.5], scope=Scope.batch)))
    for config in (ParallelConfig(), ParallelConfig(shard=4), ParallelConfig(pipeline=2, recompute=Recompute.block)):
        assert exchanged_in_blocks(whole, config, 4) is None
        assert exchanged_in_blocks(drops, config, 1) is None
        for scoped in (drops, chosen, starting):
            assert exchanged_in_blocks(scoped, config, 4) == "counts of a scope"
    for degree in ("tensor", "context", "expert", "expert_tensor"):
        assert exchanged_in_blocks(whole, ParallelConfig(**{degree: 2}), 4)


def test_experts_alone_are_compiled_behind_an_exchange_and_none_where_gradients_are_deferred(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = list[str]()
    for name in ("compile_whole_blocks", "compile_parts", "compile_experts"):
        monkeypatch.setattr(compile_blocks, name, lambda _, name=name, **how: calls.append(name + str(how or "")))
    with torch.device("meta"):
        model = Transformer(MODEL)
    caplog.set_level("INFO", "tokenyard")
    behind = ParallelConfig(expert=2, exchange=Exchange.deduplicated)
    deferring = ParallelConfig(pipeline=2, pipeline_schedule=PipelineSchedule["zbh1"])
    cpu = torch.device("cpu")
    whole = [compile_blocks.compile_blocks(model, config, 2, cpu) for config in (ParallelConfig(), behind, deferring)]
    assert whole == [True, False, False]
    parts = "compile_parts{'eager_products': False}", "compile_experts"
    assert calls == ["compile_whole_blocks", *parts, "compile_parts{'eager_products': True}"]
    assert "experts of every block, which exchange rows of experts between" in caplog.text


def test_outside_of_training_blocks_run_as_they_are(graphs: CompileCounterWithBackend) -> None:
    model, ids = build(replace(MODEL, moe=DROPLESS), True).eval(), torch.randint(64, (2, 12))
    expected = build(replace(MODEL, moe=DROPLESS), False).eval()(ids)
    assert torch.equal(model(ids), expected)
    assert graphs.frame_count == 0


def build(config: ModelConfig, compiled: bool) -> Transformer:
    with torch.device("meta"):
        model = Transformer(config)
    spread = ParallelConfig()
    parallel = parallelize(model, build_mesh(spread), spread, torch.device("cpu"), compiled)
    initialise(parallel, seed=1)
    return model


def gradients(model: Transformer, ids: Tensor, valid: Tensor) -> tuple[dict[str, Tensor], list[int]]:
    """Returns the gradients of a sum of logits, z-losses and scores, and the tokens of each expert."""
    model.zero_grad(set_to_none=True)
    logits, stats = model(ids, valid, with_stats=True)
    (logits.square().mean() + sum(layer.z + layer.scores_BE.square().sum() for layer in stats) / ids.numel()).backward()
    counts = torch.cat([layer.counts_BE.flatten() for layer in stats]).tolist()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, counts
