import logging
from dataclasses import replace
from pathlib import Path

import pytest
from tokenyard.data.config import Corpus, DataConfig
from tokenyard.data.corpus import Chunks, documents, survey, unit_hash


def test_stdlib_is_found_split_and_reported() -> None:
    corpus = survey(DataConfig())
    assert len(corpus.train) > 500 and len(corpus.validation) > 25
    assert "argparse.py" in corpus.train + corpus.validation
    assert not any("site-packages" in name for name in corpus.train + corpus.validation)
    assert unit_hash("argparse.py") == 0.25960999606469415, (
        "another hash would move documents between the splits of running experiments"
    )


def test_splits_share_neither_names_nor_texts(folder: DataConfig) -> None:
    root = Path(folder.path or "")
    for path in list(root.rglob("*.txt")):
        path.with_name("copy-" + path.name).write_bytes(path.read_bytes())
    train, validation = (list(documents(folder, split)) for split in ("train", "validation"))
    assert not {item.name for item in train} & {item.name for item in validation}
    assert not {item.text for item in train} & {item.text for item in validation}
    assert len(train) + len(validation) == 120 == survey(folder).duplicates
    assert [item.name for item in train] == sorted(item.name for item in train)


def test_split_of_a_document_depends_on_its_name_alone(folder: DataConfig) -> None:
    before = survey(folder)
    root = Path(folder.path or "")
    for index in range(60):
        (root / f"new{index}.txt").write_text(f"Something new, number {index}.")
    (root / before.train[0]).write_text("Another text under the same name.")
    after = survey(folder)
    assert set(before.train) <= set(after.train) and set(before.validation) <= set(after.validation)
    assert after.fingerprints["train"] != before.fingerprints["train"]


def test_what_is_no_text_is_counted_and_named(folder: DataConfig, caplog: pytest.LogCaptureFixture) -> None:
    root = Path(folder.path or "")
    (root / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (root / "blank.txt").write_text(" \n\t\n")
    with caplog.at_level(logging.INFO, "tokenyard"):
        corpus = survey(folder)
    assert (corpus.undecodable, corpus.empty) == (["latin.txt"], 1)
    assert "1 not UTF-8 (latin.txt)" in caplog.text


def test_chunks_of_one_file_are_the_file(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"".join(b"Paragraph %d\r\nof two lines \xc3\xa9\r\n\r\n\n" % index for index in range(2000)))
    source = Chunks(path)
    assert b"".join(map(source.read, source.names())) == path.read_bytes()
    assert source.names() == sorted(source.names()) and len(source.names()) > 100
    assert all(source.read(name).startswith(b"Paragraph") for name in source.names())
    corpus = survey(DataConfig(corpus=Corpus.text, path=str(path)))
    assert corpus.validation and not corpus.undecodable


def test_chunks_without_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("".join(f"line {index}\n" for index in range(20000)))
    source = Chunks(path)
    assert len(source.names()) > 10
    assert b"".join(map(source.read, source.names())) == path.read_bytes()


def test_synthetic_is_the_same_everywhere_and_tells_the_truth() -> None:
    texts = [item.text for item in documents(DataConfig(corpus=Corpus.synthetic), "validation")]
    assert texts == [item.text for item in documents(DataConfig(corpus=Corpus.synthetic), "validation")]
    story = texts[0].splitlines()[0].split()
    some, verb, more = int(story[2]), story[6], int(story[7])
    told = int(texts[0].splitlines()[1].split()[-3])
    assert told == (some + more if verb == "finds" else max(some - more, 0))


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"path": "{root}x"}, ["data.path={root}x", "must exist", "nearest", "{root}"]),
        ({"path": "{root}/no/such/file"}, ["data.path=", "nearest existing path is {root}"]),
        ({"path": None}, ["data.path=null", "nearest"]),
        ({"pattern": "**/*.md"}, ["data.path={root}", "data.pattern='**/*.md'", "data.pattern='**/*.txt'"]),
        ({"pattern": "/etc/*"}, ["data.pattern='/etc/*'", "relative"]),
        ({"pattern": ""}, ["data.pattern=''", "relative"]),
        ({"pattern": "../*"}, ["data.pattern='../*'", "relative"]),
        ({"corpus": Corpus.stdlib}, ["data.path={root}", "data.corpus=text"]),
        ({"validation_fraction": 1.0}, ["data.validation_fraction=1.0", "between 0 and 1"]),
        ({"corpus": Corpus.synthetic, "path": None, "synthetic_documents": 1}, ["data.synthetic_documents=1", "at least 2"]),
    ],
)
def test_settings_that_cannot_work(folder: DataConfig, change: dict, parts: list[str]) -> None:
    root = str(folder.path)
    change = {key: value.format(root=root) if isinstance(value, str) else value for key, value in change.items()}
    with pytest.raises(ValueError) as caught:
        survey(replace(folder, **change))
    message = str(caught.value)
    assert "\n" not in message
    assert not [part for part in parts if part.format(root=root) not in message], message


def test_an_empty_split_is_refused_with_a_fraction_that_works(folder: DataConfig) -> None:
    for fraction in (1e-9, 1 - 1e-9):
        with pytest.raises(ValueError, match="validation_fraction=") as caught:
            survey(replace(folder, validation_fraction=fraction))
        works = float(str(caught.value).split()[-1])
        corpus = survey(replace(folder, validation_fraction=works))
        assert min(len(corpus.train), len(corpus.validation)) == 1
