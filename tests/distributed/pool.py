"""Real ranks for tests: processes that joined one gloo group, started once per world size and kept for the whole session.

In a test module: a function at top level, and `ranks(4, function, *args)` (fixture of tests/conftest.py) to call it on 4 ranks at
once; the list of their results comes back. In the function the default process group exists, torch runs on one thread and is
seeded with 0. Sub-groups that it makes end when the next call comes.

A rank is forked from multiprocessing's server, which has imported torch and nothing of pytest: a start costs no import.
"""

import atexit
import gc
import importlib
import importlib.util
import io
import operator
import os
import pickle
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from forked_runs import PRELOADED

START_SECONDS = 240.0
# Once one rank has failed, the others may wait for it in a collective for ever; this long they may still answer.
GRACE_SECONDS = 3.0


class RankError(RuntimeError):
    """A rank raised, died or did not answer in time. The message has the ranks and their tracebacks."""


class Pools:
    """One pool per world size, and others for DeepSpeed, which keeps its groups for ever; `run` is what tests call."""

    def __init__(self) -> None:
        self._pools: dict[tuple[int, bool], Pool] = {}
        atexit.register(self.close)  # before multiprocessing waits for its processes

    def run(self, world: int, function: Callable[..., Any], *args: Any, limit_seconds: float = 240.0, **kwargs: Any) -> list[Any]:
        """Calls `function(*args, **kwargs)` on each of `world` ranks at once, and returns the results by rank.

        `function` stands at top level of a module. Arguments and results are what pickle takes; tensors arrive as plain CPU
        tensors. RankError if a rank raises, dies or does not answer within `limit_seconds`.
        """
        call = (*_address(function), _pack((args, kwargs)))
        key = world, "deepspeed" in call[0]
        if not key[1]:
            self._end([other for other in self._pools if other[1]])
        if key not in self._pools:
            self._pools[key] = Pool(world)
        try:
            return self._pools[key].run(call, limit_seconds)
        except BaseException:
            self._end([key])  # ranks that stopped at different places cannot be used again
            raise

    def close(self) -> None:
        """Ends all ranks."""
        self._end(list(self._pools))

    def _end(self, keys: list[tuple[int, bool]]) -> None:
        for key in keys:
            self._pools.pop(key).kill()


class Pool:
    """`world` processes, a pipe to each, and a temporary folder for their rendezvous and their logs."""

    def __init__(self, world: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tokenyard-ranks-")
        self._processes: list[ForkServerProcess] = []
        self._pipes: list[Any] = []
        try:
            for rank in range(world):
                self._start(rank, world)
            self._answers(START_SECONDS, "start")
        except BaseException:
            self.kill()
            raise

    def run(self, call: tuple[str, str, str, bytes], limit_seconds: float) -> list[Any]:
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send(call)
            except OSError:
                raise RankError(f"rank {rank} has died{self._log(rank)}") from None
        return [_unpack(answer) for answer in self._answers(limit_seconds, call[2])]

    def kill(self) -> None:
        """Kills the ranks: they own nothing outside the temporary folder."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()

    def _start(self, rank: int, world: int) -> None:
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        ours, theirs = Pipe()
        self._pipes.append(ours)
        path = os.pathsep.join(filter(None, sys.path))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
        self._log_path(rank).touch()
        process = context.Process(
            target=_rank, args=(rank, world, Path(self._folder.name), theirs, self._log_path(rank), environment)
        )
        with theirs:
            process.start()
        self._processes.append(process)

    def _answers(self, limit_seconds: float, what: str) -> list[bytes]:
        """Returns the answer of each rank. After an error the others get a short time, and all errors are raised together."""
        answers: dict[int, bytes] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + limit_seconds
        while waiting := [rank for rank in range(len(self._pipes)) if rank not in answers and rank not in errors]:
            ready = wait([self._pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank in (rank for rank in waiting if self._pipes[rank] in ready):
                failed, answer = self._answer(rank)
                (errors if failed else answers)[rank] = answer
            if errors:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if errors or waiting:
            raise RankError(self._report(what, limit_seconds, errors, waiting))
        return [answers[rank] for rank in range(len(self._pipes))]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        try:
            return self._pipes[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join()
            return True, f"died with exit code {self._processes[rank].exitcode}{self._log(rank)}"

    def _report(self, what: str, limit_seconds: float, errors: dict[int, str], waiting: list[int]) -> str:
        lines = [f"rank {rank} {text}" for rank, text in sorted(errors.items())]
        if waiting:
            late = ", ".join(str(rank) for rank in waiting)
            after = f"within {GRACE_SECONDS:g} s of the first error" if errors else f"within {limit_seconds:g} s"
            lines.append(f"{what}: no answer from rank {late} {after}" + "".join(self._log(rank) for rank in waiting))
        return "\n".join(lines)

    def _log_path(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank_{rank}.log"

    def _log(self, rank: int) -> str:
        text = self._log_path(rank).read_text(errors="replace").strip()
        return f"\n--- last output of rank {rank} ---\n{text[-2000:]}" if text else ""


def _address(function: Callable[..., Any]) -> tuple[str, str, str]:
    """Returns where another interpreter finds `function`: the name and file of its module, and its name there."""
    name = function.__qualname__
    path = sys.modules[function.__module__].__file__
    if "<" in name or path is None:
        raise ValueError(f"{name} cannot be sent to the ranks: it must stand at top level of a module")
    return function.__module__, path, name


def _module(name: str, path: str) -> ModuleType:
    """Imports the module under its name in pytest, so that pickle finds its classes; a test module is found by path only."""
    if name in sys.modules:
        return sys.modules[name]
    if name.split(".")[0] == "tokenyard":
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Pickle imports the parents of a module too, and those of a test module are no packages.
    for parent in (name[:end] for end, letter in enumerate(name) if letter == "."):
        sys.modules.setdefault(parent, ModuleType(parent))
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _pack(value: Any) -> bytes:
    """Pickles tensors as bytes; multiprocessing would share memory and file descriptors."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


def _unpack(packed: bytes) -> Any:
    return _Unpickler(io.BytesIO(packed)).load()


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        import torch

        if not isinstance(obj, torch.Tensor):
            return None
        flat = obj.detach().cpu().contiguous().reshape(-1)
        return str(obj.dtype).removeprefix("torch."), tuple(obj.shape), bytearray(flat.view(torch.uint8).numpy())


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, pid: Any) -> Any:
        import torch

        dtype, shape, content = pid
        # torch refuses to make a tensor of no bytes.
        flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        return flat.view(getattr(torch, dtype)).reshape(shape)


