"""`tokenyard prepare`, `tokenyard data inspect` and `tokenyard tokenizer train`: what they do and print."""

import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from .compose import compose
from .config import Config, ConfigError
from .validate import validate


def prepare(folder: str, processes: int, overrides: list[str]) -> int:
    """Tokenize the configured data into shards. Returns the exit code."""
    return _told(lambda: _prepare(folder, processes, compose(overrides)))


def train_tokenizer(folder: str, overrides: list[str]) -> int:
    """Train the configured tokenizer on the configured data and save it. Returns the exit code."""
    return _told(lambda: _train_tokenizer(Path(folder), compose(overrides)))


def inspect(steps: int, rows: int, overrides: list[str]) -> int:
    """Show what training would see first. Returns the exit code."""
    return _told(lambda: _inspect(steps, rows, compose(overrides)))


def _told(command: Callable[[], None]) -> int:
    from ..data.errors import DataStop

    try:
        command()
    except (ConfigError, ValueError) as error:
        print(f"tokenyard: {error}", file=sys.stderr)
        return 2
    except DataStop as stop:
        print(f"tokenyard: {stop}", file=sys.stderr)
        return stop.exit_code
    return 0


def _prepare(folder: str, processes: int, config: Config) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ..data.pretokenize import prepare_command

    started, tokens = perf_counter(), 0
    columns = (
        TextColumn("{task.completed}/{task.total} parts"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("0 tokens", total=None)

        def progress(done: int, total: int, count: int) -> None:
            bar.update(task, completed=done, total=total, description=f"{count:,} tokens")

        about = prepare_command(config.data, config.tokenizer, Path(folder), processes, progress)
    for split, records in about["splits"].items():
        tokens = sum(record["tokens"] for record in records)
        bad = [row for record in records for row in record["bad"]]
        documents = sum(record["documents"] for record in records)
        print(f"{split}: {tokens:,} tokens of {documents:,} documents in {len(records)} shards, {len(bad)} bad rows")
        for row in bad[:20]:
            print(f"  left out: {row}")
    print(f"in {perf_counter() - started:.1f} s; train on it: tokenyard train data=prepared data.path={folder} {_words(folder)}")


def _words(folder: str) -> str:
    from ..data.pretokenized import tokenizer_words

    return tokenizer_words(Path(folder))


def _train_tokenizer(folder: Path, config: Config) -> None:
    from ..data.build import open_tokenizer
    from ..data.cache import cache_folder
    from ..data.validate import check_corpus

    check_corpus(config.data)
    tokenizer = open_tokenizer(config.data, config.tokenizer, cache_folder(config.data))
    tokenizer.save(folder)
    print(f"{folder}: {config.tokenizer.kind.value}, {tokenizer.size} pieces, hash {tokenizer.hash}")
    print(f"train with it: tokenyard train {_words(str(folder.parent)) if folder.name == 'tokenizer' else _path(folder)}")


def _path(folder: Path) -> str:
    return f"tokenizer.path={folder / 'tokenizer.model'}"


def _inspect(steps: int, rows: int, config: Config) -> None:
    import xxhash

    from ..data.build import prepare as open_data
    from .data_table import source_table

    validate(config, config.launch.nodes * config.launch.ranks)
    sizes = config.sequence_length, config.seed, config.batch.sequences
    data = open_data(config.data, config.tokenizer, *sizes, None, config.evaluate.sequences)
    tokens = steps * config.batch.sequences * config.sequence_length
    try:
        first = data.train.batch(0).ids_BS[:rows].tolist()
        for index, ids in enumerate(first):
            ends = ids.count(data.tokenizer.end_of_document)
            print(f"row {index}: {len(ids)} tokens, {ends} ends of documents\n  {data.tokenizer.decode(ids)!r}")
        digest = xxhash.xxh3_64()
        for step in range(steps):
            of_step = data.train.digest(step)
            digest.update(of_step.encode())
            print(f"step {step + 1}: digest {of_step}")
        print(f"all {steps} steps: {tokens:,} tokens, digest {digest.hexdigest()}")
        print(f"fingerprint of the data {data.facts.train_fingerprint}, of the tokenizer {data.facts.tokenizer_hash}\n")
        print("\n".join(source_table(data, config.data.corpus.value, steps, config.sequence_length)))
        for line in data.train.bad_rows():
            print(f"bad: {line}")
    finally:
        data.train.close()
