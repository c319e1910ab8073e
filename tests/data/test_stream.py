"""No row is lost, repeated or out of order: stopped, resumed, with other workers, on other ranks, from every format."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streaming import LENGTH, ROWS, all_documents, config_of, names_in, on_ranks, opened, taken, write
from tokenyard.data.config import Corpus, DataConfig
from tokenyard.data.errors import EndOfData
from tokenyard.data.stream.documents import TokenizingRanks

KINDS = [Corpus.parquet, Corpus.jsonl, Corpus.lines]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.value)
def data(request: pytest.FixtureRequest, tmp_path: Path) -> DataConfig:
    return write(tmp_path / "rows", request.param)


def test_an_epoch_has_each_row_once_and_another_order_than_the_files(data: DataConfig) -> None:
    batches = opened(replace(data, repeat=False), sequences=1)
    steps, rows = 0, []
    with pytest.raises(EndOfData):
        while True:
            rows.append(batches.batch(steps).ids_BS.numpy())
            steps += 1
    seen = names_in(np.stack(rows))
    counts = batches.metrics()
    held_out = counts[f"data/{data.corpus.value}/held_out"]
    left_over = set(all_documents()) - set(seen)
    assert max(Counter(seen).values()) == 1 and seen != sorted(seen) and set(seen) <= set(all_documents())
    # Beside what is held out only the tokens behind the last whole row are missing: at most S of them.
    assert 1 <= held_out <= len(left_over) <= held_out + LENGTH // 6
    assert counts[f"data/{data.corpus.value}/rows"] == sum(ROWS)
    assert steps * LENGTH <= counts[f"data/{data.corpus.value}/document_tokens"] - 1 < (steps + 1) * LENGTH


def test_each_row_as_often_as_there_were_epochs(data: DataConfig) -> None:
    """Over three epochs, repeats come only after all have been seen."""
    seen = names_in(taken(opened(data), range(200)))
    per_epoch = len(set(seen))
    epochs = [seen[start : start + per_epoch] for start in range(0, 3 * per_epoch, per_epoch)]
    # A name cut by the end of one of our printed rows is put together again by joining rows, so every name is found.
    assert all(len(set(epoch)) == per_epoch for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.fault(16, "0 lost, 0 repeated, workers 0 to 2")
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_stopped_twice_mid_shard_and_resumed(data: DataConfig, workers: int) -> None:
    straight = taken(opened(data), range(60))
    config, parts, state = replace(data, workers=workers), [], None
    for steps in (range(7), range(7, 8), range(8, 60)):
        batches = opened(config)
        if state is not None:
            batches.restore(json.loads(state))
        parts.append(taken(batches, steps))
        state = json.dumps(batches.state())
        assert len(state) < 1000
        batches.close()
    assert np.array_equal(np.concatenate(parts), straight)


@pytest.mark.fault(17, "same global batches")
@pytest.mark.parametrize("sizes", [(4, 2, 4), (1, 5, 3)])
def test_other_numbers_of_ranks(data: DataConfig, sizes: tuple[int, ...]) -> None:
    """More ranks than open shards share windows, fewer make several."""
    straight, state, parts = taken(opened(data), range(45)), None, []
    for size, steps in zip(sizes, (range(10), range(10, 11), range(11, 45)), strict=True):
        states: dict[int, str] = {}

        def work(world: Any, steps: range = steps, before: str | None = state, states: dict[int, str] = states) -> np.ndarray:
            batches = opened(data, world)
            if before is not None:
                batches.restore(json.loads(before))
            rows = taken(batches, steps)
            states[world.rank] = json.dumps(batches.state())
            return rows

        found = on_ranks(size, work)
        assert all(np.array_equal(found[0], other) for other in found) and len(set(states.values())) == 1
        parts.append(found[0])
        state = states[0]
    assert np.array_equal(np.concatenate(parts), straight)


@pytest.mark.fault(17, "each data rank its own rows")
@pytest.mark.parametrize("mixed", [False, True], ids=["one source", "a mixture"])
@pytest.mark.parametrize(
    ("takers", "micro"),
    [([[0], [1], [2]], 2), ([[0, 1], [2, 3]], 1), ([[0, 2], [1, 3]], 3), ([[0], [1], [2], [3], [4], [5]], 1), ([[1, 0]], 4)],
)
def test_a_rank_receives_its_own_rows_and_no_others(tmp_path: Path, takers: list[list[int]], micro: int, mixed: bool) -> None:
    """On layouts where ranks share rows (tensor, context, pipeline) or not, with more ranks than open shards and with fewer."""
    data = write(tmp_path / "rows", Corpus.jsonl)
    if mixed:
        mix = [f"weight=0.7 corpus=jsonl path={data.path}", "weight=0.3 corpus=synthetic"]
        data = replace(data, corpus=Corpus.mix, path=None, mix=mix)
    of, sequences, states = TokenizingRanks(takers=np.array(takers), micro=micro), 2 * micro * len(takers), {}
    straight = taken(opened(data, sequences=sequences), range(12))
    received: dict[int, int] = {}

    def work(world: TokenizingRanks) -> np.ndarray:
        def counted(tokens: np.ndarray, to: list[int], from_each: list[int]) -> np.ndarray:
            received[world.rank] = received.get(world.rank, 0) + sum(from_each)
            return world.exchange(tokens, to, from_each)

        batches = opened(data, world._replace(exchange=counted), sequences)
        first = next(place for place, ranks in enumerate(takers) if world.rank in ranks) * micro
        starts = range(first, sequences, micro * len(takers))
        parts = [[batches.batch(step, range(start, start + micro)).ids_BS.numpy() for start in starts] for step in range(12)]
        states[world.rank] = json.dumps(batches.state())
        if len(takers) > 1:
            with pytest.raises(IndexError):
                batches.batch(11, range((first + micro) % sequences, (first + micro) % sequences + 1))
        return np.array(parts)

    found = on_ranks(sum(map(len, takers)), work, of)
    for place, ranks in enumerate(takers):
        own = straight.reshape(12, 2, len(takers), micro, LENGTH)[:, :, place]
        assert all(np.array_equal(found[rank], own) for rank in ranks)
    assert len(set(states.values())) == 1
    streamed = json.loads(states[0])["rows"][0]
    assert sum(received.values()) == streamed * (LENGTH + 1) * len(takers[0])


def test_each_document_is_tokenized_by_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenyard.data.tokenizer_types import BytesTokenizer

    data = write(tmp_path / "rows", Corpus.jsonl)
    opened(data)
    texts: list[str] = []
    encode = BytesTokenizer.encode_batch
    monkeypatch.setattr(
        BytesTokenizer, "encode_batch", lambda self, found, threads: texts.extend(found) or encode(self, found, threads)
    )
    on_ranks(4, lambda world: taken(opened(data, world), range(5)))
    assert len(texts) > 20 and max(Counter(texts).values()) == 1


def test_sizes_of_batches_and_accumulation_do_not_change_the_rows(data: DataConfig) -> None:
    one, other = taken(opened(data, sequences=4), range(12)), taken(opened(data, sequences=6), range(8))
    assert np.array_equal(one.reshape(-1, LENGTH), other.reshape(-1, LENGTH))
    batches = opened(data)
    parts = [batches.batch(0, range(row, row + 2)).ids_BS for row in (0, 2)]
    assert np.array_equal(torch.cat(parts).numpy(), one[0])


def test_another_seed_is_another_order(data: DataConfig) -> None:
    one, other = (names_in(taken(opened(data, seed=seed), range(30))) for seed in (1, 2))
    assert one != other


def test_the_fingerprint_tells_other_data(data: DataConfig) -> None:
    before = opened(data).fingerprint
    assert opened(data).fingerprint == before
    assert opened(replace(data, window=9)).fingerprint != before
    shard = sorted(Path(str(data.path)).iterdir())[0]
    shard.write_bytes(shard.read_bytes() + b"\n")
    if data.corpus is not Corpus.parquet:  # which does not open with a byte more at its end
        assert opened(data).fingerprint != before


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.value)
def test_a_folder_as_a_data_set_of_the_hub(tmp_path: Path, kind: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows through `datasets`, which finds the files and their format."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    data = write(tmp_path / "rows", kind)
    hub = config_of(tmp_path / "rows", Corpus.hf, path=None, name=data.path)
    assert sorted(set(names_in(taken(opened(hub), range(60))))) == sorted(set(names_in(taken(opened(data), range(60)))))


def test_a_format_that_only_datasets_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "rows"
    folder.mkdir()
    for shard in range(3):
        lines = "".join(f"{row},<{shard}.{row}>abc\n" for row in range(40))
        (folder / f"{shard}.csv").write_text("n,text\n" + lines)
    config = config_of(folder, Corpus.hf, path=None, name=str(folder), validation_fraction=0.2)
    straight = taken(opened(config), range(20))
    first = opened(config)
    parts = [taken(first, range(5))]
    second = opened(config)
    second.restore(json.loads(json.dumps(first.state())))
    parts.append(taken(second, range(5, 20)))
    assert np.array_equal(np.concatenate(parts), straight) and len(set(names_in(straight))) > 80


def test_a_data_set_in_the_hubs_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are links to the blobs beside it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    data = write(tmp_path / "hub" / "blobs", Corpus.lines)
    folder = tmp_path / "hub" / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    for file in (tmp_path / "hub" / "blobs").iterdir():
        (folder / file.name).symlink_to(Path("..", "..", "blobs", file.name))
    hub = config_of(folder, Corpus.hf, path=None, name=str(folder))
    assert sorted(set(names_in(taken(opened(hub), range(60))))) == sorted(set(names_in(taken(opened(data), range(60)))))
