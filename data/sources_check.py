"""Refuses sources that name nothing, or what is not there. Standard library only."""

import glob
import re
from pathlib import Path

from .config import Corpus, DataConfig
from .mixes import parts_of

WITH_PATH = (Corpus.text, Corpus.parquet, Corpus.jsonl, Corpus.lines, Corpus.prepared)


def check_sources(config: DataConfig) -> None:
    """ValueError of one line for the first source that cannot be opened; URLs and the hub are not asked."""
    if config.corpus is Corpus.mix and not config.mix:
        raise ValueError("data.mix=[] must name a source for data.corpus=mix, as data.mix=['weight=0.7 corpus=stdlib']")
    if config.corpus is not Corpus.mix and config.mix:
        raise ValueError(f"data.mix is read by data.corpus=mix only, and data.corpus={config.corpus.value}")
    for part in parts_of(config):
        _check(part.config)


def _check(config: DataConfig) -> None:
    kind, path = config.corpus, config.path
    if kind is Corpus.hf and not config.name:
        raise ValueError("data.name=null must name a data set for data.corpus=hf, as data.name=HuggingFaceFW/fineweb-edu")
    if kind in WITH_PATH and path is None:
        raise ValueError(
            f"data.path=null must name a file or folder for data.corpus={kind.value}; the nearest existing path is {Path.cwd()}"
        )
    if path is not None and kind in (Corpus.parquet, Corpus.jsonl, Corpus.lines) and "://" not in path:
        plain = re.sub(r"\{\d+\.\.\d+\}", "*", str(Path(path).expanduser()))
        # Path.glob wants relative patterns, users write absolute ones.
        if not Path(plain).exists() and not glob.glob(plain, recursive=True):  # noqa: PTH207
            there = Path(plain)
            while not there.exists():
                there = there.parent
            raise ValueError(f"data.path={path} must exist or match files; the nearest existing path is {there}")
