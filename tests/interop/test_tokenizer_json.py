"""Exported and imported tokenizers give the same ids: sentencepiece and bytes to tokenizer.json, tokenizer.model back."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenyard.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from tokenyard.data.tokenizer import BytesTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from tokenyard.data.tokenizer_training import train_pieces
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder
from tokenyard.interop.tokenizer_json import TEXTS, import_tokenizer, write_tokenizer

pytest.importorskip("tokenizers", reason="the comparison needs tokenizers (pip install 'tokenyard[hf]')")

SOURCES = sorted(Path(json.__file__).parents[1].glob("[a-d]*.py"))
MORE = (*(path.read_text()[:3000] for path in SOURCES[::10]), " " * 40, "\n" * 9 + "\t" * 9, "=" * 70, "aAbBaAbB" * 9)


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    """Tokenizers as `tokenyard train` makes them."""
    return SentencePieceTokenizer(train_pieces([path.read_text()[:20000] for path in SOURCES], 1200), "trained")


@pytest.fixture(params=["trained", "bytes"])
def tokenizer(request: pytest.FixtureRequest, trained: SentencePieceTokenizer) -> Tokenizer:
    return trained if request.param == "trained" else BytesTokenizer()


def test_transformers_gives_the_same_ids_and_texts(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tokenizer, tmp_path)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.end_of_document == 2
    for text in (*TEXTS, *MORE):
        ids = theirs(text)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert theirs.decode(ids) == text == tokenizer.decode(ids)


def test_the_library_alone_gives_them_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    import tokenizers

    write_tokenizer(tokenizer, tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.get_vocab_size() == tokenizer.size
    for text in (*TEXTS, *MORE):
        assert theirs.encode(text).ids == tokenizer.encode(text)


def foreign(**settings: Any) -> SentencePieceTokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for path in SOURCES[:20] for line in path.read_text().splitlines()),
        model_writer=model,
        vocab_size=600,
        minloglevel=2,
        **settings,
    )
    return SentencePieceTokenizer(model.getvalue(), "foreign")


@pytest.mark.parametrize(
    "settings",
    [{"model_type": "unigram", "byte_fallback": True}, {"model_type": "bpe", "byte_fallback": True}, {"model_type": "bpe"}],
    ids=["unigram", "dummy prefix", "no bytes"],
)
def test_what_would_differ_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^tokenizer\.json would give .* for "):
        write_tokenizer(foreign(**settings), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ours_comes_back(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    write_tokenizer(trained, tmp_path)
    import_tokenizer(tmp_path, tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").hash == trained.hash


def test_a_model_beside_another_tokenizer_is_not_taken(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    write_tokenizer(BytesTokenizer(), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(trained.model)
    with pytest.raises(ValueError, match=r"tokenizer\.json would give other ids"):
        import_tokenizer(tmp_path, tmp_path / "ours")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        import_tokenizer(tmp_path, tmp_path / "ours")


def test_files_travel_through_an_import(saved: Callable[..., Path], trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    theirs = saved("Llama")
    write_tokenizer(trained, theirs)
    (theirs / "chat_template.jinja").write_text("{{ messages }}")
    made = import_folder(theirs, tmp_path / "ours")
    assert made.notes == []
    assert load_tokenizer(made.checkpoint / "tokenizer").hash == trained.hash
    export_checkpoint(made.checkpoint, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (theirs / name).read_bytes()


def test_what_cannot_travel_is_said_and_the_weights_do(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = saved("Llama")
    write_tokenizer(BytesTokenizer(), theirs)
    made = import_folder(theirs, tmp_path / "ours")
    assert [note.partition(":")[0] for note in made.notes] == ["tokenizer"] and "there is no tokenizer.model" in made.notes[0]
    shutil.rmtree(made.checkpoint / "tokenizer_hf")
    manifest = read_manifest(made.checkpoint)
    (made.checkpoint / MANIFEST).unlink()
    write_manifest(made.checkpoint / MANIFEST, replace(manifest, attachments={}))
    foreign(model_type="unigram").save(made.checkpoint / "tokenizer")
    exported = export_checkpoint(made.checkpoint, tmp_path / "again")
    assert len(exported.notes) == 1 and exported.notes[0].startswith("no tokenizer: tokenizer.json would give ")
    assert exported.files and not (tmp_path / "again" / "tokenizer.json").exists()
    BytesTokenizer().save(made.checkpoint / "tokenizer")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    exported = export_checkpoint(made.checkpoint, tmp_path / "without")
    assert "pip install" in exported.notes[0]
