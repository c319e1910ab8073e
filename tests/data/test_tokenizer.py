import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from tokenyard.data import tokenizer as module
from tokenyard.data.config import Corpus, DataConfig, TokenizerConfig, TokenizerKind
from tokenyard.data.corpus import survey
from tokenyard.data.tokenizer import build_tokenizer, load_tokenizer
from tokenyard.data.tokenizer_path import MODEL_FILE
from tokenyard.data.tokenizer_types import ABOUT_FILE, BytesTokenizer, SentencePieceTokenizer, Tokenizer

SYNTHETIC = DataConfig(corpus=Corpus.synthetic)
SMALL = TokenizerConfig(pieces=400, sample_bytes=50_000)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build_tokenizer(SMALL, survey(SYNTHETIC), tmp_path_factory.mktemp("cache"))


@pytest.fixture(params=["sentencepiece", "bytes"])
def tokenizer(request: pytest.FixtureRequest, trained: Tokenizer) -> Tokenizer:
    return trained if request.param == "sentencepiece" else BytesTokenizer()


ODD = [
    "",
    " ",
    "   leading and trailing   ",
    "\n",
    "a\r\nb\rc\n\n\n",
    "\tif x:\n\t\treturn  {}\n",
    " " * 1000 + "\t" * 100,
    "\0",
    "a\0b\x01\x02\x1b[0m\x7f",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u00e9 e\u0301 \ufb01 \u00b2 \u4e2d\u6587 \u0645\u0631",
    "\u2581 \u2581\u2581x\u2581",
    "<s></s><unk><pad><0x41>",
    "\ufeff\u00a0\u3000\u200b\u2028\ufffd\u2047\U0010ffff",
    "1234567890.12e-5",
]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_round_trip_is_exact(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 <= index < tokenizer.size for index in ids)


def test_round_trip_of_random_text_and_of_batches(tokenizer: Tokenizer) -> None:
    chance = random.Random(1)
    texts = ["".join(chance.choice("ab \n\t\r\0\u2581\u00e9\U0001f600_.(1") for _ in range(200)) for _ in range(200)] + ODD
    batch = tokenizer.encode_batch(texts, threads=4)
    assert batch == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(ids) for ids in batch] == texts


def test_marks_are_not_text(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("one"), tokenizer.end_of_document, *tokenizer.encode("two")]
    assert tokenizer.decode(ids) == "onetwo"


def test_bytes_are_the_same_ids_in_both(trained: Tokenizer) -> None:
    assert trained.encode("\U0001f600") == BytesTokenizer().encode("\U0001f600")
    assert trained.end_of_document == BytesTokenizer.end_of_document == 2


def test_pieces_cross_no_digits_and_hold_runs_of_spaces(tmp_path: Path) -> None:
    source = "".join(f"def f{index}(x):\n        if x:\n            return {index % 5} + 90125\n\n" for index in range(500))
    (tmp_path / "code.txt").write_text(source)
    corpus = survey(DataConfig(corpus=Corpus.text, path=str(tmp_path / "code.txt")))
    tokenizer = build_tokenizer(replace(SMALL, pieces=300), corpus, tmp_path)
    assert len(tokenizer.encode(" " * 12)) <= 2
    assert len(tokenizer.encode("90125")) == 5


def test_training_is_deterministic_and_quiet(trained: Tokenizer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    again = build_tokenizer(SMALL, survey(SYNTHETIC), tmp_path)
    assert again.hash == trained.hash and again.size == SMALL.pieces
    assert capfd.readouterr() == ("", "")
    other = build_tokenizer(SMALL, survey(replace(SYNTHETIC, synthetic_documents=400)), tmp_path)
    assert other.hash != trained.hash


def test_a_trained_tokenizer_is_kept(trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_tokenizer(SMALL, survey(SYNTHETIC), tmp_path)
    monkeypatch.setattr(module, "train_pieces", None)
    assert build_tokenizer(SMALL, survey(SYNTHETIC), tmp_path).hash == trained.hash
    with pytest.raises(TypeError):  # other settings are another tokenizer
        build_tokenizer(replace(SMALL, pieces=401), survey(SYNTHETIC), tmp_path)


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "here")
    loaded = load_tokenizer(tmp_path / "here")
    assert (type(loaded), loaded.hash, loaded.size) == (type(tokenizer), tokenizer.hash, tokenizer.size)
    assert loaded.encode("Ada has 3 red kites.") == tokenizer.encode("Ada has 3 red kites.")


def test_a_changed_tokenizer_is_refused(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    about = json.loads((tmp_path / ABOUT_FILE).read_text())
    (tmp_path / ABOUT_FILE).write_text(json.dumps({**about, "hash": "0" * 32}))
    with pytest.raises(ValueError, match="hash"):
        load_tokenizer(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"no model")
    with pytest.raises(ValueError, match="sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / MODEL_FILE).unlink()
    with pytest.raises(ValueError, match=MODEL_FILE):
        load_tokenizer(tmp_path)


def test_a_model_at_hand(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    config = TokenizerConfig(path=str(tmp_path / MODEL_FILE))
    assert build_tokenizer(config, survey(SYNTHETIC), tmp_path).hash == trained.hash
    assert isinstance(build_tokenizer(config, survey(SYNTHETIC), tmp_path), SentencePieceTokenizer)


def test_too_many_pieces_names_the_largest_value(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus = survey(SYNTHETIC)
    with pytest.raises(ValueError, match=r"^tokenizer\.pieces=60000 .*largest possible value is \d+$") as caught:
        build_tokenizer(replace(SMALL, pieces=60000), corpus, tmp_path)
    largest = int(str(caught.value).split()[-1])
    assert build_tokenizer(replace(SMALL, pieces=largest), corpus, tmp_path).size == largest
    with pytest.raises(ValueError, match=r"^tokenizer\.pieces=261 .*smallest possible value is \d+$") as caught:
        build_tokenizer(replace(SMALL, pieces=261), corpus, tmp_path)
    smallest = int(str(caught.value).split()[-1])
    assert build_tokenizer(replace(SMALL, pieces=smallest), corpus, tmp_path).size == smallest
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "/no/such.model"}, r"tokenizer\.path=/no/such\.model must exist; the nearest existing path is /"),
        ({"path": "/"}, r"tokenizer\.path=/ must be a sentencepiece \.model file"),
        ({"path": __file__}, r"tokenizer\.path=.* must be a sentencepiece model"),
        ({"path": __file__, "kind": TokenizerKind.bytes}, r"tokenizer\.kind=bytes"),
        ({"pieces": 259}, r"tokenizer\.pieces=259 must be at least 260"),
        ({"sample_bytes": 0}, r"tokenizer\.sample_bytes=0"),
    ],
)
def test_settings_that_cannot_work(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        build_tokenizer(replace(SMALL, **change), survey(SYNTHETIC), tmp_path)
