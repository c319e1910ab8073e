"""How many ways the work is split. What can be derived (the ranks that replicate) is not a setting."""

from dataclasses import dataclass


@dataclass
class ParallelConfig:
    tensor: int = 1
    """Ranks that share each dense layer's weights and each sequence (tensor and sequence parallelism)."""
    shard: int = 1
    """Ways in which FSDP2 shards parameters, gradients and optimizer state; the remaining data ranks replicate."""
    zero: int = 3
    """What FSDP2 keeps whole within a step, as ZeRO-3, -2 or -1. 3: nothing, weights are gathered for each pass; 2: weights;
    1: weights, and gradients until the last micro-batch, which alone reduces them."""
    expert: int = 1
    """Ranks that share each MoE layer's experts; laid over data x tensor ranks, so it costs no ranks of its own."""
    expert_tensor: int = 1
    """Ranks that share each expert's hidden columns; laid over data x tensor ranks too, neighbours inside an expert group."""
    recompute: bool = False
    """Activation checkpointing: keep only each block's input and compute the block again in the backward pass."""
    timeout_seconds: float = 600.0
    """A collective that has not completed after this long ends the job."""
