"""Exported and imported tokenizers give the same ids: sentencepiece and bytes as tokenizer.json, and anybody's tokenizer.json."""

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
from tokenizer_cases import CASES, PIECES, mixed_texts, saved_tokenizer
from tokenyard.checkpoint.manifest import MANIFEST, read_manifest, write_manifest
from tokenyard.data.tokenizer import load_tokenizer
from tokenyard.data.tokenizer_training import train_pieces
from tokenyard.data.tokenizer_types import BytesTokenizer, SentencePieceTokenizer, Tokenizer
from tokenyard.interop.export import export_checkpoint
from tokenyard.interop.import_ import import_folder
from tokenyard.interop.tokenizer_json import TEXTS, open_tokenizer, write_tokenizer
from tokenyard.launch.main import main

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


FOREIGN_KINDS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "dummy prefix": {"model_type": "bpe", "byte_fallback": True},
    "no bytes": {"model_type": "bpe"},
    "bare": {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False},
}


@pytest.mark.parametrize("kind", FOREIGN_KINDS)
def test_sentencepiece_models_of_others(kind: str, tmp_path: Path) -> None:
    """Trained elsewhere: our ids are those of sentencepiece, with the mark in a text too, and so are those of the export."""
    transformers = pytest.importorskip("transformers")
    tokenizer, texts = foreign(**FOREIGN_KINDS[kind]), mixed_texts(60_000)
    write_tokenizer(tokenizer, tmp_path)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode_batch(texts, threads=1)
    assert theirs(texts)["input_ids"] == ids
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    assert processor.encode(texts) == ids == [tokenizer.encode(text) for text in texts]
    known = [index for index in range(len(texts)) if processor.unk_id() not in ids[index]]
    assert known and [theirs.decode(ids[index]) for index in known] == [tokenizer.decode(ids[index]) for index in known]


def test_what_would_differ_is_refused(tmp_path: Path) -> None:
    """Of two ways to part a line of dashes, with the same probability, sentencepiece and the library take different ones."""
    with pytest.raises(ValueError, match=r"^tokenizer\.json would give other ids for "):
        write_tokenizer(foreign(model_type="unigram", byte_fallback=True), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_ours_comes_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """As the exported tokenizer.json, which gives the same ids, texts and ends."""
    write_tokenizer(tokenizer, tmp_path)
    again = open_tokenizer(tmp_path)
    marks = tokenizer.begin_of_document, tokenizer.end_of_document, tokenizer.size
    assert (again.begin_of_document, again.end_of_document, again.size) == marks
    batch = again.encode_batch([*TEXTS, *MORE], threads=1)
    assert batch == tokenizer.encode_batch([*TEXTS, *MORE], threads=1)
    assert [again.decode(ids) for ids in batch] == [*TEXTS, *MORE]


def test_a_folder_without_tokenizer_json_gives_its_model(trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    write_tokenizer(trained, tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    assert open_tokenizer(tmp_path).hash == trained.hash
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match=r"or a folder with a tokenizer\.model"):
        open_tokenizer(tmp_path)


def test_files_travel_through_an_import(saved: Callable[..., Path], trained: SentencePieceTokenizer, tmp_path: Path) -> None:
    theirs = saved("Llama", vocab_size=1200)
    write_tokenizer(trained, theirs)
    (theirs / "chat_template.jinja").write_text("{{ messages }}")
    made = import_folder(theirs, tmp_path / "ours")
    assert made.notes == []
    assert load_tokenizer(made.checkpoint / "tokenizer").encode_batch(list(MORE), 1) == trained.encode_batch(list(MORE), 1)
    export_checkpoint(made.checkpoint, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (theirs / name).read_bytes()


def test_what_cannot_travel_is_said_and_the_weights_do(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = saved("Llama")
    write_tokenizer(BytesTokenizer(), theirs)
    made = import_folder(theirs, tmp_path / "small")
    assert made.notes == [
        "tokenizer: only carried along, tokenyard cannot use it (it has 259 pieces, and the model 48 rows for them)"
    ]
    (theirs / "tokenizer.json").write_text("{}")
    made = import_folder(theirs, tmp_path / "ours")
    assert len(made.notes) == 1 and made.notes[0].startswith(
        "tokenizer: only carried along, tokenyard cannot use it (tokenizer.path="
    )
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


@pytest.fixture(scope="module", params=CASES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tokenizer(request.param, tmp_path_factory.mktemp("cases") / request.param)


def test_a_tokenizer_of_anybody_travels(
    folder: Path, saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Import, generate, export: the ids are transformers' ids of the folder that was imported."""
    transformers = pytest.importorskip("transformers")
    theirs = saved("Mixtral", vocab_size=PIECES, num_local_experts=4)
    shutil.copytree(folder, theirs, dirs_exist_ok=True)
    assert main(["import", str(theirs), str(tmp_path / "ours")]) == 0
    assert "tokenizer" not in capsys.readouterr().err
    ours, texts = load_tokenizer(tmp_path / "ours" / "step_00000000" / "tokenizer"), mixed_texts(20_000)
    original: Any = transformers.AutoTokenizer.from_pretrained(theirs)
    assert ours.encode_batch(texts, threads=1) == original(texts, add_special_tokens=False)["input_ids"]
    for place in (theirs, tmp_path / "ours"):
        assert main(["generate", str(place), "--prompt", "import ", "--tokens", "3"]) == 0
    generated = capsys.readouterr().out.split("import ")
    assert len(generated) == 3 and generated[1] == generated[2]
    few = ["sequence_length=32", "batch.sequences=4", "evaluate.sequences=4", f"data.cache={tmp_path / 'cache'}"]
    assert main(["evaluate", str(tmp_path / "ours"), "data.corpus=synthetic", "data.synthetic_documents=8", *few]) == 0
    assert " of synthetic; " in capsys.readouterr().out
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "again")]) == 0
    again: Any = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(texts)["input_ids"] == original(texts)["input_ids"]


def test_a_run_exports_its_tokenizer(folder: Path, tmp_path: Path) -> None:
    """One that was named by tokenizer.path: with what was beside it, and the class that takes tokenizer.json as it is."""
    transformers = pytest.importorskip("transformers")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = open_tokenizer(folder)
    tokenizer.save(tmp_path / "saved")
    write_tokenizer(load_tokenizer(tmp_path / "saved"), tmp_path)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = mixed_texts(20_000)
    assert theirs(texts, add_special_tokens=False)["input_ids"] == tokenizer.encode_batch(texts, threads=1)
    assert theirs.eos_token_id == tokenizer.end_of_document and theirs.chat_template == "{{ messages }}"
    original: Any = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token, theirs.pad_token) == (original.bos_token, original.pad_token)
    found = {f"{key}_token_id": getattr(theirs, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    assert tokenizer.special_ids() == {key: index for key, index in found.items() if index is not None}
    assert theirs("x")["input_ids"] == original("x")["input_ids"]


def test_an_export_names_no_code(tmp_path: Path) -> None:
    folder = saved_tokenizer("gpt2", tmp_path / "theirs")
    about = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**about, "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    (tmp_path / "again").mkdir()
    write_tokenizer(open_tokenizer(folder), tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
