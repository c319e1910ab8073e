"""tokenyard prepare: the same shards whatever interrupted it, and what training reads of them."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from streaming import BYTES, LENGTH, ROWS, all_documents, names_in, write
from tokenyard.data import pretokenize
from tokenyard.data.build import open_data
from tokenyard.data.config import Corpus, DataConfig
from tokenyard.data.pretokenized import ConcatenatedArrays, open_place, open_pretokenized, verify
from tokenyard.data.tokenizer_types import BytesTokenizer


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    return write(tmp_path / "rows", Corpus.jsonl)


def prepared(data: DataConfig, folder: Path, processes: int = 1) -> DataConfig:
    pretokenize.prepare_shards(data, BYTES, folder, processes, lambda *_: None)
    return DataConfig(corpus=Corpus.prepared, path=str(folder), cache=data.cache)


def test_every_document_is_in_it_once(data: DataConfig, tmp_path: Path) -> None:
    config = prepared(data, tmp_path / "out")
    splits = [open_pretokenized(config, BytesTokenizer.hash, split) for split in ("train", "validation")]
    seen = [name for tokens in splits for name in names_in(tokens.ids[:])]
    assert sorted(seen) == sorted(all_documents()) and sum(tokens.manifest.documents for tokens in splits) == sum(ROWS)
    batches = open_data(config, BYTES, LENGTH, 1, 4).train
    assert batches.digest(3) == open_data(config, BYTES, LENGTH, 1, 4).train.digest(3) and batches.batch(0).ids_BS.shape == (
        4,
        LENGTH,
    )


def test_interrupted_and_by_several_processes_it_is_the_same(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(data, tmp_path / "one")
    done: list[str] = []
    work = pretokenize.run_job

    def failing(job: pretokenize.PretokenizeJob) -> dict:
        if len(done) == 5:
            raise RuntimeError("killed")
        done.append(job.name)
        return work(job)

    monkeypatch.setattr(pretokenize, "run_job", failing)
    with pytest.raises(RuntimeError, match="killed"):
        prepared(data, tmp_path / "two")
    assert not (tmp_path / "two" / "manifest.json").exists()
    monkeypatch.setattr(pretokenize, "run_job", lambda job: done.append(job.name) or work(job))
    prepared(data, tmp_path / "two")
    assert max(Counter(done).values()) == 1
    monkeypatch.undo()
    prepared(data, tmp_path / "three", processes=2)
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two", "three")]
    assert manifests[0] == manifests[1] == manifests[2] and not any(fault for _, fault in verify(tmp_path / "three"))


def test_other_data_and_damage_are_refused(data: DataConfig, tmp_path: Path) -> None:
    config = prepared(data, tmp_path / "out")
    with pytest.raises(ValueError, match="other data, another tokenizer"):
        prepared(replace(data, longest_row=5), tmp_path / "out")
    with pytest.raises(ValueError, match=r"was made with tokenizer .* take its own: tokenizer\.kind=bytes"):
        open_pretokenized(config, "other", "train")
    place = open_pretokenized(config, BytesTokenizer.hash, "train").place
    shard = max((tmp_path / "out").glob("train_*.npy"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert [record.file for record, fault in verify(tmp_path / "out") if fault] == [shard.name]
    shard.write_bytes(content[:-8])
    assert place is not None
    with pytest.raises(ValueError, match=r"missing or damaged|is damaged"):
        open_pretokenized(config, BytesTokenizer.hash, "train")
    lazy = open_place(place, verify=False)
    with pytest.raises(ValueError, match=r"is missing or damaged|is damaged"):
        lazy.ids[0 : len(lazy.ids)]


PARTS = [part for whole in [np.arange(100, dtype=np.uint16)] for part in (whole[:7], whole[7:50], whole[50:])]


def test_each_shard_is_hashed_once_and_when_it_is_first_read() -> None:
    checked, opened = [], []
    joined = ConcatenatedArrays(
        [7, 43, 50], lambda index: opened.append(index) or PARTS[index], lambda index, _: checked.append(index)
    )
    assert checked == opened == [] and joined[np.array([60, 99])].tolist() == [60, 99] and checked == opened == [2]
    joined.open_all()
    assert opened == [2, 0, 1] and checked == [2]
    assert np.array_equal(joined[0:60], np.arange(60)) and checked == [2, 0, 1] and opened == [2, 0, 1]


def test_joined_arrays_are_one_array() -> None:
    whole = np.arange(100, dtype=np.uint16)
    joined = ConcatenatedArrays([7, 43, 50], lambda index: PARTS[index])
    places = np.array([[0, 6, 7, 8], [49, 50, 51, 99]])
    assert np.array_equal(joined[places], whole[places]) and np.array_equal(joined[5:60], whole[5:60]) and len(joined) == 100
    for start, stop in ((0, 7), (7, 50), (6, 8), (0, 100), (99, 200), (100, 100), (3, 3), (9, 2)):
        assert np.array_equal(joined[start:stop], whole[start:stop])