def _serve(rank: int, world: int, folder: Path, pipe: Connection) -> None:
    """The main function of a rank: joins the group, then answers calls until it is killed or the test process is gone."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    address = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    gc.freeze()  # what the server has imported
    pipe.send((False, b""))
    kept = {dist.group.WORLD}
    while True:
        call = pipe.recv()
        _end_groups(kept)  # all ranks have answered the call before, so nobody is in one of them
        torch.manual_seed(0)
        pipe.send(_outcome(*call))
        torch.set_default_dtype(torch.float32)
        if "deepspeed" in call[0]:
            kept |= set(_groups())


def _end_groups(kept: set[Any]) -> None:
    """Each group of gloo has threads that poll until nothing refers to the group any more, and models are circles of references."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    names: Any = distributed_c10d._world.pg_names
    for group in _groups():
        if group not in kept:
            name = names[group]
            dist.destroy_process_group(group)
            names[object()] = name  # torch counts names to make new ones, and the store still has the keys of this one
    gc.collect()
    gc.freeze()  # the next collection looks at what is new alone


def _groups() -> list[Any]:
    from torch.distributed import distributed_c10d

    return list(distributed_c10d._world.pg_map)


def _outcome(module: str, path: str, name: str, packed: bytes) -> tuple[bool, Any]:
    try:
        # Before the arguments: they may be of classes that the module defines.
        function = operator.attrgetter(name)(_module(module, path))
        if "hydra" in sys.modules:
            importlib.import_module("composed_once").install()
        args, kwargs = _unpack(packed)
        return False, _pack(function(*args, **kwargs))
    except BaseException:
        return True, f"raised\n{traceback.format_exc()}"


def _end_with_parent(parent: int, folder: Path) -> None:
    """Exits if the server is gone, which ends with the test process: one that was killed cannot end its ranks."""
    while os.getppid() == parent:
        time.sleep(0.5)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _rank(rank: int, world: int, folder: Path, pipe: Connection, log: Path, environment: dict[str, str]) -> None:
    """The whole life of a rank."""
    watch = threading.Thread(target=_end_with_parent, args=[os.getppid(), folder], daemon=True)
    watch.start()
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        _serve(rank, world, folder, pipe)
    except (EOFError, ConnectionError):
        watch.join()
