"""Best-fit packing: every token but the first of a document is a target once an epoch, and only long documents are cut."""

import io
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from tokenyard.data import best_fit as best_fit_module
from tokenyard.data.batches import IGNORE, GlobalBatches
from tokenyard.data.best_fit import PackedRows, best_fit
from tokenyard.data.token_array import TokenArray, TokensManifest
from tokenyard.moe.token_info import documents_of

LENGTH, END = 16, 1
SIZES = {
    "short": [3, 9, 1, 2, 14, 7, 5, 16, 4, 2, 11],
    "a row": [16, 17, 18, 15],
    "long": [33, 34, 48, 49, 50, 100, 5, 12],
    "one": [2],
    "many": [1 + 7 * index % 40 for index in range(300)],
}


def corpus(sizes: list[int], fingerprint: str = "f") -> TokenArray:
    """Documents of these many tokens, the last of which ends it; all others are different."""
    parts, first = [], 2
    for size in sizes:
        parts.append(np.append(np.arange(first, first + size - 1), END))
        first += size
    ids = np.concatenate(parts).astype(np.uint32)
    return TokenArray(ids, TokensManifest(len(sizes), len(ids), 0, [], 0, 0, fingerprint))


def batches(sizes: list[int], sequences: int = 4, seed: int = 1) -> GlobalBatches:
    return GlobalBatches(corpus(sizes), seed=seed, sequences=sequences, sequence_length=LENGTH, packed_by=END)


def pairs(ids: list[int]) -> list[tuple[int, int]]:
    """Returns each token with the next one of its document."""
    return [(one, other) for one, other in itertools.pairwise(ids) if one != END]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_token_but_the_first_of_a_document_is_a_target_once_an_epoch(sizes: list[int]) -> None:
    source = batches(sizes, sequences=1)
    trained: Counter[tuple[int, int]] = Counter()
    for step in range(source.rows):
        ids_BS, targets_BS = source.batch(step)
        counted = targets_BS != IGNORE
        trained.update(zip(ids_BS[counted].tolist(), targets_BS[counted].tolist(), strict=True))
    assert trained == Counter(pairs(corpus(sizes).ids.tolist()))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_documents_that_fit_into_a_row_are_whole(sizes: list[int]) -> None:
    """And with masked documents, the documents of a row are those that were packed, and padding."""
    table = PackedRows(corpus(sizes), LENGTH, END)
    rows = table.read(np.arange(table.rows))
    assert rows.shape == (table.rows, LENGTH + 1) and rows.dtype == np.int64
    whole = Counter(tuple(pairs(part)) for part in documents(corpus(sizes).ids.tolist()) if 2 <= len(part) <= LENGTH + 1)
    found = Counter(tuple(pairs(part)) for row in rows.tolist() for part in documents(row) if len(part) >= 2)
    assert all(found[part] >= count for part, count in whole.items())
    used = sum(len(part) for row in rows.tolist() for part in documents(row) if len(part) > 1)
    assert table.padding == pytest.approx(1 - used / rows.size)
    ids_BS, targets_BS = batches(sizes, sequences=1).batch(0)
    _, masked_BS = documents_of(ids_BS, targets_BS, END, IGNORE)
    assert torch.equal(masked_BS, targets_BS)


