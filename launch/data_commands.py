"""`tokenyard prepare`, `tokenyard data inspect|verify` and `tokenyard tokenizer train`."""

import json
import os
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from ..data.batches import GlobalBatches
from ..data.build import DataPipeline
from ..data.config import TokenizerKind
from ..data.document_stats import document_stats
from ..train.config.complain import complain
from ..train.config.compose import parse_arguments
from ..train.config.config import Config, ConfigError
from ..train.preflight import check_config, check_data
from ..train.weight_source import compose_run
from .parser import OneLineParser, add_config_dir, add_json, positive, with_config_dir
from .progress_bar import progress_bar
from .words import aligned


def prepare_command(argv: list[str]) -> int:
    parser = OneLineParser("tokenyard prepare", description="Tokenizes data once into shards that training maps into memory.")
    parser.add_argument("folder", help="where the shards go; started again it goes on where it was")
    parser.add_argument("overrides", nargs="*", help="data and tokenizer, as for tokenyard train")
    parser.add_argument("--processes", type=positive, default=os.cpu_count() or 1, help="that work at once (%(default)s)")
    add_config_dir(parser)
    add_json(parser)
    arguments = parser.parse_intermixed_args(argv)

    return _exit_code(lambda: _prepare(arguments, _configured(arguments)))


def data_command(argv: list[str]) -> int:
    if argv[:1] == ["verify"]:
        return _verify(argv[1:])
    parser = OneLineParser("tokenyard data", description="Shows what training sees: decoded rows, digests of batches, sources.")
    parser.add_argument("verb", choices=["inspect", "verify"], help="verify FOLDER reads prepared shards and compares hashes")
    parser.add_argument("overrides", nargs="*", help="as for tokenyard train")
    parser.add_argument("--steps", type=positive, default=8, help="global batches to look at (%(default)s)")
    parser.add_argument("--rows", type=positive, default=3, help="sequences to print, with their tokens (%(default)s)")
    parser.add_argument("--tokens", action="store_true", help="draw lengths, bytes a token, scripts and duplicates of documents")
    parser.add_argument("--documents", type=positive, default=2000, help="of each source that --tokens reads (%(default)s)")
    add_config_dir(parser)
    add_json(parser)
    arguments = parser.parse_intermixed_args(argv)

    return _exit_code(lambda: _inspect(arguments, _configured(arguments)))


def _verify(argv: list[str]) -> int:
    description = "Reads all prepared shards and compares sizes and hashes; exit code 1 if one is damaged."
    parser = OneLineParser("tokenyard data verify", description=description)
    parser.add_argument("folder", help="that tokenyard prepare filled")
    add_json(parser)
    arguments = parser.parse_args(argv)

    return verify(arguments.folder, arguments.json)


def tokenizer_command(argv: list[str]) -> int:
    parser = OneLineParser("tokenyard tokenizer", description="Trains a sentencepiece tokenizer on the training documents.")
    parser.add_argument("verb", choices=["train"])
    parser.add_argument("folder", help="where tokenizer.model goes")
    parser.add_argument("overrides", nargs="*", help="data=... tokenizer.pieces=..., as for tokenyard train")
    add_config_dir(parser)
    add_json(parser)
    arguments = parser.parse_intermixed_args(argv)

    return _exit_code(lambda: _train_tokenizer(Path(arguments.folder), arguments.json, _configured(arguments)))


def _configured(arguments: Namespace) -> Config:
    return compose_run(parse_arguments(with_config_dir(arguments.overrides, arguments)))[0]


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


