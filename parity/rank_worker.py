"""The process of a parity rank: `python -m tokenyard.parity.rank_worker RANK FOLDER`. It answers calls until its parent exits.

A call and its answer are a line of JSON each, on standard input and output. Tensors do not travel: one rank writes the reference of
one process to a file, and all ranks read it.
"""

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..parallel.mesh import build_mesh
from ..train.config.config import Config
from ..train.config.serialize import config_from_plain, plain_config
from .compare import Reference, compare, reference_of
from .finding import Key
from .observe import observe


def main(argv: list[str]) -> None:
    """Answers calls as one of the ranks."""
    threading.Thread(target=_end_with_parent, args=[os.getppid()], daemon=True).start()
    torch.set_num_threads(1)
    # Libraries print to standard output; keep that apart from the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line), Path(argv[1]))), file=answers, flush=True)


def _answer(call: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        config = config_from_plain(call["config"])
        path = folder / f"{call['reference']}.safetensors"
        if call["rank"] is None:
            write_reference(config, call["steps"], path)
            return {}
        with _world(call["rank"], call["world"], call["meeting"], config.parallel.timeout_seconds):
            torch.manual_seed(config.seed)
            findings = compare(observe(config, call["steps"]), read_reference(path))
            return {"findings": findings, "sizes": build_mesh(config.parallel).sizes}
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300], "traceback": traceback.format_exc()}


def write_reference(config: Config, steps: int, path: Path) -> None:
    """Trains as one process, and its first step once more without auxiliary losses."""
    reference = reference_of(observe(config, steps), observe(without_auxiliary(config), 1))
    tensors = {"|".join(map(str, key)): tensor.contiguous() for key, tensor in reference.tensors.items()}
    tensors |= {f"auxiliary|{name}": tensor.contiguous() for name, tensor in reference.auxiliary.items()}
    scales = {"|".join(map(str, key)): scale for key, scale in reference.scales.items()}
    save_file(tensors, path, {"scales": json.dumps(scales)})


def read_reference(path: Path) -> Reference:
    """Reads what `write_reference` wrote. The file is memory-mapped, so ranks share its memory."""
    with safe_open(path, "pt") as file:
        scales = {_key(name): scale for name, scale in json.loads(file.metadata()["scales"]).items()}
    tensors = load_file(path)
    auxiliary = {name.partition("|")[2]: tensors.pop(name) for name in list(tensors) if name.startswith("auxiliary|")}
    return Reference({_key(name): tensor for name, tensor in tensors.items()}, scales, auxiliary)


def without_auxiliary(config: Config) -> Config:
    """Returns the same run, trained only on cross entropy."""
    changed = config_from_plain(plain_config(config))
    moe = changed.model.moe
    moe.z_coefficient = moe.balance.coefficient = moe.balance.sequence_coefficient = moe.balance.importance_coefficient = 0.0
    moe.balance.device_coefficient = moe.balance.communication_coefficient = 0.0
    return changed


def _key(name: str) -> Key:
    step, kind, rest = name.split("|")
    return Key(int(step), kind, rest)


@contextlib.contextmanager
def _world(rank: int, world: int, meeting: str, seconds: float) -> Iterator[None]:
    """Starts a separate process group for a layout, so that layouts cannot affect each other."""
    if world == 1:
        yield
        return
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=seconds)
    )
    yield
    # Not after an error: the closed connection would make the others fail, and hide the first error.
    dist.destroy_process_group()


def _end_with_parent(parent: int) -> None:
    """Exits with the parent, because a rank that waits in a collective would outlive a killed parent."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
