"""Engines run backward, reduction and update: torch's FSDP2 with our own collectives, or DeepSpeed. The numbers are the same."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from ..parallel.apply import Parallel
from ..parallel.shard import LocalShard
from .config.config import OptimizerStates
from .cuda_graph import MicroBatchGraph
from .lean_adamw import LeanAdamW
from .moments import Moments
from .state import local_state, local_weights, set_optimizer_steps
from .step import StepInput, StepNumbers, train_step


@dataclass
class Engine(ABC):
    """A model on this rank with its optimizer. All methods are collective."""

    parallel: Parallel
    optimizer: torch.optim.Optimizer

    @abstractmethod
    def step(self, step_input: StepInput) -> StepNumbers:
        """Runs one optimizer step on a global batch; see `train_step`."""

    @abstractmethod
    def state_to_save(self) -> dict[str, LocalShard]:
        """Returns weights and moments to save, by global name; the ranks together hold every element, and copies are equal."""

    @abstractmethod
    def state_to_load(self, states: OptimizerStates) -> dict[str, LocalShard]:
        """Returns the tensors to read a checkpoint with these `optimizer.states` into; `restore` must follow."""

    @abstractmethod
    def restore(self, loaded: dict[str, LocalShard], states: OptimizerStates, step: int) -> None:
        """Continues from what was read into `state_to_load(states)`, after `step` optimizer steps."""


@dataclass
class TorchEngine(Engine):
    """Sums gradients by parallel/gradients.py and FSDP2; the tensors to save are those of the optimizer."""

    graph: MicroBatchGraph | None = None
    """Runs forward and backward, with cuda_graph=true on a GPU."""

    def step(self, step_input: StepInput) -> StepNumbers:
        return train_step(self.parallel, self.optimizer, step_input, self.graph and self.graph.accumulate)

    def state_to_save(self) -> dict[str, LocalShard]:
        return local_state(self.parallel, self.optimizer)

    def state_to_load(self, states: OptimizerStates) -> dict[str, LocalShard]:
        if states is self.states:
            return self.state_to_save()
        others = (Moments.of(name, sharded, states).on_host() for name, sharded in self.parallel.parameters.items())
        return local_weights(self.parallel) | {name: shard for each in others for name, shard in each.items()}

    def restore(self, loaded: dict[str, LocalShard], states: OptimizerStates, step: int) -> None:
        set_optimizer_steps(self.optimizer, [sharded.parameter for sharded in self.parallel.parameters.values()], step)
        if states is not self.states:
            held = self.state_to_save()
            for name, sharded in self.parallel.parameters.items():
                Moments.of(name, sharded, states).convert(loaded, Moments.of(name, sharded, self.states), held, step)

    @property
    def states(self) -> OptimizerStates:
        """How the optimizer keeps its moments."""
        return self.optimizer.states if isinstance(self.optimizer, LeanAdamW) else OptimizerStates.fp32
