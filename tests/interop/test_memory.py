"""Neither direction has the model in memory twice: an import has it once, an export never whole."""

import math
from pathlib import Path
from typing import Any

import torch
from tokenyard.interop.convert import import_folder
from tokenyard.interop.load import load_folder
from tokenyard.interop.plain import plain_model
from tokenyard.interop.write import export_checkpoint
from tokenyard.moe.config import ModelConfig, MoEConfig
from tokenyard.moe.model import Transformer
from tokenyard.parallel.pieces import Held, whole
from tokenyard.train.checkpoint.store import save_checkpoint
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MODEL = ModelConfig(layers=12, width=512, heads=8, kv_heads=8, vocabulary=1024, moe=MoEConfig(8, 2, 256))


def test_the_largest_set_of_tensors_alive(tmp_path: Path) -> None:
    size, largest = write(tmp_path / "ours")
    assert size > 190e6
    with Alive() as export:
        export_checkpoint(tmp_path / "ours", tmp_path / "theirs", shard_bytes=50_000_000)
    assert export.peak < 3 * largest < size / 3
    with Alive() as load:
        load_folder(tmp_path / "theirs")
    assert size <= load.peak < size + 2 * largest
    with Alive() as again:
        import_folder(tmp_path / "theirs", tmp_path / "again")
    assert size <= again.peak < size + 2 * largest


def write(folder: Path) -> tuple[int, int]:
    """A checkpoint of MODEL; the bytes of all its tensors and of the largest."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(MODEL).state_dict().items()}
    held = {f"model.{name}": Held(whole(shape), torch.zeros(shape)) for name, shape in shapes.items()}
    save_checkpoint(folder, 0, held, {"config": {"model": plain_model(MODEL)}})
    sizes = [4 * math.prod(shape) for shape in shapes.values()]
    return sum(sizes), max(sizes)


class Alive(TorchDispatchMode):
    """The largest number of bytes in CPU tensors after any operation, of all that went into or came out of one and still are."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.known = {key: known for key, known in self.known.items() if not known[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.known.values()))
        return result
