"""`tokenyard generate`: text from a checkpoint, on one device."""

import argparse
import sys
from time import perf_counter

from ..train.config.complain import complain, printable
from ..train.config.config import SampleConfig
from ..train.load import continuation, open_checkpoint


def generate_command(arguments: argparse.Namespace) -> int:
    """Prints the prompt, its continuation as it is generated, and tokens per second. Returns the exit code."""
    try:
        opened = open_checkpoint(arguments.checkpoint)
    except ValueError as error:
        return complain(error)
    sampling = SampleConfig(arguments.prompt, arguments.tokens, arguments.temperature, arguments.top_p)
    print(arguments.prompt, end="", flush=True)
    begin, count = perf_counter(), 0
    for text in continuation(opened.model, opened.tokenizer, sampling, arguments.seed):
        print(printable(text), end="", flush=True)
        count += 1
    seconds = perf_counter() - begin
    print(f"\n\n{count} tokens, {count / max(seconds, 1e-9):.1f} tokens per second", file=sys.stderr)
    return 0
