"""Mixtures: proportions of tokens, sources that end, and resuming."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from streaming import BYTES, LENGTH, opened, taken, write
from tokenyard.data.build import open_data
from tokenyard.data.checks import check_corpus
from tokenyard.data.config import Corpus, DataConfig
from tokenyard.data.errors import EndOfData


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    a, b = write(tmp_path / "a", Corpus.jsonl), write(tmp_path / "b", Corpus.parquet)
    mix = [f"weight=0.65 corpus=jsonl path={a.path}", f"weight=0.3 corpus=parquet path={b.path}", "weight=0.05 corpus=synthetic"]
    return replace(a, corpus=Corpus.mix, path=None, mix=mix)


def test_proportions_after_a_million_tokens(data: DataConfig) -> None:
    batches = open_data(replace(data, validation_fraction=0.2), BYTES, 128, 1, 512, None, 1).train
    for step in range(16):
        batches.batch(step)
    shares = [batches.metrics()[f"data/{label}/share"] for label in ("a", "b", "synthetic")]
    assert np.allclose(shares, [0.65, 0.3, 0.05], rtol=0.01)


def test_a_stopped_mixture_goes_on(data: DataConfig) -> None:
    straight, first = taken(opened(data), range(40)), opened(data)
    parts = [taken(first, range(13))]
    second = opened(replace(data, workers=2))
    second.restore(json.loads(json.dumps(first.state())))
    parts.append(taken(second, range(13, 40)))
    second.close()
    assert np.array_equal(np.concatenate(parts), straight)


def test_a_source_that_ends_leaves_its_share_to_the_others(data: DataConfig) -> None:
    ends = replace(data, mix=[f"{data.mix[0]} repeat=false", data.mix[1]])
    batches = opened(ends)
    taken(batches, range(200))
    rows = batches.mixture.rows
    assert batches.mixture.ended == [True, False] and sum(rows) == 800
    tokens = batches.metrics()["data/a/document_tokens"]
    assert rows[0] == (tokens - 1) // LENGTH
    none = opened(replace(data, mix=[f"{entry} repeat=false" for entry in data.mix[:2]]))
    with pytest.raises(EndOfData, match="the data ends after step"):
        taken(none, range(200))


def test_other_weights_keep_the_places_of_the_sources(data: DataConfig) -> None:
    first = opened(data)
    taken(first, range(10))
    other = opened(replace(data, mix=[data.mix[1].replace("0.3", "1"), data.mix[0]]))
    other.restore(first.state())
    places = {source.label: source.state() for source in first.mixture.sources}
    assert [source.state() for source in other.mixture.sources] == [places["b"], places["a"]]


@pytest.mark.fault(35, "equal data under two labels: each goes on where it was, bit for bit")
@pytest.mark.parametrize("other", [["one", "two"], ["two", "one"], ["new", "two"]])
def test_sources_of_equal_data_keep_their_states(data: DataConfig, other: list[str]) -> None:
    """By label; a new label takes the state that no other one takes."""
    path = data.mix[0].split("path=")[1]
    mix = [f"weight={weight} corpus=jsonl path={path} label={label}" for weight, label in ((0.8, "one"), (0.2, "two"))]
    straight, first = taken(opened(replace(data, mix=mix)), range(40)), opened(replace(data, mix=mix))
    taken(first, range(13))
    weights = {"one": 0.8, "two": 0.2, "new": 0.8}
    again = [f"weight={weights[label]} corpus=jsonl path={path} label={label}" for label in other]
    second = opened(replace(data, mix=again))
    second.restore(json.loads(json.dumps(first.state())))
    places = {source.label.replace("new", "one"): source.state() for source in second.mixture.sources}
    assert places == {source.label: source.state() for source in first.mixture.sources}
    if other != ["two", "one"]:
        assert np.array_equal(taken(second, range(13, 40)), straight[13:])


@pytest.mark.fault(35, "new weights on resume: the new shares from the first row on")
@pytest.mark.parametrize("weights", [(0.9, 0.1), (0.1, 0.9), (0.45, 0.55)])
def test_new_weights_hold_from_the_resume_on(data: DataConfig, weights: tuple[float, float]) -> None:
    mix = [entry.partition(" ")[2] for entry in data.mix[:2]]
    first = opened(replace(data, mix=[f"weight={w} {entry}" for w, entry in zip((0.55, 0.45), mix, strict=True)]), sequences=16)
    taken(first, range(40))
    second = opened(replace(data, mix=[f"weight={w} {entry}" for w, entry in zip(weights, mix, strict=True)]), sequences=16)
    second.restore(json.loads(json.dumps(first.state())))
    before = list(second.mixture.rows)
    for step in range(40, 45):
        second.batch(step)
        given = np.array(second.mixture.rows) - before
        assert (abs(given - given.sum() * np.array(weights) / sum(weights)) <= 2).all(), (step, given)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ([], r"data\.mix=\[\] must name a source"),
        (["corpus=stdlib weight=0"], "weight=0 in .* must be a number above 0"),
        (["corpus=nothing"], "corpus=nothing .* must be one of stdlib"),
        (["corpus=stdlib", "corpus=stdlib"], "two sources are called stdlib"),
        (["corpus=stdlib colour=red"], "'colour=red' .* must be one of weight"),
        (["corpus=jsonl path=/no/such/file.jsonl"], "must exist or match files; the nearest existing path is /"),
        (["corpus=hf"], r"data\.name=null must name a data set"),
    ],
)
def test_wrong_mixtures_are_refused(mix: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_corpus(DataConfig(corpus=Corpus.mix, mix=mix))


@pytest.mark.parametrize("weights", [["0.1"] * 10, [str(1 / 3)] * 3, ["0.7", "0.2", "0.1"], ["1e-9", "1"]])
@pytest.mark.parametrize("sequences", [1, 3])
def test_rounded_shares_leave_no_validation_row_out(tmp_path: Path, weights: list[str], sequences: int) -> None:
    paths = [write(tmp_path / f"rows{index}", Corpus.lines).path for index in range(len(weights))]
    mix = [f"weight={weight} corpus=lines path={path}" for weight, path in zip(weights, paths, strict=True)]
    config = DataConfig(corpus=Corpus.mix, mix=mix, cache=str(tmp_path / "cache"), window=8, workers=0, validation_fraction=0.2)
    assert open_data(config, BYTES, LENGTH, 1, 4, None, sequences).validation.rows == sequences
