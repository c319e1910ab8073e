"""What a dry run found, as one JSON object or as lines for people, and what it cannot see."""

from dataclasses import asdict
from typing import Any, NamedTuple

from ..train.config.config import Config
from ..train.config.model_summary import layout_text
from .dry_run import StepFacts

KINDS = {
    "products": ("mm", "addmm", "bmm", "wide_mm", "grouped_mm", "grouped_outer", "baddbmm", "_grouped_mm"),
    "attention": ("attention", "attention_backward"),
    "copies and casts": ("_to_copy", "copy_", "clone", "cat", "stack", "split_with_sizes_copy", "all_gather_copy_in", "chunk_cat"),
    "reductions": ("sum", "mean", "amax", "max", "cumsum", "_foreach_norm", "any"),
    "optimizer": ("_fused_adamw_", "_foreach_add_", "_foreach_mul_"),
}
"""Kinds of operators; all others are counted as `element-wise and other`."""


class Allowance(NamedTuple):
    """Memory that a dry run cannot see, as a range of bytes, with where the range is from."""

    name: str
    low: float
    high: float
    reason: str


def allowances(found: StepFacts, groups: int) -> list[Allowance]:
    """Returns what to add to the peak. `groups`: communicators that this rank uses."""
    return [
        Allowance("CUDA context", 0.4e9, 0.8e9, "assumed: the driver's and loaded kernels, by GPU and driver"),
        Allowance("NCCL buffers", groups * 0.03e9, groups * 0.2e9, f"assumed: 30 to 200 MB for each of {groups} groups"),
        Allowance("workspaces", 33e6, 0.1e9, "32 MiB for cuBLAS on Hopper (torch's default), more for attention kernels"),
        Allowance("fragmentation", 0.0, 0.06 * found.peak_bytes, "assumed: up to 6 % of the peak, with expandable segments"),
    ]


def as_json(found: StepFacts, config: Config, rank: int, world: int) -> dict[str, Any]:
    """Returns one object. Bytes are of the device of one rank."""
    plain = asdict(found)
    plain["points"] = [{"phase": phase, "layer": layer, "bytes": size} for (phase, layer), size in found.points.items()]
    phase, layer = found.peak_point
    return {
        "rank": rank,
        "world": world,
        "layout": layout_text(config.parallel, world),
        "peak_bytes": found.peak_bytes,
        "peak_phase": phase,
        "peak_layer": layer,
        "peak": found.purposes,
        **plain,
        "operators_by_kind": operators_by_kind(found),
        "launches": found.launches,
        "allowances": [each._asdict() for each in allowances(found, groups(found))],
    }


def operators_by_kind(found: StepFacts) -> dict[str, float]:
    """Returns how many operators of each kind a step has."""
    counts = {kind: sum(found.operators.get(name, 0) for name in names) for kind, names in KINDS.items()}
    counts["collectives"] = sum(each.count for each in found.traffic)
    return {**counts, "element-wise and other": found.launches - sum(counts.values())}


def groups(found: StepFacts) -> int:
    """Returns the number of different groups of ranks, by size and link."""
    return len({(each.ranks, each.link) for each in found.traffic})


def lines(found: StepFacts, config: Config, rank: int, world: int) -> list[str]:
    """Returns the output for people."""
    phase, layer = found.peak_point
    where = f"phase {phase}, {'outside of layers' if layer is None else f'layer {layer}'}"
    extra = allowances(found, groups(found))
    low, high = found.peak_bytes + sum(each.low for each in extra), found.peak_bytes + sum(each.high for each in extra)
    return [
        f"rank {rank} of {layout_text(config.parallel, world)}",
        f"peak        {_gb(found.peak_bytes)} in {where}; {_gb(found.kept_bytes)} stay between steps",
        *(f"  {name:38}{_gb(size):>12}" for name, size in sorted(found.purposes.items(), key=_second) if size >= 5e5),
        f"not seen    {_gb(low)} to {_gb(high)} with",
        *(f"  {each.name:38}{_gb(each.low):>12} to {_gb(each.high)}, {each.reason}" for each in extra),
        "collectives of a step (bytes of the larger side)",
        f"  {'phase':28}{'kind':16}{'ranks':>6}  {'link':14}{'dtype':10}{'count':>8}{'bytes':>14}",
        *(
            f"  {each.phase:28}{each.kind:16}{each.ranks:>6}  {each.link:14}{each.dtype:10}{each.count:>8,.0f}{_gb(each.bytes):>14}"
            for each in found.traffic
        ),
        f"operators   at least {found.launches:,.0f} launches: "
        + ", ".join(f"{count:,.0f} {kind}" for kind, count in operators_by_kind(found).items()),
        "host waits  " + (", ".join(f"{count:,.0f} x {name}" for name, count in found.waits.items()) or "none"),
    ]


def _second(item: tuple[str, float]) -> float:
    return -item[1]


def _gb(size: float) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= scale:
            return f"{size / scale:,.3f} {unit}" if unit == "GB" else f"{size / scale:,.1f} {unit}"
    return f"{size:,.0f} bytes"
