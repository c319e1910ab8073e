"""`tokenyard evaluate`: the validation loss of a checkpoint, probes, and tasks of lm-eval."""

import argparse
import json
import math

from ..data.errors import DataStop
from ..train.config.complain import complain
from ..train.config.compose import parse_arguments
from ..train.config.config import ConfigError
from ..train.config.group_words import spelled_out
from ..train.downstream.judge import judge
from ..train.downstream.tasks import open_tasks, run_tasks
from ..train.load import open_for_evaluation, open_for_scoring
from ..train.logging.console.summary import evaluation_lines
from ..train.logging.summary_data import validation_record
from .parser import with_config_dir


def evaluate_command(arguments: argparse.Namespace) -> int:
    """Prints loss, perplexity, bits per byte and what else was asked for, computed in one process. Returns the exit code."""
    try:
        if arguments.tasks:
            return _print_tasks(arguments)
        words = with_config_dir(arguments.overrides, arguments)
        session = open_for_evaluation(arguments.checkpoint, spelled_out(parse_arguments(words)))
    except ValueError as error:
        return complain(error)
    except DataStop as stop:
        return complain(stop, stop.exit_code)
    evaluation = judge(session)
    entropy, corpus = session.data.facts.unigram_entropy, session.config.data.corpus.value
    perplexity = math.exp(min(evaluation.loss, 700))
    if arguments.json:
        facts = {"checkpoint": arguments.checkpoint, "loss": evaluation.loss, "perplexity": perplexity, "tokens": evaluation.tokens}
        more = {"corpus": corpus, "unigram_entropy": entropy, "bits_per_byte": evaluation.bits_per_byte}
        print(json.dumps(facts | more | validation_record(session.config, evaluation)))
        return 0
    print(f"validation loss {evaluation.loss:.4f} nats per token, perplexity {perplexity:.2f}")
    print(f"over {evaluation.tokens:,} tokens of {corpus}; unigram entropy {entropy:.4f}")
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
    metrics = run_tasks(tasks, scorer, arguments.limit)
    if arguments.json:
        print(json.dumps({"checkpoint": arguments.checkpoint, **metrics}))
        return 0
    for name, value in metrics.items():
        print(f"{name}  {value:.4f}")
    return 0
