"""`tokenyard evaluate`: the validation loss of a checkpoint."""

import argparse
import json
import math

from ..data.errors import DataStop
from ..train.config.complain import complain
from ..train.config.compose import parse_arguments
from ..train.config.group_words import spelled_out
from ..train.evaluation import evaluate_session
from ..train.load import open_for_evaluation
from .parser import with_config_dir


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Prints loss and perplexity, computed in one process. Returns the exit code."""
    try:
        words = with_config_dir(arguments.overrides, arguments)
        session = open_for_evaluation(arguments.checkpoint, spelled_out(parse_arguments(words)))
    except ValueError as error:
        return complain(error)
    except DataStop as stop:
        return complain(stop, stop.exit_code)
    evaluation = evaluate_session(session)
    entropy = session.data.facts.unigram_entropy
    perplexity = math.exp(min(evaluation.loss, 700))
    if arguments.json:
        facts = {"checkpoint": arguments.checkpoint, "loss": evaluation.loss, "perplexity": perplexity, "tokens": evaluation.tokens}
        print(json.dumps({**facts, "corpus": session.config.data.corpus.value, "unigram_entropy": entropy}))
        return 0
    print(f"validation loss {evaluation.loss:.4f} nats per token, perplexity {perplexity:.2f}")
    print(f"over {evaluation.tokens:,} tokens of {session.config.data.corpus.value}; unigram entropy {entropy:.4f}")
    return 0
