import math

import numpy as np
import pytest
import torch
from tokenyard.data import batches as module
from tokenyard.data.batches import IGNORE, GlobalBatches, ValidationBatches, unigram_entropy
from tokenyard.data.token_array import TokenArray, TokensManifest

LENGTH = 8


def made(rows: int, fingerprint: str = "f") -> TokenArray:
    """Token i is i, so that the first token of a row tells which row it is."""
    ids = np.arange(rows * LENGTH + 1, dtype=np.uint16)
    return TokenArray(ids, TokensManifest(1, len(ids), 0, [], 0, 0, fingerprint))


def batches(rows: int = 50, seed: int = 1, sequences: int = 16, fingerprint: str = "f") -> GlobalBatches:
    return GlobalBatches(made(rows, fingerprint), seed=seed, sequences=sequences, sequence_length=LENGTH)


def stream(source: GlobalBatches, steps: int) -> list[int]:
    """Which corpus rows the first `steps` global batches hold."""
    return [int(first) // LENGTH for step in range(steps) for first in source.batch(step).ids_BS[:, 0]]


def test_a_row_is_consecutive_tokens_and_targets_are_the_next() -> None:
    ids_BS, targets_BS = batches().batch(3)
    assert ids_BS.shape == targets_BS.shape == (16, LENGTH) and ids_BS.dtype == targets_BS.dtype == torch.int64
    assert ids_BS.is_contiguous() and targets_BS.is_contiguous()
    assert torch.equal(targets_BS, ids_BS + 1) and torch.equal(ids_BS - ids_BS[:, :1], torch.arange(LENGTH).expand(16, LENGTH))


@pytest.mark.fault(17)
@pytest.mark.parametrize("ranks", [1, 2, 4, 16])
def test_ranks_together_have_the_global_batch(ranks: int) -> None:
    source, share = batches(), 16 // ranks
    for step in (0, 2, 3, 40):
        whole = source.batch(step)
        parts = [batches().batch(step, slice(rank * share, (rank + 1) * share)) for rank in range(ranks)]
        assert torch.equal(torch.cat([part.ids_BS for part in parts]), whole.ids_BS)
        assert torch.equal(torch.cat([part.targets_BS for part in parts]), whole.targets_BS)


def test_rows_by_range() -> None:
    assert torch.equal(batches().batch(1, range(3, 16, 4)).ids_BS, batches().batch(1).ids_BS[3::4])
    assert torch.equal(batches().batch(1, slice(4, None)).ids_BS, batches().batch(1).ids_BS[4:])
    assert len(batches().batch(1, range(0)).ids_BS) == 0
    for outside in (slice(8, 17), range(-1, 3)):
        with pytest.raises(AssertionError):
            batches().batch(1, outside)


@pytest.mark.parametrize(("rows", "sequences"), [(50, 16), (50, 50), (7, 16), (1, 3), (48, 16)])
def test_each_epoch_is_each_row_once_across_batch_edges(rows: int, sequences: int) -> None:
    steps = math.ceil(4 * rows / sequences)
    order = stream(batches(rows, sequences=sequences), steps)
    epochs = [order[start : start + rows] for start in range(0, 4 * rows, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert rows < 7 or len({tuple(epoch) for epoch in epochs}) == 4


def test_the_stream_does_not_depend_on_the_batch_size() -> None:
    assert stream(batches(sequences=16), 8) == stream(batches(sequences=4), 32)


def test_the_stream_depends_on_seed_and_corpus() -> None:
    streams = [stream(source, 3) for source in (batches(), batches(seed=2), batches(fingerprint="g"))]
    assert len({tuple(rows) for rows in streams}) == 3
    assert streams[0][:8] == [16, 20, 48, 15, 42, 3, 39, 36], "another order would break the resume of running experiments"


def test_resume_needs_the_step_alone() -> None:
    straight = batches()
    expected = [straight.digest(step) for step in range(30)]
    assert [batches().digest(step) for step in reversed(range(30))] == expected[::-1]
    assert len(set(expected)) == 30


def test_digest_sees_the_targets() -> None:
    tokens = made(1)
    changed = TokenArray(tokens.ids.copy(), tokens.manifest)
    changed.ids[-1] = 0
    one, other = (GlobalBatches(each, seed=1, sequences=1, sequence_length=LENGTH).digest(0) for each in (tokens, changed))
    assert one != other


def test_too_small_a_corpus_names_the_largest_length() -> None:
    with pytest.raises(ValueError, match=r"^sequence_length=9 .* largest possible value is 8, "):
        GlobalBatches(made(1), seed=1, sequences=1, sequence_length=9)
    with pytest.raises(ValueError, match=r"^sequence_length=9 is more than the validation documents"):
        ValidationBatches(made(1), sequence_length=9)
    assert GlobalBatches(made(1), seed=1, sequences=1, sequence_length=8).rows == 1


def test_validation_rows_are_the_same_for_every_size_and_rank() -> None:
    source = ValidationBatches(made(50), sequence_length=LENGTH)
    whole = torch.cat([batch.ids_BS for batch in source.batches(24, 24)])
    assert torch.equal(torch.cat([batch.ids_BS for batch in source.batches(24, 8)]), whole)
    assert torch.equal(next(source.batches(12, 12)).ids_BS, whole[:12])
    assert torch.equal(next(source.batches(24, 24, slice(6, 12))).ids_BS, whole[6:12])
    assert len(set(whole[:, 0].tolist())) == 24 and whole[:, 0].tolist() != sorted(whole[:, 0].tolist())


@pytest.mark.parametrize(("sequences", "counted"), [(10, 10), (1000, 50)])
def test_the_last_validation_batch_is_filled_with_rows_that_are_not_counted(sequences: int, counted: int) -> None:
    found = list(ValidationBatches(made(50), sequence_length=LENGTH).batches(sequences, 16))
    assert all(batch.ids_BS.shape == (16, LENGTH) for batch in found)
    targets = torch.cat([batch.targets_BS for batch in found])
    rows = torch.cat([batch.ids_BS for batch in found])[targets[:, 0] != IGNORE]
    assert (targets != IGNORE).sum() == counted * LENGTH and len(set(rows[:, 0].tolist())) == counted


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.arange(8, dtype=np.uint16).repeat(3), 20) == pytest.approx(math.log(8), rel=1e-12)
    assert unigram_entropy(np.array([5, 5, 5, 7], dtype=np.uint16), 8) == pytest.approx(
        -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    )
    assert unigram_entropy(np.zeros(9, dtype=np.uint16), 8) == 0


def test_the_entropy_of_a_large_split_is_of_blocks_from_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENTROPY_TOKENS", 64)
    read, ids = [], np.arange(100_000) % 7

    class Counted(np.ndarray):
        def __getitem__(self, places: slice) -> np.ndarray:
            read.append((places.start, len(range(*places.indices(len(self))))))
            return np.asarray(self).__getitem__(places)

    assert unigram_entropy(ids.view(Counted), 7) == pytest.approx(math.log(7), rel=1e-3)
    assert len(read) == 16 and sum(size for _, size in read) == 16 * 64 and read[-1][0] == 100_000 - 64
    for size in (1_000, 1_024, 1_025):
        read.clear()
        unigram_entropy(ids[:size].view(Counted), 7)
        assert sum(count for _, count in read) == min(size, 1_024)
