"""Which choices an expert of limited capacity keeps (GShard, Switch Transformer).

Choices are served in the order of the tokens (and of a token's own choices), so a token's fate depends on earlier tokens
alone. B sequences, S tokens of each, E experts, K choices per token, A = S * K choices of a sequence.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from .config import MoEConfig, Scope


class Tokens(NamedTuple):
    """The choices of this device's tokens: (B, S, K) expert ids, (B, S) validity or None, (B, E) valid choices."""

    experts_BSK: Tensor
    valid_BS: Tensor | None
    counts_BE: Tensor


class Queue(NamedTuple):
    """What stands ahead of this device's choices: (B, E) earlier choices, and the tokens that share the capacity."""

    ahead_BE: Tensor
    tokens: int


class OneDevice:
    """The surroundings of a device that holds the whole micro-batch. parallel/scopes.py has those of a rank."""

    def queue(self, counts_BE: Tensor, tokens_per_sequence: int, scope: Scope) -> Queue:
        """Ahead of each sequence: nothing where sequences have their own capacity, else the earlier sequences."""
        if scope is Scope.sequence:
            return Queue(torch.zeros_like(counts_BE), tokens_per_sequence)
        return Queue(counts_BE.cumsum(0) - counts_BE, tokens_per_sequence * len(counts_BE))


def keep(tokens: Tokens, config: MoEConfig, surroundings: OneDevice) -> Tensor:
    """Booleans (B, S, K): the choices within the capacity of their expert; those of invalid tokens are not kept.

    Capacity = ceil(factor * tokens in the scope * K / E), at least 1 (GShard, section 2.2).
    """
    queue = surroundings.queue(tokens.counts_BE, tokens.experts_BSK.shape[1], config.capacity.scope)
    places_BSK = _places(tokens, config.experts) + queue.ahead_BE.gather(1, tokens.experts_BSK.flatten(1)).view_as(
        tokens.experts_BSK
    )
    kept_BSK = places_BSK < _capacity(config, queue.tokens)
    return kept_BSK if tokens.valid_BS is None else kept_BSK & tokens.valid_BS[..., None]


def _capacity(config: MoEConfig, tokens: int) -> int:
    """In exact decimals: the float product of 1.1 and 100 is above 110, and its tenth would round up to 12."""
    assert config.capacity.factor is not None
    return max(1, math.ceil(Fraction(str(config.capacity.factor)) * tokens * config.top_k / config.experts))


def _places(tokens: Tokens, experts: int) -> Tensor:
    """(B, S, K): how many valid choices of the same expert come earlier in the same sequence."""
    chosen_BA = tokens.experts_BSK.flatten(1)
    if tokens.valid_BS is not None:
        invalid_BA = ~tokens.valid_BS[..., None].expand_as(tokens.experts_BSK).flatten(1)
        chosen_BA = chosen_BA.masked_fill(invalid_BA, experts)
    order_BA = chosen_BA.argsort(dim=1, stable=True)
    starts_BE = tokens.counts_BE.cumsum(1) - tokens.counts_BE
    starts_BE = torch.cat([starts_BE, tokens.counts_BE.sum(1, keepdim=True)], dim=1)
    place_in_order_BA = torch.arange(chosen_BA.shape[1], device=chosen_BA.device).expand_as(chosen_BA)
    places_BA = torch.empty_like(chosen_BA).scatter_(1, order_BA, place_in_order_BA)
    return (places_BA - starts_BE.gather(1, chosen_BA)).view_as(tokens.experts_BSK)
