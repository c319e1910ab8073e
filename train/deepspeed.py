"""engine=deepspeed: DeepSpeed runs backward, the sum of gradients and the update; its state becomes named shards of tensors.

ZeRO 0 keeps the optimizer whole on every rank, 1 shards its state, 2 the gradients too. DeepSpeed knows dense parameters, which all
ranks hold, and those of experts, which are reduced over groups of their own. Here every parameter that fewer ranks than all hold is
of the second kind: experts, and slices of tensor parallelism. Gradients are summed and never averaged, as in parallel/gradients.py.
"""

import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, _foreach_mul_, _foreach_norm, nn  # pyright: ignore[reportPrivateImportUsage]

from ..parallel.apply import Parallel, ShardedParameter
from ..parallel.collectives import sum_over
from ..parallel.communicators import replicated
from ..parallel.gradients import clip_factor, scale_gradients, squared_norm
from ..parallel.layout import digits
from ..parallel.mesh import Axis
from ..parallel.shard import LocalShard, ShardMetadata
from .config.config import Config, ConfigError, OptimizerStates
from .config.deepspeed_settings import deepspeed_settings
from .engine import Engine
from .optimizer import build_optimizer, set_learning_rate
from .state import MOMENTS, local_state, local_weights, optimizer_state, set_optimizer_steps
from .step import StepInput, StepNumbers, add_up, count_totals, forward, update_expert_biases


class Fragment(NamedTuple):
    """The elements of a flattened parameter that this rank updates: `size` of them from `start` on."""

    start: int
    size: int
    partition: nn.Parameter
    """The optimizer's own flat parameter, with the weights of many fragments."""
    offset: int
    """The position of this fragment in the partition."""

    def view_in(self, flat: Tensor) -> Tensor:
        """Returns the view of this fragment in a tensor with the layout of the partition."""
        return flat.narrow(0, self.offset, self.size)


class Zero:
    """A DeepSpeed engine around a parallel model; `compute` takes the arguments of `forward` and returns its result."""

    def __init__(
        self, parallel: Parallel, optimizer: torch.optim.Optimizer, settings: dict[str, Any], forward: Callable[..., Any]
    ) -> None:
        """`optimizer` must have the groups of `expert_groups`; DeepSpeed takes it over. Collective."""
        deepspeed = _import_deepspeed(parallel.device)
        _start_world_of_one(parallel.device)
        _register_groups(parallel, deepspeed)
        self.parallel = parallel
        self.stage: int = settings["zero_optimization"]["stage"]
        module = _Computation(parallel, forward, deepspeed)
        self.engine: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]

    def compute(self, *arguments: Any, last: bool) -> Any:
        """Runs forward and backward of one micro-batch, and sums the gradients over ranks after the `last` one of a step."""
        self.engine.set_gradient_accumulation_boundary(last)
        result = self.engine(*arguments)
        self.engine.backward(result.objective, scale_wrt_gas=False)
        return result

    def squared_norm(self) -> Tensor:
        """Returns this rank's share of the squared norm of all gradients, fp64, as in parallel/gradients.py.

        DeepSpeed's own norm is not used, because it is a mean over ranks that hold different experts (its issue 8475).
        """
        if not self.stage:
            return squared_norm(self.parallel)
        return torch.stack([norm.double() for norm in _foreach_norm(self._gradients())]).square().sum()

    def scale(self, factor: Tensor) -> None:
        """Multiplies all gradients by a scalar."""
        if not self.stage:
            scale_gradients(self.parallel, factor)
        else:
            _foreach_mul_(self._gradients(), factor.float())

    def update(self) -> None:
        """Runs the optimizer's step, after which every rank has all of its weights again."""
        self.engine.step()

    def drop(self) -> None:
        """Drops the gradients of a step that is not accepted."""
        self.engine.zero_grad() if not self.stage else self.engine.optimizer.zero_grad()
        if self.stage:
            gradients = self.engine.optimizer.averaged_gradients
            gradients.update(dict.fromkeys(gradients))

    def fragments(self) -> Iterator[tuple[str, ShardedParameter, Fragment | None]]:
        """Yields name, parameter and fragment, which is None if this rank updates no element of it. For ZeRO 1 and 2."""
        partitions = self.engine.optimizer.single_partition_of_fp32_groups
        for name, sharded in self.parallel.parameters.items():
            link: Any = getattr(sharded.parameter, "_hp_mapping")  # noqa: B009
            if link is None:
                yield name, sharded, None
                continue
            here, there = link.lp_fragment_address, link.hp_fragment_address
            yield name, sharded, Fragment(here.start, here.numel, partitions[link.param_group_index], there.start)

    def _gradients(self) -> list[Tensor]:
        """Returns this rank's share of the gradients, after the last micro-batch of a step. For ZeRO 1 and 2."""
        return [tensor for group in self.engine.optimizer.averaged_gradients.values() for tensor in group]


