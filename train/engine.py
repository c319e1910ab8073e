"""Who runs backward, reduction and update: torch's FSDP2 with our own collectives, or DeepSpeed. The numbers are the same."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..moe.token_info import BatchPosition
from ..parallel.apply import Parallel
from ..parallel.shard import LocalShard
from .batch import Rows
from .state import held_state, set_optimizer_steps
from .step import StepNumbers, train_step
from .step_flags import NOTHING, GlobalFlags, RankFlags, is_sound


@dataclass
class Engine(ABC):
    """A model on this rank with its optimizer. All methods are collective."""

    parallel: Parallel
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def step(
        self,
        rows: list[Rows],
        lr: float,
        clip_norm: float | None,
        place: BatchPosition | None = None,
        rank_flags: RankFlags = NOTHING,
        accepts: Callable[[GlobalFlags], bool] = is_sound,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> StepNumbers:
        """One optimizer step on a global batch, of which `rows` are this rank's micro-batches; see `train_step`."""

    @abstractmethod
    def held(self) -> dict[str, LocalShard]:
        """Weights and moments to save, by global name; ranks together hold every element, and copies are equal."""

    @abstractmethod
    def wanted(self) -> dict[str, LocalShard]:
        """Tensors that a checkpoint is to be read into; `take` must follow."""

    @abstractmethod
    def take(self, loaded: dict[str, LocalShard], step: int) -> None:
        """Go on from what was read into `wanted()`, after `step` optimizer steps."""


class TorchEngine(Engine):
    """Gradients by parallel/gradients.py and FSDP2; the state is where the optimizer has it."""

    def step(
        self,
        rows: list[Rows],
        lr: float,
        clip_norm: float | None,
        place: BatchPosition | None = None,
        rank_flags: RankFlags = NOTHING,
        accepts: Callable[[GlobalFlags], bool] = is_sound,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> StepNumbers:
        return train_step(self.parallel, self.optimizer, rows, lr, clip_norm, place, rank_flags, accepts, meanwhile)

    def held(self) -> dict[str, LocalShard]:
        return held_state(self.parallel, self.optimizer)

    def wanted(self) -> dict[str, LocalShard]:
        return self.held()

    def take(self, loaded: dict[str, LocalShard], step: int) -> None:
        set_optimizer_steps(self.optimizer, [sharded.parameter for sharded in self.parallel.parameters.values()], step)