def _prepare(arguments: Namespace, config: Config) -> None:
    from ..data.checks import check_corpus
    from ..data.pretokenize import prepare_shards

    check_corpus(config.data)
    check_data(config)
    folder, started = arguments.folder, perf_counter()
    with progress_bar("of the parts") as progress:
        about = prepare_shards(
            config.data,
            config.tokenizer,
            Path(folder),
            arguments.processes,
            lambda done, total, count: progress(done, total, f"{count:,} tokens"),
        )
    found = {"folder": folder, "splits": {split: _of_split(records) for split, records in about["splits"].items()}}
    seconds = perf_counter() - started
    if arguments.json:
        print(json.dumps({**found, "seconds": round(seconds, 1)}))
        return
    for split, facts in found["splits"].items():
        bad = facts["bad_rows"]
        print(
            f"{split}: {facts['tokens']:,} tokens of {facts['documents']:,} documents in {facts['shards']} shards, "
            f"{len(bad)} bad rows"
        )
        for row in bad[:20]:
            print(f"  left out: {row}")
    print(f"in {seconds:.1f} s; train on it: tokenyard train data=prepared data.path={folder}")


def _of_split(records: list[dict[str, Any]]) -> dict[str, Any]:
    sums = {key: sum(record[key] for record in records) for key in ("tokens", "documents", "bytes")}
    return {**sums, "shards": len(records), "bad_rows": [row for record in records for row in record["bad"]]}


def _train_tokenizer(folder: Path, as_json: bool, config: Config) -> None:
    from ..data.build import open_tokenizer
    from ..data.cache import cache_folder
    from ..data.checks import check_corpus

    check_corpus(config.data)
    check_data(config)
    tokenizer = open_tokenizer(config.data, config.tokenizer, cache_folder(config.data))
    tokenizer.save(folder)
    kind = config.tokenizer.kind
    if as_json:
        print(json.dumps({"folder": str(folder), "kind": kind.value, "pieces": tokenizer.size, "hash": tokenizer.hash}))
        return
    print(f"{folder}: {kind.value}, {tokenizer.size} pieces, hash {tokenizer.hash}")
    path = "" if kind is TokenizerKind.bytes else f" tokenizer.path={folder}"
    print(f"train with it: tokenyard train tokenizer={kind.value}{path}")


def _inspect(arguments: Namespace, config: Config) -> None:
    import xxhash

    from ..data.build import open_data
    from .data_picture import row_lines, stats_lines, stats_object

    check_config(config, config.launch.nodes * config.launch.ranks)
    check_data(config)
    sizes, steps = config.batch.sizes(config.sequence_length), arguments.steps
    data = open_data(config.data, config.tokenizer, config.sequence_length, config.seed, sizes, None, config.evaluate.sequences)
    tokens = sizes.before(steps) * config.sequence_length
    say = (lambda *_: None) if arguments.json else print
    try:
        first = data.train.batch(0).ids_BS[: arguments.rows].tolist()
        say("\n".join(line for index, ids in enumerate(first) for line in row_lines(index, ids, data.tokenizer)))
        digest, digests = xxhash.xxh3_64(), []
        for step in range(steps):
            digests.append(data.train.digest(step))
            digest.update(digests[-1].encode())
            say(f"step {step + 1}: digest {digests[-1]}")
        say(f"all {steps} steps: {tokens:,} tokens, digest {digest.hexdigest()}")
        say(f"fingerprint of the data {data.facts.train_fingerprint}, of the tokenizer {data.facts.tokenizer_hash}\n")
        say("\n".join(source_table(data, config.data.corpus.value, steps, config.sequence_length)))
        bad = [str(found) for found in data.train.read_failures()]
        for found in bad:
            say(f"bad: {found}")
        stats = document_stats(config.data, data.tokenizer, arguments.documents) if arguments.tokens else None
        if stats is not None:
            say("\n".join(["", *stats_lines(stats)]))
        if arguments.json:
            found = {
                "rows": [{"tokens": ids, "text": data.tokenizer.decode(ids)} for ids in first],
                "steps": steps,
                "tokens": tokens,
                "digest": digest.hexdigest(),
                "digests": digests,
                "data_fingerprint": data.facts.train_fingerprint,
                "tokenizer_hash": data.facts.tokenizer_hash,
                "bytes_per_token": data.facts.bytes_per_token,
                "sources": source_counts(data, config.data.corpus.value, steps, config.sequence_length),
                "bad": bad,
            }
            print(json.dumps(found if stats is None else {**found, "documents": stats_object(stats)}))
    finally:
        data.train.close()


