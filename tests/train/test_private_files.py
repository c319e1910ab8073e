"""A run writes to its own folder only, readable by its owner only."""

from pathlib import Path

import pytest
from tokenyard.train.config.config import ConfigError
from tokenyard.train.config.private_files import RUN_FILES, append_private, write_private
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
        append_private(tmp_path / "events.jsonl")
    assert private.read_text() == "precious" and not (tmp_path / "run_id").is_symlink()


def test_others_cannot_read_what_is_written(tmp_path: Path) -> None:
    write_private(tmp_path / "job.sh", "echo")
    append_private(tmp_path / "log").close()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
