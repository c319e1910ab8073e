"""The rules of the data's settings."""

from collections.abc import Iterator

from ...data.config import STREAMED, Corpus
from ..config import Config
from .broken import Broken

INTERVALS = {
    "data.window": "[1, inf)",
    "data.open_shards": "[1, inf)",
    "data.workers": "[0, inf)",
    "data.ahead": "[1, inf)",
    "data.longest_row": "[1, inf)",
    "data.max_bad_fraction": "[0, 1]",
    "data.max_failed_files": "[0, inf)",
    "data.patience_seconds": "[0, inf)",
    "data.stall_seconds": "(0, inf)",
}


def data(config: Config, world: int) -> Iterator[Broken]:
    """While one rank waits for its source the others wait for it in a collective."""
    limit = config.parallel.timeout_seconds
    streams = config.data.corpus in (*STREAMED, Corpus.mix)
    if world > 1 and streams and config.data.patience_seconds + config.data.stall_seconds >= limit:
        rule = f"must, with data.stall_seconds, stay below parallel.timeout_seconds={limit:g}"
        yield Broken("data.patience_seconds", rule, [limit / 2])
