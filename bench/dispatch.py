"""Measures the bytes and the time of each exchange: `python -m tokenyard.bench.dispatch`.

Bytes are counted at the collectives, forward and backward, and compared with a lower bound: each token once to each other rank
that has any of its experts, and one row back. Each exchange is measured with bf16 rows and with tokens that travel in e4m3. Time is
that of dispatch and combine, with experts that do nothing.
"""

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..moe.config import SCALE_BLOCK, GroupScore, MoEConfig, RouterConfig, Score
from ..moe.dispatch import Dispatcher
from ..moe.router import Router, Routing
from ..parallel.apply import build_dispatcher
from ..parallel.collectives import sum_over
from ..parallel.config import OWN_EXCHANGES, Exchange, ExchangeDtype, ParallelConfig
from ..parallel.dispatch.base import ExpertParallelDispatcher
from ..parallel.mesh import Axis, build_mesh
from .comm_trace import Traffic
from .rank_processes import answer, join, on_ranks

V3 = RouterConfig(score=Score.sigmoid, groups=8, top_groups=4, group_score=GroupScore.top2, scale=2.5)
ROUTINGS = {
    "mixtral": MoEConfig(experts=8, top_k=2),
    "qwen3": MoEConfig(experts=128, top_k=8),
    "deepseek_v3": MoEConfig(experts=256, top_k=8, router=V3),
}
"""Routings, named after the model that uses them."""


class ExchangeResult(NamedTuple):
    """Bytes and seconds are means over the ranks. Seconds are the median of the repeats."""

    routing: str
    ranks: int
    exchange: str
    forward_bytes: float
    backward_bytes: float
    forward_bound_bytes: float
    bound_bytes: float
    """Of the backward pass, in which all rows are bf16."""
    between_nodes_bytes: float
    """Bytes to other nodes, forward and backward."""
    seconds: float


class SentBytes(NamedTuple):
    """Bytes that this rank sent in one pass."""

    forward: int
    backward: int
    between_nodes: int


