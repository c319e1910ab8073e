"""Trains the pieces of a sentencepiece tokenizer on a sample of the training documents."""

import io
import re

import sentencepiece

from .corpus import CorpusSurvey, unit_hash

# Byte fallback, no normalisation and no dummy prefix make every round trip exact. Whole runs of spaces are pieces, for source code:
# 3.4 bytes a token on the standard library, 2.3 without. Pieces that mix letters with punctuation would make it 3.9, but a small
# model learns far less from them (docs/log.md).
RECIPE = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "split_by_unicode_script": True,
    "max_sentencepiece_length": 32,
    "unk_surface": "\ufffd",
    # The model file records the number of threads; more would change its hash and not its pieces, and are no faster.
    "num_threads": 1,
    "minloglevel": 2,
}
SENTENCE = 2048


def sample(corpus: CorpusSurvey, limit: int) -> list[str]:
    """Beginnings of training documents, together about `limit` bytes; deterministic.

    A document contributes at most a few times its even share, so that one large file cannot fill the sample.
    """
    share = max(16384, 4 * limit // len(corpus.train))
    texts: list[str] = []
    for name in sorted(corpus.train, key=lambda name: unit_hash(name, seed=1)):
        text = corpus.read(name).text[: min(share, limit)]
        texts.append(text)
        limit -= len(text.encode())
        if limit <= 0:
            break
    return texts


def train_pieces(texts: list[str], pieces: int) -> bytes:
    """Returns the bytes of a model file with `pieces` pieces.

    Raises ValueError, one line, if the text has too little in it for that.
    """
    # The trainer takes no sentence above 4192 bytes and no NUL; encoding has neither limit.
    sentences = (text[at : at + SENTENCE].replace("\0", "") for text in texts for at in range(0, len(text), SENTENCE))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, vocab_size=pieces, **RECIPE)
    except RuntimeError as error:
        raise ValueError(_reason(str(error), pieces)) from None
    return model.getvalue()


def _reason(message: str, pieces: int) -> str:
    if found := re.search(r"value <= (\d+)", message):
        return f"tokenizer.pieces={pieces} is more than this corpus has in it; the largest possible value is {found[1]}"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"tokenizer.pieces={pieces} is fewer than this corpus has characters; the smallest possible value is {found[1]}"
    return f"tokenizer.pieces={pieces} cannot be trained on this corpus; take tokenizer.kind=bytes ({' '.join(message.split())})"
