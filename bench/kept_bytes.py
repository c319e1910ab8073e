"""Counts what the blocks of a model keep for the backward pass, and what they repeat in it: `python -m tokenyard.bench.kept_bytes`.

For each value of parallel.recompute a block of each kind runs forward on one simulated GPU, in bf16, without numbers (plan/). Bytes
are those of the memory that is alive two blocks later and was not before, the block's output included, per token: what grows with
the tokens, so that copies of weights are not counted. FLOPs are those of moe/param_count.py.
"""

import argparse
import gc
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..moe.param_count import flops_by_layer, repeated_flops_per_token
from ..moe.token_info import BatchPosition, build_token_info
from ..parallel.apply import Parallel
from ..parallel.config import Recompute
from ..parallel.offload import WINDOW
from ..plan.rank_step import dry_rank
from ..train.config.compose import compose
from .timing import markdown

PRESETS = "qwen3_30b_a3b", "mixtral_8x7b", "deepseek_v3"


class KeptResult(NamedTuple):
    """Of all blocks of a model, without multi-token prediction, per token."""

    model: str
    recompute: str
    kept_bytes: float
    host_bytes: float
    """In the memory of the host."""
    repeated_flops: int
    forward_flops: int


class _Alive(TorchDispatchMode):
    """Counts the bytes of the memory that operators allocate and that is still used."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[tuple[StorageWeakRef, int, torch.device]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(results):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self.storages.append((StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes(), x.device))
        return results

    def bytes(self, device: torch.device) -> int:
        gc.collect()
        return sum({place.cdata: size for place, size, at in self.storages if at == device and not place.expired()}.values())


def kept_bytes(parallel: Parallel, index: int, length: int) -> tuple[float, float]:
    """Returns the bytes per token that block `index` keeps, in sequences of `length` tokens: on its device, and on another host."""
    one, two = (_kept_of_batch(parallel, index, sequences, length) for sequences in (1, 2))
    device, host = ((more - less) / length for less, more in zip(one, two, strict=True))
    return device, host


def _kept_of_batch(parallel: Parallel, index: int, sequences: int, length: int) -> tuple[int, int]:
    model, device = parallel.model, parallel.device
    ids_BS = torch.zeros(sequences, length, dtype=torch.int64, device=device)
    rotary = model.rotary_tables(model.config, 0, length, device, model.activations, None)
    rotary = rotary._replace(blocks=model.block_masks(model.config, ids_BS, model.activations, None))
    tokens = build_token_info(ids_BS, None, BatchPosition(), model.is_random)._replace(layer=index)
    x_BSD = torch.zeros(sequences, length, model.config.width, dtype=model.activations, device=device, requires_grad=True)
    with _Alive() as alive:
        output = model.layers[str(index)](x_BSD, rotary, tokens, None, x_BSD)
    later = [model.layers[str(index)](x_BSD, rotary, tokens, None, x_BSD) for _ in range(WINDOW)]
    host = torch.device("cpu")
    found = alive.bytes(device), 0 if device == host else alive.bytes(host)
    del output, later
    return found


def measure(preset: str, recompute: Recompute, length: int) -> KeptResult:
    """Runs one block of each kind of layer."""
    words = [f"model={preset}", "precision=bf16", "batch.sequences=1", f"sequence_length={length}"]
    config = compose([*words, f"parallel.recompute={recompute.value}"])
    kinds = Counter(config.model.layer_kind(index) for index in range(config.model.layers))
    first = {config.model.layer_kind(index): index for index in reversed(range(config.model.layers))}
    with dry_rank(config, 0, 1) as rank:
        found = {kind: kept_bytes(rank.parallel, first[kind], length) for kind in kinds}
    kept, on_host = (sum(count * found[kind][place] for kind, count in kinds.items()) for place in (0, 1))
    forward = sum(flops_by_layer(config.model, length)[0])
    config.model.mtp_depth = 0
    repeated = {"none": 0, "offload": 0, "block": forward, "selective": repeated_flops_per_token(config.model, length)}
    return KeptResult(preset, recompute.value, kept, on_host, repeated[recompute.value], forward)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenyard.bench.kept_bytes", description=__doc__)
    parser.add_argument("--models", nargs="+", default=PRESETS, help="presets")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    return parser.parse_args(words)


def table(lines: list[KeptResult]) -> str:
    """Returns a Markdown table."""
    rows = (
        [
            line.model,
            line.recompute,
            f"{line.kept_bytes / 1024:,.0f}",
            f"{line.host_bytes / 1024:,.0f}",
            f"{line.repeated_flops / 1e6:,.0f}",
            f"{line.repeated_flops / line.forward_flops:.1%}",
        ]
        for line in lines
    )
    return markdown(["model", "parallel.recompute", "KiB a token", "on the host", "MFLOP repeated", "of forward"], rows)


def main() -> None:
    arguments = parse()
    print(table([measure(preset, recompute, arguments.length) for preset in arguments.models for recompute in Recompute]))


if __name__ == "__main__":
    main()
