"""deepspeed.moe.layer.MoE in our transformer, with our feed-forwards as its experts."""

from importlib import import_module

import torch
import torch.distributed as dist
from torch import nn

from ...moe.feedforward import FeedForward
from ...moe.layer import MoELayer
from .cases import CAPACITY, Case
from .ours import DTYPES, Built, build_with


def build(case: Case, variant: str) -> Built:
    """`variant`: drops, or nothing."""
    deepspeed, moe = import_module("deepspeed"), import_module("deepspeed.moe.layer")
    alone()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which it would compile first, and one process has no use for
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)

    def convert(layer: MoELayer) -> nn.Module:
        theirs = moe.MoE(
            hidden_size=case.width,
            expert=FeedForward(case.width, case.hidden, DTYPES[case.precision]),
            num_experts=case.experts,
            k=case.top_k,
            capacity_factor=CAPACITY,
            drop_tokens=variant == "drops",
            top2_2nd_expert_sampling=False,
        )
        theirs.set_deepspeed_parallelism()
        theirs.to(DTYPES[case.precision])
        copy_weights(layer, theirs.deepspeed_moe)
        return theirs

    return build_with(case, convert)


def copy_weights(ours: MoELayer, theirs: nn.Module) -> None:
    assert ours.router.weight is not None
    with torch.no_grad():
        theirs.get_parameter("gate.wg.weight").copy_(ours.router.weight)
        for expert in range(len(ours.experts.down)):
            prefix = f"experts.deepspeed_experts.{expert}"
            theirs.get_parameter(f"{prefix}.gate_up").copy_(ours.experts.gate_up[expert])
            theirs.get_parameter(f"{prefix}.down").copy_(ours.experts.down[expert])


def alone() -> None:
    """A process group of this process, made once."""
    if not dist.is_initialized():
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
