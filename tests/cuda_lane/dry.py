"""What the tests of this folder run in a process of their own: steps of single ranks under plan/, and what they left in the ledger.

Import it as `dry`: tests/conftest.py puts this folder on the path.
"""

import functools
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import composed_once
import torch
from tokenyard.checkpoint.save_plan import HeldShards, held_shards
from tokenyard.moe.config import Selection
from tokenyard.parallel.config import Exchange, Overflow, Recompute
from tokenyard.parallel.streams import copy_to_host, host_memory
from tokenyard.plan.ledger import Collective, Message, UnknownNumbers
from tokenyard.plan.rank_step import DryRank, dry_rank
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.logging.expert_stats.collector import ExpertStats

MICRO_BATCHES = 2

composed_once.install()


class Case(NamedTuple):
    """A rank of a run."""

    model: str
    world: int = 1
    rank: int = 0
    words: tuple[str, ...] = ()


class Found(NamedTuple):
    waits: Counter[str]
    """At the places that have a name."""
    unlisted: Counter[str]
    strangers: Counter[str]
    collectives: list[Collective]
    groups: list[int]
    """In the order in which they were made."""
    conditions: dict[str, bool]
    """The conditions of the table in docs/performance.md, and whether they hold."""
    passes: int
    """Forward passes of MoE layers, those of recomputation and of each chunk included."""
    sent: list[Message]
    received: list[Message]


def step_of(case: Case) -> Found:
    """What one step of the rank does."""
    config = config_of(case)
    with dry_rank(config, case.rank, case.world) as rank:
        rank.step()
        return found(rank, config)


def step_of_experiment(experiment: str, place: float) -> Found:
    """One step of the rank at `place`, from 0 to below 1, of the ranks that the experiment launches, on short sequences."""
    words = [f"experiment={experiment}", "sequence_length=128", "batch.micro=1", "parallel.node_ranks=8"]
    launch, parallel = compose(words).launch, compose(words).parallel
    world = launch.nodes * launch.ranks
    data = world // parallel.pipeline // parallel.tensor // parallel.context
    config = compose([*words, f"batch.sequences={MICRO_BATCHES * data}"])
    with dry_rank(config, int(place * world), world) as rank:
        rank.step()
        return found(rank, config)


def ranks_of(words: tuple[str, ...], world: int) -> list[tuple[Found, set[str], HeldShards]]:
    """The same step of each rank of a world, one after the other, and what the rank holds for a save then."""
    return [saved(Case("tiny_qwen3_moe", world, rank, words)) for rank in range(world)]


def saved(case: Case) -> tuple[Found, set[str], HeldShards]:
    """A step, the names of what a save then copies to the host, and what the rank tells of it."""
    config = config_of(case)
    with dry_rank(config, case.rank, case.world) as rank:
        rank.step()
        held = rank.engine.state_to_save()
        for _, tensor in held.values():
            copy_to_host(tensor, host_memory(tensor))
        return found(rank, config), set(held), held_shards(held, case.rank)


def watched(case: Case, logged: bool) -> Found:
    """A step that is watched, as the loop does; `logged`: and looked at."""
    config = config_of(case)
    with dry_rank(config, case.rank, case.world) as rank:
        session: Any = SimpleNamespace(config=config, parallel=rank.parallel, device=rank.parallel.device, step=0)
        expert_stats = ExpertStats(session)
        numbers = rank.step()
        session.step = 1
        expert_stats.update(numbers)
        if logged:
            expert_stats.snapshot(numbers, validated=False, saves=True)
        return found(rank, config)


def largest_kept(model: str, length: int, context: int = 1) -> int:
    """Elements of the largest tensor that a forward pass keeps for the backward pass, on the first of `context` ranks."""
    sizes: list[int] = []
    words = f"sequence_length={length}", f"parallel.context={context}"
    with dry_rank(config_of(Case(model, context, words=words)), 0, context) as rank:

        def keep(x: torch.Tensor) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            rank.step()
    return max(sizes)


