"""batch.schedule: the rows of a run, its resumption and its layouts are those of the steps, whatever their sizes."""

from pathlib import Path

import pytest
import torch
from tiny_run import TINY_RUN
from tokenyard.checkpoint.store import read_whole
from tokenyard.data.batches import Batch
from tokenyard.data.build import open_data
from tokenyard.train.config.compose import compose
from tokenyard.train.config.config import Config
from tokenyard.train.logging.journal import read_journal
from tokenyard.train.run import run

GROWING = ["batch.schedule=[600,16,2000,32]", "schedule.unit=tokens", "schedule.warmup=512", "batch.micro=4"]
SIZES = [8, 8, 8, 16, 16, 16, 32, 32]
"""Of 32 tokens each: 768 tokens are trained before step 4, and 2,304 before step 7."""


def config_of(folder: Path, *words: str) -> Config:
    return compose(
        [*TINY_RUN, *GROWING, "steps=8", f"run.dir={folder}", f"data.cache={folder.parent}/cache", "log.every=1", *words]
    )


def losses(folder: Path) -> list[tuple[float, int, float]]:
    return [(record["loss"], record["tokens"], record["lr"]) for record in read_journal(folder / "metrics.jsonl")]


@pytest.mark.parametrize("streams", [False, True], ids=["array", "stream"])
def test_no_row_is_left_out_or_seen_twice(tmp_path: Path, streams: bool) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        lines = (f'{{"text": "document {shard} {row} {"word " * (row % 40)}"}}' for row in range(200))
        (folder / f"{shard}.jsonl").write_text("\n".join(lines))
    words = ["data=jsonl", f"data.path={folder}"] if streams else []
    config = config_of(tmp_path / "run", *words)
    assert [config.batch.sizes(32).of(step) for step in range(8)] == SIZES

    def rows(sizes: list[int], config: Config) -> torch.Tensor:
        opened = open_data(config.data, config.tokenizer, 32, 1, config.batch.sizes(32), None, 1).train
        batches: list[Batch] = [opened.batch(step) for step in range(len(sizes))]
        assert [len(batch.ids_BS) for batch in batches] == sizes
        return torch.cat([batch.ids_BS for batch in batches])

    plain = config_of(tmp_path / "run", *words, "batch.schedule=[]")
    assert torch.equal(rows(SIZES, config), rows([8] * (sum(SIZES) // 8), plain))


def test_a_run_that_stops_in_a_phase_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run(config_of(whole)) == 0
    assert (
        run(config_of(halves, "steps=5", "schedule=constant"))
        == run(config_of(whole.parent / "reference", "schedule=constant"))
        == 0
    )
    assert run(config_of(halves, "schedule=constant")) == 0
    assert losses(halves) == losses(tmp_path / "reference")
    tokens = [tokens for _, tokens, _ in losses(whole)]
    assert tokens == [32 * sum(SIZES[: step + 1]) for step in range(8)]
    expected, found = (read_whole(folder / "checkpoints" / "step_00000008") for folder in (tmp_path / "reference", halves))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
