"""Known bugs of distributed MoE training, as context managers that patch this process. Import it as `bugs`, on ranks too."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from tokenyard.moe.attention import attend
from tokenyard.moe.balance import update_expert_bias
from tokenyard.moe.init import expert_biases
from tokenyard.moe.rotary import rotary_tables
from tokenyard.moe.router import Router
from tokenyard.parallel import context, gradients
from tokenyard.parallel.apply import Parallel, gradient_of
from tokenyard.parallel.collectives import sum_over
from tokenyard.parallel.pipeline import run
from tokenyard.train import step


@contextlib.contextmanager
def averaged_over_expert_ranks() -> Iterator[None]:
    """The gradient of experts is a mean over expert-parallel ranks."""

    @contextlib.contextmanager
    def summed(parallel: Parallel) -> Iterator[None]:
        with gradients.gradient_all_reduce(parallel):
            yield
        for name, sharded in parallel.parameters.items():
            if ".experts." in name:
                gradient_of(sharded).div_(parallel.mesh.sizes["expert"])

    with mock.patch.object(step, "gradient_all_reduce", summed):
        yield


@contextlib.contextmanager
def averaged_over_context_ranks() -> Iterator[None]:
    """The gradient of dense weights is a mean over context ranks."""

    @contextlib.contextmanager
    def summed(parallel: Parallel) -> Iterator[None]:
        with gradients.gradient_all_reduce(parallel):
            yield
        for name, sharded in parallel.parameters.items():
            if ".experts." not in name:
                gradient_of(sharded).div_(parallel.mesh.sizes["context"])

    with mock.patch.object(step, "gradient_all_reduce", summed):
        yield


@contextlib.contextmanager
def chunks_rotated_as_if_neighbours() -> Iterator[None]:
    """Positions count from the first token of a context rank, as if its two chunks followed each other."""

    def own_tables(axis: Any, *args: Any) -> Any:
        tables = rotary_tables(*args)
        return tables._replace(**{name: getattr(tables, name).chunk(axis.size, -2)[axis.rank] for name in ("cos", "sin")})

    with mock.patch.object(context, "_own_tables", own_tables):
        yield


@contextlib.contextmanager
def chunk_of_keys_forgotten() -> Iterator[None]:
    """A context rank's late chunk does not attend to the first chunk of the sequence."""

    def attend_late(q: Any, k: Any, v: Any, softmax: Any, sinks: Any, documents: Any, blocks: Any) -> Any:
        first = q.shape[2] if k.shape[2] > 2 * q.shape[2] else 0
        return attend(q, k[:, :, first:], v[:, :, first:], softmax, sinks, documents, blocks)

    with mock.patch.object(context, "attend", attend_late):
        yield


@contextlib.contextmanager
def clipped_by_own_norm() -> Iterator[None]:
    """Each rank clips by the norm of its own shards, and reports the right norm."""

    def scale(parallel: Parallel, _: Any) -> None:
        held = [gradient_of(sharded) for sharded in parallel.parameters.values()]
        norm = torch.stack([gradient.square().sum() for gradient in held]).sum().sqrt()
        gradients.scale_gradients(parallel, (0.01 / norm).clamp(max=1.0))

    with mock.patch.object(step, "scale_gradients", scale):
        yield


@contextlib.contextmanager
def auxiliary_divided_by_data_ranks() -> Iterator[None]:
    """The gradients of balance losses and z-loss are divided by the number of data ranks; reported values are right."""
    right = step.losses

    def losses(summed: Any, stats: Any, config: Any, totals: Any, mesh: Any) -> Any:
        ranks = mesh.data.size
        less = {name: getattr(config.balance, name) / ranks for name in ("coefficient", "sequence_coefficient")}
        balance = dataclasses.replace(config.balance, **less)
        changed = dataclasses.replace(config, balance=balance, z_coefficient=config.z_coefficient / ranks)
        return right(summed, stats, changed, totals, mesh)

    with mock.patch.object(step, "losses", losses):
        yield


@contextlib.contextmanager
def router_not_added_up_over_tensor_ranks() -> Iterator[None]:
    @contextlib.contextmanager
    def summed(parallel: Parallel) -> Iterator[None]:
        replicas = {name: sharded.replicas for name, sharded in parallel.parameters.items()}
        for name, sharded in parallel.parameters.items():
            if name.endswith("router.weight"):
                sharded.replicas = parallel.mesh.axis("replicate", "shard")
        with gradients.gradient_all_reduce(parallel):
            yield
        for name, sharded in parallel.parameters.items():
            sharded.replicas = replicas[name]

    with mock.patch.object(step, "gradient_all_reduce", summed):
        yield


