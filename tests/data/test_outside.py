"""A folder's own words and links lead nowhere outside of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from streaming import BYTES, LENGTH, config_of, names_in, opened, taken, write
from tokenyard.data.build import open_data
from tokenyard.data.checks import check_corpus
from tokenyard.data.config import Corpus, DataConfig
from tokenyard.data.errors import DataUnavailable
from tokenyard.data.stream import hub_shards

pytestmark = pytest.mark.usefixtures("nothing_online")
NOWHERE = "http://127.0.0.1:9/x.txt"


@pytest.fixture
def nothing_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows, and beside their folder something private."""
    write(tmp_path / "rows", Corpus.lines)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key.txt").write_text("".join(f"private words {row}\n" for row in range(50)))
    return tmp_path / "rows"


def hub_config(folder: Path) -> DataConfig:
    return config_of(folder, Corpus.hf, path=None, name=str(folder))


def card(folder: Path, words: str, name: str = "README.md") -> None:
    fence = "---\n" if name == "README.md" else ""
    (folder / name).write_text(f"{fence}configs:\n- config_name: default\n{words}\n{fence}")


OUTSIDE = {
    "parent": "  data_files:\n  - split: train\n    path: ../private/*",
    "parent in the middle": "  data_files:\n  - split: train\n    path: sub/../../private/*",
    "absolute": "  data_files: {private}/*",
    "one of many": "  data_files:\n  - split: train\n    path: ['*.txt', ../private/key.txt]",
    "another split": "  data_files:\n  - split: train\n    path: '*.txt'\n  - split: test\n    path: ../private/*",
    "another configuration": "  data_files: '*.txt'\n- config_name: other\n  data_files: ../private/*",
    "data_dir": "  data_dir: ../private",
    "URL": f"  data_files: {NOWHERE}",
    "file URL": "  data_files: file://{private}/*",
    "in an archive": "  data_files: zip://*.txt::{private}/a.zip",
}


@pytest.mark.parametrize("name", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize("words", OUTSIDE)
def test_a_card_names_nothing_outside_of_its_folder(folder: Path, words: str, name: str) -> None:
    private = folder.parent / "private"
    card(folder, OUTSIDE[words].replace("{private}", str(private)), name)
    with pytest.raises(ValueError, match=rf"data\.name=.*rows.* leads out of its folder: .*(private|{NOWHERE})"):
        opened(hub_config(folder))


def test_a_card_may_choose_among_its_own(folder: Path) -> None:
    card(folder, "  data_files:\n  - split: train\n    path: '[01].txt'")
    config = replace(hub_config(folder), validation_fraction=0.2)
    assert {name[1] for name in names_in(taken(opened(config), range(40)))} == {"0", "1"}


def test_a_data_set_of_the_hub_names_its_own_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What its card says of this machine or of another one."""
    for other in (
        str(folder / "0.txt"),
        "https://example.org/x.txt",
        "hf://datasets/other/set@1/0.txt",
        "hf://buckets/somebody/set/0.txt",
    ):
        with pytest.raises(ValueError, match=r"data\.name=somebody/set leads out of its folder: "):
            hub_shards.refuse_foreign_files("somebody/set", ["hf://datasets/somebody/set@1/0.txt", other])
    hub_shards.refuse_foreign_files(
        "somebody/set", ["hf://datasets/somebody/set@1/0.txt", "hf://datasets/somebody/set@1/sub/1.txt"]
    )


@pytest.mark.parametrize("kind", [Corpus.hf, Corpus.lines, Corpus.text])
@pytest.mark.parametrize("linked", ["file", "folder"])
def test_links_out_of_a_folder_are_refused(folder: Path, kind: Corpus, linked: str) -> None:
    if linked == "file":
        (folder / "6.txt").symlink_to("../private/key.txt")
    else:
        (folder / "sub").symlink_to(folder.parent / "private")
    config = replace(hub_config(folder) if kind is Corpus.hf else config_of(folder, kind), validation_fraction=0.4)
    if linked == "folder":  # not looked into
        assert open_data(config, BYTES, LENGTH, 1, 4, None, 1).facts.undecodable == 0
        return
    with pytest.raises(ValueError, match=r"leads out of its folder: .*(6\.txt|key\.txt)"):
        open_data(config, BYTES, LENGTH, 1, 4, None, 1)


def test_links_that_stay_and_links_that_a_user_names(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "0.txt").rename(folder / "sub" / "0.txt")
    (folder / "again.txt").symlink_to("sub/0.txt")
    assert taken(opened(config_of(folder, Corpus.lines, validation_fraction=0.2)), range(2)).shape[0] == 2
    (folder / "6.txt").symlink_to("../private/key.txt")
    for named in (folder / "6.txt", folder / "*.txt"):
        config = config_of(folder, Corpus.lines, path=str(named), validation_fraction=0.5, max_bad_fraction=1.0)
        check_corpus(config)
        assert taken(opened(config), range(1)).shape[0] == 1
    other = folder.parent / "link"
    other.symlink_to(folder / "sub")
    assert taken(opened(config_of(other, Corpus.lines, validation_fraction=0.2)), range(2)).shape[0] == 2


def test_the_cache_of_the_hub_is_one_folder(folder: Path) -> None:
    """Its snapshots are links to blobs beside them."""
    snapshot, blobs = folder.parent / "datasets--a--b" / "snapshots" / "1", folder.parent / "datasets--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in sorted(folder.iterdir()):
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert taken(opened(config_of(snapshot, Corpus.lines, validation_fraction=0.2)), range(2)).shape[0] == 2
    assert taken(opened(replace(hub_config(snapshot), validation_fraction=0.2)), range(2)).shape[0] == 2
    (blobs / "0.txt").unlink()
    (blobs / "0.txt").symlink_to(folder.parent / "private" / "key.txt")
    with pytest.raises(ValueError, match="leads out of its folder"):
        opened(config_of(snapshot, Corpus.lines))


def test_a_link_in_prepared_shards(folder: Path, tmp_path: Path) -> None:
    from tokenyard.data.pretokenize import prepare_shards
    from tokenyard.data.pretokenized import MANIFEST_FILE, verify

    prepare_shards(config_of(folder, Corpus.lines, validation_fraction=0.3), BYTES, tmp_path / "out", 1, lambda *_: None)
    shard = tmp_path / "out" / json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())["splits"]["train"][0]["file"]
    shard.rename(tmp_path / "private" / "ids.npy")
    shard.symlink_to(tmp_path / "private" / "ids.npy")
    assert [text for _, text in verify(tmp_path / "out") if "is no regular file" in text]


def test_a_hub_that_cannot_be_reached_is_no_wrong_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """75 after patience; a data set that it does not know is 2 at once."""
    import datasets

    asked: list[str] = []

    def down(name: str, *_: object, **__: object) -> None:
        asked.append(name)
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub (ConnectError)")

    monkeypatch.setattr(datasets, "load_dataset_builder", down)
    hub_shards.refuse_outside_card(str(tmp_path))  # imports
    config = config_of(tmp_path, Corpus.hf, path=None, name="some/set", patience_seconds=1.0)
    with pytest.raises(DataUnavailable, match=r"data\.name=some/set did not answer for .*Couldn't reach"):
        opened(config)
    assert len(asked) > 1

    def unknown(*_: object, **__: object) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'some/set' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unknown)
    with pytest.raises(ValueError, match=r"data\.name=some/set cannot be opened: Dataset 'some/set' doesn't exist"):
        opened(config)
