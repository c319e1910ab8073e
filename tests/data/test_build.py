import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from tokenyard.data import build, token_array, tokenizer
from tokenyard.data.build import open_data
from tokenyard.data.config import DataConfig, Packing, TokenizerConfig, TokenizerKind
from tokenyard.data.token_array import TokensPlace

SMALL = TokenizerConfig(pieces=320, sample_bytes=20_000)


def test_prepare_and_again_from_the_cache(folder: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_data(folder, SMALL, 32, seed=1, batch_sequences=4)
    monkeypatch.setattr(tokenizer, "train_pieces", None)
    monkeypatch.setattr(token_array, "_write", None)
    again = open_data(folder, SMALL, 32, seed=1, batch_sequences=4)
    assert again.facts == first.facts and again.train.digest(5) == first.train.digest(5)
    assert first.facts.train_documents + first.facts.validation_documents == 120
    assert 1 < first.facts.bytes_per_token < 8 and 3 < first.facts.unigram_entropy < 5.77  # log(320)


def test_bytes_give_one_token_a_byte(folder: DataConfig) -> None:
    facts = open_data(folder, TokenizerConfig(kind=TokenizerKind.bytes), 32, seed=1, batch_sequences=4).facts
    assert facts.bytes_per_token == pytest.approx((facts.train_tokens - facts.train_documents) / facts.train_tokens)


def test_another_seed_changes_the_order_and_not_the_corpus(folder: DataConfig) -> None:
    one, two = (open_data(folder, SMALL, 32, seed=seed, batch_sequences=4) for seed in (1, 2))
    assert one.facts == two.facts and one.train.digest(0) != two.train.digest(0)


def test_a_sequence_longer_than_the_corpus(folder: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"^sequence_length=1000000 .*training documents"):
        open_data(folder, SMALL, 1_000_000, seed=1, batch_sequences=4)


def test_processes_at_once_see_the_same(folder: DataConfig) -> None:
    program = (
        "import sys; from tokenyard.data.config import *; from tokenyard.data.build import open_data\n"
        "data = DataConfig(corpus=Corpus.text, path=sys.argv[1], validation_fraction=0.2, cache=sys.argv[2])\n"
        "print(open_data(data, TokenizerConfig(pieces=320, sample_bytes=20_000), 32, 1, 4).train.digest(3))"
    )
    command = [sys.executable, "-c", program, str(folder.path), str(folder.cache)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=_environment()) for _ in range(3)]
    answers = {process.communicate(timeout=240)[0].strip() for process in started}
    assert answers == {open_data(folder, SMALL, 32, seed=1, batch_sequences=4).train.digest(3)}
    assert not list(Path(str(folder.cache)).rglob(".*"))


def test_checks_need_no_torch(folder: DataConfig) -> None:
    program = (
        "import sys; from tokenyard.data.checks import check_corpus; from tokenyard.data.config import *\n"
        "from tokenyard.data.tokenizer_path import check_tokenizer\n"
        "check_corpus(DataConfig()); check_tokenizer(TokenizerConfig())\n"
        "print(sorted({'torch', 'numpy', 'sentencepiece'} & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=_environment(), check=True)
    assert answer.stdout.strip() == "[]"


def test_the_default_refuses_a_path_it_would_not_read(folder: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"data\.corpus=text"):
        open_data(replace(DataConfig(), path=folder.path, cache=folder.cache), SMALL, 32, seed=1, batch_sequences=4)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_packed_rows_of_another_version_than_those_of_rank_0_are_refused(folder: DataConfig) -> None:
    packed = replace(folder, packing=Packing.best_fit)
    told = open_data(packed, SMALL, 32, seed=1, batch_sequences=4).opened
    again = open_data(packed, SMALL, 32, seed=1, batch_sequences=4, known=told)
    assert again.train.fingerprint == told.facts.train_fingerprint
    other = told._replace(facts=told.facts._replace(train_fingerprint="another"))
    with pytest.raises(
        ValueError, match=r"^data\.cache=.*: its packed rows are of another version than those of rank 0; remove .*packed$"
    ):
        open_data(packed, SMALL, 32, seed=1, batch_sequences=4, known=other)


def test_other_ranks_read_nothing_but_tokens(folder: DataConfig) -> None:
    """What rank 0 sends them opens the same data, without a look at the documents; in a cache of their own they make it."""
    first = open_data(folder, SMALL, 32, seed=1, batch_sequences=4)
    with mock.patch.object(build, "survey", side_effect=AssertionError):
        again = open_data(folder, SMALL, 32, seed=1, batch_sequences=4, known=copy.deepcopy(first.opened))
    assert again.train.digest(3) == first.train.digest(3) and again.facts == first.facts
    place = first.opened.train[0]
    assert isinstance(place, TokensPlace)
    gone = first.opened._replace(train=[place._replace(path=place.path + "x")])
    with mock.patch.object(build, "survey", wraps=build.survey) as survey:
        open_data(folder, SMALL, 32, seed=1, batch_sequences=4, known=gone)
    assert survey.call_count == 1
