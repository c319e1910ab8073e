"""Generates tokens one at a time with a key-value cache, on one device.

V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .attention import KeyValueCache
from .model import Transformer


@torch.inference_mode()
def generate(
    model: Transformer,
    prompt: list[int],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int = 1,
    stop: int | None = None,
    vocabulary: int | None = None,
) -> Iterator[int]:
    """Yields up to `tokens` ids that follow `prompt` (which must not be empty); ends early at the id `stop`, which is not yielded.

    Temperature 0 takes the likeliest id. Otherwise samples, with a generator of its own, from the likeliest ids that together have
    probability top_p (nucleus sampling, Holtzman et al. 2020), and from at most top_k of these (Fan et al. 2018). Ids from
    `vocabulary` on are never chosen: an embedding may have more rows than the tokenizer has pieces.
    """
    if not prompt:
        raise ValueError("prompt must have at least one token")
    model.eval()
    device = model.get_parameter("embedding.weight").device
    generator = torch.Generator(device).manual_seed(seed)
    cache = [KeyValueCache() for _ in model.layers]
    ids = prompt
    for _ in range(tokens):
        logits_V = model(torch.tensor([ids], device=device), cache=cache)[0, -1, :vocabulary].float()
        token = int(sample(logits_V, temperature, top_p, generator, top_k))
        if token == stop:
            return
        yield token
        ids = [token]


def sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator, top_k: int | None = None) -> Tensor:
    """Draws one id, an int64 scalar, from logits (V,)."""
    if temperature == 0:
        return logits_V.argmax()
    sorted_V, ids_V = (logits_V / temperature).softmax(0).sort(descending=True)
    before_V = sorted_V.cumsum(0) - sorted_V
    sorted_V = sorted_V.masked_fill(before_V >= top_p, 0.0)[:top_k]  # the likeliest id always stays
    return ids_V[torch.multinomial(sorted_V, 1, generator=generator)].squeeze(0)
