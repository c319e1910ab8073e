"""A run writes to its own folder only, with the modes that the umask allows."""

import os
from pathlib import Path

import pytest
from tokenyard.train.config.config import ConfigError
from tokenyard.train.config.own_files import RUN_FILES, open_appending, write_whole
from tokenyard.train.logging.trackers.trackers import run_identity
from tokenyard.train.run_folder import lock_run


@pytest.mark.parametrize("name", RUN_FILES)
def test_a_run_folder_with_a_link_for_a_file_is_refused(name: str, tmp_path: Path) -> None:
    folder, private = tmp_path / "run", tmp_path / "private"
    folder.mkdir()
    private.write_text("precious")
    (folder / name).symlink_to(private)
    with pytest.raises(ConfigError, match=rf"run\.dir=.*: its file {name} is a link to .*private; nearest valid"):
        lock_run(folder)
    assert private.read_text() == "precious"


def test_a_link_made_later_is_not_followed_either(tmp_path: Path) -> None:
    private = tmp_path / "private"
    private.write_text("precious")
    for name in ("run_id", "events.jsonl"):
        (tmp_path / name).symlink_to(private)
    run_identity(tmp_path, resumed=False)
    with pytest.raises(OSError, match="symbolic link"):
        open_appending(tmp_path / "events.jsonl")
    assert private.read_text() == "precious" and not (tmp_path / "run_id").is_symlink()


@pytest.mark.parametrize("mask", [0o077, 0o027, 0o002])
def test_modes_follow_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "job.sh", "echo")
        open_appending(tmp_path / "log").close()
        lock = lock_run(tmp_path)
        assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}
        lock.release()
    finally:
        os.umask(before)
