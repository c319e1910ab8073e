"""`tokenyard generate`: text from a checkpoint, on one device."""

import argparse
import json
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
    settings = {name: getattr(arguments, name) for name in ("prompt", "tokens", "temperature", "top_p", "top_k")}
    sampling = SampleConfig(**settings)
    if not arguments.json:
        print(arguments.prompt, end="", flush=True)
    begin, texts = perf_counter(), list[str]()
    for text in continuation(opened.model, opened.tokenizer, sampling, arguments.seed):
        texts.append(text)
        if not arguments.json:
            print(printable(text), end="", flush=True)
    seconds, count = perf_counter() - begin, len(texts)
    if arguments.json:
        facts = {"checkpoint": str(opened.path), "prompt": arguments.prompt, "text": "".join(texts), "tokens": count}
        print(json.dumps({**facts, "seconds": round(seconds, 3)}))
        return 0
    print(f"\n\n{count} tokens, {count / max(seconds, 1e-9):.1f} tokens per second", file=sys.stderr)
    return 0
