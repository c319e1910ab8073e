"""`tokenyard prepare`, `tokenyard data inspect|verify` and `tokenyard tokenizer train`."""

import os
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from ..data.batches import GlobalBatches
from ..data.build import DataPipeline
from ..data.config import TokenizerKind
from ..train.config.complain import complain
from ..train.config.compose import parse_arguments
from ..train.config.config import Config, ConfigError
from ..train.preflight import check_config, check_data
from ..train.weight_source import compose_run
from .parser import OneLineParser, positive


def prepare_command(argv: list[str]) -> int:
    parser = OneLineParser("tokenyard prepare", description="Tokenizes data once into shards that training maps into memory.")
    parser.add_argument("folder", help="where the shards go; started again it goes on where it was")
    parser.add_argument("overrides", nargs="*", help="data and tokenizer, as for tokenyard train")
    parser.add_argument("--processes", type=positive, default=os.cpu_count() or 1, help="that work at once (%(default)s)")
    arguments = parser.parse_intermixed_args(argv)

    return _exit_code(lambda: _prepare(arguments.folder, arguments.processes, _configured(arguments.overrides)))


def data_command(argv: list[str]) -> int:
    if argv[:1] == ["verify"]:
        return _verify(argv[1:])
    parser = OneLineParser("tokenyard data", description="Shows what training sees: decoded rows, digests of batches, sources.")
    parser.add_argument("verb", choices=["inspect", "verify"], help="verify FOLDER reads prepared shards and compares hashes")
    parser.add_argument("overrides", nargs="*", help="as for tokenyard train")
    parser.add_argument("--steps", type=positive, default=8, help="global batches to look at (%(default)s)")
    parser.add_argument("--rows", type=positive, default=2, help="sequences to print (%(default)s)")
    arguments = parser.parse_intermixed_args(argv)

    return _exit_code(lambda: _inspect(arguments.steps, arguments.rows, _configured(arguments.overrides)))


def _verify(argv: list[str]) -> int:
    description = "Reads all prepared shards and compares sizes and hashes; exit code 1 if one is damaged."
    parser = OneLineParser("tokenyard data verify", description=description)
    parser.add_argument("folder", help="that tokenyard prepare filled")

    return verify(parser.parse_args(argv).folder)


def tokenizer_command(argv: list[str]) -> int:
    parser = OneLineParser("tokenyard tokenizer", description="Trains a sentencepiece tokenizer on the training documents.")
    parser.add_argument("verb", choices=["train"])
    parser.add_argument("folder", help="where tokenizer.model goes")
    parser.add_argument("overrides", nargs="*", help="data=... tokenizer.pieces=..., as for tokenyard train")
    arguments = parser.parse_intermixed_args(argv)

    return _exit_code(lambda: _train_tokenizer(Path(arguments.folder), _configured(arguments.overrides)))


def _configured(overrides: list[str]) -> Config:
    return compose_run(parse_arguments(overrides))[0]


def _exit_code(command: Callable[[], None]) -> int:
    """Runs a command. Returns the exit code, with one line on standard error if it failed."""
    from ..data.errors import DataStop

    try:
        command()
    except (ConfigError, ValueError) as error:
        return complain(error)
    except DataStop as stop:
        return complain(stop, stop.exit_code)
    return 0


def _prepare(folder: str, processes: int, config: Config) -> None:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ..data.checks import check_corpus
    from ..data.pretokenize import prepare_shards

    check_corpus(config.data)
    check_data(config)
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

        about = prepare_shards(config.data, config.tokenizer, Path(folder), processes, progress)
    for split, records in about["splits"].items():
        tokens = sum(record["tokens"] for record in records)
        bad = [row for record in records for row in record["bad"]]
        documents = sum(record["documents"] for record in records)
        print(f"{split}: {tokens:,} tokens of {documents:,} documents in {len(records)} shards, {len(bad)} bad rows")
        for row in bad[:20]:
            print(f"  left out: {row}")
    print(f"in {perf_counter() - started:.1f} s; train on it: tokenyard train data=prepared data.path={folder}")


