"""The page: one HTML file with its data, style and code, whose content security policy forbids loading anything."""

import base64
import hashlib
import html
import json
from functools import cache
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "page"
SCRIPTS = (
    "dom",
    "numbers",
    "palette",
    "lines",
    "axis",
    "heat",
    "bars",
    "balance",
    "overview",
    "compare",
    "parallel_axes",
    "experts",
    "layer",
    "tables",
    "main",
)
"""Concatenated in this order; only the last has effects when it is loaded."""
NAMED = 3
"""The most runs that the title names."""


def page(data: dict[str, Any]) -> str:
    """Returns the whole file. Content of run folders appears in the title and as JSON, and is escaped in both."""
    style, script = (PAGE / "page.css").read_text(encoding="utf-8"), code()
    names = ", ".join(run["name"] for run in data["runs"][:NAMED])
    names += f" and {more} more" if (more := len(data["runs"]) - NAMED) > 0 else ""
    connect = "'self'" if data["live"] else "'none'"
    policy = (
        f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{html.escape(names)} - tokenyard</title>
<style>{style}</style>
</head>
<body>
<noscript><p>The charts of this page are drawn by JavaScript. Pictures of the main ones are beside the file.</p></noscript>
<div id="page"></div>
<script type="application/json" id="data">{embedded(data)}</script>
<script>{script}</script>
</body>
</html>
"""


@cache
def code() -> str:
    """Returns all scripts inside one function, so they define no global names."""
    parts = "\n".join((PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\n}})();'


def embedded(data: Any) -> str:
    """Returns JSON that cannot end its HTML element: it contains neither `<` nor `&`."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def digest(content: str) -> str:
    """Returns the source by which a content security policy allows only this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
