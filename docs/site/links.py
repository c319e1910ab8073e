"""Hooks of mkdocs: README.md is the first page, links out of docs/ become names, and the search of files needs no network."""

import re
import shutil
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


WORKER = "iframe_worker.js"


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Takes our file for the one that the theme loads from a server, for the search from files."""
    return output.replace("https://unpkg.com/iframe-worker/shim", f"assets/{WORKER}")


def on_post_build(config: Any) -> None:
    shutil.copyfile(Path(__file__).with_name(WORKER), Path(config.site_dir) / "assets" / WORKER)


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
