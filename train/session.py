"""A run with everything it needs, from its configuration to the step before the first."""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.folder import remove_leftovers
from ..checkpoint.saver import Saver
from ..checkpoint.store import read_facts
from ..data.build import Prepared, prepare
from ..data.stream.packing import World
from ..moe.model import Transformer
from ..parallel.apply import Parallel, initialise, parallelize
from ..parallel.mesh import build_mesh
from ..parallel.object_collectives import from_first
from .checkpoint.checkpointing import build_saver
from .checkpoint.lock import RunLock, lock_run
from .checkpoint.resuming import find_resume, keep_timeline, note, resume
from .config.config import Config, ConfigError, Precision
from .config.private_files import writing_to
from .config.serialize import shown_config
from .config.validate import check_rules
from .derive import derive, set_products
from .engine import Engine, build_engine
from .feed import Feed, data_world, open_together
from .folder import new_run_folder
from .survival.lone_failure import remove_note

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp64: torch.float64}


@dataclass
class Session:
    """The state of a run on this rank."""

    config: Config
    folder: Path
    device: torch.device
    data: Prepared
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
    def feed(self) -> Feed:
        """Of this rank's rows."""
        return Feed(self.config, self.data, self.parallel.mesh.data, self.micro, self.device)

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


def open_session(config: Config, device: torch.device) -> Session:
    """Data, model and engine on this rank, and the newest checkpoint's state if the run resumes. Collective.

    ValueError, one line, for what cannot run.
    """
    folder, lock = agree_on_folder(config)
    found = find_resume(config, folder)
    world = data_world(device)
    saved = saved_precision(config, found)
    precision_from = derive(config, device, saved)
    if saved is not None:
        check_rules(config, world.size)
    set_products(config, device, precision_from)
    data = first_rank_first(config, world)
    if data.tokenizer.size > config.model.vocabulary:
        raise ConfigError.of("model.vocabulary", config.model.vocabulary, "is smaller than the tokenizer", f"{data.tokenizer.size}")
    parallel = build_parallel(config, device)
    saver = build_saver(config.checkpoint, folder)
    engine = build_engine(config, parallel)
    session = Session(config, folder, device, data, parallel, engine, saver, precision_from=precision_from, lock=lock)
    session.engine.optimizer.register_step_pre_hook(lambda *_: saver.release())
    if found is not None:
        resume(session, found)
    keep_timeline(session)
    return session


def saved_precision(config: Config, found: Path | None) -> str | None:
    """Of the checkpoint `found`, if the configuration leaves the precision open. Collective."""
    if found is None or config.precision is not Precision.auto:
        return None
    return from_first(lambda: read_facts(found)["config"].get("precision"))


def build_parallel(config: Config, device: torch.device) -> Parallel:
    """The model with its first weights, spread over the ranks."""
    with torch.device("meta"):
        model = Transformer(config.model, DTYPES[config.precision])
    parallel = parallelize(model, build_mesh(config.parallel), config.parallel, device, config.compile)
    initialise(parallel, config.seed)
    return parallel


def first_rank_first(config: Config, world: World | None = None) -> Prepared:
    """The data of the configuration; see `open_together`."""

    def ready() -> Prepared:
        sizes = config.sequence_length, config.seed, config.batch.sequences
        return prepare(config.data, config.tokenizer, *sizes, world, config.evaluate.sequences)

    return open_together(ready)


def agree_on_folder(config: Config) -> tuple[Path, RunLock | None]:
    """The run folder, decided by rank 0, which alone makes it, locks it and removes what an interrupted save has left there."""
    locks: list[RunLock] = []

    def make() -> str:
        folder = Path(config.run.dir or new_run_folder())
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            locks.append(lock_run(folder))
            remove_note(folder)
        return str(folder)

    config.run.dir = from_first(make)
    folder = Path(config.run.dir)
    if locks and locks[0].previous:
        text = f"{folder} was in use by {locks[0].previous}, which has ended: this job takes it over"
        note(folder, "lock_taken_over", text, owner=locks[0].previous)
    for path in remove_leftovers(folder / "checkpoints") if locks else []:
        note(folder, "leftover_removed", f"removed {path}, which an interrupted save had left", path=str(path))
    return folder, locks[0] if locks else None
