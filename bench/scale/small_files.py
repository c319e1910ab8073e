"""Files that a rank opens when a run opens its data, by kind of data; rank 0, which tells the others, opens more.

What is counted, by Python's audit events, are files that are opened and folders that are listed, of a small corpus in many shards.
`python -m tokenyard.bench.scale.small_files` prints the numbers, which do not depend on the number of ranks.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ...data.build import OpenedData, open_data
from ...data.config import Corpus, DataConfig, Packing, TokenizerConfig, TokenizerKind
from ...data.pretokenize import prepare_shards
from ...data.stream.documents import TokenizingRanks

SHARDS = 50
_hooked: list[bool] = []
_listeners: list[Callable[[str], None]] = []


def main() -> None:
    print(json.dumps(figures(1), indent=1))


def figures(world: int) -> dict[str, float]:
    """Returns how many files each rank but the first opens, and how many rank 0 does. They are the same for every world."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, config in kinds(Path(folder)).items():
            opened_by(config, None)  # makes what the cache lacks
            first, known = opened_by(config, None)
            others, _ = opened_by(config, known)
            found[f"data={name}: files that a rank opens"] = len(set(others))
            found[f"data={name}: files that rank 0 opens"] = len(set(first))
    return found


def kinds(folder: Path) -> dict[str, DataConfig]:
    """Returns a configuration of each kind of data, in files that it writes."""
    (folder / "text").mkdir(parents=True)
    for shard in range(SHARDS):
        (folder / "text" / f"{shard}.txt").write_text("".join(f"line {shard} {row} of some words\\n" for row in range(40)))
    text = DataConfig(corpus=Corpus.text, path=str(folder / "text"), cache=str(folder / "cache"), workers=0)
    text = replace(text, validation_fraction=0.2)
    stream = replace(text, corpus=Corpus.lines)
    prepare_shards(stream, TOKENIZER, folder / "prepared", 1, lambda *_: None)
    prepared = replace(text, corpus=Corpus.prepared, path=str(folder / "prepared"))
    parts = [f"corpus=lines path={stream.path} label=rows", f"corpus=prepared path={prepared.path} label=tokens"]
    mixed = replace(text, corpus=Corpus.mix, path=None, mix=[f"weight=0.5 {part}" for part in parts])
    packed = replace(text, packing=Packing.best_fit)
    found = {"text": text, "text, best fit": packed, "stream": stream, "prepared": prepared, "mix": mixed}
    for ending in ("csv", "jsonl"):
        (folder / ending).mkdir()
        for shard in range(SHARDS):
            rows = [f"line {shard} {row}" for row in range(40)]
            lines = ["text", *rows] if ending == "csv" else [json.dumps({"text": row}) for row in rows]
            (folder / ending / f"train-{shard}.{ending}").write_text("\n".join(lines) + "\n")
        hub = replace(stream, corpus=Corpus.hf, path=None, name=str(folder / ending), split="train")
        found[f"hub, {ending}"] = hub
    return found


TOKENIZER = TokenizerConfig(kind=TokenizerKind.bytes)


def opened_by(config: DataConfig, known: OpenedData | None) -> tuple[list[str], OpenedData]:
    """Returns the files that a rank opens, of what another one has told it, and what it then knows of the data."""
    with opens() as found:
        data = open_data(config, TOKENIZER, 16, 1, 4, TokenizingRanks(), 4, copy.deepcopy(known))
    return found, data.opened


@contextmanager
def opens() -> Iterator[list[str]]:
    """Yields a list of the paths that this process opens or lists meanwhile, without modules."""
    if not _hooked:
        sys.addaudithook(lambda event, args: _listeners[-1](f"{args[0]}") if event in EVENTS and _listeners else None)
        _hooked.append(True)  # no hook can be removed
    found: list[str] = []
    _listeners.append(lambda path: found.append(path) if not path.endswith((".py", ".pyc", ".so")) else None)
    try:
        yield found
    finally:
        _listeners.pop()


EVENTS = ("open", "os.listdir", "os.scandir")


if __name__ == "__main__":
    main()
