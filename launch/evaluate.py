"""`tokenyard evaluate`: the validation loss of a checkpoint, probes, and tasks of lm-eval."""

import argparse
import math

from ..data.errors import DataStop
from ..train.config.complain import complain
from ..train.config.config import ConfigError
from ..train.downstream.judge import judge
from ..train.downstream.tasks import open_tasks, run_tasks
from ..train.load import open_for_evaluation, open_for_scoring
from ..train.logging.console.summary import evaluation_lines


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Prints loss, perplexity, bits per byte and what else was asked for, computed in one process. Returns the exit code."""
    try:
        if arguments.tasks:
            return _print_tasks(arguments)
        session = open_for_evaluation(arguments.checkpoint, arguments.overrides)
    except ValueError as error:
        return complain(error)
    except DataStop as stop:
        return complain(stop, stop.exit_code)
    evaluation = judge(session)
    entropy = session.data.facts.unigram_entropy
    print(f"validation loss {evaluation.loss:.4f} nats per token, perplexity {math.exp(min(evaluation.loss, 700)):.2f}")
    print(f"over {evaluation.tokens:,} tokens of {session.config.data.corpus.value}; unigram entropy {entropy:.4f}")
    print(f"{evaluation.bits_per_byte:.4f} bits per byte of text")
    for line in evaluation_lines(evaluation)[1:]:
        print(line)
    return 0


def _print_tasks(arguments: argparse.Namespace) -> int:
    """Prints the metrics of --tasks, which need no data of the run. Raises ConfigError."""
    if arguments.overrides:
        rule = "with --tasks the data of the run are not read, and no setting applies"
        raise ConfigError.of(
            "--tasks", arguments.tasks, rule, f"tokenyard evaluate {arguments.checkpoint} --tasks {arguments.tasks}"
        )
    tasks = open_tasks([name for name in arguments.tasks.split(",") if name])
    scorer = open_for_scoring(arguments.checkpoint, arguments.batch)
    for name, value in run_tasks(tasks, scorer, arguments.limit).items():
        print(f"{name}  {value:.4f}")
    return 0
