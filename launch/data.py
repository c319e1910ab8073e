"""The command lines of `tokenyard prepare`, `tokenyard data` and `tokenyard tokenizer`."""

import os

from .parser import OneLineParser, positive


def prepare(argv: list[str]) -> int:
    parser = OneLineParser("tokenyard prepare", description="Tokenizes data once into shards that training maps into memory.")
    parser.add_argument("folder", help="where the shards go; started again it goes on where it was")
    parser.add_argument("overrides", nargs="*", help="data and tokenizer, as for tokenyard train")
    parser.add_argument("--processes", type=positive, default=os.cpu_count() or 1, help="that work at once (%(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    from ..train.data_commands import prepare as command

    return command(arguments.folder, arguments.processes, arguments.overrides)


def data(argv: list[str]) -> int:
    if argv[:1] == ["verify"]:
        return _verify(argv[1:])
    parser = OneLineParser("tokenyard data", description="Shows what training sees: decoded rows, digests of batches, sources.")
    parser.add_argument("verb", choices=["inspect", "verify"], help="verify FOLDER reads prepared shards and compares hashes")
    parser.add_argument("overrides", nargs="*", help="as for tokenyard train")
    parser.add_argument("--steps", type=positive, default=8, help="global batches to look at (%(default)s)")
    parser.add_argument("--rows", type=positive, default=2, help="sequences to print (%(default)s)")
    arguments = parser.parse_intermixed_args(argv)
    from ..train.data_commands import inspect as command

    return command(arguments.steps, arguments.rows, arguments.overrides)


def _verify(argv: list[str]) -> int:
    description = "Reads all prepared shards and compares sizes and hashes; exit code 1 if one is damaged."
    parser = OneLineParser("tokenyard data verify", description=description)
    parser.add_argument("folder", help="that tokenyard prepare filled")
    from ..train.verify_shards import verify as command

    return command(parser.parse_args(argv).folder)


def tokenizer(argv: list[str]) -> int:
    parser = OneLineParser("tokenyard tokenizer", description="Trains a sentencepiece tokenizer on the training documents.")
    parser.add_argument("verb", choices=["train"])
    parser.add_argument("folder", help="where tokenizer.model goes")
    parser.add_argument("overrides", nargs="*", help="data=... tokenizer.pieces=..., as for tokenyard train")
    arguments = parser.parse_intermixed_args(argv)
    from ..train.data_commands import train_tokenizer as command

    return command(arguments.folder, arguments.overrides)
