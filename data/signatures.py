"""What a file holds, by its first bytes. Standard library only."""

PARQUET, BINARY, UTF_16 = "parquet", "binary data", "UTF-16 text"
SIGNATURES = {
    b"PAR1": PARQUET,
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"PK\x03\x04": "a zip archive",
    b"ARROW1": "Arrow",
    b"%PDF": "PDF",
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
}

SUFFIX_OF = {"gzip": ".gz", "zstd": ".zst", "bzip2": ".bz2", "xz": ".xz"}
"""The suffix of a compressed file."""
LOOKED_AT = 4096
"""Bytes that tell text from binary data."""
BAD_SHARE = 0.1
"""Share of characters that are no UTF-8, above which it is no text. A row of text may be damaged, and is then a bad row."""


def content(head: bytes) -> str:
    """Returns what a file holds that begins with `head`, in words."""
    for signature, name in SIGNATURES.items():
        if head.startswith(signature):
            return name
    text = head[:LOOKED_AT].decode(errors="replace")
    if "\0" in text or text.count("\N{REPLACEMENT CHARACTER}") > BAD_SHARE * len(text) + 1:
        return BINARY
    start = text.lstrip()[:1]
    return {"{": "JSON", "[": "JSON"}.get(start, "text")


def kind_for(found: str) -> str:
    """Returns the setting or command with which a file of that content is read."""
    ready = {PARQUET: "data=parquet", "JSON": "data=jsonl", "text": "data=text", UTF_16: "iconv -f UTF-16 -t UTF-8"}
    return ready.get(found, "a file of text, JSON lines or parquet")
