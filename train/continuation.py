"""`tokenyard generate`: text from a checkpoint, on one device."""

from collections.abc import Iterator

from ..data.tokenizer import Tokenizer
from ..moe.generation import generate
from ..moe.model import Transformer
from .config.config import SampleConfig


def continuation(model: Transformer, tokenizer: Tokenizer, wish: SampleConfig, seed: int) -> Iterator[str]:
    """The text that each new token adds. Characters of several byte tokens come with the last of them."""
    prompt = tokenizer.encode(wish.prompt) or [tokenizer.end_of_document]
    ids, shown = list(prompt), tokenizer.decode(prompt)
    stop = tokenizer.end_of_document
    for token in generate(
        model, prompt, wish.tokens, temperature=wish.temperature, top_p=wish.top_p, seed=seed, stop=stop, vocabulary=tokenizer.size
    ):
        ids.append(token)
        text = tokenizer.decode(ids)
        ready = "" if text.endswith("\ufffd") else text[len(shown) :]
        shown = text if ready else shown
        yield ready
