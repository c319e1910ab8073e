"""The state of a run on one rank, from which the training loop, the logger and the checkpoints work."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.local_tier import LocalTier
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
    """The state of a run on this rank; `open_session` in setup.py makes it."""

    config: Config
    folder: Path
    device: torch.device
    data: DataPipeline
    parallel: Parallel
    engine: Engine
    saver: Saver
    local: LocalTier | None = None
    """The node-local tier of checkpoints; None without checkpoint.local.folder."""
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    precision_from: str = ""
    """Where the precision comes from, in words."""
    start: str = "new run"
    """Where the run started from, in words."""
    checkpoint: Path | None = None
    """The last one that is durable, or that was loaded."""
    last_save_failed: bool = False
    """If so, the next save is synchronous."""
    validation_loss: dict[int, float] = field(default_factory=dict)
    """The loss of this step's validation, by step; empty if there was none."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The training loop's own state, plain JSON that checkpoints contain."""
    tasks: dict[str, Any] | None = None
    """The tasks of evaluate.tasks as lm-eval has loaded them; None without any."""
    lock: RunLock | None = None
    """The lock of the run folder, which no other job may use; None on all ranks but the first."""

    @property
    def micro(self) -> int:
        """Sequences of a micro-batch on this rank."""
        return self.config.batch.micro or self.config.batch.sequences // self.parallel.mesh.data.size

    @functools.cached_property
    def batch_loader(self) -> BatchLoader:
        return BatchLoader(self.config, self.data, self.parallel.mesh.data, self.micro, self.device)

    @functools.cached_property
    def token_bytes(self) -> torch.Tensor:
        """The bytes of text that each token id stands for, (V,) int64 on the device; 0 for ids that the tokenizer lacks."""
        found = torch.zeros(self.config.model.vocabulary, dtype=torch.int64)
        lengths = torch.from_numpy(self.data.tokenizer.byte_lengths())
        found[: len(lengths)] = lengths
        return found.to(self.device)

    @functools.cached_property
    def shown_config(self) -> dict[str, Any]:
        """The configuration as checkpoints contain it; cached because it takes a tenth of a second."""
        return shown_config(self.config)

    def close(self) -> None:
        """Ends the threads of saver and data, and releases the run folder. Not collective."""
        self.saver.close()
        self.data.train.close()
        if self.lock is not None:
            self.lock.release()
