"""`tokenyard generate`: text from a checkpoint, on one device."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

from ..data.tokenizer import Tokenizer
from ..moe.generate import generate
from ..moe.model import Transformer
from ..parallel.process_group import pick_device
from .config.complain import complain, printable
from .config.config import SampleConfig
from .load import open_checkpoint


def generate_command(arguments: argparse.Namespace) -> int:
    """Prints the prompt, its continuation as it comes, and tokens per second. Returns the exit code."""
    try:
        opened = open_checkpoint(Path(arguments.checkpoint), pick_device("auto"))
    except ValueError as error:
        return complain(error)
    wish = SampleConfig(arguments.prompt, arguments.tokens, arguments.temperature, arguments.top_p)
    print(arguments.prompt, end="", flush=True)
    begin, count = perf_counter(), 0
    for text in continuation(opened.model, opened.tokenizer, wish, arguments.seed):
        print(printable(text), end="", flush=True)
        count += 1
    seconds = perf_counter() - begin
    print(f"\n\n{count} tokens, {count / max(seconds, 1e-9):.1f} tokens per second", file=sys.stderr)
    return 0


def continuation(model: Transformer, tokenizer: Tokenizer, wish: SampleConfig, seed: int) -> Iterator[str]:
    """The text that each new token adds. Characters of several byte tokens come with the last of them."""
    prompt = tokenizer.encode(wish.prompt) or [tokenizer.end_of_document]
    ids, shown = list(prompt), tokenizer.decode(prompt)
    stop = tokenizer.end_of_document
    for token in generate(
        model, prompt, wish.tokens, temperature=wish.temperature, top_p=wish.top_p, seed=seed, stop=stop, vocabulary=tokenizer.size
    ):
        ids.append(token)
        text = tokenizer.decode(ids)
        ready = "" if text.endswith("\ufffd") else text[len(shown) :]
        shown = text if ready else shown
        yield ready
