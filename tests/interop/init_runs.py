"""Runs that start from the weights of a tiny model, and transformers' loss on their first tokens."""

from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenyard.checkpoint.store import read_whole
from tokenyard.data.batches import IGNORE
from tokenyard.train.checkpointing import save
from tokenyard.train.config.compose import parse_arguments
from tokenyard.train.config.config import Config
from tokenyard.train.logging.run_logger import build_run_logger
from tokenyard.train.run import train_session
from tokenyard.train.setup import open_data_on_all_ranks, open_session
from tokenyard.train.weight_source import compose_run

SETTINGS = """steps=2 sequence_length=32 batch.sequences=8 data=synthetic data.synthetic_documents=64 tokenizer=bytes tracker=jsonl
    evaluate.every=0 evaluate.sequences=4 schedule=constant schedule.warmup=0 optimizer.lr=0.001 sample.prompt=''"""
EXPERTS = ["parallel.expert=2", "parallel.tensor=2"]
DENSE = ["parallel.shard=2", "parallel.tensor=2"]


def configured(source: Path, folder: Path, *overrides: str) -> Config:
    words = [
        *SETTINGS.split(),
        f"checkpoint.init={source}",
        f"run.dir={folder}",
        f"data.cache={folder.parent / 'cache'}",
        *overrides,
    ]
    return compose_run(parse_arguments(words))[0]


def trained(config: Config) -> str:
    """Trains to the end. Returns where the run started from."""
    session = open_session(config, torch.device("cpu"))
    with closing(session), build_run_logger(session) as run_logger:
        assert train_session(session, run_logger) == 0
    return session.start


def opened(config: Config) -> dict[str, torch.Tensor]:
    """Opens the run and saves a checkpoint before any step. Returns its weights."""
    session = open_session(config, torch.device("cpu"))
    with closing(session):
        return read_whole(save(session))


class TheirLoss(NamedTuple):
    cross_entropy: float
    auxiliary: float | None
    """Times its coefficient; None if transformers' model has none."""


def their_loss(theirs: Any, config: Config) -> TheirLoss:
    """transformers' loss on the tokens of the first step, nats per token."""
    batch = open_data_on_all_ranks(config).train.batch(0, range(config.batch.sequences))
    with torch.no_grad():
        found = theirs(batch.ids_BS, output_router_logits=True)
    targets_T = batch.targets_BS.flatten()
    cross_entropy = torch.nn.functional.cross_entropy(found.logits.flatten(0, 1).double(), targets_T, ignore_index=IGNORE).item()
    auxiliary = getattr(found, "aux_loss", None)
    return TheirLoss(cross_entropy, None if auxiliary is None else theirs.router_aux_loss_coef * auxiliary.item())
