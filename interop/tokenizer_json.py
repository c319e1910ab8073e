"""Makes a tokenizer.json of our sentencepiece or byte tokenizer, and imports a tokenizer.model.

Both are compared: they must give the same ids, and the text back, for TEXTS and for random texts of the tokenizer's pieces.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from ..checkpoint.bounded import short_message
from ..data.tokenizer import MODEL_FILE, SPACE_MARK, SentencePieceTokenizer, Tokenizer

FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"

TEXTS = (
    "",
    " ",
    "a",
    "Hello, world!",
    " leading and trailing ",
    "two  three   four    spaces",
    "\ttabs\tand\nnewlines\r\n\n\n",
    "    def f(x):\n        return x ** 2  # comment\n",
    "0123456789 3.14159 1,000,000 0xff",
    "aaaaaaaaaaaaaaaa bbbbbbbbb ------------------",
    "Gr\u00fc\u00dfe na\u00efve \u00c5ngstr\u00f6m e\u0301 \ufb01ne \u2460 \uff21",
    "\u4f60\u597d\uff0c\u4e16\u754c \u3053\u3093\u306b\u3061\u306f",
    "\uc548\ub155 \u0627\u0644\u0633\u0644\u0627\u0645 \u05e9\u05dc\u05d5\u05dd",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0010ffff",
    "</s><s><unk> </s> <0x41> <|endoftext|> <pad>",
    f"the mark {SPACE_MARK} itself{SPACE_MARK}{SPACE_MARK} and \ufffd",
    "\u00a0\u2009\u3000\u200b\ufeff thin and other spaces",
    "\x00\x01\x7f\x80 controls",
)


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and, for a sentencepiece model, tokenizer.model. ValueError if they differ."""
    fast = _import_tokenizers().Tokenizer.from_str(json.dumps(_tokenizer_json(tokenizer)))
    _check(tokenizer, fast)
    fast.save(str(folder / FILE))
    (folder / CONFIG_FILE).write_text(json.dumps(_tokenizer_config(tokenizer), indent=2) + "\n")
    if isinstance(tokenizer, SentencePieceTokenizer):
        (folder / MODEL_FILE).write_bytes(tokenizer.model)


def import_tokenizer(path: Path, folder: Path) -> None:
    """Saves the tokenizer.model of the Hugging Face folder `path` in `folder` as our tokenizer.

    Raises ValueError if there is none, or if tokenizer.json gives other ids.
    """
    if not (path / MODEL_FILE).is_file():
        raise ValueError(f"it reads sentencepiece models, and there is no {MODEL_FILE}")
    tokenizer = SentencePieceTokenizer((path / MODEL_FILE).read_bytes(), str(path / MODEL_FILE))
    if (path / FILE).is_file():
        try:
            fast = _import_tokenizers().Tokenizer.from_file(str(path / FILE))
        except BaseException as error:  # the library has no error class of its own, and its panics are BaseExceptions
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ValueError(f"{FILE} cannot be read: {short_message(error)}") from None
        _check(tokenizer, fast)
    tokenizer.save(folder)


def _check(tokenizer: Tokenizer, fast: Any) -> None:
    fast.encode_special_tokens = True
    for text in (*TEXTS, *_random_texts(tokenizer)):
        ours, theirs = tokenizer.encode(text), fast.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise ValueError(f"{FILE} would give other ids for {text[:40]!r}")
        back = fast.decode(theirs, skip_special_tokens=False)
        if back != text:
            raise ValueError(f"{FILE} would give {back[:40]!r} back for {text[:40]!r}")


def _random_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of random pieces, whose neighbours may merge in more than one order."""
    chance = random.Random(1)
    pieces = [tokenizer.decode([index]) for index in range(3, tokenizer.size)]
    pieces = [piece for piece in pieces if piece and "\ufffd" not in piece] or ["a"]
    for _ in range(64):
        yield "".join(chance.choices(pieces, k=64))


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    special = _special_tokens(tokenizer)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": special[tokenizer.end_of_document],
        "unk_token": special.get(0),
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "</s>" in a text is plain text
    }


def _special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """The special tokens, by id."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return dict(enumerate(("<unk>", "<s>", "</s>")))
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    ids = range(processor.get_piece_size())
    return {index: processor.id_to_piece(index) for index in ids if processor.is_control(index) or processor.is_unknown(index)}


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer.json: byte-pair encoding with byte fallback, without normalizer or pre-tokenizer.

    A space is a space and not sentencepiece's mark, so that the mark in a text is encoded as bytes, as our tokenizer does.
    """
    if isinstance(tokenizer, SentencePieceTokenizer):
        vocabulary, merges = _pieces(tokenizer)
    else:
        vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
        merges = []
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": _special_tokens(tokenizer).get(0),
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }


def _pieces(tokenizer: SentencePieceTokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns the ids of all pieces, and every pair that merges into a piece, best score first, as sentencepiece merges them."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    ids = range(processor.get_piece_size())
    texts = {index: processor.id_to_piece(index).replace(SPACE_MARK, " ") for index in ids}
    special = {index for index in ids if processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index)}
    normal = {texts[index] for index in ids if index not in special}
    best = sorted((index for index in ids if index not in special), key=lambda index: -processor.get_score(index))
    merges = []
    for text in (texts[index] for index in best):
        cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        merges += [pair for pair in cuts if normal.issuperset(pair)]
    return {text: index for index, text in texts.items()}, merges


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "it is compared with the tokenizers library, which is not installed: pip install 'tokenyard[hf]'"
        ) from None
    return tokenizers
