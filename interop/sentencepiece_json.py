"""The tokenizer.json of a sentencepiece model, trained here or elsewhere, or of bytes, by the fields of sentencepiece_model.proto.

Unigram models may part a text in two ways of the same probability, of which sentencepiece and the tokenizers library take different
ones, for example in a line of dashes.
"""

import base64
from typing import Any

import sentencepiece

from ..data.tokenizer_types import SPACE_MARK, SentencePieceTokenizer, Tokenizer

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
