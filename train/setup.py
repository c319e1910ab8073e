"""Opens a run: data, model, engine and saver on this rank, and the newest checkpoint's state if the run resumes."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..checkpoint.folder import remove_leftovers, step_of
from ..checkpoint.retention import Retention
from ..checkpoint.saver import Saver
from ..checkpoint.store import read_facts
from ..data.build import DataPipeline, OpenedData, open_data
from ..data.errors import DataStop
from ..data.stream.documents import TokenizingRanks
from ..moe.device import kind_of, warn_of_missing_kernels
from ..moe.fp8 import warn_of_emulated_products
from ..moe.model import Transformer
from ..parallel.apply import Parallel, initialise, parallelize
from ..parallel.config import ParallelConfig
from ..parallel.gradients import narrow_gradients
from ..parallel.layout import DENSE, mesh_sizes
from ..parallel.mesh import build_mesh
from ..parallel.object_collectives import from_all, from_first
from ..parallel.process_group import is_first, wait_for_all
from .config.config import CheckpointConfig, Config, ConfigError, EngineKind, GradientDtype, Precision
from .config.own_files import new_run_folder, writing_to
from .config.published import warn_of_toy_settings
from .config.validate import check_rules
from .cuda_graph import MicroBatchGraph
from .derive import DTYPES, derive, set_products
from .downstream.tasks import open_tasks
from .engine import Engine, TorchEngine
from .exit import remove_notes
from .initial_weights import load_initial
from .local_saves import find_newer, open_local_tier, resume_locally
from .optimizer import build_optimizer
from .resume import announce, find_resume, keep_timeline, resume
from .run_folder import RunLock, lock_run
from .session import Session
from .tokenizer_source import rows_for

log = logging.getLogger("tokenyard")


def open_session(config: Config, device: torch.device) -> Session:
    """Returns the session of a run, ready for its next step. Collective. Raises ValueError, one line, for what cannot run."""
    folder, lock = agree_on_folder(config)
    found = find_resume(config, folder)
    tier = open_local_tier(config, folder)
    newer = find_newer(tier, folder, step_of(found) if found is not None else 0)
    ranks = tokenizing_ranks(config, device)
    saved = None
    if newer is not None and config.precision is Precision.auto:
        saved = newer.facts["config"].get("precision")
    elif found is not None and config.precision is Precision.auto:
        saved = from_first(lambda: read_facts(found)["config"].get("precision"))
    precision_from = derive(config, device, saved)
    if saved is not None:
        check_rules(config, ranks.size)
    set_products(config, device, precision_from)
    warn_of_missing_kernels(device)
    warn_of_emulated_products(config.model, device)
    warn_of_toy_settings(config)
    data = open_data_on_all_ranks(config, ranks)
    if (pieces := data.tokenizer.size) > config.model.vocabulary:
        rule = f"is smaller than the tokenizer, which has {pieces} pieces"
        raise ConfigError.of("model.vocabulary", config.model.vocabulary, rule, f"model.vocabulary={rows_for(pieces)}")
    parallel, start = build_model(config, device, found is not None or newer is not None, folder)
    saver = build_saver(config.checkpoint, folder)
    engine = build_engine(config, parallel)
    session = Session(
        config, folder, device, data, parallel, engine, saver, tier, precision_from=precision_from, start=start, lock=lock
    )
    session.engine.optimizer.register_step_pre_hook(saver.wait_for_copies)
    if newer is not None:
        session.checkpoint = found
        resume_locally(session, newer)
    elif found is not None:
        resume(session, found)
    if tier is not None:
        session.engine.optimizer.register_step_pre_hook(tier.wait_for_copies)
        tier.clear(but=session.step if newer is not None else None)
    keep_timeline(session)
    session.tasks = open_tasks_on_all_ranks(config)
    return session


def build_model(config: Config, device: torch.device, resumes: bool, folder: Path) -> tuple[Parallel, str]:
    """Returns the model, spread over the ranks, and where its weights are from, in words. Collective.

    They are those of checkpoint.init, or initial ones. If the run `resumes`, they are uninitialised until all of them are read.
    """
    if not resumes and config.checkpoint.init is None:
        return build_parallel(config, device), "new run"
    parallel = spread_model(config, device)
    if resumes:
        return parallel, "resumed"
    read = load_initial(parallel, config, folder)
    said = f"new run from the weights of {read.path}{read.note and f'; {read.note}'}"
    announce(folder, "initialised", f"a {said}", path=str(read.path))
    return parallel, said


def build_parallel(config: Config, device: torch.device) -> Parallel:
    """Returns the model with its initial weights, spread over the ranks."""
    parallel = spread_model(config, device)
    initialise(parallel, config.seed)
    return parallel


def spread_model(config: Config, device: torch.device) -> Parallel:
    """Returns the model, spread over the ranks, with uninitialised weights."""
    with torch.device("meta"):
        model = Transformer(config.model, DTYPES[config.precision])
    return parallelize(model, build_mesh(config.parallel), config.parallel, device, config.compile)


def open_data_on_all_ranks(config: Config, ranks: TokenizingRanks | None = None) -> DataPipeline:
    """Opens the data on rank 0, which may have to tokenize them, and then on the others. Collective.

    These read only what is in their own rows, if they see the files that rank 0 has found; otherwise they open the data themselves.

    If one rank refuses them (ValueError), or a source does not answer (DataUnavailable), all ranks raise the error.
    """
    data: DataPipeline | None = None
    failure: Exception | None = None
    sizes = config.sequence_length, config.seed, config.batch.sizes(config.sequence_length)
    known: OpenedData | None = None
    for others in (False, True):
        if others:
            known = from_first(partial(getattr, data, "opened", None))
        if is_first() != others:
            try:
                data = open_data(config.data, config.tokenizer, *sizes, ranks, config.evaluate.sequences, known)
            except (DataStop, ValueError) as error:
                failure = error
        wait_for_all()
        if failures := [each for each in from_all(failure) if each is not None]:
            raise failures[0]
    assert data is not None
    return data


def open_tasks_on_all_ranks(config: Config) -> dict[str, Any] | None:
    """Loads evaluate.tasks on rank 0, which may have to convert their data, and then on the others. Collective.

    All ranks raise the ConfigError of one that cannot.
    """
    tasks, failure = None, None
    for others in (False, True) if config.evaluate.tasks else ():
        if is_first() != others:
            try:
                tasks = open_tasks(config.evaluate.tasks)
            except ConfigError as error:
                failure = error
        wait_for_all()
        if failures := [each for each in from_all(failure) if each is not None]:
            raise failures[0]
    return tasks


def agree_on_folder(config: Config) -> tuple[Path, RunLock | None]:
    """Returns the run folder and its lock. Only rank 0 creates it, locks it and removes what an interrupted save has left there."""
    locks: list[RunLock] = []

    def make() -> str:
        folder = Path(config.run.dir or new_run_folder())
        with writing_to(folder):
            folder.mkdir(parents=True, exist_ok=True)
            locks.append(lock_run(folder))
            remove_notes(folder)
        return str(folder)

    config.run.dir = from_first(make)
    folder = Path(config.run.dir)
    if locks and locks[0].previous:
        text = f"{folder} was in use by {locks[0].previous}, which has ended: this job takes it over"
        announce(folder, "lock_taken_over", text, owner=locks[0].previous)
    for path in remove_leftovers(folder / "checkpoints") if locks else []:
        announce(folder, "leftover_removed", f"removed {path}, which an interrupted save had left", path=str(path))
    return folder, locks[0] if locks else None


def build_engine(config: Config, parallel: Parallel) -> Engine:
    """Returns the engine of `engine.kind`. Collective."""
    match config.engine.kind:
        case EngineKind.torch:
            if config.optimizer.gradients is GradientDtype.bf16:
                narrow_gradients(parallel)
            return TorchEngine(parallel, build_optimizer(config.optimizer, parallel), build_graph(config, parallel))
        case EngineKind.deepspeed:
            from .deepspeed import build_zero_engine

            return build_zero_engine(config, parallel)


def build_graph(config: Config, parallel: Parallel) -> MicroBatchGraph | None:
    """Returns what captures and replays CUDA graphs; None, with a warning in one line, where there is no GPU."""
    if config.cuda_graph and kind_of(parallel.device) != "cuda":
        log.warning("cuda_graph=true: there is no GPU, steps run without a graph")
    return MicroBatchGraph(parallel) if config.cuda_graph and kind_of(parallel.device) == "cuda" else None


def build_saver(config: CheckpointConfig, folder: Path) -> Saver:
    """Returns the saver of the run folder `folder`, which removes old checkpoints after each new one."""
    checkpoints = folder / "checkpoints"
    retention = Retention(config.keep, config.keep_every, config.keep_best)

    def tidy(path: Path) -> None:
        retention.written(path)
        retention.prune(checkpoints)

    staging = None if config.staging_gb is None else int(config.staging_gb * 1e9)
    return Saver(checkpoints, config.timeout_seconds, tidy, staging)


def tokenizing_ranks(config: Config, device: torch.device) -> TokenizingRanks:
    """Returns the ranks that tokenize the documents together: all of them; and which rows of a global batch each takes."""
    if not dist.is_initialized():
        return TokenizingRanks()
    takers = takers_of_rows(config.parallel, dist.get_world_size())
    micro = config.batch.micro or config.batch.sequences // len(takers)

    def add(table: np.ndarray) -> np.ndarray:
        total = torch.from_numpy(table).to(device)
        dist.all_reduce(total)
        return total.cpu().numpy()

    def exchange(tokens: np.ndarray, to: list[int], received: list[int]) -> np.ndarray:
        found = torch.empty(sum(received), dtype=torch.int32, device=device)
        dist.all_to_all_single(found, torch.from_numpy(tokens).to(device), received, to)
        return found.cpu().numpy()

    return TokenizingRanks(dist.get_rank(), dist.get_world_size(), takers, micro, add, exchange, from_all)


def takers_of_rows(config: ParallelConfig, world: int) -> np.ndarray:
    """Returns the ranks that take the same rows, for each place on the mesh's data axis: (data ranks, ranks of one)."""
    sizes = mesh_sizes(config, world)
    grid = np.arange(world).reshape([sizes[dim] for dim in DENSE])
    rows = [DENSE.index(dim) for dim in ("replicate", "shard")]
    return np.moveaxis(grid, rows, (0, 1)).reshape(sizes["replicate"] * sizes["shard"], -1)
