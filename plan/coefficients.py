"""The few numbers of plan/step_time.py that no data sheet has: coefficients.json, as plan/fit.py and plan/calibrate.py wrote it."""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COEFFICIENTS = Path(__file__).with_name("coefficients.json")


@dataclass(frozen=True)
class Coefficients:
    """Shares are those of data-sheet peaks, between 0 and 1."""

    hopper_bf16: float
    """Share of the peak that large products with dense weights reach."""
    hopper_fp8: float
    blackwell_bf16: float
    blackwell_fp8: float
    ultra: float
    """Factor of Blackwell Ultra (B300, GB300) over Blackwell: the same peaks at a higher limit of power."""
    experts: float
    """What grouped products of experts with many rows reach, over what those with dense weights do."""
    half_rows: float
    """Rows of an expert at which its products reach half of that: rows / (rows + half_rows)."""
    half_width: float
    """The same for the columns of one expert on a rank."""
    hopper_scores: float
    """Share of the bf16 peak that fused attention reaches."""
    blackwell_scores: float
    memory: float
    """Share of the memory's bandwidth that elementwise operations reach."""
    layer_seconds: float
    """What the host takes for a layer with experts, forward and backward, with products in bf16."""
    fp8_layer: float
    """Factor on that with fp8, which also quantizes."""
    fixed_layer: float
    """Factor with fixed shapes, so that the host waits for no counts."""
    captured_layer: float
    """Factor with graphs."""
    captured_memory: float
    """Factor on elementwise time of the recipes with graphs, which also came with more fused kernels."""
    grace_layer: float
    """Factor in hosts of Grace CPUs, which have fewer GPUs to feed, and whose recipes capture parts of a layer."""
    stage_seconds: float
    """What the host takes for a stage of a pipeline besides its layers, forward and backward: messages, and waits for them."""
    nvlink: float
    """Share of NVLink's bandwidth that exchanges and collectives reach."""
    network: float
    plain: float
    """Factor on `nvlink` and `network` for an exchange of experts by NCCL's all-to-all, not by kernels made for it (DeepEP)."""
    exchange_hidden: float
    """Share of the exchange of experts that hides behind products, if nothing else is said."""
    overlap_hidden: float
    """The same with parallel.pipeline_overlap or overlap_chunks."""
    gradients_hidden: float
    """Share of gathers and gradient sums that hides, as far as there is computation to hide them behind."""
    community: float
    """Factor on all time of software that no vendor tuned."""
    natural: float
    """Load of the busiest rank over the mean, if no balance is forced."""
    vendor_low: float
    """Factors from the likely seconds to the ends of the range."""
    vendor_high: float
    community_low: float
    community_high: float


@functools.cache
def coefficients(own: bool = False) -> Coefficients:
    """Returns those that plan/fit.py wrote; with `own`, some replaced by what plan/calibrate.py read in a report."""
    plain: dict[str, Any] = json.loads(COEFFICIENTS.read_text())
    return Coefficients(**plain["coefficients"] | (plain["tokenyard"] if own else {}))


def measured_on() -> str:
    """Returns the name of the GPU that those of `coefficients(own=True)` were measured on."""
    return json.loads(COEFFICIENTS.read_text())["measured_on"]


def write_coefficients(part: str, values: Mapping[str, float], gpu: str | None = None) -> str:
    """Writes one part of the file, with 4 digits, and leaves the other. `gpu`: what the part "tokenyard" was measured on.

    Returns the text of the file.
    """
    plain = json.loads(COEFFICIENTS.read_text()) | {part: {name: float(f"{value:.4g}") for name, value in values.items()}}
    plain |= {"measured_on": gpu} if gpu else {}
    text = json.dumps(plain, indent=1) + "\n"
    COEFFICIENTS.write_text(text)
    return text
