"""Measures where the time of an MoE layer goes: `python -m tokenyard.bench.layer`.

Prints three tables: the parts of forward and backward, with the share that is not matrix products; the throughput against the
number of experts, at constant work per token; the throughput against skewed loads. On one device; the sides of a table take turns.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn

from ..moe import dispatch, layer
from ..moe import experts as experts_module
from ..moe.config import ModelConfig, MoEConfig
from ..moe.layer import MoELayer
from ..moe.scoring import ChosenExperts
from ..train.allocator import restart_with_kept_memory
from .timing import Ratio, markdown, ratio, take_turns


class LayerShape(NamedTuple):
    """Sizes of an MoE layer. The router is a softmax over all experts, and the weights of a token sum to one."""

    width: int
    hidden: int
    """Hidden width of one expert."""
    experts: int
    top_k: int
    tokens: int
    shared: int = 0

    @property
    def flops(self) -> int:
        """FLOPs of forward and backward in the matrix products of the experts: 3 x 2 for each weight and row."""
        return 18 * self.width * (self.top_k * self.hidden + self.shared) * self.tokens

    @property
    def title(self) -> str:
        return f"d {self.width}, {self.experts} x {self.hidden}, top-{self.top_k}"


def our_layer(shape: LayerShape, device: torch.device, dtype: torch.dtype) -> MoELayer:
    """Returns an MoE layer with random normal weights."""
    moe = MoEConfig(experts=shape.experts, top_k=shape.top_k, hidden=shape.hidden, shared_hidden=shape.shared)
    layer = MoELayer(ModelConfig(width=shape.width, moe=moe), dtype, seed=None).to_empty(device=device)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=shape.width**-0.5)
    return layer


PARTS = {
    "route": ((layer.Router, "forward"),),
    "sort": ((dispatch, "plan_rows"), (dispatch, "pad_to_multiple")),
    "gather": ((experts_module, "gather_rows"),),
    "products": ((experts_module, "product"), (experts_module, "grouped_outer")),
    "activation": ((experts_module, "_activated"), (experts_module, "_activation_backward")),
    "weights": ((experts_module, "weights_per_row"), (experts_module, "values_per_choice")),
    "combine": ((experts_module, "sum_rows"),),
}
"""The functions of each part. The remaining time is `rest`: the backward pass of the router, autograd."""


SHAPES = [
    LayerShape(width=512, hidden=1024, experts=8, top_k=2, tokens=4096),
    LayerShape(width=1024, hidden=2048, experts=8, top_k=2, tokens=2048),
    LayerShape(width=1024, hidden=512, experts=32, top_k=8, tokens=2048),
]
EXPERTS = [8, 16, 32, 64, 128, 256]
TINY = LayerShape(width=16, hidden=16, experts=4, top_k=2, tokens=64)


class Timer:
    """Sums the seconds of each part. On a GPU it synchronises before and after each part, so parts do not overlap."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return perf_counter()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = self.now()
            result = function(*arguments, **named)
            self.seconds[part] += self.now() - start
            return result

        return run

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Times the functions of the parts inside the block."""
        places = [(part, owner, name) for part, all_of in PARTS.items() for owner, name in all_of]
        patches = [patch.object(owner, name, self.timed(part, getattr(owner, name))) for part, owner, name in places]
        for each in patches:
            each.start()
        try:
            yield
        finally:
            for each in patches:
                each.stop()


class Bench:
    """One layer with random weights, and a forward and backward pass of random tokens."""

    def __init__(self, shape: LayerShape, dtype: torch.dtype, device: torch.device, chosen_TK: Tensor | None = None) -> None:
        self.shape = shape
        self.layer = our_layer(shape, device, dtype)
        with device:
            self.x_BSD = torch.randn(1, shape.tokens, shape.width, dtype=dtype, requires_grad=True)
            self.grad_BSD = torch.randn_like(self.x_BSD)
        self.chosen_TK = chosen_TK

    def run(self) -> None:
        self.backward(self.forward())

    def forward(self) -> Tensor:
        if self.chosen_TK is None:
            return self.layer(self.x_BSD)[0]
        choice = ChosenExperts(self.chosen_TK.view(1, *self.chosen_TK.shape).to(self.x_BSD.device))
        with patch("tokenyard.moe.router.choose_experts", lambda *_: choice):
            return self.layer(self.x_BSD)[0]

    def backward(self, y_BSD: Tensor) -> None:
        self.layer.zero_grad(set_to_none=True)
        y_BSD.backward(self.grad_BSD)


class Parts(NamedTuple):
    """Median milliseconds of the parts of forward and of backward, and the share of both together that is not products."""

    shape: LayerShape
    forward: dict[str, float]
    backward: dict[str, float]
    not_products: float


def parts(shape: LayerShape, dtype: torch.dtype, device: torch.device, rounds: int) -> Parts:
    """Measures the parts of a layer."""
    bench = Bench(shape, dtype, device)
    bench.run()
    taken: dict[str, list[dict[str, float]]] = {"forward": [], "backward": []}
    for _ in range(rounds):
        y_BSD, seconds = _watched(bench.forward, device)
        taken["forward"].append(seconds)
        taken["backward"].append(_watched(lambda y=y_BSD: bench.backward(y), device)[1])
    shares = [
        1 - sum(run["products"] for run in both) / sum(run["all"] for run in both) for both in zip(*taken.values(), strict=True)
    ]
    forward, backward = (
        {part: 1e3 * statistics.median(run[part] for run in runs) for part in (*PARTS, "rest", "all")} for runs in taken.values()
    )
    return Parts(shape, forward, backward, statistics.median(shares))


def _watched(call: Callable[[], Any], device: torch.device) -> tuple[Any, dict[str, float]]:
    timer = Timer(device)
    with timer.watching():
        start = timer.now()
        result = call()
        seconds = timer.now() - start
    of_parts = {part: timer.seconds[part] for part in PARTS}
    return result, of_parts | {"rest": seconds - sum(of_parts.values()), "all": seconds}


def against_experts(
    shape: LayerShape, counts: list[int], dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[int, Ratio]:
    """Tokens per second relative to the layer with the fewest experts."""
    benches = {str(count): Bench(shape._replace(experts=count), dtype, device) for count in counts}
    seconds = take_turns({name: bench.run for name, bench in benches.items()}, device, rounds)
    return {count: ratio(seconds[str(counts[0])], seconds[str(count)]) for count in counts}


def against_skew(shape: LayerShape, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Ratio]:
    """Tokens per second relative to a balanced load."""
    benches = {name: Bench(shape, dtype, device, chosen) for name, chosen in skews(shape).items()}
    seconds = take_turns({name: bench.run for name, bench in benches.items()}, device, rounds)
    return {name: ratio(seconds["balanced"], seconds[name]) for name in seconds}


def skews(shape: LayerShape) -> dict[str, Tensor]:
    """Returns the experts of each token, (T, K): equal loads, loads of 1 / rank (Zipf), and the first K experts for every token."""
    generator = torch.Generator().manual_seed(0)
    places_TE = torch.arange(shape.tokens)[:, None] * shape.top_k + torch.arange(shape.top_k)
    chances_E = 1 / torch.arange(1, shape.experts + 1)
    zipf_TK = torch.multinomial(chances_E.expand(shape.tokens, -1), shape.top_k, generator=generator)
    return {
        "balanced": places_TE % shape.experts,
        "zipf": zipf_TK,
        "one": torch.arange(shape.top_k).expand(shape.tokens, -1).contiguous(),
    }


def main() -> None:
    restart_with_kept_memory()
    arguments = parse()
    dtype, device = getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[arguments.precision]), torch.device(arguments.device)
    shapes, counts, tokens = ([TINY], [4, 8], 64) if arguments.tiny else (SHAPES, EXPERTS, 16384)
    spread = shapes[0]._replace(width=256, hidden=512, tokens=tokens) if not arguments.tiny else TINY
    found = {
        "parts": [parts(shape, dtype, device, arguments.rounds) for shape in shapes],
        "experts": against_experts(spread, counts, dtype, device, arguments.rounds),
        "skew": against_skew(spread._replace(experts=16) if not arguments.tiny else TINY, dtype, device, arguments.rounds),
    }
    print(json.dumps(found, indent=1) if arguments.json else table(found))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenyard.bench.layer", description=__doc__)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args(words)


def table(found: dict[str, Any]) -> str:
    """Returns three Markdown tables."""
    names, rows = [*PARTS, "rest", "all"], []
    for shape, forward, backward, not_products in found["parts"]:
        for name, times in (("forward", forward), ("backward", backward)):
            cells = [f"{times[part]:.1f}" for part in names]
            rows.append([f"{shape.title}, {shape.tokens} tokens", name, *cells, f"{100 * not_products:.1f} %"])
    experts, skew = ([[str(name), str(value)] for name, value in found[key].items()] for key in ("experts", "skew"))
    tables = [
        markdown(["layer", "ms of", *names, "not products"], rows),
        markdown(["experts", "tokens/s, share of the first"], experts),
        markdown(["load", "tokens/s, share of balanced"], skew),
    ]
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
