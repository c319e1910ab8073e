"""FSDP2 for `parallel.shard` > 1: blocks and root over the shard and context ranks, experts over the ranks that hold the
same experts.

While a block computes, the weights of the next one (its experts' too) are prefetched: before the host waits for row counts in the
MoE layer, which would delay them. So at most two blocks are gathered at a time.

`parallel.zero` decides what stays gathered within a step. Gradients are summed (never averaged) in their own dtype. Norms and
routers are not sharded: they are small, and the router must not be cast down.
"""

import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from ..moe.model import Transformer
from .layout import shard_dim, stays_whole
from .mesh import Mesh
from .pipeline.overlap import in_other_pass


def apply_fsdp(
    model: Transformer,
    mesh: Mesh,
    device: torch.device,
    zero: int,
    stages: Mapping[int, range] | None = None,
    compiled_whole: bool = False,
) -> None:
    """Wraps blocks, their experts and the root, in this order. `stages`: the layers of each stage of this rank of a pipeline.

    Experts are gathered and reduced around their MoE layer: once, however many chunks it cuts its tokens into. If blocks are
    `compiled_whole`, which needs all experts on each rank, they are so with the other weights of their block.
    """
    whole = {parameter for name, parameter in model.named_parameters() if stays_whole(name, parameter.ndim)}
    # Weights are gathered in the dtype of the activations.
    # Inputs are not cast: activations are narrow already, and rotary tables must stay wide.
    narrow = None if model.activations == model.weights else model.activations
    policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=model.weights, cast_forward_inputs=False)
    # No code writes into the output of an MoE layer, which is added to the residual stream.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPMoELayer\) returned a view")
    dense, experts = mesh.axis("shard", "context"), mesh.axis("expert_shard")
    if compiled_whole:
        assert experts.size == dense.size, "all experts are on each rank"
    dense_mesh = mesh.device_mesh(dense, "shard", device) if dense.size > 1 else None
    expert_mesh = mesh.device_mesh(experts, "expert_shard", device) if experts.size > 1 and not compiled_whole else None
    for block in model.blocks:
        of_experts = set() if block.moe is None or compiled_whole else set(block.moe.experts.parameters())
        _wrap(block, dense_mesh, dense.size, policy, whole | of_experts)
        if block.moe is not None and expert_mesh is not None:
            _wrap(block.moe, expert_mesh, experts.size, policy, set(block.moe.parameters()) - of_experts)
    _wrap(model, dense_mesh, dense.size, policy, whole)
    _set_prefetch(model, stages)
    if zero < 3:
        cast(FSDPModule, model).set_reshard_after_forward(False)


def prepare_backward(model: nn.Module, zero: int, last: bool, ended: Iterable[nn.Module] = (), sums: bool = True) -> None:
    """Sets what FSDP does in the next backward pass; `last`: it is that of the last micro-batch of a step.

    `ended`: blocks that have no later backward pass, though the model has. Without `sums` it reduces no gradient, since most come
    later: see `end_deferred_gradients`.
    """
    for module, final in ((model, last), *((block, True) for block in ended)):
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(sums and (final or zero > 1))
            module.set_reshard_after_backward(final or zero == 3)


def end_deferred_gradients(model: nn.Module) -> None:
    """Does with gradients that came without a backward pass through the modules what FSDP does after such a pass.

    FSDP reduces the gradients of a module together, in one dtype: a weight whose first gradient comes in the last pass has a narrow
    one, while those of others have been added up in the dtype of the sum.
    """
    if isinstance(model, FSDPModule):
        for group in _groups(model):
            if any(parameter.unsharded_accumulated_grad is not None for parameter in group.fsdp_params):
                for parameter in group.fsdp_params:
                    if parameter.unsharded_accumulated_grad is None:
                        parameter.to_accumulated_grad_if_needed()
        state: Any = fully_shard.state(model)  # pyright: ignore[reportFunctionMemberAccess]
        state._root_post_backward_final_callback()


def attributes_of_pass(model: nn.Module) -> list[tuple[Any, str]]:
    """Returns where FSDP keeps what it knows of the pass that runs: objects and names of attributes.

    A forward and a backward pass that run side by side each have their own (pipeline/overlap.py). A block may be in both, so its
    weights stay gathered until neither needs them.
    """
    states, groups = _states(model), _groups(model)
    for group in groups:
        group.reshard = functools.partial(_reshard, group, group.reshard)
    shared = [(states[0]._state_ctx, "iter_forward_root")] if states else []
    return [*((each, "_training_state") for each in [*states, *groups]), *shared]


def _states(model: nn.Module) -> list[Any]:
    return [cast(Any, module)._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]


def _groups(model: nn.Module) -> list[Any]:
    """Returns what FSDP keeps of the weights that each module gathers together."""
    return [state._fsdp_param_group for state in _states(model) if state._fsdp_param_group is not None]


def _reshard(group: Any, reshard: Callable[[], None]) -> None:
    state = in_other_pass(group, "_training_state")
    if state is None or state.name not in ("FORWARD", "PRE_BACKWARD"):
        reshard()


def _set_prefetch(model: Transformer, stages: Mapping[int, range] | None) -> None:
    """Each block prefetches the weights of the block of its stage that follows it, in the forward and in the backward pass.

    The last layer does not prefetch the first module of multi-token prediction, which only training runs. Backward, torch
    prefetches the last block by itself; if the root did, it would do so again for each of its outputs. Where passes do not follow
    each other as torch assumes, which is in a pipeline, a module that has nothing to prefetch names one that is gathered already.
    """
    shortcut, in_pipeline = model.config.moe.shortcut, stages is not None
    stages = stages or {0: range(model.config.layers)}
    groups: dict[int, list[Any]] = {
        index: [m for m in (block, block.moe) if isinstance(m, FSDPModule)]
        for index, block in zip(model.block_indices, model.blocks, strict=True)
    }
    first: dict[int, list[Any]] = {}
    for stage, layers in stages.items():
        inside = [groups[index] for index in layers]
        further = [groups[index] for index in groups if index >= model.config.layers and stage == max(stages)]
        first[stage] = inside[0] if inside else []
        for here, following in (*itertools.pairwise(inside), *itertools.pairwise(further)):
            here[0].set_modules_to_forward_prefetch(following)
        if shortcut and not in_pipeline:  # torch goes back in the order that it saw: experts of a block are before its dense parts
            continue
        for here, following in itertools.pairwise([*reversed([*inside, *further]), []]):
            experts = [] if shortcut else here[1:]  # torch comes to such a block a second time, when its experts are done
            here[0].set_modules_to_backward_prefetch([*experts, *(following or here[:1])])
            for module in here[1:]:
                module.set_modules_to_backward_prefetch(here[:1])
    root: Any = model
    root.set_modules_to_forward_prefetch(first[min(stages)])
    if len(stages) > 1:
        root.register_forward_pre_hook(
            lambda _, __, kwargs: root.set_modules_to_forward_prefetch(first[kwargs["stage"]]), prepend=True, with_kwargs=True
        )
        root.set_modules_to_backward_prefetch([root])


def _wrap(module: nn.Module, device_mesh: Any, ranks: int, policy: MixedPrecisionPolicy, ignored: set[nn.Parameter]) -> None:
    sharded: Any = fully_shard(
        module,
        mesh=device_mesh,
        mp_policy=policy,
        shard_placement_fn=lambda parameter: Shard(shard_dim(parameter.shape, ranks)),
        ignored_params={parameter for parameter in module.parameters() if parameter in ignored},
    )
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
