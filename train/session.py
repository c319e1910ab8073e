"""A run with everything it needs, from its configuration to the step before the first."""

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..data.prepare import Prepared, prepare
from ..data.stream.rows import World
from ..moe.model import Transformer
from ..parallel.apply import Parallel, initialise, parallelize
from ..parallel.mesh import build_mesh
from ..parallel.processes import is_first, wait_for_all
from .checkpoint.store import load_checkpoint, newest_checkpoint, prune, read_facts, remove_leftovers, save_checkpoint
from .config import Config, ConfigError, Precision
from .engine import Engine, build_engine
from .feed import Waiting, data_world
from .folder import new_run_folder
from .plain import config_from_plain, plain_config
from .state import random_state, restore_random

log = logging.getLogger("tokenyard")

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
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Tokens trained on."""
    start: str = "new run"
    """Where it started from, in words."""
    checkpoint: Path | None = None
    """The last one written or read."""
    waiting: Waiting = field(default_factory=Waiting)
    """For data."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Plain JSON that the next checkpoint keeps beside the rest, or that the one kept from which the run resumed."""

    @property
    def micro(self) -> int:
        """Sequences of this rank in one micro-step."""
        return self.config.batch.micro or self.config.batch.sequences // self.parallel.mesh.data.size


def open_session(config: Config, device: torch.device) -> Session:
    """Data, model and engine on this rank, and the newest checkpoint's state if the run resumes. Collective.

    ValueError, one line, for what cannot run.
    """
    folder = agree_on_folder(config)
    found = find_resume(config, folder)
    data = first_rank_first(config, data_world(device))
    if data.tokenizer.size > config.model.vocabulary:
        raise ConfigError.of("model.vocabulary", config.model.vocabulary, "is smaller than the tokenizer", f"{data.tokenizer.size}")
    parallel = build_parallel(config, device)
    session = Session(config, folder, device, data, parallel, build_engine(config, parallel))
    if found is not None:
        resume(session, found)
    return session


def build_parallel(config: Config, device: torch.device) -> Parallel:
    """The model with its first weights, spread over the ranks."""
    with torch.device("meta"):
        model = Transformer(config.model, DTYPES[config.precision])
    parallel = parallelize(model, build_mesh(config.parallel), config.parallel, device, config.compile)
    initialise(parallel, config.seed)
    return parallel


def first_rank_first(config: Config, world: World | None = None) -> Prepared:
    """Open the data on rank 0, which may have to tokenize it, and then on the others, which find it in the cache."""

    def ready() -> Prepared:
        sizes = config.sequence_length, config.seed, config.batch.sequences
        return prepare(config.data, config.tokenizer, *sizes, world, config.evaluate.sequences)

    data = ready() if is_first() else None
    wait_for_all()
    return data or ready()


def agree_on_folder(config: Config) -> Path:
    """The run folder, decided by rank 0, which alone makes it."""
    choice: list[Any] = [config.run.dir]
    if is_first():
        folder = Path(config.run.dir or new_run_folder())
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder / "checkpoints")
        choice = [str(folder)]
    if dist.is_initialized():
        dist.broadcast_object_list(choice)
    config.run.dir = choice[0]
    return Path(choice[0])


def find_resume(config: Config, folder: Path) -> Path | None:
    """The checkpoint to go on from, if any."""
    wish = config.checkpoint.resume
    newest = newest_checkpoint(folder / "checkpoints")
    if wish == "auto":
        return newest
    if wish == "never":
        if newest is not None:
            raise ConfigError.of(
                "checkpoint.resume", "never", f"would overwrite {newest}", "checkpoint.resume=auto or a new run.dir"
            )
        return None
    return as_checkpoint(Path(wish))


def as_checkpoint(path: Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest one of the run folder `path`."""
    inside = newest_checkpoint(path / "checkpoints") or newest_checkpoint(path)
    if inside is None and not (path / "manifest.json").is_file():
        raise ConfigError(f"{path}: is neither a checkpoint nor a run folder with one")
    return inside or path


def save(session: Session) -> Path:
    """Write a checkpoint of the whole run. Collective."""
    state = session.engine.held() | random_state()
    path = save_checkpoint(session.folder / "checkpoints", session.step, state, facts_of(session))
    if session.parallel.mesh.rank == 0:
        session.data.tokenizer.save(path / "tokenizer")
        prune(session.folder / "checkpoints", session.config.checkpoint.keep)
    session.checkpoint = path
    return path


def resume(session: Session, path: Path) -> None:
    """Continue from a checkpoint, of whatever layout; on the same layout bit for bit. Collective."""
    facts = read_facts(path)
    refuse_another_run(session, facts, path)
    same_ranks = facts["ranks"] == session.parallel.mesh.world
    held, random = session.engine.wanted(), random_state() if same_ranks else {}
    load_checkpoint(path, held | random, strict=same_ranks)
    restore_random(random)
    session.extra = facts.get("extra", {})
    session.engine.take(held, facts["step"] - session.extra.get("guard", {}).get("skipped", 0))
    session.step, session.tokens, session.checkpoint = facts["step"], facts["tokens"], path
    restore_data(session, facts)
    session.start = f"resumed after step {session.step} from {path}"


def restore_data(session: Session, facts: dict[str, Any]) -> None:
    """Where the data was left. With other data, allowed, each source goes on where it was, if it was there."""
    state = facts.get("data_state") or {"rows": [], "since": [], "ended": [], "sources": []}
    session.data.train.restore({**state, "step": session.step})


def facts_of(session: Session) -> dict[str, Any]:
    """What a checkpoint says beside its tensors: plain JSON."""
    return {
        "config": plain_config(session.config),
        "step": session.step,
        "tokens": session.tokens,
        "ranks": session.parallel.mesh.world,
        "layout": session.parallel.mesh.sizes,
        "tokenizer_hash": session.data.facts.tokenizer_hash,
        "data_fingerprint": session.data.facts.train_fingerprint,
        "data_state": session.data.train.state(),
        "extra": session.extra,
        "torch": torch.__version__,
        "host_cores": os.cpu_count(),
    }


def refuse_another_run(session: Session, facts: dict[str, Any], path: Path) -> None:
    """Another model, tokenizer, corpus or order of the data would not be the same run."""
    saved, config = config_from_plain(facts["config"]), session.config
    same = {
        "model": (saved.model, config.model),
        "sequence_length": (saved.sequence_length, config.sequence_length),
        "batch.sequences": (saved.batch.sequences, config.batch.sequences),
        "seed": (saved.seed, config.seed),
        "tokenizer": (facts["tokenizer_hash"], session.data.facts.tokenizer_hash),
        "data": (facts["data_fingerprint"], session.data.facts.train_fingerprint),
    }
    if config.data.allow_change:
        del same["data"]
    for key, (before, now) in same.items():
        if before != now:
            key, before, now = first_difference(key, before, now)
            raise ConfigError(
                f"{key}={now}: the checkpoint {path} was made with {before}; nearest valid: {key}={before} or a new run.dir"
            )


def first_difference(key: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """Down to the setting that differs."""
    if hasattr(before, "__dataclass_fields__"):
        for name in before.__dataclass_fields__:
            if getattr(before, name) != getattr(now, name):
                return first_difference(f"{key}.{name}", getattr(before, name), getattr(now, name))
    return key, getattr(before, "value", before), getattr(now, "value", now)
