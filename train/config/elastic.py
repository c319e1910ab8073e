"""Fits a configuration to the hosts that are there, if some were lost (launch.min_nodes). The global batch stays. No torch here.

Fixed are the degrees that say how a replica is built: tensor, context, pipeline, expert, expert_tensor. The number of replicas
follows from the ranks. FSDP shards over as many ranks as before or more, else over as many as there are; a micro-batch never grows,
so that a rank which has more sequences accumulates over more micro-batches.
"""

import copy
import math

from ...parallel.config import PipelineSchedule
from ...parallel.layout import data_ranks
from .config import Config, ConfigError
from .rules.rule import divisors
from .rules.rules import layout_violations


def fit_to_ranks(config: Config, world: int) -> str | None:
    """Changes `parallel.shard` and `batch.micro` for `world` ranks on fewer hosts than launch.nodes. Returns what, in words.

    Returns None, and changes nothing, if all hosts are there or launch.min_nodes allows no other number. Raises ConfigError if the
    run cannot go on with these.
    """
    c = config.launch
    full = c.nodes * c.ranks
    if c.min_nodes is None or world == full or world % c.ranks or not c.min_nodes <= world // c.ranks < c.nodes:
        return None
    before = {"parallel.shard": config.parallel.shard, "batch.micro": config.batch.micro}
    _fit(config, world, full)
    if violation := next(layout_violations(config, world), None):
        hosts = host_counts(config, before)
        rule = f"cannot go on with the {world // c.ranks} hosts that are there: {violation.key} {violation.rule}"
        nearest = ", ".join(map(str, hosts)) or "none below launch.nodes"
        raise ConfigError.of("launch.min_nodes", c.min_nodes, rule, f"these numbers of hosts: {nearest}")
    now = {"parallel.shard": config.parallel.shard, "batch.micro": config.batch.micro}
    changed = [f"{key} {before[key]} -> {now[key]}" for key in now if now[key] != before[key]]
    return f"{world // c.ranks} of launch.nodes={c.nodes} hosts: {', '.join(changed) or 'fewer replicas'}, the same global batch"


def check_host_counts(config: Config) -> None:
    """Raises ConfigError if launch.min_nodes is below launch.nodes and no number of hosts between them fits the batch."""
    c = config.launch
    if c.min_nodes is None or c.min_nodes >= c.nodes or host_counts(config):
        return
    sizes = [data_ranks(config.parallel, nodes * c.ranks) for nodes in (c.nodes, c.nodes - 1)]
    unit = math.lcm(*(max(1, size) for size in sizes))
    near = max(1, round(config.batch.sequences / unit)) * unit
    rule = f"no number of hosts below launch.nodes={c.nodes} fits batch.sequences={config.batch.sequences} and the degrees"
    raise ConfigError.of("launch.min_nodes", c.min_nodes, rule, f"launch.min_nodes=null, or batch.sequences={near}")


def host_counts(config: Config, settings: dict[str, int | None] | None = None) -> list[int]:
    """Returns the numbers of hosts below launch.nodes with which the run can go on, largest first.

    settings: values of parallel.shard and batch.micro before they were fitted.
    """
    c, found = config.launch, []
    for nodes in range(c.nodes - 1, (c.min_nodes or c.nodes) - 1, -1):
        fitted = copy.deepcopy(config)
        if settings is not None:
            fitted.parallel.shard, fitted.batch.micro = settings["parallel.shard"] or 1, settings["batch.micro"]
        _fit(fitted, nodes * c.ranks, c.nodes * c.ranks)
        if next(layout_violations(fitted, nodes * c.ranks), None) is None:
            found.append(nodes)
    return found


def _fit(config: Config, world: int, full: int) -> None:
    p, batch, inner = config.parallel, config.batch, world // config.parallel.pipeline
    own_before = batch.micro or max(1, batch.sequences // max(1, data_ranks(p, full)))
    shards = [s for s in range(1, inner + 1) if inner % (p.tensor * math.lcm(p.context, s)) == 0 and (s == 1 or s % p.context == 0)]
    if shards and p.shard > 1:
        p.shard = min((s for s in shards if s >= p.shard), default=shards[-1])
    data = data_ranks(p, world)
    if data and batch.sequences % data == 0:
        own = batch.sequences // data
        interleaved = p.pipeline_schedule is PipelineSchedule["interleaved"]
        sizes = [size for size in divisors(own) if size <= own_before and (not interleaved or own // size % p.pipeline == 0)]
        batch.micro = max(sizes, default=batch.micro)
