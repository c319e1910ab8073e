"""Hooks of mkdocs: README.md is the first page, and what a page links to outside of docs/ is named instead."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds README.md, whose links to docs/ are links to pages."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=re.sub(r"\]\(docs/", "](", text)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Replaces links to files of the repository, which are not in the site, by their names."""
    pages = {file.src_uri for file in files}

    def shown(match: re.Match[str]) -> str:
        text, target = match.groups()
        return match.group() if target.partition("#")[0] in pages else f"`{text.strip('`')}`"

    return LINK.sub(shown, markdown)
