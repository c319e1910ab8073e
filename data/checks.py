"""Refuses data settings that cannot work, before anything is read. Standard library only."""

import difflib
import glob
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from .config import Corpus, DataConfig, mixture_sources

WITH_PATH = (Corpus.text, Corpus.parquet, Corpus.jsonl, Corpus.lines, Corpus.prepared)


def check_corpus(config: DataConfig) -> None:
    """Raises ValueError, one line, if `config` names no text. URLs and the hub are not opened."""
    if not 0 < config.validation_fraction < 1:
        raise ValueError(f"data.validation_fraction={config.validation_fraction} must lie between 0 and 1; the default is 0.05")
    if config.corpus is Corpus.mix and not config.mix:
        raise ValueError("data.mix=[] must name a source for data.corpus=mix, as data.mix=['weight=0.7 corpus=stdlib']")
    if config.corpus is not Corpus.mix and config.mix:
        raise ValueError(f"data.mix is read by data.corpus=mix only, and data.corpus={config.corpus.value}")
    parts = mixture_sources(config)
    for part in parts:
        _check_place(part.config)
    for part in parts:
        _check_part(part.config)


def _check_place(config: DataConfig) -> None:
    """Raises ValueError, one line, for a source that is not named or does not exist."""
    kind, path = config.corpus, config.path
    if kind is Corpus.hf and not config.name:
        raise ValueError("data.name=null must name a data set for data.corpus=hf, as data.name=HuggingFaceFW/fineweb-edu")
    if kind in WITH_PATH and path is None:
        raise ValueError(
            f"data.path=null must name a file or folder for data.corpus={kind.value}; the nearest existing path is {Path.cwd()}"
        )
    if path is not None and kind in (Corpus.parquet, Corpus.jsonl, Corpus.lines) and "://" not in path:
        plain = re.sub(r"\{\d+\.\.\d+\}", "*", str(Path(path).expanduser()))
        # Path.glob does not take absolute patterns.
        if not Path(plain).exists() and not glob.glob(plain, recursive=True):  # noqa: PTH207
            there = Path(plain)
            while not there.exists():
                there = there.parent
            raise ValueError(f"data.path={path} must exist or match files; the nearest existing path is {there}")


def _check_part(config: DataConfig) -> None:
    if config.path is not None and config.corpus in (Corpus.text, Corpus.prepared):
        path = Path(config.path).expanduser()
        if not path.exists():
            raise ValueError(f"data.path={config.path} must exist; the nearest existing path is {nearest_path(path)}")
    if config.corpus is Corpus.text:
        _check_text(config)
    elif config.path is not None and config.corpus in (Corpus.stdlib, Corpus.synthetic, Corpus.hf):
        raise ValueError(f"data.path={config.path} is read by data.corpus=text only, and data.corpus={config.corpus.value}")
    if config.corpus is Corpus.stdlib and not any(stdlib_files(stdlib_root())):
        raise ValueError(f"data.corpus=stdlib finds no .py file under {stdlib_root()}; the nearest choice is data.corpus=synthetic")
    if config.corpus is Corpus.synthetic and config.synthetic_documents < 2:
        raise ValueError(f"data.synthetic_documents={config.synthetic_documents} must be at least 2, one for each split")


def stdlib_root() -> Path:
    """Returns the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(root: Path) -> Iterator[str]:
    """Yields the relative paths, with /, of all .py files below `root` except those that pip installed."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in ("site-packages", "dist-packages", "__pycache__")]
        for name in files:
            if name.endswith(".py"):
                yield Path(folder, name).relative_to(root).as_posix()


def pattern_files(root: Path, pattern: str) -> Iterator[str]:
    """Yields the relative paths, with /, of all files below `root` that match `pattern`."""
    for path in root.glob(pattern):
        if path.is_file():
            yield path.relative_to(root).as_posix()


def _check_text(config: DataConfig) -> None:
    assert config.path is not None
    root = Path(config.path).expanduser()
    if not root.is_dir():
        return
    parts = Path(config.pattern).parts
    if not parts or Path(config.pattern).is_absolute() or ".." in parts or any("**" in part and part != "**" for part in parts):
        # Path.glob would raise an error that does not name the setting.
        rule = "must be a relative pattern, with ** as a whole part; the default is '**/*.txt'"
        raise ValueError(f"data.pattern='{config.pattern}' {rule}")
    found = list(pattern_files(root, config.pattern))
    refuse_outside(root, (str(root / name) for name in found), "data.path")
    if not found:
        suffixes = Counter(Path(name).suffix for name in pattern_files(root, "**/*"))
        suffix = min(suffixes, key=lambda suffix: (-suffixes[suffix], suffix), default=None)
        hint = "the folder holds no file" if suffix is None else f"the nearest choice is data.pattern='**/*{suffix}'"
        raise ValueError(f"data.path={config.path} must hold files that match data.pattern='{config.pattern}'; {hint}")


def nearest_path(path: Path) -> Path:
    """Returns the existing path nearest to `path`: a similarly named entry of its deepest existing parent, else that parent."""
    path = path.absolute()
    while not path.parent.is_dir():
        path = path.parent
    siblings = sorted(entry.name for entry in path.parent.iterdir()) if os.access(path.parent, os.R_OK) else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return path.parent / close[0] if close else path.parent


def refuse_outside(root: Path, files: Iterable[str], key: str) -> None:
    """Raises ValueError, one line, naming the setting `key`, for the first of `files` that is not below the folder `root`.

    In the cache of the Hugging Face hub, links from a snapshot to the blobs of the same repository are allowed.
    """
    home = os.path.realpath(root)
    inside = [home]
    if Path(home).parent.name == "snapshots":
        inside.append(str(Path(home).parent.parent / "blobs"))
    for file in files:
        real = os.path.realpath(file)
        if not any(real.startswith(f"{place}{os.sep}") for place in inside):
            raise ValueError(f"{key}={root} leads out of its folder: {file} is {real}; name that place itself, or take a copy")
