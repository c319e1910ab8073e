"""`tokenyard audit`: a claim about a model beside what its configuration says."""

import dataclasses
import json
import textwrap
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..plan.claims import Answer, audit, left_out
from ..train.config.config import ConfigError
from ..train.rank_command import refuse
from .params import configured
from .words import named_models

LARGEST_CARD = 1 << 20
"""Bytes of a card."""
WIDTH = 120


def audit_command(arguments: Namespace) -> int:
    """Prints the page, or one object (--json). Returns 0 if nothing that was claimed differs, 1 if something does."""
    try:
        claim = read_claim(arguments.claim)
        name, config = configured(named_models(arguments.model))
    except ConfigError as error:
        return refuse(error)
    answers = audit(claim, config.model)
    if arguments.json:
        print(json.dumps({"model": name, "claim": claim, "answers": [dataclasses.asdict(answer) for answer in answers]}))
    else:
        print("\n".join(page(name, claim, answers)))
    return int(any(answer.verdict.startswith("differs") for answer in answers))


def read_claim(text: str) -> str:
    """Returns the claim: the text itself, or of a card (a file that ends in .json) its keys and values. Raises ConfigError."""
    if not text.endswith(".json"):
        return text
    from ..checkpoint.bounded import read_regular, strict_json

    try:
        return "; ".join(_sentences(strict_json(read_regular(Path(text), LARGEST_CARD))))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{text}: {' '.join(str(error).split())}; nearest valid: the claim itself, in quotes") from error


def _sentences(card: Any, key: str = "") -> list[str]:
    """Returns `key value` for each value, with words for underscores; a number of at least a million as a count such as 671B."""
    if isinstance(card, dict):
        return [sentence for name, value in card.items() for sentence in _sentences(value, str(name).replace("_", " "))]
    if isinstance(card, list):
        return [sentence for value in card for sentence in _sentences(value, key)]
    if isinstance(card, int | float) and not isinstance(card, bool) and card >= 1e6:
        return [f"{key} {card / 1e9:.6g}B"]
    return [f"{card} {key}" if isinstance(card, int) and not isinstance(card, bool) else f"{key} {card}"]


def page(name: str, claim: str, answers: list[Answer]) -> list[str]:
    """Returns the lines for people."""
    found = [*textwrap.wrap(f"claim: {claim}", WIDTH, subsequent_indent="       "), f"model: {name}", ""]
    for answer in answers:
        found += _row(answer.question, answer.model)
        title = "  claimed" if answer.model else answer.question
        found += _row(title, f"{answer.claim}: {answer.verdict}" if answer.claim else answer.verdict)
    missing = left_out(answers)
    return [*found, "", *_row("left out", ", ".join(missing) if missing else "nothing")]


def _row(title: str, text: str) -> list[str]:
    """Returns a title and a text beside it, wrapped; no lines for an empty text."""
    wrapped = textwrap.wrap(text, WIDTH - 18) if text else []
    return [f"{title if index == 0 else '':18}{line}" for index, line in enumerate(wrapped)]
