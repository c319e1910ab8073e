import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import BYTES, LENGTH, write
from tokenyard.data import token_array as module
from tokenyard.data.build import open_data
from tokenyard.data.cache import atomic_folder, cache_folder
from tokenyard.data.config import Corpus, DataConfig
from tokenyard.data.corpus import documents, survey
from tokenyard.data.token_array import MANIFEST_FILE, TOKENS_FILE, open_tokens
from tokenyard.data.tokenizer_types import BytesTokenizer


def test_tokens_are_all_documents_with_their_ends(folder: DataConfig, tmp_path: Path) -> None:
    ids, manifest, _ = open_tokens(survey(folder), "train", BytesTokenizer(), tmp_path)
    ends = np.flatnonzero(ids == BytesTokenizer.end_of_document)
    found = [BytesTokenizer().decode(part.tolist()) for part in np.split(ids, ends + 1)[:-1]]
    texts = [item.text for item in documents(folder, "train")]
    assert sorted(found) == sorted(texts) and found != texts
    assert ids[-1] == BytesTokenizer.end_of_document
    size = sum(len(text.encode()) for text in texts)
    assert manifest[:3] == (len(texts), size + len(texts), size)
    assert ids.dtype == np.uint16 and not ids.flags.writeable


def test_batches_of_documents_do_not_change_the_tokens(folder: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_tokens(survey(folder), "train", BytesTokenizer(), tmp_path / "a")
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 1000)
    parts = open_tokens(survey(folder), "train", BytesTokenizer(), tmp_path / "b")
    assert whole.manifest == parts.manifest and np.array_equal(whole.ids, parts.ids)


def test_more_ids_than_16_bits(folder: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = BytesTokenizer()
    monkeypatch.setattr(tokenizer, "size", 2**16 + 1, raising=False)
    monkeypatch.setattr(tokenizer, "end_of_document", 2**16, raising=False)
    ids, *_ = open_tokens(survey(folder), "validation", tokenizer, tmp_path)
    assert ids.dtype == np.uint32 and ids[-1] == 2**16


def test_tokens_are_kept_and_made_again_for_another_text(
    folder: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_tokens(survey(folder), "train", BytesTokenizer(), tmp_path)
    write = module._write
    monkeypatch.setattr(module, "_write", None)
    assert open_tokens(survey(folder), "train", BytesTokenizer(), tmp_path).manifest == first.manifest
    monkeypatch.setattr(module, "_write", write)
    (Path(folder.path or "") / survey(folder).train[0]).write_text("Another text.")
    assert open_tokens(survey(folder), "train", BytesTokenizer(), tmp_path).manifest.fingerprint != first.manifest.fingerprint


def test_damaged_tokens_are_refused(folder: DataConfig, tmp_path: Path) -> None:
    open_tokens(survey(folder), "train", BytesTokenizer(), tmp_path)
    (made,) = (tmp_path / "tokens").iterdir()
    (made / TOKENS_FILE).write_bytes((made / TOKENS_FILE).read_bytes()[:-10])
    with pytest.raises(ValueError, match="damaged"):
        open_tokens(survey(folder), "train", BytesTokenizer(), tmp_path)
    (made / MANIFEST_FILE).write_text("{}")
    with pytest.raises(ValueError, match="damaged"):
        open_tokens(survey(folder), "train", BytesTokenizer(), tmp_path)


def test_publish_shows_all_or_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic_folder(tmp_path / "a") as unfinished:
        (unfinished / "half").touch()
        raise KeyError
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "a") as slow:
        (slow / "slow").touch()
        with atomic_folder(tmp_path / "a") as fast:
            (fast / "fast").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "fast"]


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENYARD_CACHE", str(tmp_path / "environment"))
    assert cache_folder(DataConfig()) == tmp_path / "environment"
    assert cache_folder(DataConfig(cache=str(tmp_path / "setting"))) == tmp_path / "setting"
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"data\.cache=.*file/x must be"):
        cache_folder(DataConfig(cache=str(tmp_path / "file" / "x")))


def changed(path: Path, at: int, keep_time: bool) -> None:
    """Another id of the same size."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.fault(
    36, "an edit of the same size is refused when opened; in files over 1 MiB, one that keeps the file's time may need data.verify"
)
@pytest.mark.parametrize("keep_time", [False, True])
def test_a_changed_id_is_seen(folder: DataConfig, tmp_path: Path, keep_time: bool) -> None:
    open_tokens(survey(folder), "train", BytesTokenizer(), tmp_path)
    (file,) = (tmp_path / "tokens").glob(f"*/{TOKENS_FILE}")
    changed(file, 5000, keep_time)
    with pytest.raises(ValueError, match=r"cached tokens in .* were changed .*remove the folder and they are made again"):
        open_tokens(survey(folder), "train", BytesTokenizer(), tmp_path)


@pytest.mark.fault(36)
def test_a_changed_id_of_many(tmp_path: Path) -> None:
    ids = np.arange(4 << 20, dtype="<u2")
    np.save(tmp_path / TOKENS_FILE, ids)
    about = module.TokensManifest(1, len(ids), 1, [], 0, 0, module.hash_ids(ids))
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(about._asdict()))
    assert len(module.load_tokens(tmp_path).ids) == len(ids)  # of a version that noted nothing: hashed whole
    module.write_stamp(tmp_path)
    changed(tmp_path / TOKENS_FILE, 300_001, keep_time=True)
    module.load_tokens(tmp_path)
    with pytest.raises(ValueError, match="were changed"):
        module.load_tokens(tmp_path, verify=True)
    changed(tmp_path / TOKENS_FILE, 300_001, keep_time=True)
    os.utime(tmp_path / TOKENS_FILE)  # touched and whole
    assert np.array_equal(module.load_tokens(tmp_path).ids, ids)
    changed(tmp_path / TOKENS_FILE, 300_001, keep_time=False)
    with pytest.raises(ValueError, match="were changed"):
        module.load_tokens(tmp_path)


def mixed(folder: DataConfig, tmp_path: Path) -> DataConfig:
    return replace(folder, corpus=Corpus.mix, path=None, mix=[f"weight=1 corpus=text path={folder.path}"])


def streamed(folder: DataConfig, tmp_path: Path) -> DataConfig:
    """Whose held-out documents are in the cache."""
    return replace(write(tmp_path / "rows", Corpus.lines), cache=folder.cache, validation_fraction=0.2)


@pytest.mark.fault(36)
@pytest.mark.parametrize("kind", [lambda folder, _: folder, mixed, streamed], ids=["a corpus", "a mixture", "a stream"])
def test_all_of_the_cache_is_hashed_if_asked(
    kind: Any, folder: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, sizes = kind(folder, tmp_path), (LENGTH, 1, 4, None, 1)
    open_data(config, BYTES, *sizes)
    monkeypatch.setattr(module, "_stamp_matches", lambda _: True)
    for file in (tmp_path / "cache").rglob(TOKENS_FILE):
        changed(file, -1, keep_time=True)
    open_data(config, BYTES, *sizes)
    with pytest.raises(ValueError, match="were changed"):
        open_data(replace(config, verify=True), BYTES, *sizes)
