"""Which expert a token gets: the router, the balance of load and the capacity."""

from dataclasses import dataclass, field
from enum import Enum


class Scope(Enum):
    """Over which tokens a balance loss, a capacity or a balanced choice is counted."""

    sequence = "sequence"
    batch = "batch"
    rank = "rank"


class Score(Enum):
    """How router logits become scores."""

    softmax = "softmax"
    sigmoid = "sigmoid"
    sqrtsoftplus = "sqrtsoftplus"


class Selection(Enum):
    """How tokens and experts find each other."""

    top_k = "top_k"
    gshard = "gshard"
    expert_choice = "expert_choice"
    hash = "hash"
    sinkhorn = "sinkhorn"


class GroupScore(Enum):
    """What a group of experts is ranked by in group-limited selection."""

    max = "max"
    top2 = "top2"


class DropPolicy(Enum):
    """Which choices a full expert keeps."""

    position = "position"
    probability = "probability"
    random = "random"


@dataclass
class RouterConfig:
    score: Score = Score.softmax
    """How logits become scores: over all experts, or each expert on its own (DeepSeek-V3: sigmoid)."""
    selection: Selection = Selection.top_k
    """top_k; gshard (a random second expert); expert_choice (looks ahead); hash of the token; sinkhorn (balanced)."""
    softmax_after_top_k: bool = False
    """Choose by logits, then softmax over the chosen alone (gpt-oss)."""
    normalize_top_k: bool = True
    """Divide the chosen scores by their sum, as Mixtral does; top_k = 1 never does (Switch), or its router would not learn."""
    scale: float = 1.0
    """Factor of the chosen weights (DeepSeek's routed_scaling_factor)."""
    bias: bool = False
    """The router's projection has a bias (gpt-oss)."""
    groups: int = 1
    """Groups of experts for group-limited selection (DeepSeek-V2); 1 is none."""
    top_groups: int = 1
    """Groups that a token may choose from."""
    group_score: GroupScore = GroupScore.max
    """max (DeepSeek-V2) or the sum of the two best (DeepSeek-V3)."""
    jitter: float = 0.0
    """In training the router's input is multiplied by uniform noise from 1 - jitter to 1 + jitter (Switch)."""
    noise: bool = False
    """In training learned Gaussian noise is added to the logits (Shazeer 2017)."""
    null_experts: int = 0
    """More experts that compute nothing: a token that chooses one has fewer real experts."""


@dataclass
class BalanceConfig:
    coefficient: float = 0.01
    """Factor of the load-balance loss of each MoE layer (Switch Transformer, eq. 4); 0 turns it off."""
    scope: Scope = Scope.sequence
    """Of these losses and of sinkhorn. sequence and batch (the global micro-batch) do not depend on the layout; rank does."""
    sequence_coefficient: float = 0.0
    """Factor of DeepSeek-V3's complementary sequence-wise balance loss (eq. 17-20); 0 turns it off."""
    importance_coefficient: float = 0.0
    """Factor of the squared coefficient of variation of importance and load (Shazeer 2017), in `scope`; 0 turns it off."""
    bias_rate: float = 0.0
    """Step of the auxiliary-loss-free expert bias (DeepSeek-V3: 0.001), once per optimizer step; 0 turns it off."""


@dataclass
class CapacityConfig:
    factor: float | None = None
    """Rows an expert takes, as a multiple of an even share (GShard); null is dropless."""
    evaluation_factor: float | None = None
    """The same outside training; null is dropless."""
    minimum: int = 1
    """An expert always takes so many rows of a scope."""
    scope: Scope = Scope.sequence
    """The tokens that compete for an expert, in expert_choice too; with sequence and batch the layout decides nothing."""
    policy: DropPolicy = DropPolicy.position
    """Earlier tokens first (causal), likelier choices first (looks ahead), or at random (outside training by position)."""
    pad: bool = False
    """Pad each expert's rows to its capacity, as GShard does: fixed shapes for more computation."""
    schedule: list[float] = field(default_factory=list)
    """Pairs of step and factor, flattened, as [0, 1.0, 1000, 1.5, 2000, 0]: the factor from each step on; 0 is dropless."""

    def factor_at(self, step: int) -> float | None:
        """The factor in force in training at optimizer step `step` (the first is 1); None is dropless."""
        factor = self.factor
        for start, scheduled in zip(self.schedule[::2], self.schedule[1::2], strict=True):
            if step >= start:
                factor = scheduled or None
        return factor
