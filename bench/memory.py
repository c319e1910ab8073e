"""Measures the bytes per token that a layer saves for the backward pass: `python -m tokenyard.bench.memory`.

Compares an MoE layer and its router with the dense feed-forward of equal active size. Weights, and copies of them in another
dtype, are not counted, because they do not grow with the tokens. The numbers are the same on every device.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..moe.feedforward import FeedForward
from .layer import SHAPES, TINY, LayerShape, our_layer
from .timing import markdown

FINE = LayerShape(width=512, hidden=256, experts=64, top_k=8, tokens=4096)
TOKENS = 509
"""A prime, so that no activation has as many elements as a weight."""


class MemoryResult(NamedTuple):
    """Bytes saved per token."""

    shape: LayerShape
    precision: str
    moe: float
    dense: float
    ratio: float


def saved_bytes(call: Callable[[], Any], module: nn.Module) -> int:
    """Returns the bytes of the storages that autograd saves in `call`, each counted once, without those of the size of a weight."""
    weights = {parameter.numel() for parameter in module.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() // tensor.element_size() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    del result
    return sum(storages.values())


def measure(shape: LayerShape, dtype: torch.dtype) -> MemoryResult:
    """Runs both layers on the same tokens."""
    moe, dense = our_layer(shape, torch.device("cpu"), dtype), FeedForward(shape.width, shape.top_k * shape.hidden, dtype)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=shape.width**-0.5)
    x_BSD = torch.randn(1, shape.tokens, shape.width, dtype=dtype, requires_grad=True)
    of_moe, of_dense = (saved_bytes(lambda layer=layer: layer(x_BSD), layer) / shape.tokens for layer in (moe, dense))
    return MemoryResult(shape, {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype], of_moe, of_dense, of_moe / of_dense)


def main() -> None:
    arguments = parse()
    shapes = [TINY] if arguments.tiny else [SHAPES[0], FINE, *SHAPES[1:]]
    lines = [measure(shape._replace(tokens=TOKENS), dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    print(json.dumps([line._asdict() for line in lines], indent=1) if arguments.json else table(lines))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenyard.bench.memory", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def table(lines: list[MemoryResult]) -> str:
    """Returns a Markdown table."""
    rows = ([line.shape.title, line.precision, f"{line.moe:,.0f}", f"{line.dense:,.0f}", f"{line.ratio:.2f}"] for line in lines)
    return markdown(["layer", "precision", "MoE", "dense", "ratio"], rows)


if __name__ == "__main__":
    main()
