"""The random numbers that a rank of DeepSeek-V3 draws for its initial weights: `python -m tokenyard.bench.scale.weights WORLD`.

Rank 0 of the fake process group fills weights of the meta device by the code of a run, and each call for random words is counted.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ...moe import philox
from ...moe.model import Transformer
from ...parallel.apply import Parallel, initialise, local, parallelize
from ...parallel.mesh import build_mesh
from ...train.config.compose import compose
from ...train.config.config import Config
from ...train.derive import DTYPES


def figures(world: int) -> dict[str, float]:
    """Returns the counts of rank 0. 2048 ranks are spread as its authors did, fewer as by experiment=deepseek_v3_512_gpus."""
    words = ["experiment=deepseek_v3_2048_gpus"] if world >= 2048 else ["experiment=deepseek_v3_512_gpus"]
    if world < 2048:
        words.append(f"parallel.pipeline={world // 32}")
    with rank_of(0, world):
        parallel = spread_on_meta(compose([*words, f"launch.nodes={world // 8}"]))
        drawn, held = numbers_drawn(parallel), random_numbers_held(parallel)
    return {
        "numbers drawn": drawn,
        "random numbers held": held,
        "drawn / held": drawn / held,
        "numbers of its whole tensors and experts": sum(whole_numbers(parallel)),
    }


def spread_on_meta(config: Config) -> Parallel:
    """Returns the model, spread over the ranks, with weights that stay on the meta device."""
    with torch.device("meta"):
        model = Transformer(config.model, DTYPES[config.precision])
    model.to_empty = lambda **_: model
    return parallelize(model, build_mesh(config.parallel), config.parallel, torch.device("cpu"))


def numbers_drawn(parallel: Parallel) -> int:
    """Fills the weights from words that nobody computes, and returns how many were asked for."""
    counts: list[int] = []

    def count(_: tuple[int, int], first_R: torch.Tensor, blocks: int, device: torch.device) -> torch.Tensor:
        counts.append(len(first_R) * blocks * philox.LANES)
        return torch.empty(len(first_R), blocks * philox.LANES, dtype=torch.int32, device=device)

    with patch.object(philox, "random_words", count):
        initialise(parallel, 1)
    return sum(counts)


def random_numbers_held(parallel: Parallel) -> int:
    """Returns the elements of the parameters that are neither norms, biases nor sinks."""
    return sum(local(sharded.parameter).numel() for name, sharded in parallel.parameters.items() if is_random(name))


def is_random(name: str) -> bool:
    constant = "norm" in name or name.endswith((".bias", ".sinks")) or "_bias" in name
    return name.endswith("dt_bias") or not constant


def whole_numbers(parallel: Parallel) -> Iterator[int]:
    """Yields the elements of each random tensor of which the rank holds a part; of experts, of those alone."""
    for name, sharded in parallel.parameters.items():
        shard = sharded.metadata
        if is_random(name) and math.prod(shard.sizes):
            yield math.prod([shard.sizes[0], *shard.shape[1:]] if ".experts." in name else shard.shape)


@contextmanager
def rank_of(rank: int, world: int) -> Iterator[None]:
    """Makes this process rank `rank` of `world`; its collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    for name, value in figures(int(sys.argv[1])).items():
        print(f"{name}: {value:,.2f}" if value != round(value) else f"{name}: {value:,.0f}")


if __name__ == "__main__":
    main()
