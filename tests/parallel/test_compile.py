"""torch.compile changes no numbers: losses and gradients of compiled and eager models."""

import pytest
import torch
import torch._inductor.config as inductor
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.moe.model import Transformer
from tokenyard.parallel.apply import Parallel, initialise, parallelize
from tokenyard.parallel.config import ParallelConfig
from tokenyard.parallel.mesh import build_mesh
from tokenyard.train.batch import Rows
from tokenyard.train.loss import Totals
from tokenyard.train.step import forward
from torch._inductor import cpu_vec_isa

pytestmark = [  # all are the compiler's own
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf.*:UserWarning"),
]
MODEL = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, vocabulary=64, init_std=0.2)
MODEL.moe = MoEConfig(experts=4, hidden=16, shared_hidden=16)


@pytest.mark.slow
@inductor.patch(compile_threads=1)  # starting a pool of compilers takes longer than these few kernels
def test_compiled_model_equals_the_eager_one() -> None:
    torch.manual_seed(0)
    eager, compiled = build(False), build(True)
    rows = Rows(torch.randint(64, (2, 12)), torch.randint(64, (2, 12)))
    for _ in range(2):
        losses = [forward(parallel, rows, Totals(24, 2, 1)) for parallel in (eager, compiled)]
        for share in losses:
            share.objective.backward()
        torch.testing.assert_close(losses[1].objective, losses[0].objective, rtol=1e-6, atol=0)
        assert torch.equal(losses[1].counts_LE, losses[0].counts_LE)
    for name, sharded in eager.parameters.items():
        expected, gradient = sharded.parameter.grad, compiled.parameters[name].parameter.grad
        assert expected is not None and gradient is not None and expected.norm() > 0
        assert (gradient - expected).norm() < 1e-6 * expected.norm(), name


@pytest.mark.parametrize("isa", [cpu_vec_isa.VecAVX2(), cpu_vec_isa.VecAVX512(), cpu_vec_isa.invalid_vec_isa], ids=str)
def test_other_vectors_are_other_entries_of_the_cache(isa: cpu_vec_isa.VecISA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: isa)
    with inductor.patch({"cpp.simdlen": None}):
        build(True)
        assert inductor.save_config_portable()["cpp.simdlen"] == isa.bit_width()


def build(compiled: bool) -> Parallel:
    torch.compiler.reset()
    with torch.device("meta"):
        model = Transformer(MODEL)
    spread = ParallelConfig()
    parallel = parallelize(model, build_mesh(spread), spread, torch.device("cpu"), compiled=compiled)
    initialise(parallel, seed=1)
    return parallel
