"""The tokenizer of a Hugging Face folder: opens it, and writes ours, so that transformers' AutoTokenizer gives the same ids.

A tokenizer.json is written as it was. One made of a sentencepiece model or of bytes is compared with it: it must give the same ids,
and the same text back, for TEXTS and for random texts of the tokenizer's pieces.
"""

import base64
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from ..data.config import TokenizerConfig, TokenizerKind
from ..data.huggingface_tokenizer import HuggingFaceTokenizer, read_library
from ..data.tokenizer import ready_tokenizer
from ..data.tokenizer_path import MODEL_FILE, TOKENIZER_CONFIG, TOKENIZER_JSON
from ..data.tokenizer_types import SPACE_MARK, SentencePieceTokenizer, Tokenizer

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
    """Writes tokenizer.json, tokenizer_config.json, and what was beside an original tokenizer.json or else tokenizer.model.

    Raises ValueError if tokenizer.json would differ from the tokenizer.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        files = {**tokenizer.companions, TOKENIZER_JSON: tokenizer.content}
    else:
        fast = read_library(json.dumps(tokenizer_json(tokenizer)).encode(), f"the {TOKENIZER_JSON} to export")
        _check(tokenizer, fast)
        files = {TOKENIZER_JSON: fast.to_str(pretty=True).encode()}
        if isinstance(tokenizer, SentencePieceTokenizer):
            files[MODEL_FILE] = tokenizer.model
    files[TOKENIZER_CONFIG] = json.dumps(_tokenizer_config(tokenizer), indent=2).encode() + b"\n"
    for name, content in files.items():
        (folder / name).write_bytes(content)


def open_tokenizer(path: Path) -> Tokenizer:
    """Returns the tokenizer of the Hugging Face folder `path`: its tokenizer.json, or else its tokenizer.model.

    Raises ValueError, one line, if it has neither, or one that cannot be used.
    """
    kind = TokenizerKind.huggingface if (path / TOKENIZER_JSON).is_file() else TokenizerKind.sentencepiece
    tokenizer = ready_tokenizer(TokenizerConfig(kind=kind, path=str(path)))
    assert tokenizer is not None
    return tokenizer


def _check(tokenizer: Tokenizer, fast: Any) -> None:
    fast.encode_special_tokens = True
    unknown = unknown_id(tokenizer)  # which has no text of its own
    for text in (*TEXTS, *_random_texts(tokenizer)):
        ours, theirs = tokenizer.encode(text), fast.encode(text, add_special_tokens=False).ids
        if ours != theirs:
            raise ValueError(f"{TOKENIZER_JSON} would give other ids for {text[:40]!r}")
        back, expected = fast.decode(theirs, skip_special_tokens=False), tokenizer.decode(ours)
        if back != expected and unknown not in ours:
            raise ValueError(f"{TOKENIZER_JSON} would give {back[:40]!r} back for {text[:40]!r}")


def _random_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Texts of random pieces, whose neighbours may merge in more than one order."""
    chance = random.Random(1)
    pieces = [tokenizer.decode([index]) for index in range(3, tokenizer.size)]
    pieces = [piece for piece in pieces if piece and "\ufffd" not in piece] or ["a"]
    for _ in range(64):
        yield "".join(chance.choices(pieces, k=64))


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer_config.json, with the class that takes tokenizer.json as it is; others build one of their own."""
    as_is: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(tokenizer, HuggingFaceTokenizer):
        kept = {key: value for key, value in tokenizer.settings.items() if key != "auto_map"}  # which names code
        begin = {"bos_token": tokenizer.begin} if tokenizer.begin else {}
        return kept | begin | as_is | {"eos_token": tokenizer.end}
    special = special_tokens(tokenizer)
    return as_is | {
        "bos_token": None,
        "eos_token": special[tokenizer.end_of_document],
        "unk_token": special[unknown_id(tokenizer)],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # "</s>" in a text is plain text
    }


# The tokenizer.json of a sentencepiece model, trained here or elsewhere, or of bytes, by the fields of sentencepiece_model.proto.
#
# Unigram models may part a text in two ways of the same probability, of which sentencepiece and the tokenizers library take
# different ones, for example in a line of dashes.

UNIGRAM = 1
"""The type of the model in sentencepiece_model.proto."""


def special_tokens(tokenizer: Tokenizer) -> dict[int, str]:
    """Returns the special tokens, by id."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return dict(enumerate(("<unk>", "<s>", "</s>")))
    processor = _processor(tokenizer)
    ids = range(processor.get_piece_size())
    return {index: processor.id_to_piece(index) for index in ids if processor.is_control(index) or processor.is_unknown(index)}


