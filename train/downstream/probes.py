"""Small probes that need no network: the next word of held-out text, copying, addition, and the bracket that closes.

The questions are the same in every run and on every rank; those of the next word follow from the validation split. Which option is
right is drawn, so that a model that ignores the context answers as many as chance does.
"""

import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from ...data.corpus import COLORS, THINGS
from ...data.tokenizer_types import Tokenizer
from ..session import Session
from .scorer import Scorer, TokenRow

WORDS = [*THINGS.split(), *COLORS.split()]
CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
OPTIONS = 4
EXAMPLES = 3
"""Sums before the one that is asked for."""
DEPTH = 4
"""Brackets that are open at most."""
_WORD = re.compile(r"(?<=\w) (?=[^\W\d_]{2,}\b)")


class Question(NamedTuple):
    """A text and the ways in which it may go on. With one option the model must write it; of several it must find the likeliest."""

    context: str
    options: list[str]
    right: int = 0


class ProbeResult(NamedTuple):
    accuracy: float
    chance: float
    """The accuracy without the context: of the commonest word, or one of the options."""
    questions: int


def run_probes(session: Session, scorer: Scorer) -> dict[str, ProbeResult]:
    """Returns the results of evaluate.probes questions of each kind. Collective."""
    count, results = session.config.evaluate.probes, {}
    for name, questions in all_questions(session, count).items():
        if questions:
            right = answer(scorer, questions)
            results[name] = ProbeResult(sum(right) / len(right), chance(questions), len(right))
    return results


def all_questions(session: Session, count: int) -> dict[str, list[Question]]:
    """Returns `count` questions of each kind; fewer of the next word if the validation split has fewer rows with words."""
    makers: dict[str, Callable[[random.Random], Question]] = {"copying": copying, "addition": addition, "brackets": brackets}
    made = {name: [make(random.Random(f"{name} {index}")) for index in range(count)] for name, make in makers.items()}
    return {"next_word": next_words(session, count), **made}


def next_words(session: Session, count: int) -> list[Question]:
    """Returns rows of held-out text up to a word in their second half, and that word."""
    tokenizer, validation = session.data.tokenizer, session.data.validation
    [batch] = validation.batches(count, min(count, validation.rows))
    questions = []
    for ids in batch.ids_BS.tolist():
        text = tokenizer.decode(ids)
        if found := [match.start() for match in _WORD.finditer(text) if match.start() >= len(text) // 2]:
            word = re.match(r" [^\W\d_]+", text[found[0] :])
            assert word is not None
            questions.append(Question(text[: found[0]], [word[0]]))
    return questions


def copying(chance: random.Random) -> Question:
    """Asks for the next of OPTIONS words that stand in the same order before."""
    words = [f" {word}" for word in draw(chance, WORDS, OPTIONS)]
    right = below(chance, OPTIONS)
    return Question("".join([*words, *words, *words[:right]]), words, right)


def addition(chance: random.Random) -> Question:
    """Asks for a sum of digits after EXAMPLES sums. The options are sums of other digits, so that none is likelier in itself."""
    pairs = {a + b: (a, b) for a, b in ((below(chance, 10), below(chance, 10)) for _ in range(99))}
    sums = draw(chance, sorted(pairs), OPTIONS + EXAMPLES)
    shown, options, right = sums[OPTIONS:], sums[:OPTIONS], below(chance, OPTIONS)
    lines = [f"{a} + {b} =" for a, b in (pairs[total] for total in [*shown, options[right]])]
    examples = "".join(f"{line} {total}\n" for line, total in zip(lines, shown, strict=False))
    return Question(examples + lines[-1], [f" {total}" for total in options], right)


def brackets(chance: random.Random) -> Question:
    """Asks for the bracket that closes next in a text of nested brackets."""
    text, opened = "", list[str]()
    for _ in range(16):
        if opened and (len(opened) == DEPTH or below(chance, 2)):
            text += f" {CLOSING[opened.pop()]}"
        else:
            opened.append(list(CLOSING)[below(chance, len(CLOSING))])
            text += f" {opened[-1]}"
    if not opened:
        opened.append(list(CLOSING)[below(chance, len(CLOSING))])
        text += f" {opened[-1]}"
    options = list(CLOSING.values())
    return Question(text, [f" {option}" for option in options], options.index(CLOSING[opened[-1]]))


def below(chance: random.Random, limit: int) -> int:
    return int(chance.random() * limit)  # only random() of random.Random is the same in every version of Python


def draw(chance: random.Random, of: list[Any], count: int) -> list[Any]:
    """Returns `count` different ones."""
    left = list(of)
    return [left.pop(below(chance, len(left))) for _ in range(count)]


def chance(questions: list[Question]) -> float:
    """Returns the accuracy that needs no context."""
    if len(questions[0].options) > 1:
        return 1 / len(questions[0].options)
    return max(Counter(question.options[0] for question in questions).values()) / len(questions)


def answer(scorer: Scorer, questions: list[Question]) -> list[bool]:
    """Returns which questions are answered right. Collective."""
    rows = [encode_pair(scorer.tokenizer, question.context, option) for question in questions for option in question.options]
    scores, right = iter(scorer.score(rows)), list[bool]()
    for question in questions:
        of_options = [next(scores) for _ in question.options]
        likelihoods = [score.log_likelihood for score in of_options]
        right.append(of_options[0].greedy if len(of_options) == 1 else likelihoods.index(max(likelihoods)) == question.right)
    return right


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> TokenRow:
    """Returns the row of both texts as one, in which the tokens behind those of the context are scored."""
    ids, before = tokenizer.encode_prompt(context + continuation), tokenizer.encode_prompt(context)
    return TokenRow(ids, min(len(before), len(ids) - 1))
