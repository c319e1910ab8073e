"""Rows on their way to the device: the host has counted them, and the count is that of the rows that arrive."""

from pathlib import Path

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.data.batches import IGNORE, Batch
from tokenyard.parallel.mesh import Place
from tokenyard.train.batch import BatchLoader, as_rows, targets_ahead, valid_targets
from tokenyard.train.config.compose import compose
from tokenyard.train.setup import open_data_on_all_ranks


@pytest.mark.parametrize("masked", [False, True])
def test_the_host_counts_what_arrives(tmp_path: Path, masked: bool) -> None:
    words = [*TINY_RUN, f"data.cache={tmp_path}", f"data.mask_documents={masked}", "model.mtp_depth=2"]
    config = compose(words)
    data = open_data_on_all_ranks(config)
    batch = data.train.batch(0)
    cut = batch.targets_BS.clone()
    cut[0, 3:7] = IGNORE
    end = batch.ids_BS.clone()
    end[1, 5] = data.tokenizer.end_of_document
    rows = as_rows(Batch(end, cut), 4, config, data, torch.device("cpu"))
    assert rows.first == 4 and (rows.documents is not None) == masked
    expected = [int((targets_ahead(rows, depth) != IGNORE).sum()) for depth in range(3)]
    assert rows.valid == expected == valid_targets(rows._replace(valid=None), 2)
    assert rows.valid[0] > rows.valid[1] > rows.valid[2] > 0
    assert rows.valid[0] <= cut.numel() - 4 - masked


@pytest.mark.parametrize("masked", [False, True])
def test_rows_without_tokens_have_the_tensors_of_others(tmp_path: Path, masked: bool) -> None:
    """A rank that cannot read its rows runs the same step as the others, by a graph too."""
    config = compose([*TINY_RUN, f"data.cache={tmp_path}", f"data.mask_documents={masked}"])
    data = open_data_on_all_ranks(config)
    loader = BatchLoader(config, data, Place(1, 0), config.batch.sequences, torch.device("cpu"))
    [read], [empty] = loader.take(0), loader.empty(0)
    assert (empty.targets == IGNORE).all()
    for name in ("ids", "targets", "documents"):
        kinds = [None if x is None else (x.shape, x.dtype) for x in (getattr(read, name), getattr(empty, name))]
        assert kinds[0] == kinds[1], name


def test_an_unknown_token_is_refused_on_the_host(tmp_path: Path) -> None:
    config = compose([*TINY_RUN, f"data.cache={tmp_path}"])
    data = open_data_on_all_ranks(config)
    batch = data.train.batch(0)
    batch.ids_BS[2, 2] = config.model.vocabulary
    with pytest.raises(ValueError, match="row 8 and following: a token id is not below"):
        as_rows(batch, 8, config, data, torch.device("cpu"))
