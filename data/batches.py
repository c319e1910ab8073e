"""Global batches of a tokenized corpus, as a function of the corpus, the seed and the step alone.

B: sequences; S: tokens per sequence. A corpus row is S + 1 consecutive tokens; rows start every S tokens, so each token but the
first is a target once an epoch.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
import xxhash

from .batch_sizes import BatchSizes, batch_sizes
from .best_fit import PackedRows
from .permutation import COMPUTED, SORTED, in_order, rows_at
from .token_array import TokenArray

IGNORE = -100
"""Target of a position without a loss: F.cross_entropy's default `ignore_index`."""


class Batch(NamedTuple):
    ids_BS: torch.Tensor
    """int64 token ids."""
    targets_BS: torch.Tensor
    """int64 ids of the next tokens, or IGNORE."""


@final
class GlobalBatches:
    """The training batches. A run resumes from its step alone.

    Each epoch has its own permutation of the rows (data/permutation.py), computed for the rows that are read. The global batch of a
    step starts behind those of the steps before it in the epochs together, so an epoch may end inside a batch.
    """

    def __init__(
        self,
        tokens: TokenArray,
        *,
        seed: int,
        sequences: int | BatchSizes,
        sequence_length: int,
        packed_by: int | None = None,
        cache: Path | None = None,
    ) -> None:
        """`packed_by`: the token that ends documents, to pack them by best fit; `cache` then keeps the table of rows, if given.

        Raises ValueError, one line, if there is no row.
        """
        packs = packed_by is not None
        self._row_table = (
            PackedRows(tokens, sequence_length, packed_by, cache) if packs else _RowTable(tokens, sequence_length, "training")
        )
        self._seed, self._packed_by, self._order = seed, packed_by, COMPUTED
        self.sizes = batch_sizes(sequences)
        self.fingerprint = self._row_table.fingerprint
        self.rows = self._row_table.rows

    def batch(self, step: int, rows: slice | range | None = None) -> Batch:
        """Returns the given rows (None: all) of the global batch of optimizer step `step`, counted from 0.

        In packed rows, what follows the end of a document is no target.
        """
        ids_BS, targets_BS = split_rows(self._tokens(step, rows))
        if self._packed_by is not None:
            targets_BS = targets_BS.masked_fill(ids_BS == self._packed_by, IGNORE)
        return Batch(ids_BS, targets_BS)

    def digest(self, step: int) -> str:
        """Returns xxh3-64 of the global batch: its rows of S + 1 int64 token ids."""
        return xxhash.xxh3_64_hexdigest(self._tokens(step, None).astype("<i8").tobytes())

    def state(self, step: int | None = None) -> dict[str, Any]:
        """Returns the kind of the order; a batch follows from its step."""
        return {"order": self._order}

    def restore(self, state: dict[str, Any]) -> None:
        """Continues in the order of `state`."""
        self._order = state.get("order", SORTED)

    def metrics(self, step: int | None = None) -> dict[str, float]:
        """Returns the share of padding in packed rows. StreamBatches has more."""
        return {"padding_fraction": self._row_table.padding} if isinstance(self._row_table, PackedRows) else {}

    def read_failures(self) -> list[Any]:
        """Empty: unreadable documents were left out when the corpus was tokenized."""
        return []

    def close(self) -> None:
        """Does nothing: no file is open."""

    def _tokens(self, step: int, rows: slice | range | None) -> np.ndarray:
        """(B, S + 1), int64."""
        positions = self.sizes.before(step) + np.array(chosen_rows(rows, self.sizes.of(step)), dtype=np.int64)
        indices = rows_at(positions, self.rows, self._order, "train", self._row_table.fingerprint, self._seed)
        return self._row_table.read(indices)