# The table of `tokenyard data inspect`: a row of text for each source.

KEYS = ("source", "share", "tokens", "epoch", "documents", "document_tokens", "held_out", "bad_rows", "duplicates")
COLUMNS = ("source", "share", "tokens", "epoch", "documents", "their tokens", "held out", "bad rows", "duplicates")


def source_table(data: DataPipeline, name: str, steps: int, length: int) -> list[str]:
    """Returns the table's lines, after `steps` global batches of rows of `length` tokens.

    `name` names a corpus that is one array.
    """
    whole = isinstance(data.train, GlobalBatches)
    note = "documents: of the corpus" if whole else "documents: read so far, with what is read ahead"
    rows = [[_cell(each.get(key)) for key in KEYS] for each in source_counts(data, name, steps, length)]
    return _table(rows, f"{note}; held out: for validation")


def source_counts(data: DataPipeline, name: str, steps: int, length: int) -> list[dict[str, Any]]:
    """Returns the numbers of each source, by KEYS; a number that is not known is missing."""
    train, facts = data.train, data.facts
    if isinstance(train, GlobalBatches):
        rows = train.sizes.before(steps)
        counts = (facts.train_documents, facts.train_tokens, facts.validation_documents)
        found = (name, 1.0, rows * length, (rows - 1) // train.rows, *counts, facts.undecodable + facts.empty, facts.duplicates)
        return [dict(zip(KEYS, found, strict=True))]
    by_label: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in train.metrics().items():
        label, _, count = key.removeprefix("data/").rpartition("/")
        by_label[label][count] = value
    given = dict(zip((source.label for source in train.mixture.sources), train.mixture.rows, strict=True))
    return [
        {
            "source": label,
            "tokens": given[label] * length,
            **{key: counts[key] for key in KEYS if key in counts and key != "tokens"},
        }
        for label, counts in by_label.items()
    ]


def _cell(value: object) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.4f}"
        case int():
            return f"{value:,}"
        case _:
            return str(value)


def _table(rows: list[list[str]], note: str) -> list[str]:
    """Returns aligned lines: the first column to the left, numbers to the right. Columns without any value are left out."""
    shown = [index for index in range(len(COLUMNS)) if any(row[index] != "-" for row in rows)]
    lines = [[row[index] for index in shown] for row in [list(COLUMNS), *rows]]
    return [*aligned(lines), f"({note})"]


def verify(folder: str, as_json: bool = False) -> int:
    """Prints each damaged shard, and a summary. Returns the exit code: 0; 1 if a shard is damaged; 2 if there are no shards."""
    from ..data.pretokenized import read_manifest
    from ..data.pretokenized import verify as verify_shards

    path, started, damaged, shards, tokens = Path(folder).expanduser(), perf_counter(), list[dict[str, str]](), 0, 0
    try:
        total = sum(record["tokens"] for split in read_manifest(path)["splits"].values() for record in split)
        with progress_bar("of the tokens") as progress:
            for record, fault in verify_shards(path):
                shards, tokens = shards + 1, tokens + record.tokens
                progress(tokens, total)
                if fault:
                    damaged.append({"file": record.file, "fault": " ".join(fault.split())})
    except ValueError as error:
        return complain(error)
    seconds = perf_counter() - started
    if as_json:
        facts = {"folder": folder, "whole": not damaged, "shards": shards, "tokens": tokens, "damaged": damaged}
        print(json.dumps({**facts, "seconds": round(seconds, 1)}))
        return int(bool(damaged))
    for each in damaged:
        print(f"{each['file']}: DAMAGED, {each['fault']}")
    what = f"{len(damaged)} of {shards} shards are DAMAGED" if damaged else f"whole; {shards} shards, {tokens:,} tokens"
    print(f"{folder}: {what}, in {seconds:.1f} s")
    return int(bool(damaged))