def expert_groups(parallel: Parallel) -> Callable[[ShardedParameter], dict[str, Any]]:
    """Returns the items by which DeepSpeed recognizes an optimizer group of parameters that fewer ranks than all hold."""
    names = _group_names(parallel)

    def mark(sharded: ShardedParameter) -> dict[str, Any]:
        return {"moe": True, "name": names[sharded.replicas]} if sharded.replicas in names else {}

    return mark


class _Computation(nn.Module):
    """The model, as DeepSpeed sees it."""

    def __init__(self, parallel: Parallel, forward: Callable[..., Any], deepspeed: ModuleType) -> None:
        super().__init__()
        self.model = parallel.model
        self.compute = forward
        if _group_names(parallel):
            self.groups = _empty_moe_layer(deepspeed)

    def forward(self, *arguments: Any) -> Any:
        return self.compute(*arguments)


def _empty_moe_layer(deepspeed: ModuleType) -> nn.Module:
    """Returns a layer without experts: DeepSpeed looks for groups of experts only if it finds one of its own layers."""
    layer = deepspeed.moe.layer.MoE.__new__(deepspeed.moe.layer.MoE)
    nn.Module.__init__(layer)
    layer.num_experts = 0
    layer.set_deepspeed_parallelism = lambda *_: None
    return layer


def _group_names(parallel: Parallel) -> dict[Axis, str]:
    """Returns the sets of ranks, except all ranks, that hold the same shards, with names in the same order on every rank."""
    axes = {sharded.replicas: None for sharded in parallel.parameters.values() if sharded.replicas.size < parallel.mesh.world}
    return {axis: f"copies_{number}" for number, axis in enumerate(axes)}


def _register_groups(parallel: Parallel, deepspeed: ModuleType) -> None:
    """Gives DeepSpeed the process groups, and marks each parameter with its own. Collective."""
    registry = deepspeed.utils.groups
    registry._WORLD_GROUP = None  # that of an earlier world of this process
    known = registry._get_expert_data_parallel_group_dict()
    known.clear()
    names, mesh = _group_names(parallel), parallel.mesh
    for axis, name in names.items():
        of_axis = next(parameter for parameter, sharded in parallel.parameters.items() if sharded.replicas == axis)
        if axis.indirect:
            known[name] = mesh.group(*digits(replicated(of_axis, False, parallel.model.config), mesh.sizes))
        else:
            known[name] = axis.group or mesh.group()
    for sharded in parallel.parameters.values():
        if sharded.replicas in names:
            marked: Any = sharded.parameter
            marked.allreduce, marked.group_name = False, names[sharded.replicas]


