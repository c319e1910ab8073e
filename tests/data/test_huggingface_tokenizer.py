"""A tokenizer.json made with the library itself, alone and beside transformers."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizer_cases import CASES, EXACT, mixed_texts, saved_tokenizer
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers, trainers
from tokenyard.data.config import TokenizerConfig, TokenizerKind
from tokenyard.data.huggingface_tokenizer import HuggingFaceTokenizer
from tokenyard.data.tokenizer import load_tokenizer, ready_tokenizer, settings_of_saved
from tokenyard.data.tokenizer_path import check_tokenizer
from tokenyard.data.tokenizer_types import SPACE_MARK

TEXTS = ["the cat sat on the mat", "na\u00efve \U0001f600 text\n\twith  spaces", "<|endoftext|> is text here", ""]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    )
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def config(path: Path, end: str | None = None) -> TokenizerConfig:
    return TokenizerConfig(kind=TokenizerKind.huggingface, path=str(path), end=end)


def test_round_trip_and_saved(path: Path, tmp_path: Path) -> None:
    tokenizer = ready_tokenizer(config(path))
    assert tokenizer is not None and tokenizer.end_of_document == 0
    batch = tokenizer.encode_batch(TEXTS, threads=1)
    assert [tokenizer.decode(ids) for ids in batch] == TEXTS and batch == [tokenizer.encode(text) for text in TEXTS]
    assert all(0 not in ids and max(ids, default=0) < tokenizer.size for ids in batch)
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").hash == tokenizer.hash


def test_refusals(path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.end=<none> must be a token of"):
        ready_tokenizer(config(path, "<none>"))
    with pytest.raises(ValueError, match=r"the nearest is tokenizer=huggingface"):
        check_tokenizer(TokenizerConfig(path=str(path)))
    with pytest.raises(ValueError, match=r"must name a tokenizer\.json"):
        check_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface))


def test_a_tokenizer_at_which_the_library_panics_is_refused(path: Path) -> None:
    about = json.loads(path.read_text())
    about["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"must be a tokenizer\.json \(Precompiled"):
        ready_tokenizer(config(path))


@pytest.mark.fault(37, "refused in one line with the nearest value; one in an older checkpoint draws nothing")
def test_dropout_is_refused(path: Path, tmp_path: Path) -> None:
    about = json.loads(path.read_text())
    about["model"]["dropout"] = 0.3
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"without dropout: its model\.dropout=0\.3 draws .*the nearest value is null"):
        ready_tokenizer(config(path))
    HuggingFaceTokenizer(path.read_bytes(), "it").save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert len({tuple(saved.encode(TEXTS[0])) for _ in range(50)}) == 1
    about["model"]["dropout"] = 0.0
    path.write_text(json.dumps(about))
    assert ready_tokenizer(config(path)) is not None


def test_only_the_library_parses_a_tokenizer_json(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary of 150,000 pieces is 13 MB, and a run opens its tokenizer twice."""
    parsed, loads = [], json.loads
    monkeypatch.setattr(json, "loads", lambda content: parsed.append(len(content)) or loads(content))
    assert ready_tokenizer(config(path)) is not None
    assert path.stat().st_size not in parsed


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a kind of tokenizer that published models have; its name is that of the case."""
    return saved_tokenizer(request.param, tmp_path_factory.mktemp("cases") / request.param)


def opened(folder: Path, **settings: Any) -> HuggingFaceTokenizer:
    tokenizer = ready_tokenizer(TokenizerConfig(kind=TokenizerKind.huggingface, path=str(folder), **settings))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def compare(folder: Path, size: int) -> None:
    """Ids and texts are those of transformers; where the kind allows, the text is the one that was encoded."""
    theirs: Any = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    tokenizer, texts = opened(folder), mixed_texts(size)
    assert sum(len(text.encode()) for text in texts) >= size
    for first in range(0, len(texts), 500):
        some = texts[first : first + 500]
        batch = tokenizer.encode_batch(some, threads=1)
        assert batch == theirs(some, add_special_tokens=False)["input_ids"]
        back = [tokenizer.decode(ids) for ids in batch]
        assert back == [theirs.decode(ids, skip_special_tokens=True) for ids in batch]
        assert max(max(ids, default=0) for ids in batch) < tokenizer.size == len(theirs)
        if folder.name in EXACT:  # sentencepiece writes a space as its mark, and reads the mark as a space
            assert back == [text.replace(SPACE_MARK, " ") if folder.name == "mixtral" else text for text in some]


def test_ids_are_those_of_transformers(folder: Path) -> None:
    """TOKENIZER_CHARACTERS=10000000 in the environment compares ten megabytes, 20 seconds a tokenizer."""
    compare(folder, int(os.environ.get("TOKENIZER_CHARACTERS", "1000000")))


def test_prompts_are_those_of_transformers(folder: Path) -> None:
    """With the token before it that the tokenizer adds, and without an end."""
    theirs: Any = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    tokenizer = opened(folder)
    for text in ("Hello", " two", "<|im_start|>user\nHi</s><s>", "<|begin_of_text|>once"):
        ids = theirs(text)["input_ids"]
        doubled = tokenizer.begin_of_document is not None and ids[:2] == [tokenizer.begin_of_document] * 2
        expected = ids[1:] if doubled else ids[:-1] if folder.name == "unigram" else ids
        assert tokenizer.encode_prompt(text) == expected
    assert tokenizer.encode_prompt("") == [
        tokenizer.end_of_document if tokenizer.begin_of_document is None else tokenizer.begin_of_document
    ]


MARKS = {
    "gpt2": (None, "<|endoftext|>"),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>"),
    "qwen": (None, "<|im_end|>"),
    "mixtral": ("<s>", "</s>"),
    "unigram": (None, "</s>"),
}


def test_documents_stand_between_the_marks_of_the_family(folder: Path, tmp_path: Path) -> None:
    tokenizer, library = opened(folder), Library.from_file(str(folder / "tokenizer.json"))
    begin, end = (None if token is None else library.token_to_id(token) for token in MARKS[folder.name])
    assert (tokenizer.begin_of_document, tokenizer.end_of_document) == (begin, end)
    expected = [] if begin is None else [begin]
    assert tokenizer.encode_documents(["one two", ""], threads=1) == [
        [*expected, *tokenizer.encode("one two"), end],
        [*expected, end],
    ]
    tokenizer.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert (saved.hash, saved.begin_of_document) == (tokenizer.hash, begin)
    assert opened(folder, begin="", end=tokenizer.end).begin_of_document is None
    assert (opened(folder, begin="").hash == tokenizer.hash) is (begin is None)


def test_add_bos_token_decides_nothing_as_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for case, setting in (("llama3", False), ("qwen", True)):
        folder = saved_tokenizer(case, tmp_path / case)
        about = json.loads((folder / "tokenizer_config.json").read_text()) | {"add_bos_token": setting, "add_eos_token": setting}
        (folder / "tokenizer_config.json").write_text(json.dumps({**about, "bos_token": about.get("bos_token", "<|im_start|>")}))
        tokenizer = opened(folder)
        assert tokenizer.begin == (MARKS[case][0] or "")
        assert transformers.AutoTokenizer.from_pretrained(folder)("x")["input_ids"] == tokenizer.encode_prompt("x")


def test_a_checkpoint_of_before_keeps_its_documents(tmp_path: Path) -> None:
    """Earlier versions put nothing before a document, and saved no begin."""
    tokenizer = opened(saved_tokenizer("llama3", tmp_path / "theirs"), begin="")
    tokenizer.save(tmp_path / "saved")
    about = json.loads((tmp_path / "saved" / "tokenizer_about.json").read_text())
    assert about.pop("begin") == ""
    (tmp_path / "saved" / "tokenizer_about.json").write_text(json.dumps(about))
    assert load_tokenizer(tmp_path / "saved").hash == tokenizer.hash
    again = ready_tokenizer(TokenizerConfig(**{**settings_of_saved(tmp_path / "saved"), "kind": TokenizerKind.huggingface}))  # pyright: ignore[reportArgumentType]
    assert again is not None and (again.hash, again.begin_of_document) == (tokenizer.hash, None)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    folder = saved_tokenizer("gpt2", tmp_path / "theirs")
    (tmp_path / "secret").write_text("{}")
    (folder / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"leads out of its folder: .*special_tokens_map\.json"):
        opened(folder)


def test_without_the_library_one_line_says_what_to_install(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"^tokenizer\.path=.* is not installed: pip install tokenizers$"):
        ready_tokenizer(config(path))