def main() -> None:
    arguments = parse()
    if arguments.rank:
        task = join(arguments.rank)
        answer(arguments.rank, [line._asdict() for line in measure(**task)])
        return
    task = {name: getattr(arguments, name) for name in ("tokens", "width", "repeats", "routings")}
    lines = [ExchangeResult(**line) for world in arguments.ranks for line in on_ranks("tokenyard.bench.dispatch", world, task)[0]]
    print(json.dumps([line._asdict() for line in lines], indent=1) if arguments.json else table(lines))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tokenyard.bench.dispatch", description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8], help="worlds to start; half of the ranks make a node")
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank")
    parser.add_argument("--width", type=int, default=1024, help="numbers of a row, in bf16")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each exchange")
    parser.add_argument("--routings", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def measure(tokens: int, width: int, repeats: int, routings: list[str]) -> list[ExchangeResult]:
    """On each rank: measures all exchanges for each routing, in turns."""
    lines = []
    for name in routings:
        x_TD, routing = routed(ROUTINGS[name], tokens, width)
        world, experts = dist.get_world_size(), ROUTINGS[name].experts
        # The symmetric one writes into memory, which no collective counts.
        exchanges = [exchange for exchange in OWN_EXCHANGES if exchange is not Exchange.symmetric]
        makers = {
            f"{exchange.value}{', e4m3' if dtype is ExchangeDtype.fp8 else ''}": made(experts, exchange, dtype)
            for exchange in exchanges
            for dtype in ExchangeDtype
        }
        seconds: dict[str, list[float]] = {exchange: [] for exchange in makers}
        for _ in range(repeats):
            for exchange, dispatcher in makers.items():
                seconds[exchange].append(timed(functools.partial(one_pass, dispatcher, x_TD, routing)))
        rows, wide = mean(len(pairs(routing, experts))), width * x_TD.element_size()
        for exchange, dispatcher in makers.items():
            sent = wide if not dispatcher.narrow else width + -(-width // SCALE_BLOCK)
            there, back, between = map(mean, sent_bytes(dispatcher, x_TD, routing))
            bounds = rows * (sent + wide), rows * 2 * wide
            lines.append(
                ExchangeResult(name, world, exchange, there, back, *bounds, between, mean(statistics.median(seconds[exchange])))
            )
    return lines


def made(experts: int, exchange: Exchange, dtype: ExchangeDtype) -> ExpertParallelDispatcher:
    world = dist.get_world_size()
    config = ParallelConfig(expert=world, exchange=exchange, exchange_dtype=dtype, node_ranks=world // 2)
    dispatcher = build_dispatcher(experts, build_mesh(config), config)
    assert isinstance(dispatcher, ExpertParallelDispatcher)
    return dispatcher


def routed(config: MoEConfig, tokens: int, width: int) -> tuple[Tensor, Routing]:
    """Returns random bf16 tokens of this rank, and their routing by a random router that is the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    router = Router(width, config, torch.float32)
    assert router.weight is not None
    torch.nn.init.normal_(router.weight, std=width**-0.5, generator=generator)
    if config.router.groups > 1:
        router.add_expert_bias()
        assert router.expert_bias is not None
        torch.nn.init.normal_(router.expert_bias, std=0.01, generator=generator)
    x_TD = torch.randn(tokens, width, generator=generator.manual_seed(1 + dist.get_rank())).bfloat16()
    with torch.no_grad():
        routing = router(x_TD.unsqueeze(0))
    return x_TD.requires_grad_(), routing._replace(weights_TK=routing.weights_TK.requires_grad_())


def pairs(routing: Routing, experts: int) -> set[tuple[int, int]]:
    """Pairs of a token of this rank and another rank with any of its experts: a row must go there, and one must come back."""
    held, rank = experts // dist.get_world_size(), dist.get_rank()
    chosen = enumerate(routing.experts_TK.tolist())
    return {(token, expert // held) for token, row in chosen for expert in row if expert // held != rank}


def one_pass(made: Dispatcher, x_TD: Tensor, routing: Routing) -> None:
    forward(made, x_TD, routing).backward(torch.ones_like(x_TD))


def forward(made: Dispatcher, x_TD: Tensor, routing: Routing) -> Tensor:
    return made.run(x_TD, routing, lambda rows, counts: rows, lambda: lambda: None).y_TD


def sent_bytes(made: Dispatcher, x_TD: Tensor, routing: Routing) -> SentBytes:
    with Traffic() as there:
        y_TD = forward(made, x_TD, routing)
    with Traffic() as back:
        y_TD.backward(torch.ones_like(y_TD))
    half = dist.get_world_size() // 2
    return SentBytes(there.total(), back.total(), there.between_nodes(half) + back.between_nodes(half))


def timed(function: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def mean(value: float) -> float:
    """Returns the mean of `value` over the ranks."""
    everyone = Axis(dist.get_world_size(), dist.get_rank(), dist.group.WORLD)
    return sum_over(torch.tensor(value, dtype=torch.float64), everyone).item() / everyone.size


def table(lines: list[ExchangeResult]) -> str:
    """Returns a Markdown table.

    MiB are sent by a rank, forward and backward. Shares of the bound are given for forward, then backward.
    """
    heads = ["routing", "ranks", "exchange", "MiB", "bound MiB", "of the bound", "of plain", "MiB between nodes", "ms"]
    plain = {(line.routing, line.ranks): line for line in lines if line.exchange == Exchange.plain.value}
    rows = [heads, ["---"] * len(heads), *(_cells(line, plain[line.routing, line.ranks]) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cells(line: ExchangeResult, plain: ExchangeResult) -> list[str]:
    total = line.forward_bytes + line.backward_bytes
    shares = f"{line.forward_bytes / line.forward_bound_bytes:.4f}, {line.backward_bytes / line.bound_bytes:.4f}"
    of_plain = f"{total / (plain.forward_bytes + plain.backward_bytes):.2f}"
    sizes = [
        f"{total / 2**20:.2f}",
        f"{(line.forward_bound_bytes + line.bound_bytes) / 2**20:.2f}",
        shares,
        of_plain,
        f"{line.between_nodes_bytes / 2**20:.2f}",
    ]
    return [line.routing, str(line.ranks), line.exchange, *sizes, f"{line.seconds * 1e3:.0f}"]


if __name__ == "__main__":
    main()