def _start_world_of_one(device: torch.device) -> None:
    """Starts a process group for one process, which DeepSpeed requires."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def _import_deepspeed(device: torch.device) -> ModuleType:
    """Imports DeepSpeed only when it is used: that takes half a second, reads the environment and reports devices."""
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    import deepspeed
    import deepspeed.moe.layer
    import deepspeed.utils.groups

    # On the CPU it would first compile its own all-reduce: a minute of C++, whose sums differ from those of gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def build_zero_engine(config: Config, parallel: Parallel) -> Engine:
    """Returns the engine. Collective."""
    optimizer = build_optimizer(config.optimizer, parallel, expert_groups(parallel))
    settings = deepspeed_settings(config, parallel.mesh.world)
    return ZeroEngine(parallel, optimizer, Zero(parallel, optimizer, settings, functools.partial(forward, parallel)))


class ZeroEngine(Engine):
    """With ZeRO 1 and 2 a rank holds the moments of a run of elements of some parameters: a `Fragment` of each."""

    def __init__(self, parallel: Parallel, optimizer: torch.optim.Optimizer, zero: Zero) -> None:
        super().__init__(parallel, optimizer)
        self.zero = zero

    def step(self, step_input: StepInput) -> StepNumbers:
        """Does what `train_step` does, in the same order."""
        totals = count_totals(self.parallel, step_input.rows)
        shares = [
            self.zero.compute(rows, totals, step_input.position, last=rows is step_input.rows[-1]) for rows in step_input.rows
        ]
        squared = self.zero.squared_norm()
        step_input.overlap_fn()
        numbers = add_up(self.parallel, shares, totals, squared, step_input.rank_flags)
        if not step_input.accepts(numbers.global_flags):
            self.zero.drop()
            return numbers._replace(updated=False)
        if step_input.clip_norm is not None:
            self.zero.scale(clip_factor(numbers.gradient_norm, step_input.clip_norm))
        set_learning_rate(self.optimizer, step_input.lr)
        self.zero.update()
        update_expert_biases(self.parallel, numbers.counts_LE, step_input.position)
        return numbers

    def state_to_save(self) -> dict[str, LocalShard]:
        """Gathers the moments one by one; each stays on one of the ranks that hold the parameter, in turns."""
        if not self.zero.stage:
            return local_state(self.parallel, self.optimizer)
        held = local_weights(self.parallel)
        for turn, (name, sharded, fragment) in enumerate(self.zero.fragments()):
            for moment in MOMENTS:
                whole = self._gather(sharded, fragment, moment)
                if turn % sharded.replicas.size == sharded.replicas.rank:
                    held[f"optimizer.{name}.{moment}"] = LocalShard(sharded.metadata, whole)
        return held

    def state_to_load(self, states: OptimizerStates) -> dict[str, LocalShard]:
        """Returns weights, and of the moments the rows in which this rank has an element. Raises ConfigError for lean ones."""
        if states is not OptimizerStates.fp32:
            rule = f"opens no checkpoint with optimizer.states={states.value}"
            raise ConfigError.of("engine", "deepspeed", rule, "engine=torch")
        if not self.zero.stage:
            return local_state(self.parallel, self.optimizer)
        held = local_weights(self.parallel)
        for name, sharded, fragment in self.zero.fragments():
            if fragment is not None:
                rows = rows_around(sharded.metadata, fragment)
                for moment in MOMENTS:
                    held[f"optimizer.{name}.{moment}"] = LocalShard(rows, torch.empty(rows.sizes, device=self.parallel.device))
        return held

    def restore(self, loaded: dict[str, LocalShard], states: OptimizerStates, step: int) -> None:
        if not self.zero.stage:
            set_optimizer_steps(self.optimizer, [sharded.parameter for sharded in self.parallel.parameters.values()], step)
            return
        for name, sharded, fragment in self.zero.fragments():
            if fragment is not None:
                weights = sharded.parameter.detach().flatten()
                fragment.view_in(fragment.partition.data).copy_(weights.narrow(0, fragment.start, fragment.size))
                for moment in MOMENTS:
                    shard, rows = loaded[f"optimizer.{name}.{moment}"]
                    first = (shard.offsets[0] - sharded.metadata.offsets[0]) * row_size(shard)
                    wanted = rows.flatten().narrow(0, fragment.start - first, fragment.size)
                    self._moment(fragment, moment).copy_(wanted)
        partitions = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        set_optimizer_steps(self.optimizer, partitions, step)

    def _gather(self, sharded: ShardedParameter, fragment: Fragment | None, moment: str) -> Tensor:
        whole = torch.zeros(sharded.metadata.sizes, device=self.parallel.device)
        if fragment is not None:
            whole.view(-1).narrow(0, fragment.start, fragment.size).copy_(self._moment(fragment, moment))
        return sum_over(whole, sharded.replicas)

    def _moment(self, fragment: Fragment, moment: str) -> Tensor:
        return fragment.view_in(optimizer_state(self.optimizer, fragment.partition)[moment])


def rows_around(shard: ShardMetadata, fragment: Fragment) -> ShardMetadata:
    """Returns the smallest run of rows of the shard that contains all elements of the fragment."""
    row = row_size(shard)
    first, end = fragment.start // row, -(-(fragment.start + fragment.size) // row)
    return ShardMetadata(shard.shape, (shard.offsets[0] + first, *shard.offsets[1:]), (end - first, *shard.sizes[1:]))


def row_size(shard: ShardMetadata) -> int:
    """Returns the elements of one row."""
    return math.prod(shard.sizes[1:])
