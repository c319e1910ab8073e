"""Log-likelihoods and continuations of token rows by the ranks that train. Every rank gets all results, the same on every layout.

Rows are padded behind their tokens, which attention does not see. B rows of a batch of this rank, S tokens of each, s those of its
context rank, D width, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.batches import IGNORE
from ...data.tokenizer_types import Tokenizer
from ...moe.generation import generate, sample
from ...moe.model import LMHead
from ...parallel.apply import Parallel
from ...parallel.collectives import sum_over
from ...parallel.context import own_chunks
from ...parallel.vocabulary import head_logits, head_loss
from ..batch import Rows
from ..forward_only import forward_heads

SHORTEST = 16
"""Tokens of the shortest rows that are computed."""


class TokenRow(NamedTuple):
    """A row to score: how likely the tokens from `first` on are after those before them."""

    ids: list[int]
    first: int


class Score(NamedTuple):
    log_likelihood: float
    """Nats, the sum over the scored tokens."""
    greedy: bool
    """Whether each scored token is the likeliest one."""


class Sampling(NamedTuple):
    """How to continue a text; see moe/generation.py."""

    tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 1
    top_k: int | None = None


class Scorer:
    """Scores and continues rows of at most `length` tokens, `micro` rows of each rank at a time. All methods are collective."""

    def __init__(self, parallel: Parallel, tokenizer: Tokenizer, length: int, micro: int) -> None:
        self.parallel, self.tokenizer, self.length, self.micro = parallel, tokenizer, length, micro

    @torch.no_grad()
    def score(self, rows: list[TokenRow]) -> list[Score]:
        """Returns the scores, in the order of the rows. Of longer rows the last `length` + 1 tokens are seen."""
        cut = [TokenRow(row.ids[-self.length - 1 :], row.first - max(0, len(row.ids) - self.length - 1)) for row in rows]
        order = sorted(range(len(cut)), key=lambda index: -len(cut[index].ids))  # rows of a batch are about equally long
        mesh, device = self.parallel.mesh, self.parallel.device
        found_2N = torch.zeros(2, len(cut), dtype=torch.float64, device=device)
        with self._evaluating():
            for indices in self._batches(order):
                longest = len(cut[indices[0]].ids) - 1
                own = [cut[index] for index in self._own(indices)]
                batch = self._padded([row.ids[:-1] for row in own], longest)
                targets_BS = torch.full_like(batch.ids, IGNORE)
                for at, row in enumerate(own):
                    targets_BS[at, row.first - 1 : len(row.ids) - 1] = torch.tensor(row.ids[row.first :], device=device)
                scores_2BS = self._scores(batch, targets_BS)
                wrong_B = (self._of_context(targets_BS != IGNORE) & (scores_2BS[1] == 0)).sum(1) * self._has_head
                per_row = torch.stack([scores_2BS[0].sum(1), wrong_B])[:, : len(own)] / mesh.tensor.size
                found_2N[:, self._own(indices)] = per_row
        nats, wrong = sum_over(found_2N, mesh.everyone).tolist()
        return [Score(-each, count < 0.5) for each, count in zip(nats, wrong, strict=True)]

    @torch.no_grad()
    def continuations(
        self, prompts: list[list[int]], sampling: Sampling, ends: Callable[[list[int]], bool] = lambda _: False
    ) -> list[list[int]]:
        """Returns what the model writes after each prompt: until its end of a document, or until `ends` is true of what is written.

        A prompt and its continuation have at most `length` tokens: of a longer prompt the last are seen. One process uses the cache
        of keys and values; several compute each row anew for each token.
        """
        tokens, stop, pieces = min(sampling.tokens, self.length - 1), self.tokenizer.end_of_document, self.tokenizer.size
        prompts = [prompt[-(self.length - tokens) :] for prompt in prompts]
        if self.parallel.mesh.world == 1:
            with self._evaluating():
                settings = sampling._asdict() | {"tokens": tokens, "stop": stop, "vocabulary": pieces}
                write = partial(generate, self.parallel.model, **settings)
                return [_until(write(prompt), ends) for prompt in prompts]
        generators = [torch.Generator(self.parallel.device).manual_seed(sampling.seed) for _ in prompts]
        written: list[list[int]] = [[] for _ in prompts]
        going = list(range(len(prompts)))
        for _ in range(tokens):
            if not going:
                break
            logits = self._next_logits([prompts[index] + written[index] for index in going])[:, :pieces]
            drawn = [
                sample(row, sampling.temperature, sampling.top_p, generators[index], sampling.top_k)
                for row, index in zip(logits, going, strict=True)
            ]
            for index, token in zip(list(going), torch.stack(drawn).tolist(), strict=True):
                if token != stop:
                    written[index].append(token)
                if token == stop or ends(written[index]):
                    going.remove(index)
        return written

    def _next_logits(self, rows: list[list[int]]) -> Tensor:
        """Returns the logits (rows, V) after the last token of each row, in fp32 or wider."""
        mesh, device, wide = (
            self.parallel.mesh,
            self.parallel.device,
            torch.promote_types(self.parallel.model.activations, torch.float32),
        )
        found = torch.zeros(len(rows), self.parallel.model.config.vocabulary, dtype=wide, device=device)
        for indices in self._batches(list(range(len(rows)))):
            own = self._own(indices)
            batch = self._padded([rows[index] for index in own], max(len(rows[index]) for index in indices))
            last_BS = torch.zeros_like(batch.ids, dtype=torch.bool)
            for at, index in enumerate(own):
                last_BS[at, len(rows[index]) - 1] = True
            last_BS = self._of_context(last_BS)
            kept: list[tuple[Tensor, Tensor]] = []
            with self._evaluating():
                forward_heads(self.parallel, batch, self._valid(batch), [partial(_keep_logits, kept, last_BS)])
            for rows_R, logits_RV in kept:
                columns = logits_RV.shape[1]
                chosen_R = torch.tensor(own, dtype=torch.int64, device=device)[rows_R]
                found[chosen_R, mesh.tensor.rank * columns : (mesh.tensor.rank + 1) * columns] = logits_RV
        return sum_over(found, mesh.everyone)

    def _batches(self, order: list[int]) -> Iterator[list[int]]:
        """Yields the rows of each global batch."""
        size = self.micro * self.parallel.mesh.data.size
        yield from (order[start : start + size] for start in range(0, len(order), size))

    def _own(self, indices: list[int]) -> list[int]:
        """Returns this rank's rows of a global batch; none if they are fewer than the ranks take."""
        first = self.parallel.mesh.data.rank * self.micro
        return indices[first : first + self.micro]

    def _padded(self, rows: list[list[int]], longest: int) -> Rows:
        """Returns `micro` rows (B, S); S is a power of two, or `length`. The targets tell tokens (0) from padding (IGNORE)."""
        length, capacity = self.length, self.parallel.model.config.moe.capacity
        if capacity.factor is None and not capacity.schedule:  # the room of an expert depends on the length
            shorter = max(SHORTEST, 1 << max(0, longest - 1).bit_length())
            length = shorter if shorter < length and shorter % (2 * self.parallel.mesh.sequence.size) == 0 else length
        ids_BS = torch.full((self.micro, length), self.tokenizer.end_of_document)
        filled_BS = torch.full_like(ids_BS, IGNORE)
        for at, row in enumerate(rows):
            ids_BS[at, : len(row)] = torch.tensor(row)
            filled_BS[at, : len(row)] = 0
        return Rows(ids_BS.to(self.parallel.device), filled_BS.to(self.parallel.device))

    def _valid(self, batch: Rows) -> Tensor:
        return batch.targets != IGNORE

    def _scores(self, batch: Rows, targets_BS: Tensor) -> Tensor:
        """Returns what `head_loss` stores of each token of this rank, (2, B, s); zeros on ranks without the head."""
        own_BS = self._of_context(targets_BS)
        scores_2BS = torch.zeros(2, *own_BS.shape, dtype=torch.float64, device=own_BS.device)
        settings = {"ignore": IGNORE, "axis": self.parallel.mesh.tensor, "scores_2T": scores_2BS.flatten(1)}
        forward_heads(self.parallel, batch, self._valid(batch), [partial(head_loss, targets=own_BS, **settings)])
        return scores_2BS

    def _of_context(self, x_BS: Tensor) -> Tensor:
        """Returns the tokens whose logits this rank computes, of all of its rows."""
        return x_BS if self.parallel.mesh.sizes["context"] == 1 else own_chunks(x_BS, self.parallel.mesh.context)

    @property
    def _has_head(self) -> bool:
        pipeline = self.parallel.pipeline
        return pipeline is None or pipeline.last in pipeline.layers

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        model = self.parallel.model
        training = model.training
        model.eval()
        yield
        model.train(training)


def _keep_logits(kept: list[tuple[Tensor, Tensor]], chosen_BS: Tensor, x_BSD: Tensor, weight_VD: Tensor, head: LMHead) -> Tensor:
    """A head that keeps the logits of chosen tokens, at most one of a row, with their rows."""
    rows_R = chosen_BS.any(1).nonzero().squeeze(1)
    kept.append((rows_R, head_logits(x_BSD[chosen_BS], weight_VD, head)))
    return x_BSD.new_zeros(())


def _until(tokens: Iterable[int], ends: Callable[[list[int]], bool]) -> list[int]:
    written: list[int] = []
    for token in tokens:
        written.append(token)
        if ends(written):
            break
    return written