@contextlib.contextmanager
def bias_moved_per_micro_batch() -> Iterator[None]:
    right = step.forward

    def forward(parallel: Parallel, *args: Any) -> Any:
        share = right(parallel, *args)
        counts = sum_over(share.counts_LE.clone(), parallel.mesh.everyone)
        for bias, counts_E in zip(expert_biases(parallel.model).values(), counts, strict=True):
            update_expert_bias(bias, counts_E, parallel.model.config.moe.balance.bias_rate)
        return share

    nothing: Callable[..., None] = lambda *_: None  # noqa: E731
    with mock.patch.object(step, "forward", forward), mock.patch.object(step, "update_expert_biases", nothing):
        yield


@contextlib.contextmanager
def counts_again_in_recomputation() -> Iterator[None]:
    """Routers accumulate their counts in attributes, each time they run."""
    right_forward, right_sum = Router.forward, step.add_up
    seen: dict[Router, Any] = {}

    def forward(self: Router, *args: Any) -> Any:
        routing = right_forward(self, *args)
        seen[self] = seen.get(self, 0) + routing.stats.counts_BE.sum(0)
        return routing

    def add_up(parallel: Parallel, shares: list[Any], *args: Any) -> Any:
        wrong = torch.stack([seen.pop(module) for module in parallel.model.modules() if isinstance(module, Router)])
        none = [share._replace(counts_LE=torch.zeros_like(share.counts_LE)) for share in shares[1:]]
        return right_sum(parallel, [shares[0]._replace(counts_LE=wrong), *none], *args)

    with mock.patch.object(Router, "forward", forward), mock.patch.object(step, "add_up", add_up):
        yield


@contextlib.contextmanager
def auxiliary_forgotten_by_a_stage() -> Iterator[None]:
    """All stages of a pipeline but the last differentiate only their output, and report their losses."""
    right = run._backward

    def backward(result: run.StageResult, received: Any) -> None:
        right(result if received is None else result._replace(objective=result.objective.detach()), received)

    with mock.patch.object(run, "_backward", backward):
        yield


@contextlib.contextmanager
def micro_batch_counted_twice_in_a_pipeline() -> Iterator[None]:
    right = step.pipeline_pass

    def pipeline_pass(*args: Any) -> list[Any]:
        return [share for share in right(*args) for _ in range(2)]

    with mock.patch.object(step, "pipeline_pass", pipeline_pass):
        yield


@contextlib.contextmanager
def tied_weight_updated_by_each_stage() -> Iterator[None]:
    """The copies of the embedding on the first and on the last stage each keep their own gradient."""

    @contextlib.contextmanager
    def summed(parallel: Parallel) -> Iterator[None]:
        embedding = parallel.parameters.get("embedding.weight")
        if parallel.pipeline is None or embedding is None:
            with gradients.gradient_all_reduce(parallel):
                yield
            return
        both, embedding.replicas = embedding.replicas, parallel.mesh.axis("replicate", "shard")
        with gradients.gradient_all_reduce(parallel):
            yield
        embedding.replicas = both

    with mock.patch.object(step, "gradient_all_reduce", summed):
        yield


@contextlib.contextmanager
def averaged_over_stages() -> Iterator[None]:
    """Each stage divides its own share of the objective by the stages."""
    right_pass, right = step.pipeline_pass, run._backward

    def pipeline_pass(parallel: Parallel, pipeline: run.Pipeline, *args: Any) -> list[Any]:
        def backward(result: run.StageResult, received: Any) -> None:
            right(result._replace(objective=result.objective / pipeline.stages), received)

        with mock.patch.object(run, "_backward", backward):
            return right_pass(parallel, pipeline, *args)

    with mock.patch.object(step, "pipeline_pass", pipeline_pass):
        yield


@contextlib.contextmanager
def raised_on_tensor_ranks() -> Iterator[None]:
    """Not a numerical bug: with tensor parallelism the last rank raises, and the others wait for it."""
    right = step.count_totals

    def count_totals(parallel: Parallel, rows: Any) -> Any:
        if parallel.mesh.tensor.size > 1 and parallel.mesh.rank == parallel.mesh.world - 1:
            raise ArithmeticError("the last rank's reason")
        return right(parallel, rows)

    with mock.patch.object(step, "count_totals", count_totals):
        yield


def install(name: str) -> None:
    """Installs a bug until the process ends, for ranks that a command starts."""
    _installed.enter_context(globals()[name]())


_installed = contextlib.ExitStack()