@functools.cache
def config_of(case: Case) -> Config:
    """In bf16, on short sequences, so many micro-batches of one on each data rank."""
    same_rows = ("parallel.tensor=", "parallel.context=", "parallel.pipeline=")
    same = [int(word.partition("=")[2]) for word in case.words if word.startswith(same_rows)]
    sequences = MICRO_BATCHES * case.world // math.prod(same)
    sizes = [f"batch.sequences={sequences}", "batch.micro=1", "precision=bf16"]
    sizes += [] if any(word.startswith("sequence_length=") for word in case.words) else ["sequence_length=128"]
    return compose([f"model={case.model}", *sizes, *case.words])


def found(rank: DryRank, config: Config) -> Found:
    layers = sum(block.moe is not None for block in rank.parallel.model.blocks)
    passes = layers * MICRO_BATCHES * (2 if config.parallel.recompute is Recompute.block else 1) * config.parallel.overlap_chunks
    ledger, mesh = rank.ledger, rank.parallel.mesh
    kept = ledger.waits, ledger.strangers, ledger.collectives
    table = [axis.size for axis in mesh.by_ranks.values() if axis.group is not None], conditions(config, rank), passes
    return Found(Counter(rank.waits), *kept, *table, ledger.sent, ledger.received)


def conditions(config: Config, rank: DryRank) -> dict[str, bool]:
    """By the words of the table."""
    parallel, moe = config.parallel, config.model.moe
    drops = moe.capacity.factor is not None and not moe.capacity.pad
    nulls = moe.router.null_experts > 0
    plain = parallel.expert == 1 or parallel.exchange is Exchange.plain
    return {
        "always": True,
        "capacity, null experts, expert choice; one device or plain": plain
        and (drops or nulls or moe.router.selection is Selection.expert_choice),
        "parallel.expert_tensor": parallel.expert_tensor > 1,
        "parallel.exchange_overflow=repair": parallel.exchange_overflow is Overflow.repair,
        **{f"parallel.exchange={each.value}": parallel.expert > 1 and parallel.exchange is each for each in Exchange},
    }


def planted(line: str) -> str:
    """How one line that a step may not have is found."""
    with dry_rank(config_of(Case("tiny")), 0, 1) as rank:
        device = rank.parallel.device
        x, host = torch.zeros(4, 4, device=device), torch.zeros(4, 4)
        try:
            eval(line, {"x": x, "host": host, "torch": torch, "device": device})
        except UnknownNumbers:
            return "stops"
        return "waits" if rank.ledger.waits else "stranger" if rank.ledger.strangers else ""


PLANTS = {
    "torch.tensor([1, 2], device=device)": "waits",
    "x.new_tensor([1.0])": "waits",
    "host.to(device, non_blocking=True)": "waits",
    "host.pin_memory().to(device)": "waits",
    "host.pin_memory().to(device, non_blocking=True)": "",
    "x.cpu()": "waits",
    "x.to('cpu', non_blocking=True)": "",
    "host.copy_(x, non_blocking=True)": "waits",
    "torch.empty(4, 4, pin_memory=True).copy_(x, non_blocking=True)": "",
    "torch.segment_reduce(x, 'sum', lengths=x[0].long(), axis=0)": "waits",
    "x + 1.0": "",
    "x + torch.tensor(1.0)": "stranger",
    "x[torch.tensor([0, 1])]": "stranger",
    "x.sum().item()": "stops",
    "bool(x.sum() > 0)": "stops",
    "x.tolist()": "stops",
    "x.nonzero()": "stops",
    "x[x[0] > 0]": "stops",
    "x.repeat_interleave(x[0].long(), 0)": "stops",
    "x.repeat_interleave(x[0].long(), 0, output_size=6)": "",
}
"""Lines, and how the lane takes them."""