def documents(ids: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in ids:
        parts[-1].append(token)
        if token == END:
            parts.append([])
    return [part for part in parts if part]


def test_each_piece_goes_to_the_fullest_row_that_it_fits_into() -> None:
    lengths = sorted((3 + 11 * index % 57 for index in range(400)), reverse=True)
    room: list[int] = []
    for length, row in zip(lengths, best_fit(np.array(lengths), 64).tolist(), strict=True):
        least = min((left for left in room if left >= length), default=None)
        if least is None:
            assert row == len(room)
            room.append(64)
        else:
            assert room[row] == least
        room[row] -= length
    assert len(room) == -(-sum(lengths) // 64), "as few rows as possible, here"


def one_after_the_other(lengths: list[int], capacity: int) -> list[int]:
    """The rows of best fit, of rows with equal room the one that got it last: a piece at a time."""
    of_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rows, found = 0, []
    for length in lengths:
        room = next((room for room in range(length, capacity + 1) if of_room[room]), None)
        if room is None:
            room, row, rows = capacity, rows, rows + 1
        else:
            row = of_room[room].pop()
        of_room[room - length].append(row)
        found.append(row)
    return found


@pytest.mark.parametrize("capacity", [7, 64, 257])
def test_pieces_of_one_length_go_where_each_alone_would(capacity: int) -> None:
    """Runs in progress keep their rows."""
    draw = np.random.default_rng(1)
    for count in (0, 1, 50, 3_000):
        lengths = np.sort(np.minimum(2 + draw.geometric(3 / capacity, count), capacity))[::-1]
        assert best_fit(lengths, capacity).tolist() == one_after_the_other(lengths.tolist(), capacity)


def test_the_table_is_made_once_and_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one file."""
    tokens = corpus(SIZES["many"])
    made = PackedRows(tokens, LENGTH, END)
    for number in range(3):
        mapped = PackedRows(tokens, LENGTH, END, tmp_path)
        assert all(isinstance(array, np.memmap) for array in mapped._table)
        assert np.array_equal(mapped.read(np.arange(mapped.rows)), made.read(np.arange(made.rows)))
        assert (mapped.rows, mapped.padding, mapped.fingerprint) == (made.rows, made.padding, made.fingerprint)
        if number == 0:
            monkeypatch.delattr(best_fit_module, "pack")
    (table,) = (tmp_path / "packed").glob("*/*")
    words = np.load(table)
    for damaged in (table.read_bytes()[:200], as_file(words[:-1]), as_file(np.append(words, 0))):
        table.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^packed rows in .* are damaged .*; remove the folder"):
            PackedRows(tokens, LENGTH, END, tmp_path)


def as_file(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def in_windows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(best_fit_module, "AT_ONCE", 100)
    monkeypatch.setattr(best_fit_module, "WINDOW_ROWS", 100 * rows // LENGTH)


@pytest.mark.parametrize("rows", [1, 7])
def test_windows_are_packed_as_corpora_of_their_own(rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents that end in a window, one window after the other; in memory and from a file the same."""
    whole = corpus(SIZES["many"]).ids
    ends = np.flatnonzero(whole == END)
    in_windows(monkeypatch, rows)
    size = max(1, 100 * rows // LENGTH * LENGTH // 100) * 100
    bounds = [0, *(int(ends[ends < edge][-1]) + 1 for edge in range(size, len(whole) + size, size))]
    expected = []
    for first, last in itertools.pairwise(bounds):
        part = TokenArray(whole[first:last], TokensManifest(1, last - first, 0, [], 0, 0, "part"))
        with monkeypatch.context() as once:
            once.setattr(best_fit_module, "AT_ONCE", 1 << 24)
            table = PackedRows(part, LENGTH, END)
        expected.append(table.read(np.arange(table.rows)))
    assert len(expected) > 3
    for cache in (None, tmp_path):
        found = PackedRows(corpus(SIZES["many"]), LENGTH, END, cache)
        assert np.array_equal(found.read(np.arange(found.rows)), np.concatenate(expected))


def test_a_table_of_version_1_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in progress goes on with the rows of its cache, and of several windows only with them."""
    tokens = corpus(SIZES["many"])
    at_once = PackedRows(tokens, LENGTH, END)
    key = f"1 {at_once.fingerprint} {LENGTH} {END}"
    folder = tmp_path / "old" / "packed" / xxhash.xxh3_128_hexdigest(key.encode())
    folder.mkdir(parents=True)
    for name, array in at_once._table._asdict().items():
        np.save(folder / f"{name}.npy", array[:3] if name == "numbers" else array)
    in_windows(monkeypatch, 1)
    old, new = (PackedRows(tokens, LENGTH, END, tmp_path / name) for name in ("old", "new"))
    assert old.fingerprint == at_once.fingerprint != new.fingerprint
    assert old.padding == at_once.padding
    assert np.array_equal(old.read(np.arange(old.rows)), at_once.read(np.arange(at_once.rows)))


def test_padding_is_little_with_documents_of_many_sizes() -> None:
    table = PackedRows(corpus(SIZES["many"]), LENGTH, END)
    assert table.padding < 0.02


def test_a_batch_follows_from_its_step() -> None:
    sizes = SIZES["many"]
    assert [batches(sizes).digest(step) for step in range(200, 203)] == [batches(sizes).digest(step) for step in range(200, 203)]
    assert batches(sizes).digest(3) != batches(sizes, seed=2).digest(3)
    whole, parts = batches(sizes).batch(5), [batches(sizes).batch(5, slice(rank, rank + 1)) for rank in range(4)]
    assert torch.equal(torch.cat([part.targets_BS for part in parts]), whole.targets_BS)
    assert batches(sizes).metrics() == {"padding_fraction": PackedRows(corpus(sizes), LENGTH, END).padding}


def test_it_is_not_the_data_of_concatenated_rows() -> None:
    plain = GlobalBatches(corpus(SIZES["many"]), seed=1, sequences=4, sequence_length=LENGTH)
    assert plain.fingerprint == "f" and batches(SIZES["many"]).fingerprint != "f"


def test_a_corpus_without_two_tokens_in_a_document() -> None:
    with pytest.raises(ValueError, match="no training document has two tokens"):
        batches([1, 1, 1])
