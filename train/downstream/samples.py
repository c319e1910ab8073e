"""Text that the model writes during training, after the prompts of `sample`."""

from typing import NamedTuple

from ..session import Session
from .scorer import Sampling, Scorer


class Sample(NamedTuple):
    prompt: str
    text: str


def write_samples(session: Session, scorer: Scorer) -> list[Sample]:
    """Returns what the model writes after each prompt. The weights decide alone: the seed is the same each time. Collective."""
    settings, tokenizer = session.config.sample, session.data.tokenizer
    prompts = [prompt for prompt in settings.prompts or [settings.prompt] if prompt]
    if not prompts or not settings.tokens:
        return []
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    sampling = Sampling(settings.tokens, settings.temperature, settings.top_p, session.config.seed, settings.top_k)
    found = []
    for prompt, begin, written in zip(prompts, ids, scorer.continuations(ids, sampling), strict=True):
        found.append(Sample(prompt, tokenizer.decode([*begin, *written])[len(tokenizer.decode(begin)) :]))
    return found
