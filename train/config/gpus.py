"""The catalogue of GPUs in conf/cluster/: peaks, memory, links and prices, one file a type. For MFU and for `tokenyard plan`.

It is no group of a run: `tokenyard train` does not ask what it runs on.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CATALOGUE = Path(__file__).resolve().parents[2] / "conf" / "cluster"


@dataclass(frozen=True)
class Price:
    """US dollars for an hour of one GPU, on `date`. A range, because providers and terms differ by several times."""

    low: float
    high: float
    date: str
    source: str
    typical: float | None = None

    @property
    def likely(self) -> float:
        """The typical price; if no source names one, the geometric mean of the range."""
        return self.typical or (self.low * self.high) ** 0.5


@dataclass(frozen=True)
class Gpu:
    """A type of GPU. Bandwidths are those of one GPU in one direction, peaks those of dense products."""

    name: str
    """The name of its file, as in cluster=h100x2048."""
    title: str
    device_words: tuple[str, ...]
    """All of them occur in what torch.cuda.get_device_name returns."""
    generation: str
    flops: Mapping[str, float]
    """FLOP/s by number format: bf16, fp8, tf32, fp32, fp64; those that its sources print."""
    memory_bytes: float
    memory_bytes_per_second: float
    nvlink_bytes_per_second: float
    """To the GPUs of its domain: NVLink, Infinity Fabric, or PCIe."""
    network_bytes_per_second: float
    """To the GPUs of other domains: its share of the network cards of its host."""
    domain: int
    """GPUs that reach each other without the network."""
    host: int
    """GPUs with one operating system."""
    price: Price | None
    source: str
    unverified: tuple[str, ...]
    """The figures that were not read in a document of the maker."""


@functools.cache
def gpus() -> dict[str, Gpu]:
    """Returns the types by name. Raises ImportError without PyYAML, and ValueError if a file cannot be read."""
    import yaml

    return {path.stem: _gpu(path.stem, yaml.safe_load(path.read_text())) for path in sorted(CATALOGUE.glob("*.yaml"))}


def gpu_of_device(device: str) -> Gpu | None:
    """Returns the type whose words occur in torch's name of a device: of several the one with most letters (H100 NVL, not H100)."""
    found = [gpu for gpu in gpus().values() if all(word in device for word in gpu.device_words)]
    return max(found, key=lambda gpu: sum(map(len, gpu.device_words)), default=None)


def _gpu(name: str, plain: dict[str, Any]) -> Gpu:
    try:
        return Gpu(
            name,
            plain["title"],
            tuple(plain["device_words"]),
            plain["generation"],
            {kind: 1e12 * number for kind, number in plain["teraflops"].items()},
            1e9 * plain["memory_gb"],
            1e9 * plain["memory_gb_per_second"],
            1e9 * plain["nvlink_gb_per_second"],
            1e9 * plain["network_gb_per_second"],
            plain["domain"],
            plain["host"],
            Price(**plain["price"]) if "price" in plain else None,
            plain["source"],
            tuple(plain["unverified"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"conf/cluster/{name}.yaml: {type(error).__name__}: {error}") from error