def _train_tokenizer(folder: Path, config: Config) -> None:
    from ..data.build import open_tokenizer
    from ..data.cache import cache_folder
    from ..data.checks import check_corpus

    check_corpus(config.data)
    check_data(config)
    tokenizer = open_tokenizer(config.data, config.tokenizer, cache_folder(config.data))
    tokenizer.save(folder)
    print(f"{folder}: {config.tokenizer.kind.value}, {tokenizer.size} pieces, hash {tokenizer.hash}")
    path = "" if config.tokenizer.kind is TokenizerKind.bytes else f" tokenizer.path={folder}"
    print(f"train with it: tokenyard train tokenizer={config.tokenizer.kind.value}{path}")


def _inspect(steps: int, rows: int, config: Config) -> None:
    import xxhash

    from ..data.build import open_data

    check_config(config, config.launch.nodes * config.launch.ranks)
    check_data(config)
    sizes = config.batch.sizes(config.sequence_length)
    data = open_data(config.data, config.tokenizer, config.sequence_length, config.seed, sizes, None, config.evaluate.sequences)
    tokens = sizes.before(steps) * config.sequence_length
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
        for found in data.train.read_failures():
            print(f"bad: {found}")
    finally:
        data.train.close()


# The table of `tokenyard data inspect`: a row of text for each source.

COLUMNS = ("source", "share", "tokens", "epoch", "documents", "their tokens", "held out", "bad rows", "duplicates")


def source_table(data: DataPipeline, name: str, steps: int, length: int) -> list[str]:
    """Returns the table's lines, after `steps` global batches of rows of `length` tokens.

    `name` names a corpus that is one array.
    """
    train = data.train
    if isinstance(train, GlobalBatches):
        return _table([_whole(data, train, name, steps, length)], "documents: of the corpus; held out: for validation")
    counts: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in train.metrics().items():
        label, _, count = key.removeprefix("data/").rpartition("/")
        counts[label][count] = value
    given = dict(zip((source.label for source in train.mixture.sources), train.mixture.rows, strict=True))
    rows = [_streamed(label, given[label] * length, values) for label, values in counts.items()]
    return _table(rows, "documents: read so far, with what is read ahead; held out: for validation")


def _whole(data: DataPipeline, train: GlobalBatches, name: str, steps: int, length: int) -> list[str]:
    facts, rows = data.facts, train.sizes.before(steps)
    documents = f"{facts.train_documents:,}", f"{facts.train_tokens:,}", f"{facts.validation_documents:,}"
    bad = f"{facts.undecodable + facts.empty:,}", f"{facts.duplicates:,}"
    return [name, f"{1:.4f}", f"{rows * length:,}", f"{(rows - 1) // train.rows:,}", *documents, *bad]


def _streamed(label: str, tokens: int, counts: dict[str, Any]) -> list[str]:
    names = ("epoch", "documents", "document_tokens", "held_out", "bad_rows")
    return [
        label,
        f"{counts['share']:.4f}",
        f"{tokens:,}",
        *(f"{counts[name]:,}" if name in counts else "-" for name in names),
        "-",
    ]


def _table(rows: list[list[str]], note: str) -> list[str]:
    """Returns aligned lines: the first column to the left, numbers to the right. Columns without any value are left out."""
    shown = [index for index in range(len(COLUMNS)) if any(row[index] != "-" for row in rows)]
    lines = [[row[index] for index in shown] for row in [list(COLUMNS), *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in lines
    ]
    return [*aligned, f"({note})"]


def verify(folder: str) -> int:
    """Prints each damaged shard, and a summary. Returns the exit code: 0; 1 if a shard is damaged; 2 if there are no shards."""
    from ..data.pretokenized import verify as verify_shards

    path, started, damaged, shards, tokens = Path(folder).expanduser(), perf_counter(), 0, 0, 0
    try:
        for record, fault in verify_shards(path):
            shards, tokens = shards + 1, tokens + record.tokens
            if fault:
                damaged += 1
                print(f"{record.file}: DAMAGED, {' '.join(fault.split())}")
    except ValueError as error:
        return complain(error)
    what = f"{damaged} of {shards} shards are DAMAGED" if damaged else f"whole; {shards} shards, {tokens:,} tokens"
    print(f"{folder}: {what}, in {perf_counter() - started:.1f} s")
    return 1 if damaged else 0
