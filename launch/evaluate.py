"""`tokenyard evaluate`: the validation loss of a checkpoint."""

import argparse
import math

from ..data.errors import DataStop
from ..train.config.complain import complain
from ..train.evaluation import evaluate_session
from ..train.load import open_for_evaluation


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Prints loss and perplexity, computed in one process. Returns the exit code."""
    try:
        session = open_for_evaluation(arguments.checkpoint, arguments.overrides)
    except ValueError as error:
        return complain(error)
    except DataStop as stop:
        return complain(stop, stop.exit_code)
    evaluation = evaluate_session(session)
    entropy = session.data.facts.unigram_entropy
    print(f"validation loss {evaluation.loss:.4f} nats per token, perplexity {math.exp(min(evaluation.loss, 700)):.2f}")
    print(f"over {evaluation.tokens:,} tokens of {session.config.data.corpus.value}; unigram entropy {entropy:.4f}")
    return 0