def unknown_id(tokenizer: Tokenizer) -> int:
    """Returns the id of what the tokenizer has no piece for."""
    return _processor(tokenizer).unk_id() if isinstance(tokenizer, SentencePieceTokenizer) else 0


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the content of tokenizer.json. Raises ValueError if the model cannot be read.

    Of a tokenizer that encodes texts as they are, as those trained here do, it has no normalizer, and a space is a space and not
    sentencepiece's mark, so that the mark in a text is encoded as bytes, as our tokenizer does.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
        return _content(_bpe(vocabulary, [], "<unk>", True), [], [])
    about = _proto(tokenizer)
    trained, space = about.trainer_spec, " " if tokenizer.verbatim else SPACE_MARK
    if trained.model_type == UNIGRAM:
        pieces = [(each.piece.replace(SPACE_MARK, space), each.score) for each in about.pieces]
        model = {"type": "Unigram", "unk_id": trained.unk_id, "vocab": pieces, "byte_fallback": trained.byte_fallback}
    else:
        model = _bpe(*_pieces(tokenizer, space), special_tokens(tokenizer)[trained.unk_id], trained.byte_fallback)
    return _content(model, *(([], []) if tokenizer.verbatim else _rules(about.normalizer_spec)))


def _rules(rules: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the normalizers and decoders of a NormalizerSpec, in the order in which sentencepiece applies them."""
    normalizers: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        characters = base64.b64encode(rules.precompiled_charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": characters})
    if rules.remove_extra_whitespaces:
        normalizers.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    decoders = [{"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}]
    if rules.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE_MARK})
    normalizers.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK})
    return normalizers, decoders + ([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if rules.add_dummy_prefix else [])


def _content(model: dict[str, Any], normalizers: list[dict[str, Any]], decoders: list[dict[str, Any]]) -> dict[str, Any]:
    bytes_to_text = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders[:1] + bytes_to_text + decoders[1:]},
        "model": model,
    }


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str, byte_fallback: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def _pieces(tokenizer: SentencePieceTokenizer, space: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Returns the ids of all pieces, and every pair that merges into a piece, best score first, as sentencepiece merges them."""
    processor = _processor(tokenizer)
    ids = range(processor.get_piece_size())
    texts = {index: processor.id_to_piece(index).replace(SPACE_MARK, space) for index in ids}
    special = {index for index in ids if processor.is_control(index) or processor.is_unknown(index) or processor.is_byte(index)}
    normal = {texts[index] for index in ids if index not in special}
    best = sorted((index for index in ids if index not in special), key=lambda index: -processor.get_score(index))
    merges = []
    for text in (texts[index] for index in best):
        cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        merges += [pair for pair in cuts if normal.issuperset(pair)]
    return {text: index for index, text in texts.items()}, merges


def _processor(tokenizer: SentencePieceTokenizer) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)


def _proto(tokenizer: SentencePieceTokenizer) -> Any:
    """The parsed model file."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ValueError("a sentencepiece model is read with protobuf, which is not installed: pip install protobuf") from None
    about = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    about.ParseFromString(tokenizer.model)
    return about
