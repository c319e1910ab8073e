"""A run with everything it needs, from its configuration to the step before the first."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.saver import Saver
from ..data.build import DataPipeline
from ..parallel.apply import Parallel
from .batch import BatchLoader
from .config.config import Config
from .config.serialize import shown_config
from .engine import Engine
from .run_folder import RunLock


@dataclass
class Session:
    """The state of a run on this rank."""

    config: Config
    folder: Path
    device: torch.device
    data: DataPipeline
    parallel: Parallel
    engine: Engine
    saver: Saver
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    precision_from: str = ""
    """Why it is what it is, in words."""
    start: str = "new run"
    """Where it started from, in words."""
    checkpoint: Path | None = None
    """The last one that is durable, or that was read."""
    careful: bool = False
    """The last save failed: the next one is waited for."""
    validated: dict[int, float] = field(default_factory=dict)
    """The last validation: its step and loss."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Plain JSON that belongs to the run and is kept in its checkpoints: the training loop's own state."""
    lock: RunLock | None = None
    """Of the run folder, which no other job may use; rank 0 has it."""

    @property
    def micro(self) -> int:
        """Sequences of this rank in one micro-step."""
        return self.config.batch.micro or self.config.batch.sequences // self.parallel.mesh.data.size

    @functools.cached_property
    def feed(self) -> BatchLoader:
        """Of this rank's rows."""
        return BatchLoader(self.config, self.data, self.parallel.mesh.data, self.micro, self.device)

    @functools.cached_property
    def shown(self) -> dict[str, Any]:
        """The configuration as checkpoints keep it: a tenth of a second, once."""
        return shown_config(self.config)

    def close(self) -> None:
        """End what goes on beside the training; not collective."""
        self.saver.close()
        self.data.train.close()
        if self.lock is not None:
            self.lock.release()
