"""Bits per byte, sources, probes, scores and samples do not depend on the layout, and follow from the model's logits alone."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from tiny_run import TINY_RUN
from tokenyard.data.batches import IGNORE
from tokenyard.train.config.compose import compose
from tokenyard.train.downstream.judge import judge, scorer_of
from tokenyard.train.downstream.samples import Sample, write_samples
from tokenyard.train.downstream.scorer import Sampling, Score, TokenRow
from tokenyard.train.evaluation import Evaluation
from tokenyard.train.session import Session
from tokenyard.train.setup import open_session

COMMON = [
    *TINY_RUN,
    "precision=fp64",
    "sequence_length=64",
    "batch.sequences=6",
    "model.layers=2",
    "evaluate.sequences=20",
    "evaluate.probes=4",
    "sample.prompts=['Ada has 3 ',B]",
    "sample.tokens=5",
]
LAYOUTS = {
    "expert 2": (2, "parallel.expert=2"),
    "tensor 2": (2, "parallel.tensor=2 batch.micro=3"),
    "pipeline 2": (2, "parallel.pipeline=2 batch.micro=2"),
    "context 2": (2, "parallel.context=2 batch.micro=3"),
    "FSDP 3": (3, "parallel.shard=3"),
    "tensor 2 x pipeline 2 x expert 2": (4, "parallel.tensor=2 parallel.pipeline=2 parallel.expert=2 batch.micro=3"),
}
ROWS = [
    TokenRow([2, *range(70, 90)], 1),
    TokenRow([2, 68, 69, 70], 3),
    TokenRow([*range(3, 103)], 95),
    TokenRow([5, 7], 1),
    *(TokenRow([2, 60 + index, 9, 11, 13], 2) for index in range(6)),
]
"""One is longer than a sequence; together they fill more than a batch."""


PROMPTS = [[2, 68], [2, 80, 81, 82]]


class Judged(NamedTuple):
    evaluation: Evaluation
    samples: list[Sample]
    greedy: list[list[int]]
    scores: list[Score]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two sources of different length, one of which is not ASCII."""
    folder = tmp_path_factory.mktemp("texts")
    for index in range(60):
        (folder / f"{index}.txt").write_text(f"stra\u00dfe {index} \u4f60\u597d na\u00efve words " * (1 + index % 4))
    return [f"data.mix=['weight=1 label=made corpus=synthetic','weight=2 label=texts corpus=text path={folder}']", "data=mix"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, mixed: list[str]) -> Judged:
    return judged(tmp_path_factory.mktemp("one"), mixed)


def opened(folder: Path, overrides: list[str]) -> Session:
    config = compose([*COMMON, *overrides, f"run.dir={folder}", f"data.cache={folder}"])
    return open_session(config, torch.device("cpu"))


def judged(folder: Path, overrides: list[str]) -> Judged:
    session = opened(folder, overrides)
    scorer, state = scorer_of(session), torch.get_rng_state()
    greedy = scorer.continuations(PROMPTS, Sampling(6))
    likeliest = [
        TokenRow([*prompt, *written[:place]], len(prompt) + place - 1)
        for prompt, written in zip(PROMPTS, greedy, strict=True)
        for place in range(1, len(written) + 1)
    ]
    found = Judged(judge(session), write_samples(session, scorer), greedy, scorer.score([*ROWS, *likeliest]))
    assert torch.equal(torch.get_rng_state(), state) and session.parallel.model.training
    session.close()
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_has_the_results_of_one_process(ranks: Any, tmp_path: Path, name: str, mixed: list[str], expected: Judged) -> None:
    world, layout = LAYOUTS[name]
    for found in ranks(world, judged, tmp_path, [*mixed, *layout.split()]):
        for field in ("loss", "bits_per_byte"):
            assert getattr(found.evaluation, field) == pytest.approx(getattr(expected.evaluation, field), rel=1e-12)
        assert found.evaluation.tokens == expected.evaluation.tokens
        assert found.evaluation.scores == expected.evaluation.scores
        for source, losses in expected.evaluation.sources.items():
            assert found.evaluation.sources[source] == pytest.approx(tuple(losses), rel=1e-12), source
        assert (found.samples, found.greedy) == (expected.samples, expected.greedy)
        assert [score.greedy for score in found.scores] == [score.greedy for score in expected.scores]
        assert {score.greedy for score in expected.scores} == {True, False}
        likelihoods = [score.log_likelihood for score in expected.scores]
        assert [score.log_likelihood for score in found.scores] == pytest.approx(likelihoods, rel=1e-12)


def test_validation_by_plain_counting(tmp_path: Path, mixed: list[str], expected: Judged) -> None:
    """Bytes of the targets themselves, which the tokenizer of bytes shows, and of each source."""
    session = opened(tmp_path, mixed)
    [batch] = session.data.validation.batches(20, 20)
    valid_BS = batch.targets_BS != IGNORE
    session.parallel.model.eval()
    with torch.no_grad():
        logits = session.parallel.model(batch.ids_BS)
    nats_BS = F.cross_entropy(logits.flatten(0, 1), batch.targets_BS.flatten(), reduction="none").view_as(batch.ids_BS) * valid_BS
    bytes_BS = (batch.targets_BS >= 3) * valid_BS
    found = expected.evaluation
    assert found.bits_per_byte == pytest.approx(nats_BS.sum().item() / math.log(2) / bytes_BS.sum().item(), rel=1e-12)
    names, sources_B = session.data.validation.source_names, torch.tensor(session.data.validation.sources(20, range(20)))
    assert set(names) == {"made", "texts"} == set(found.sources)
    for index, name in enumerate(names):
        sums = [x_BS[sources_B == index].sum().item() for x_BS in (nats_BS, valid_BS, bytes_BS)]
        assert found.sources[name] == pytest.approx(tuple(sums), rel=1e-12)
    session.close()


def test_scores_and_continuations_by_the_logits(tmp_path: Path, expected: Judged, mixed: list[str]) -> None:
    session = opened(tmp_path, mixed)
    model = session.parallel.model.eval()
    for row, score in zip(ROWS, expected.scores, strict=False):
        ids = row.ids[-65:]
        first = row.first - (len(row.ids) - len(ids))
        with torch.no_grad():
            logits_SV = model(torch.tensor([ids[:-1]]))[0]
        targets_S = torch.tensor(ids[1:])
        likelihood = logits_SV.log_softmax(-1).gather(1, targets_S[:, None])[first - 1 :].sum().item()
        assert score.log_likelihood == pytest.approx(likelihood, rel=1e-10)
        assert score.greedy == bool((logits_SV.argmax(-1) == targets_S)[first - 1 :].all())
    scorer = scorer_of(session)
    for prompt, written in zip(PROMPTS, expected.greedy, strict=True):
        for place in range(len(written)):
            with torch.no_grad():
                logits_V = model(torch.tensor([[*prompt, *written[:place]]]))[0, -1]
            assert written[place] == logits_V[:259].argmax(), "no id that the tokenizer lacks"
            likeliest, other = (
                TokenRow([*prompt, *written[:place], int(each)], len(prompt) + place) for each in logits_V.topk(2)[1]
            )
            assert [score.greedy for score in scorer.score([likeliest, other])] == [True, False]
    session.close()
