"""Small corpora on disk."""

import sys
from pathlib import Path

import pytest
from tokenyard.data.config import Corpus, DataConfig
from tokenyard.data.corpus import Grammar

sys.path.append(str(Path(__file__).parent))  # streaming.py, which tests import


@pytest.fixture
def folder(tmp_path: Path) -> DataConfig:
    """120 different stories, one file each."""
    root = tmp_path / "texts"
    stories = Grammar(120)
    for name in stories.names():
        path = root / name[-1] / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stories.read(name))
    return DataConfig(corpus=Corpus.text, path=str(root), validation_fraction=0.2, cache=str(tmp_path / "cache"))
