"""A number of GPUs of one type, as `cluster=h100x2048` names them."""

import re
from dataclasses import dataclass

from ..train.config.config import ConfigError
from ..train.config.gpus import Gpu as Gpu
from ..train.config.gpus import gpus
from ..train.config.schema import nearest_text


@dataclass(frozen=True)
class Cluster:
    """GPUs that train together: ranks 0, 1, ... of a domain are neighbours."""

    gpu: Gpu
    ranks: int

    def __str__(self) -> str:
        return f"{self.gpu.name}x{self.ranks}"

    @property
    def hosts(self) -> int:
        """Hosts that have this many GPUs, the last one perhaps in part."""
        return -(-self.ranks // self.gpu.host)

    def reached(self, ranks: int, step: int = 1) -> int:
        """Returns how many of `ranks` ranks, each `step` after the last, are in one domain; at least 1.

        If they do not fill domains evenly, as many as divide them: of 12 ranks in domains of 8, 6.
        """
        inside = max(1, self.gpu.domain // step)
        if ranks <= inside:
            return ranks
        return max(size for size in range(1, inside + 1) if ranks % size == 0)


def read_cluster(text: str) -> Cluster:
    """Returns the cluster of this name. Raises ConfigError."""
    match = re.fullmatch(r"(?P<name>\w+?)(x(?P<ranks>[1-9][0-9]{0,6}))?", text)
    types = gpus()
    name = match["name"] if match else text
    if name not in types:
        nearest = f"{nearest_text(name, list(types))}x{(match and match['ranks']) or 8}"
        raise ConfigError.of("cluster", text, f"must be TYPExNUMBER with a TYPE of {', '.join(types)}", f"cluster={nearest}")
    assert match
    return Cluster(types[name], int(match["ranks"] or types[name].host))
