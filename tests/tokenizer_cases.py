"""Tokenizers as published models have them, trained on the standard library's text, in Hugging Face folders; and mixed texts."""

import functools
import json
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Library

SOURCES = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py"))
FOREIGN = (
    "Gr\u00fc\u00dfe aus M\u00fcnchen, na\u00efve \u00c5ngstr\u00f6m e\u0301 \ufb01ne \u2460 \uff21 \u212b",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f\u4e16\u754c \uc548\ub155\ud558\uc138\uc694",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! \u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5",
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645",
    "\u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0010ffff \u2620\ufe0f",
)
ODD = (
    "",
    " ",
    "a",
    " leading and trailing ",
    "two  three   four    spaces" + " " * 40,
    "\ttabs\tand\nnewlines\r\n\n\n",
    "don't DON'T we'll 0123456789 3.14159 1,000,000",
    "the mark \u2581 itself\u2581\u2581 and \ufffd",
    "\u00a0\u2009\u3000\u200b\ufeff thin and other spaces",
    "\x01\x02\x1b[0m\x7f\x80 controls",
    "a\0b",
    *FOREIGN,
)
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PIECES = 1200


def mixed_texts(size: int, seed: int = 1) -> list[str]:
    """Texts of together about `size` characters: source code, other scripts, emoji, and characters drawn from all of Unicode."""
    chance = random.Random(seed)
    code = [path.read_text(errors="replace") for path in SOURCES]
    texts = list(ODD)
    while sum(map(len, texts)) < size:
        source = chance.choice(code)
        begin = chance.randrange(len(source))
        drawn = "".join(chr(chance.choice((chance.randrange(1, 0xD800), chance.randrange(0xE000, 0x110000)))) for _ in range(40))
        words = " ".join(chance.choices(" ".join(FOREIGN).split(), k=20))
        texts += [source[begin : begin + chance.randrange(20000)], words, drawn, chance.choice(code)[:200] + drawn + words]
    return texts


def byte_level(split: str | None, special: list[str], normalizer: Any = None, **model: Any) -> Library:
    """Byte-level BPE."""
    library = Library(models.BPE(**model))
    library.normalizer = normalizer
    if split is None:
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), plain])
    library.decoder = decoders.ByteLevel()
    library.train_from_iterator(_training_texts(), trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    ))  # fmt: skip
    return library


def beginning(library: Library, token: str) -> Library:
    """The tokenizer, which puts a token before each text."""
    library.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, library.token_to_id(token))]
    )
    return library


def gpt2() -> tuple[Library, dict[str, Any]]:
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return byte_level(None, ["<|endoftext|>"]), settings


def llama3() -> tuple[Library, dict[str, Any]]:
    library = byte_level(LLAMA_3, ["<|begin_of_text|>", "<|end_of_text|>"], ignore_merges=True)
    settings = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    return beginning(library, "<|begin_of_text|>"), settings


def qwen() -> tuple[Library, dict[str, Any]]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return byte_level(LLAMA_3.replace("{1,3}", ""), special, normalizers.NFC()), settings


def mixtral() -> tuple[Library, dict[str, Any]]:
    """Sentencepiece's BPE with byte fallback, as converted by transformers: spaces are marks, one of them before each text."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    library = Library(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581+[^\u2581\n]*|\n+"), "isolated")  # for its training alone
    library.train_from_iterator(_training_texts(), trainers.BpeTrainer(
        vocab_size=PIECES, special_tokens=special, limit_alphabet=150, show_progress=False
    ))  # fmt: skip
    content = json.loads(library.to_str())
    content |= {"pre_tokenizer": None, "added_tokens": content["added_tokens"][:3]}
    library = Library.from_str(json.dumps(content))
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    end = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {"bos_token": "<s>", "eos_token": end, "unk_token": "<unk>", "add_bos_token": True}
    return beginning(library, "<s>"), settings


def unigram() -> tuple[Library, dict[str, Any]]:
    """As T5's: what a text becomes is normalized, and its spaces are not all kept."""
    library = Library(models.Unigram())
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    library.train_from_iterator(_training_texts(), trainers.UnigramTrainer(
        vocab_size=PIECES, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    ))  # fmt: skip
    library.post_processor = processors.TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)])
    return library, {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


CASES: dict[str, Callable[[], tuple[Library, dict[str, Any]]]] = {
    "gpt2": gpt2,
    "llama3": llama3,
    "qwen": qwen,
    "mixtral": mixtral,
    "unigram": unigram,
}
EXACT = ("gpt2", "llama3", "mixtral")
"""Those that give every text back; the others normalize it."""


def saved_tokenizer(name: str, folder: Path) -> Path:
    """Writes the files of a case of CASES as in a published folder, and returns the folder."""
    text, settings = _trained(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(text)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | settings))
    return folder


@functools.cache
def _trained(name: str) -> tuple[str, dict[str, Any]]:
    library, settings = CASES[name]()
    return library.to_str(pretty=True), settings


def _training_texts() -> list[str]:
    return [path.read_text(errors="replace")[:8000] for path in SOURCES] + list(FOREIGN) * 20