@final
class ValidationBatches:
    """The validation rows, in a shuffled order that does not depend on the run's seed."""

    def __init__(self, tokens: TokenArray, *, sequence_length: int, sources: list[tuple[str, int]] | None = None) -> None:
        """Raises ValueError, one line, if the corpus has no row.

        sources: name and number of tokens of each source, in the order of the tokens; None for a single source.
        """
        self._row_table = _RowTable(tokens, sequence_length, "validation")
        self._length = sequence_length
        self.rows = self._row_table.rows
        self.source_names = [name for name, _ in sources or [("all", 0)]]
        self._ends = np.cumsum([size for _, size in sources or []][:-1])
        self._order = COMPUTED

    def restore(self, state: dict[str, Any]) -> None:
        """Takes the rows in the order of `state`, that of the training batches, so that losses can be compared over a resume."""
        self._order = state.get("order", SORTED)

    def batches(self, sequences: int, size: int, rows: slice | range | None = None) -> Iterator[Batch]:
        """Yields the first `sequences` rows, or all if there are fewer, in global batches of `size`; of each, `rows` (None: all).

        The last batch is padded with rows whose targets are all IGNORE, so that every rank gets the same shapes.
        """
        order = self._first(sequences)
        chosen = np.array(chosen_rows(rows, size), dtype=np.int64)
        for start in range(0, len(order), size):
            places = start + chosen
            ids_BS, targets_BS = split_rows(self._row_table.read(order[np.minimum(places, len(order) - 1)]))
            targets_BS[torch.from_numpy(places >= len(order))] = IGNORE
            yield Batch(ids_BS, targets_BS)

    def sources(self, sequences: int, rows: range) -> list[int]:
        """Returns for each of the `rows`, counted over all batches, the source that it begins in, as an index of `source_names`."""
        order = self._first(sequences)
        starts = order[np.minimum(np.array(rows, dtype=np.int64), len(order) - 1)] * self._length
        return np.searchsorted(self._ends, starts, side="right").tolist()

    def _first(self, sequences: int) -> np.ndarray:
        """Returns the first `sequences` rows, or all if there are fewer."""
        places = np.arange(min(sequences, self.rows))
        return in_order(places, self.rows, self._order, "validation", self._row_table.fingerprint)


ENTROPY_BLOCKS, ENTROPY_TOKENS = 16, 1 << 20
"""Blocks of these many tokens, spread evenly, tell the entropy of a larger split."""


def unigram_entropy(tokens: np.ndarray, size: int) -> float:
    """Returns the entropy of the frequencies of the `size` ids, nats per token: the loss of the best model without context.

    Of all tokens, or of blocks of them, so that a process does not read a large split at its start.
    """
    counts = np.zeros(size, dtype=np.int64)
    blocks = max(1, min(ENTROPY_BLOCKS, -(-len(tokens) // ENTROPY_TOKENS)))
    for block in range(blocks):
        start = max(0, len(tokens) - ENTROPY_TOKENS) * block // max(1, blocks - 1)
        if len(tokens) <= ENTROPY_BLOCKS * ENTROPY_TOKENS:
            start = block * ENTROPY_TOKENS
        counts += np.bincount(tokens[start : start + ENTROPY_TOKENS], minlength=size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


@final
class _RowTable:
    """A flat array of tokens as rows of S + 1."""

    def __init__(self, tokens: TokenArray, sequence_length: int, split: str) -> None:
        self._ids = tokens.ids
        self._length = sequence_length
        self.fingerprint = tokens.manifest.fingerprint
        self.rows = (len(tokens.ids) - 1) // sequence_length
        if self.rows < 1:
            most = len(tokens.ids) - 1
            rule = f"is more than the {split} documents have; the largest possible value is {most}"
            raise ValueError(f"sequence_length={sequence_length} {rule}, their {most + 1} tokens less one")

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Shape (indices, S + 1), int64."""
        at = indices[:, None] * self._length + np.arange(self._length + 1)
        return self._ids[at].astype(np.int64)


def split_rows(tokens: np.ndarray) -> Batch:
    """Ids and targets, (B, S) each, of `tokens`, (B, S + 1)."""
    tokens_BS1 = torch.from_numpy(tokens)
    return Batch(tokens_BS1[:, :-1].contiguous(), tokens_BS1[:, 1:].contiguous())


def chosen_rows(rows: slice | range | None, size: int) -> range:
    """Returns `rows` of a global batch of `size` (None: all) as a range."""
    if isinstance(rows, slice):
        rows = range(rows.start or 0, size if rows.stop is None else rows.stop, rows.step or 1)
    chosen = range(size) if rows is None else rows
    assert all(0 <= row < size for row in (*chosen[:1], *chosen[-1:])), f"rows {chosen} of a global batch of {size}"
    return chosen
