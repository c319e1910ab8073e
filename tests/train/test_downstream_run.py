"""Probes: right answers and chance. During a run, they and samples change nothing of the training."""

import math
import random
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.checkpoint.store import read_whole
from tokenyard.train.config.compose import compose
from tokenyard.train.downstream import probes
from tokenyard.train.downstream.probes import CLOSING, Question, addition, brackets, chance, copying
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import train_session
from tokenyard.train.setup import open_session

MADE = {"copying": copying, "addition": addition, "brackets": brackets}


def sum_of(question: Question) -> str:
    *examples, last = question.context.splitlines()
    for line in examples:
        a, b, total = map(int, re.findall(r"\d+", line))
        assert a + b == total
    return f" {sum(map(int, re.findall(r'[0-9]+', last)))}"


def closing_bracket(question: Question) -> str:
    opened = list[str]()
    for mark in question.context.split():
        if mark in CLOSING:
            opened.append(mark)
        else:
            assert CLOSING[opened.pop()] == mark
    return f" {CLOSING[opened[-1]]}"


def next_in_order(question: Question) -> str:
    words = question.context.split()
    return f" {words[len(words) % len(question.options)]}"


@pytest.mark.parametrize(("name", "solve"), [("copying", next_in_order), ("addition", sum_of), ("brackets", closing_bracket)])
def test_the_right_answer_is_right_and_blind_ones_are_by_chance(name: str, solve: Callable[[Question], str]) -> None:
    questions = [MADE[name](random.Random(f"{name} {index}")) for index in range(2000)]
    for question in questions:
        assert len(set(question.options)) == 4
        assert question.options[question.right] == solve(question)
    blind: dict[str, Callable[[Question], int]] = {
        "first": lambda question: 0,
        "smallest": lambda question: question.options.index(min(question.options)),
        "longest": lambda question: question.options.index(max(question.options, key=len)),
        "hash": lambda question: question.options.index(min(question.options, key=lambda option: hash_of(option))),
    }
    for how, choose in blind.items():
        found = sum(choose(question) == question.right for question in questions) / len(questions)
        assert found == pytest.approx(chance(questions), abs=4 * math.sqrt(0.25 * 0.75 / 2000)), how


def hash_of(option: str) -> int:
    return sum(ord(character) * 7919**place for place, character in enumerate(option)) % 1009


def test_the_chance_of_the_next_word() -> None:
    questions = [Question("a", [word]) for word in (" b", " c", " b", " d")]
    assert chance(questions) == 0.5


class Likes:
    """A scorer that finds one option likelier than others."""

    def __init__(self, liked: str) -> None:
        from tokenyard.data.tokenizer_types import BytesTokenizer

        self.tokenizer, self.liked = BytesTokenizer(), liked

    def score(self, rows: list[Any]) -> list[Any]:
        from tokenyard.train.downstream.scorer import Score

        written = [self.tokenizer.decode(row.ids[row.first :]) for row in rows]
        return [Score(float(text == self.liked), text == self.liked) for text in written]


def test_answers() -> None:
    questions = [Question("x", [" a", " b"], 1), Question("x", [" b", " a"], 1), Question("x", [" b"]), Question("x", [" a"])]
    assert probes.answer(Likes(" b"), questions) == [True, False, True, False]  # pyright: ignore[reportArgumentType]


def run(folder: Path, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Trains. Returns the records, and the weights at the end."""
    common = ["steps=4", "sequence_length=64", "model.dropout=0.1", "evaluate.every=2", "evaluate.sequences=8"]
    config = compose([*TINY_RUN, *common, *overrides, f"run.dir={folder}", f"data.cache={folder.parent / 'cache'}"])
    session = open_session(config, torch.device("cpu"))
    with closing(session), build_run_logger(session) as run_logger:
        assert train_session(session, run_logger) == 0
    return read_journal(folder / "metrics.jsonl"), read_whole(folder / "checkpoints" / "step_00000004")


def test_a_run_that_is_judged_trains_as_one_that_is_not(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain, weights = run(tmp_path / "plain")
    capfd.readouterr()
    words = ["evaluate.probes=3", "sample.every=3", "sample.prompts=[Ada,Ben]", "sample.tokens=3"]
    judged, same = run(tmp_path / "judged", *words)
    said = capfd.readouterr()
    for name in ("loss", "grad_norm"):
        assert [record[name] for record in plain] == [record[name] for record in judged]
    assert all(weights[name].equal(same[name]) for name in weights)
    names = {f"probes/{name}{suffix}" for name in ("next_word", *MADE) for suffix in ("", "_chance")}
    assert [names <= set(record) for record in judged] == [False, True, False, True]
    events = [event for event in read_journal(tmp_path / "judged" / "events.jsonl") if event["event"] == "sample"]
    assert [(event["step"], event["prompt"]) for event in events] == [(3, "Ada"), (3, "Ben"), (4, "def ")]
    bits = judged[-1]["validation/bits_per_byte"]
    lines = said.out + said.err
    assert f"step 4: validation loss {judged[-1]['validation_loss']:.4f}, {bits:.4f} bits a byte, over 512 tokens" in lines
    assert "probe copying:" in lines and "25.0% by chance" in lines and "sample at step 3" in lines
